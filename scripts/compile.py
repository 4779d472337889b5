"""The same as `dml-jax train`."""

from dml_jax.cli import launch

launch(__name__, "compile")
