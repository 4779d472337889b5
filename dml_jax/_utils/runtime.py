"""Settings of XLA and of the C library's allocator, made before a program uses them."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import jax

from dml_jax._utils import files

# XLA computes convolutions on the CPU with a newer library by default. Its gradient with respect to
# the kernel is up to four times as slow as Eigen's, and less accurate. Versions of XLA that do not
# know the flag exit.
_EIGEN_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-library_fusion_type_individual_convolution"
_FLAG_SINCE, _FLAG_BEFORE = (0, 10, 2), (0, 13)

_CACHE_BYTES = 1 << 30

_TPU_CHIPS = ("dev/accel[0-9]*", "dev/vfio/[0-9]*")


def prepare(*, embeds: bool) -> None:
    """Configures XLA and the C library for speed; settings in the environment take precedence.

    Args:
        embeds: whether the program runs batches of images through a network.
    """
    _prefer_eigen()
    _cache_programs()
    if embeds:
        _dispatch_synchronously()
    if embeds and not _has_accelerator():
        _keep_freed_memory()


def _has_accelerator() -> bool:
    """Returns whether JAX will find an accelerator, without initialising its devices."""
    if importlib.metadata.entry_points(group="jax_plugins"):
        return True
    # JAX's package for TPUs has no entry point; the driver of the chips makes one of these files.
    is_installed = importlib.util.find_spec("libtpu") is not None
    return is_installed and any(chip for files in _TPU_CHIPS for chip in Path("/").glob(files))


def _prefer_eigen() -> None:
    given = os.environ.get("XLA_FLAGS", "")
    known = _FLAG_SINCE <= jax.__version_info__ < _FLAG_BEFORE
    if known and "ynn_fusion_type" not in given:
        os.environ["XLA_FLAGS"] = f"{given} {_EIGEN_FLAG}"


def _cache_programs() -> None:
    """Enables the persistent compilation cache, so that a resumed run starts at once."""
    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder = files.cache_folder() / _processor()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # There is no home folder, or it is read-only.
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


def _processor() -> str:
    """Returns a hash of the CPU's features; machines of several kinds may share the cache."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]


def _dispatch_synchronously() -> None:
    """Dispatches CPU programs one at a time, so that the next one can reuse the memory."""
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory, which avoids page faults at every step.

    Small allocations between two steps may fragment it, so that the next step needs a new block.
    Then several blocks are kept; `release_freed_memory` avoids that.
    """
    _set_malloc(
        {
            -8: 1,  # M_ARENA_MAX: only the first arena grows beyond 64 MB.
            -4: 0,  # M_MMAP_MAX: no mmap, which is unmapped when it is freed.
            -1: (1 << 31) - 1,  # M_TRIM_THRESHOLD
            -2: 256 << 20,  # M_TOP_PAD
        }
    )


def release_freed_memory() -> None:
    """Makes glibc return large blocks to the system when freed: slower, with less memory."""
    _set_malloc(
        {
            -4: 1 << 16,  # M_MMAP_MAX
            -3: 32 << 20,  # M_MMAP_THRESHOLD: the maximum.
            -1: 32 << 20,  # M_TRIM_THRESHOLD
            -2: 0,  # M_TOP_PAD
        }
    )


def trim_memory() -> None:
    """Makes glibc return free memory to the system now, such as that of compilation."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _set_malloc(parameters: Mapping[int, int]) -> None:
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in parameters.items():
            mallopt(parameter, value)
