"""The same as `dml-jax compile`."""

from dml_jax.cli import launch

launch(__name__, "compile")
