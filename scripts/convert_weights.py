"""The same as `dml-jax convert`."""

from dml_jax.cli import launch

launch(__name__, "convert")
