"""The same as `dml-jax study`."""

from dml_jax.cli import launch

launch(__name__, "study")
