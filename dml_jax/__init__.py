"""Deep metric learning in JAX: proxy losses, Proxy Synthesis, MemVir, and zero-shot retrieval."""

__version__ = "0.1.0"
