"""Deep metric learning in JAX: proxy losses, Proxy Synthesis, MemVir, and zero-shot retrieval.

>>> import dml_jax
>>> loss = dml_jax.losses.create("proxy_anchor")
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dml_jax import losses, memvir, proxy_synthesis, retrieval
    from dml_jax.inference.retriever import load
    from dml_jax.training.run import train
else:
    _FUNCTIONS = {"load": "dml_jax.inference.retriever", "train": "dml_jax.training.run"}

    def __getattr__(name: str) -> Any:
        """Imports a part on first access, since importing JAX takes seconds."""
        if name in _FUNCTIONS:
            return getattr(importlib.import_module(_FUNCTIONS[name]), name)
        if name in __all__:
            return importlib.import_module(f"dml_jax.{name}")
        raise AttributeError(f"module 'dml_jax' has no attribute {name!r}")


__all__ = ["load", "losses", "memvir", "proxy_synthesis", "retrieval", "train"]
