import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dml_jax._utils import sharding, topologies
from dml_jax.training import compile_ahead
from dml_jax.training.config import parse
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
CLASSES, BATCH = 50, 64
SETTINGS = {"model__backbone": "conv4", "model__width": 8, "model__dim": 32, "batch_size": BATCH}
MEMVIR = {"memvir__num_steps": 5, "memvir__step_gap": 19}

COMPILERS = {"h100": ("jax_cuda12_plugin", "cuda"), "v5e": ("libtpu", "tpu")}


def built_for(devices, variant, **settings):
    memvir = MEMVIR if "memvir" in variant else {}
    config = parse(tiny.config("/nowhere", variant, **SETTINGS | memvir | settings))
    mesh = sharding.make_mesh(devices)
    return compile_ahead.abstract_experiment(config, mesh, classes=CLASSES, images=100 * BATCH)


# What was measured, and a tenth more for other versions of the compilers.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "variant", "peak", "collectives", "size"),
    [
        ("v5e:1x1", "ps_memvir", 10.1e6, 0, 0),
        ("v5e:2x2", "baseline", 5.4e6, 17, 16_100),
        ("v5e:2x2", "ps_memvir", 7.7e6, 57, 116_600),
        ("v5e:4x4", "ps_memvir", 4.4e6, 55, 105_700),
        ("h100:8", "ps_memvir", 0.69e6, 40, 93_700),
    ],
)
def test_the_step_stays_within_its_budget(topology, variant, peak, collectives, size):
    compiler, extra = COMPILERS[topology.partition(":")[0]]
    pytest.importorskip(compiler, reason=f"the extra {extra} is not installed")
    built = built_for(topologies.get(topology).devices, variant)
    analysis = compile_ahead.analyse(built)
    assert 0 < analysis.peak < 1.1 * peak
    assert len(analysis.collectives) <= 1.1 * collectives
    assert sum(one.size for one in analysis.collectives) <= 1.1 * size
    assert analysis.copied == 0
    if built.abstract_state.memory is not None:
        ring = built.abstract_state.memory.ring.embeddings
        whole = ring.size * ring.dtype.itemsize
        assert all(one.size < whole / 4 for one in analysis.collectives)


@pytest.fixture
def tpu():
    pytest.importorskip("libtpu", reason="the extra tpu is not installed")
    return topologies.get("v5e:1x1")


def test_a_program_that_needs_more_memory_than_a_chip_has_is_told_by_its_size(tpu):
    device = jax.sharding.SingleDeviceSharding(tpu.devices[0])
    x = jax.ShapeDtypeStruct((100_000, 8), jnp.float32, sharding=device)
    lowered = jax.jit(lambda x: jnp.sort(x @ x.T).sum(axis=0)).lower(x)
    with pytest.raises(compile_ahead.DoesNotFitError, match=r"needs \d+\.\d GB") as error:
        compile_ahead._compile(lowered)
    assert 40e9 < error.value.needed < 100e9  # The product, or that and its sorted copy.


@pytest.mark.slow
def test_settings_that_fit_are_found(tpu):
    settings = {"memvir__step_gap": 799, "model__dim": 256}
    built = built_for(tpu.devices, "memvir", **settings)
    needed = compile_ahead.analyse(built).peak
    rounded = built_for(tpu.devices, "memvir", memvir__dtype="bfloat16", **settings)
    room = compile_ahead.analyse(rounded).peak
    assert room < 0.6 * needed
    assert compile_ahead.fitting(built, 0.6 * needed, needed) == [
        "  --config.memvir.dtype=bfloat16"
    ]
    assert compile_ahead.fitting(built, 0.1 * needed, needed) == []


@pytest.mark.slow
def test_the_program_prints_what_a_program_reads(tpu, tmp_path):
    del tpu
    arguments = tiny.arguments(tmp_path, "ps")
    program = [sys.executable, "-m", "dml_jax", "compile", "--topology=v5e:2x2", "--json"]
    with_images = subprocess.run([*program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert with_images.returncode == 2 and "give --classes" in with_images.stderr
    done = subprocess.run(
        [*program, "--classes=50", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 4 and found["fits"] and found["flops_per_device"] > 0
    assert found["peak_bytes_per_device"] == sum(found["bytes_per_device"].values())
    assert found["copied_bytes_per_device"] == 0
    assert found["collectives"]["all-reduce"] > 0 and found["collective_bytes"] > 0
    assert "the whole state is updated in place" in done.stdout


def test_a_collective_counts_once_with_the_size_of_its_result():
    text = """
  %all-reduce.80 = (f32[128,128]{1,0:T(8,128)}, bf16[64]{0}) all-reduce(%a, %b), channel_id=1
  %all-reduce.81 = (f32[128,128]{1,0}, bf16[64]{0}) all-reduce(%a, %b), channel_id=1
  ROOT %g = (f32[2,8]{1,0}, f32[8,8]{1,0}, u32[]{:S(2)}) all-gather-start(%c), channel_id=2, \
metadata={op_name="jit(step)/slice"}
  %done = f32[8,8]{1,0} all-gather-done(%g)
  %fusion = f32[4]{0} fusion(%done), kind=kLoop
"""
    found = list(compile_ahead.collectives(text))
    assert found == [
        ("all-reduce", 128 * 128 * 4 + 64 * 2, ""),
        ("all-gather", 8 * 8 * 4, "jit(step)/slice"),
    ]
    assert compile_ahead.largest([*found, found[1]])[0] == found[0]
    assert compile_ahead.largest([found[1]] * 300)[0].size == 300 * 256
