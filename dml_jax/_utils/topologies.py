"""Descriptions of accelerators that programs are compiled for without having them."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dml_jax._utils import extras
from dml_jax._utils.errors import UserError

_GIB = 1 << 30
# TPUs: published; XLA keeps a part of it for itself, and refuses a program that does not fit in the
# rest. H100: the three quarters that JAX takes by default, which its compiler does not know of.
_MEMORY = {
    "v5e": 16 * _GIB,
    "v5p": 95 * _GIB,
    "v6e": 32 * _GIB,
    "h100": 0.75 * 84_942_979_072,
}
_SIDES = {"v5e": (2,), "v5p": (3,), "v6e": (2,), "h100": (1, 2)}
"""By kind: how many numbers a shape may have."""

# What XLA asks a GPU of this type for, as an XLA GpuTargetConfig.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  driver_version: "13.0.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Without these, libtpu asks a server of the cloud which chips there are, and waits for it.
_WITHOUT_CHIPS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Topology(NamedTuple):
    """Accelerators to compile for."""

    devices: Sequence[jax.Device]
    memory: float
    """Bytes of memory that a program may use on each device."""


def get(name: str) -> Topology:
    """Returns the accelerators of a topology; no accelerator and no driver is needed.

    Args:
        name: kind and shape: `v5e:4x4`, `v6e:8x8` or `v5p:4x4x4` for TPUs; `h100:8` for
            GPUs of one host, `h100:4x8` for 4 hosts of 8 GPUs.

    Raises:
        ValueError: the name is invalid, or the compiler does not know it.
        ModuleNotFoundError: JAX's package for these accelerators is not installed.
    """
    kind, _, shape = name.partition(":")
    sides = shape.split("x")
    is_shape = all(re.fullmatch("[1-9][0-9]*", side) for side in sides)
    if kind not in _MEMORY or not is_shape or len(sides) not in _SIDES[kind]:
        raise UserError(
            f"--topology={name} is not known; give a kind, {', '.join(_MEMORY)}, and a shape, such "
            "as v5e:4x4, v5p:4x4x4, h100:8 or h100:4x8"
        )
    is_gpu = kind == "h100"
    if is_gpu:
        with extras.required_by("cuda"):
            _require("jax_cuda12_plugin")
    else:
        with extras.required_by("tpu"):
            _require("libtpu")
    # This process uses no accelerator, and must not wait for one or lock it.
    jax.config.update("jax_platforms", "cpu")
    try:
        if is_gpu:
            hosts, per_host = sides if len(sides) == 2 else ("1", shape)
            described = topologies.get_topology_desc(
                platform="cuda", target_config=_H100, topology=f"1x{hosts}x{per_host}"
            )
        else:
            os.environ |= _WITHOUT_CHIPS
            described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the compiler has no --topology={name}: {error}") from error
    return Topology(described.devices, _MEMORY[kind])


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(name=package)
