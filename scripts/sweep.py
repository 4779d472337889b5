"""The same as `dml-jax sweep`."""

from dml_jax.cli import launch

launch(__name__, "sweep")
