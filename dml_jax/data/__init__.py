"""From image files to batches: sources of encoded images, sampling, decoding, the pipeline."""

from dml_jax.data.images import Augmentation, centre_view, decode
from dml_jax.data.inspection import POLICIES, InspectionReport, accept, inspect, report
from dml_jax.data.pipeline import (
    IndexBatch,
    TestBatch,
    TrainBatch,
    test_batches,
    test_indices,
    train_batches,
    train_indices,
    view_batches,
)
from dml_jax.data.previews import check_upload, preview
from dml_jax.data.reading import Batches
from dml_jax.data.sampling import Order, epoch_order, steps_per_epoch
from dml_jax.data.sources import (
    WITH_IMAGES,
    Source,
    create,
    images_below,
    merge,
    register,
    split_classes,
)

__all__ = [
    "POLICIES",
    "WITH_IMAGES",
    "Augmentation",
    "Batches",
    "IndexBatch",
    "InspectionReport",
    "Order",
    "Source",
    "TestBatch",
    "TrainBatch",
    "accept",
    "centre_view",
    "check_upload",
    "create",
    "decode",
    "epoch_order",
    "images_below",
    "inspect",
    "merge",
    "preview",
    "register",
    "report",
    "split_classes",
    "steps_per_epoch",
    "test_batches",
    "test_indices",
    "train_batches",
    "train_indices",
    "view_batches",
]
