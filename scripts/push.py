"""The same as `dml-jax push`."""

from dml_jax.cli import launch

launch(__name__, "push")
