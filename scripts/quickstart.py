"""The same as `dml-jax quickstart`."""

from dml_jax.cli import launch

launch(__name__, "quickstart")
