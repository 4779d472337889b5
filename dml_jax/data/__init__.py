"""From image files to batches: sources of encoded images, sampling, decoding, the pipeline."""

from dml_jax.data.images import Augmentation, centre_view, decode
from dml_jax.data.pipeline import TestBatch, TrainBatch, test_batches, train_batches
from dml_jax.data.previews import check_upload, preview
from dml_jax.data.sampling import epoch_order, steps_per_epoch
from dml_jax.data.sources import Source, check, create, images_below, split_classes

__all__ = [
    "Augmentation",
    "Source",
    "TestBatch",
    "TrainBatch",
    "centre_view",
    "check",
    "check_upload",
    "create",
    "decode",
    "epoch_order",
    "images_below",
    "preview",
    "split_classes",
    "steps_per_epoch",
    "test_batches",
    "train_batches",
]
