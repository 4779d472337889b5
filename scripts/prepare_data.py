"""The same as `dml-jax prepare`."""

from dml_jax.cli import launch

launch(__name__, "prepare")
