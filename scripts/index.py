"""The same as `dml-jax index`."""

from dml_jax.cli import launch

launch(__name__, "index")
