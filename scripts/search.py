"""The same as `dml-jax search`."""

from dml_jax.cli import launch

launch(__name__, "search")
