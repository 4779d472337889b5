"""How XLA and the C library are set up for a program, before either is at work."""

import ctypes
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import jax

# XLA gives convolutions on the CPU to a newer library, which is up to four times as slow at the
# kernel's gradient as Eigen, where they went before, and less exact. Versions that do not know the
# flag would end the program.
_CONVOLVE = "--xla_cpu_experimental_ynn_fusion_type=-library_fusion_type_individual_convolution"
_CONVOLVE_SINCE, _CONVOLVE_BEFORE = (0, 10, 2), (0, 13)

_CACHE_BYTES = 1 << 30


def prepare(*, embeds: bool) -> None:
    """Sets up XLA and the C library for speed. What the environment already says stays.

    Args:
        embeds: whether batches of images go through a network, for the program's whole life.
    """
    _prefer_eigen()
    _keep_programs()
    if embeds:
        _dispatch_in_turn()
    if embeds and not importlib.metadata.entry_points(group="jax_plugins"):  # No accelerator.
        _keep_memory()


def _prefer_eigen() -> None:
    given = os.environ.get("XLA_FLAGS", "")
    known = _CONVOLVE_SINCE <= jax.__version_info__ < _CONVOLVE_BEFORE
    if known and "ynn_fusion_type" not in given:
        os.environ["XLA_FLAGS"] = f"{given} {_CONVOLVE}"


def _keep_programs() -> None:
    """Keeps compiled programs, so that a run that goes on starts at once."""
    if jax.config.jax_compilation_cache_dir is None:
        try:
            caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            folder = caches / "dml_jax" / _processor()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # No home, or one that is not to be written to.
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


def _processor() -> str:
    """What a program for this CPU may not run without; machines may share the cache's folder."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]


def _dispatch_in_turn() -> None:
    """Has CPUs end a program before the next is dispatched, which then can have its memory."""
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _keep_memory() -> None:
    """Has glibc keep what a step needs, for which Linux would otherwise fill pages at every step.

    Between two steps others may take small pieces of it, so that it no longer fits the next step.
    Then it is kept several times; see `give_memory_back`.
    """
    _set_malloc(
        {
            -8: 1,  # M_ARENA_MAX: only the first arena grows beyond 64 MB.
            -4: 0,  # M_MMAP_MAX: nothing is mapped on its own, and unmapped when it is freed.
            -1: (1 << 31) - 1,  # M_TRIM_THRESHOLD
            -2: 256 << 20,  # M_TOP_PAD
        }
    )


def give_memory_back() -> None:
    """Has glibc give large blocks back when they are freed: slower, but nothing is kept twice."""
    _set_malloc(
        {
            -4: 1 << 16,  # M_MMAP_MAX
            -3: 32 << 20,  # M_MMAP_THRESHOLD: glibc takes no higher one.
            -1: 32 << 20,  # M_TRIM_THRESHOLD
            -2: 0,  # M_TOP_PAD
        }
    )


def trim_memory() -> None:
    """Has glibc give back what is free at this moment, such as what compiling has needed."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _set_malloc(parameters: Mapping[int, int]) -> None:
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in parameters.items():
            mallopt(parameter, value)
