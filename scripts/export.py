"""The same as `dml-jax export`."""

from dml_jax.cli import launch

launch(__name__, "export")
