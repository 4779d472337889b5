"""The same as `dml-jax reproduce`."""

from dml_jax.cli import launch

launch(__name__, "reproduce")
