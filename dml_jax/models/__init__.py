"""Networks from pixels to embeddings."""

from dml_jax.models import pretrained
from dml_jax.models.embedder import POOLINGS, Embedder
from dml_jax.models.registry import (
    BACKBONES,
    backbone_options,
    check_image_size,
    create_backbone,
    create_embedder,
)

__all__ = [
    "BACKBONES",
    "POOLINGS",
    "Embedder",
    "backbone_options",
    "check_image_size",
    "create_backbone",
    "create_embedder",
    "pretrained",
]
