"""The same as `dml-jax report`."""

from dml_jax.cli import launch

launch(__name__, "report")
