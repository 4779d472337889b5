"""Runs the tests on eight virtual CPU devices, with shapes checked at every call."""

import functools
import os
import tempfile
from unittest import mock

import flax.linen as nn
import hypothesis
import jax
import jaxtyping

# CPU everywhere, also for the programs that tests start as a user would. Eight devices only in
# this process: a test makes a mesh of 1, 2, 4 or 8 of them from jax.devices()[:n].
os.environ["JAX_PLATFORMS"] = "cpu"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# This process mostly compiles, in two thirds of the time without LLVM's optimisations. The programs
# that tests start compile as a user's do: XLA reads the flags once, when its devices are made.
_quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
with mock.patch.dict(os.environ, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {_quickly}"):
    jax.devices()

# Runs of one configuration compile one program; so they do it once, in whatever process. Nothing is
# downloaded, and nobody's cache is read. pytest's worker processes find this in their environment.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="dml_jax_tests_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_folder.name}/compiled"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1"
    os.environ["HF_HOME"] = f"{_folder.name}/hub"
    os.environ["HF_HUB_OFFLINE"] = "1"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)

# Broadcasting between ranks must be written out. (Not so the promotion of types: optax's Adam,
# clu's metrics and flax's BatchNorm in bfloat16 rely on it.)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The shapes in dml_jax's signatures are checked at every call. Must precede its first import.
jaxtyping.install_import_hook("dml_jax", "beartype.beartype")

from dml_jax.models import layers, registry, resnet  # noqa: E402
from dml_jax.models.normalisation import IMAGENET, InputNormalisation  # noqa: E402

# A first example compiles, which takes as long as it takes; the same examples at every run.
hypothesis.settings.register_profile("dml_jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dml_jax")

# Networks that compile in a moment, for tests in this process.
registry.register_backbone("resnet6")(
    functools.partial(resnet.ResNet, stage_sizes=(1, 1), bottleneck=False)
)


class Colours(nn.Module):
    """Next to no network: the colours, normalised."""

    freeze_bn: bool = False
    dtype: str = "float32"
    input_normalisation: InputNormalisation = IMAGENET

    @nn.compact
    def __call__(self, images, *, train):
        return layers.batch_norm(frozen=self.freeze_bn, train=train, dtype=self.dtype, name="bn")(
            images
        )


registry.register_backbone("colours")(Colours)


def pytest_collection_modifyitems(items):
    """Whole programs and runs first: they take minutes, and the processes should end together."""
    long = ("test_kills.py", "test_programs.py", "test_whole_run.py")
    items.sort(key=lambda item: item.path.name not in long)
