"""The same as `dml-jax embed`."""

from dml_jax.cli import launch

launch(__name__, "embed")
