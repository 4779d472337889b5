import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from dml_jax._utils import runtime

OTHER_VALUE = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"


@pytest.mark.parametrize(
    ("given", "version", "expected"),
    [
        ("", (0, 12, 0), runtime._EIGEN_FLAG),
        ("--a=b", (0, 10, 2), f"--a=b {runtime._EIGEN_FLAG}"),
        (OTHER_VALUE, (0, 12, 0), OTHER_VALUE),
        ("--a=b", (0, 13, 0), "--a=b"),
    ],
)
def test_the_eigen_flag_is_set_for_the_versions_that_know_it(monkeypatch, given, version, expected):
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr(jax, "__version_info__", version)
    runtime.prepare(embeds=False)
    assert os.environ["XLA_FLAGS"].strip() == expected


@pytest.mark.parametrize(
    ("plugins", "package", "chips", "expected"),
    [
        (["cuda"], None, (), True),
        ([], object(), ("dev/null",), True),
        ([], object(), (), False),
        ([], None, ("dev/null",), False),
    ],
)
def test_gpus_and_tpus_are_accelerators(monkeypatch, plugins, package, chips, expected):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr(runtime, "_TPU_CHIPS", chips)
    assert runtime._has_accelerator() is expected


PROGRAM = """
import resource
import numpy as np
import jax
from dml_jax._utils import runtime

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

runtime.prepare(embeds=True)
np.ones(25_000_000, np.float32)
before = faults()
for _ in range(5):
    np.ones(25_000_000, np.float32)
print(faults() - before, jax.config.jax_compilation_cache_dir)
runtime.release_freed_memory()
before = resident()
np.ones(100_000_000, np.float32)
left = resident() - before
print(left, jax.config.values["jax_cpu_enable_async_dispatch"])
"""


def run_prepared(**variables):
    unset = {"JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | variables,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()


def test_freed_memory_is_kept_and_programs_are_cached_in_the_users_cache_folder(tmp_path):
    faults, cache, left, asynchronous = run_prepared(HOME=str(tmp_path))
    assert int(faults) < 1000 or sys.platform != "linux"  # 122,000 without.
    assert cache.startswith(f"{tmp_path}/.cache/dml_jax/")
    assert int(left) < 4_000_000  # Of 400 MB that were released.
    assert asynchronous == "False"


def test_the_environments_dispatch_setting_takes_precedence(tmp_path):
    variables = {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "true"}
    assert run_prepared(HOME=str(tmp_path), **variables)[3] == "True"


def test_programs_are_not_cached_if_the_cache_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    assert run_prepared(XDG_CACHE_HOME=str(tmp_path / "file"))[1] == "None"
