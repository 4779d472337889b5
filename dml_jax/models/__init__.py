"""Networks from pixels to embeddings."""

from dml_jax.models import pretrained
from dml_jax.models.embedder import HEAD_INITS, POOLINGS, Embedder
from dml_jax.models.registry import (
    BACKBONES,
    backbone_options,
    check_image_size,
    create_backbone,
    create_embedder,
)

__all__ = [
    "BACKBONES",
    "HEAD_INITS",
    "POOLINGS",
    "Embedder",
    "backbone_options",
    "check_image_size",
    "create_backbone",
    "create_embedder",
    "pretrained",
]
