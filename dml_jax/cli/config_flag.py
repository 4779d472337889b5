"""The flag `--config`: config file, variant and overrides."""

import runpy
from typing import Any

from absl import flags
from ml_collections import config_flags

from dml_jax.cli import packaged_configs
from dml_jax.training import variants
from dml_jax.training.origin import Origin


def file_and_variant() -> tuple[str, str]:
    """Returns the config file and its variant, which may be empty."""
    file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return file, variant


def config_globals() -> dict[str, Any]:
    """Returns the globals of the config file, among them `get_config`."""
    return runpy.run_path(file_and_variant()[0])


def packaged_globals(name: str) -> dict[str, Any]:
    """Returns the globals of a packaged config file, such as `cars196`."""
    return runpy.run_path(str(packaged_configs.path(name)))


def overrides() -> dict[str, Any]:
    """Returns the settings given as `--config.PATH=VALUE`, by path."""
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def origin() -> Origin:
    """Returns the origin of the configuration that the flags define."""
    file, variant = file_and_variant()
    shortened = packaged_configs.shortened(file)
    return variants.origin_of(shortened, variant, config_globals(), overrides())
