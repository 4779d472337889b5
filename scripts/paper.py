"""The same as `dml-jax paper`."""

from dml_jax.cli import launch

launch(__name__, "paper")
