"""Backbones, the embedder and pretrained weights."""

from dml_jax.models import pretrained
from dml_jax.models.embedder import HEAD_INITS, POOLINGS, Embedder
from dml_jax.models.registry import (
    BACKBONES,
    check_image_size,
    create_backbone,
    create_embedder,
    register_backbone,
)

__all__ = [
    "BACKBONES",
    "HEAD_INITS",
    "POOLINGS",
    "Embedder",
    "check_image_size",
    "create_backbone",
    "create_embedder",
    "pretrained",
    "register_backbone",
]
