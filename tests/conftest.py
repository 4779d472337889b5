"""Configures the tests: eight virtual CPU devices, and shapes checked at every call."""

import functools
import gc
import os
import tempfile
from unittest import mock

import flax.linen as nn
import hypothesis
import jax
import jaxtyping
import pytest

# CPU in this process and in the programs that tests start. Only this process has eight devices: a
# test makes a mesh of 1, 2, 4 or 8 of them from jax.devices()[:n].
os.environ["JAX_PLATFORMS"] = "cpu"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Without LLVM's optimisations, compilation, which takes most of the time, needs two thirds of it.
# Programs that tests start are not affected: XLA reads the flags when it initialises its devices.
_quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
with mock.patch.dict(os.environ, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {_quickly}"):
    jax.devices()

# All test processes share a temporary compilation cache. No test downloads anything or reads the
# caches of the user. Worker processes of pytest inherit these environment variables.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="dml_jax_tests_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_folder.name}/compiled"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["HF_HOME"] = f"{_folder.name}/hub"
    os.environ["HF_HUB_OFFLINE"] = "1"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Implicit rank promotion is an error. (Implicit dtype promotion is not: optax's Adam, clu's metrics
# and flax's BatchNorm in bfloat16 rely on it.)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Checks the shapes in the signatures of dml_jax at every call. Must precede its first import.
jaxtyping.install_import_hook("dml_jax", "beartype.beartype")

from dml_jax.models import layers, registry, resnet  # noqa: E402
from dml_jax.models.normalisation import IMAGENET, InputNormalisation  # noqa: E402

# Tests make many objects that live long, such as compiled functions. With Python's thresholds,
# garbage collection takes 5 % of the time.
gc.set_threshold(50_000, 20, 50)

# No deadline, since a first example compiles; the same examples in every run.
hypothesis.settings.register_profile("dml_jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dml_jax")

# Networks that compile quickly, for tests in this process.
registry.register_backbone("resnet6")(
    functools.partial(resnet.ResNet, stage_sizes=(1, 1), bottleneck=False)
)


@registry.register_backbone("conv1")
class Conv1(nn.Module):
    """One convolution and its batch normalisation."""

    width: int = 4
    freeze_bn: bool = False
    dtype: str = "float32"
    input_normalisation: InputNormalisation = IMAGENET

    @nn.compact
    def __call__(self, images, *, train):
        x = layers.convolution(self.width, 3, 2, dtype=self.dtype, name="conv1")(images)
        bn = layers.batch_norm(frozen=self.freeze_bn, train=train, dtype=self.dtype, name="bn1")
        return nn.relu(bn(x))


@pytest.hookimpl(tryfirst=True)  # Before pytest deselects by marker.
def pytest_collection_modifyitems(items):
    """Marks the tutorial as slow, and moves the slowest files to the front.

    All workers then finish at the same time.
    """
    long = ("test_kills.py", "test_programs.py", "test_whole_run.py")
    items.sort(key=lambda item: item.path.name not in long)
    for item in items:
        if item.path.name == "tutorial.md":
            item.add_marker(pytest.mark.slow)
