import os
import subprocess
import sys

import jax
import pytest

from dml_jax._utils import runtime

NEWER = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"


@pytest.mark.parametrize(
    ("given", "version", "expected"),
    [
        ("", (0, 12, 0), runtime._CONVOLVE),
        ("--a=b", (0, 10, 2), f"--a=b {runtime._CONVOLVE}"),
        (NEWER, (0, 12, 0), NEWER),
        ("--a=b", (0, 13, 0), "--a=b"),
    ],
)
def test_convolutions_go_to_eigen_where_it_is_known_how(monkeypatch, given, version, expected):
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr(jax, "__version_info__", version)
    runtime.prepare(embeds=False)
    assert os.environ["XLA_FLAGS"].strip() == expected


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
runtime.give_memory_back()
before = resident()
np.ones(100_000_000, np.float32)
left = resident() - before
print(left, jax.config.values["jax_cpu_enable_async_dispatch"])
"""


def prepared(**given):
    unset = {"JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | given,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()


def test_memory_is_kept_and_programs_are_kept_where_the_user_has_caches(tmp_path):
    faults, cache, left, in_background = prepared(HOME=str(tmp_path))
    assert int(faults) < 1000 or sys.platform != "linux"  # 122,000 without.
    assert cache.startswith(f"{tmp_path}/.cache/dml_jax/")
    assert int(left) < 4_000_000  # Of 400 MB that were given back.
    assert in_background == "False"


def test_what_the_environment_says_of_dispatch_stays(tmp_path):
    given = {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "true"}
    assert prepared(HOME=str(tmp_path), **given)[3] == "True"


def test_where_nothing_can_be_kept_programs_are_not(tmp_path):
    (tmp_path / "file").touch()
    assert prepared(XDG_CACHE_HOME=str(tmp_path / "file"))[1] == "None"
