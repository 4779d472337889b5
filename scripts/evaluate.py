"""The same as `dml-jax evaluate`."""

from dml_jax.cli import launch

launch(__name__, "evaluate")
