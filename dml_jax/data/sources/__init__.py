"""Sources of encoded images with labels, one module per kind."""

from dml_jax.data.sources.folder import images_below
from dml_jax.data.sources.registry import REGISTRY, WITH_IMAGES, create, register
from dml_jax.data.sources.source import Source, Sources, leave_out, merge, split_classes

__all__ = [
    "REGISTRY",
    "WITH_IMAGES",
    "Source",
    "Sources",
    "create",
    "images_below",
    "leave_out",
    "merge",
    "register",
    "split_classes",
]
