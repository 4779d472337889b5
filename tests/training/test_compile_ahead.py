import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dml_jax._utils import sharding, topologies
from dml_jax.training import builder, compile_ahead
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
        ("v5e:2x2", "baseline", 4.6e6, 16, 27_900),
        ("v5e:2x2", "ps_memvir", 7.3e6, 27, 110_800),
        ("v5e:4x4", "ps_memvir", 3.8e6, 27, 115_500),
        ("h100:8", "ps_memvir", 0.77e6, 25, 97_800),
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


@pytest.mark.slow
def test_devices_sum_gradients_in_float32_also_in_bfloat16():
    pytest.importorskip("libtpu", reason="the extra tpu is not installed")
    built = built_for(topologies.get("v5e:2x2").devices, "baseline", model__dtype="bfloat16")
    lowered = built.take_step.lower(built.abstract_state, builder.abstract_batch(built))
    text = compile_ahead._compile(lowered).as_text()
    reductions = re.findall(r"= (.*) (?:all-reduce|reduce-scatter)(?:-start)?\(", text)
    assert any("f32[3,3,8,8]" in result for result in reductions)
    assert not any("bf16" in result for result in reductions)


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
    assert compile_ahead.fitting(built, 0.1 * needed, None) == []


def test_settings_that_the_backbone_lacks_are_not_proposed(tpu, monkeypatch):
    built = built_for(tpu.devices, "baseline")
    monkeypatch.setattr(
        compile_ahead, "analyse", lambda _: compile_ahead.Analysis(5, {}, 0, 0, [], {})
    )
    found = compile_ahead.fitting(built, 10**6, 4 * 10**6)
    assert not any("remat" in line for line in found)  # conv4 has no blocks.
    assert "  --config.micro_batches=8" in found


def run_program(arguments, *options):
    program = [sys.executable, "-m", "dml_jax", "compile", "--json", *arguments, *options]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_program_tells_what_is_missing(tpu, tmp_path):
    del tpu
    arguments = [*tiny.arguments(tmp_path, "ps"), "--topology=v5e:2x2"]
    no_images = run_program(arguments)
    assert no_images.returncode == 2 and "give --classes" in no_images.stderr
    no_count = run_program(arguments, "--classes=50", "--config.data.cache=device")
    assert no_count.returncode == 2 and "needs --images beside --classes" in no_count.stderr


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_an_error(tpu, tmp_path):
    del tpu
    ring = {"memvir__num_steps": 5, "memvir__step_gap": 2000, "model__dim": 4096}
    arguments = tiny.arguments(tmp_path, "memvir", batch_size=64, **ring)
    done = run_program(arguments, "--topology=v5e:1x1", "--classes=50")
    assert done.returncode == 2 and "on each device, which has 17.18 GB" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] is False and found["peak_bytes_per_device"] > 17e9
    assert found["fitting"] == ["  --config.memvir.dtype=bfloat16"]


@pytest.mark.slow
def test_the_program_prints_what_a_program_reads(tpu, tmp_path):
    del tpu
    arguments = tiny.arguments(tmp_path, "ps")
    done = run_program(arguments, "--topology=v5e:2x2", "--classes=50")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 4 and found["fits"] and found["flops_per_device"] > 0
    assert found["peak_bytes_per_device"] == sum(found["bytes_per_device"].values())
    assert found["copied_bytes_per_device"] == 0
    assert found["collectives"]["all-reduce"] > 0 and found["collective_bytes"] > 0
    assert "the whole state is updated in place" in done.stdout
    assert done.stdout.startswith("configs/folder.py:ps, 50 classes, 8 images a step, on 4 x TPU")


def test_a_state_that_is_not_donated_counts_as_copied(tpu):
    device = jax.sharding.SingleDeviceSharding(tpu.devices[0])
    x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=device)
    step = jax.jit(lambda a, b, c: (a + 1, b * c, c[:1] + 1), donate_argnums=(0, 2))
    text = step.lower(x, x, x).compile().as_text()
    # One of the first two outputs takes the place of the first argument, one that of the third.
    assert compile_ahead.donated_outputs(text) == {0, 1}
    plain = jax.jit(lambda a: a + 1).lower(x).compile().as_text()
    assert compile_ahead.donated_outputs(plain) == set()


def test_a_collective_counts_once_with_the_size_of_its_result():
    text = """
  %all-reduce.80 = (f32[128,128]{1,0:T(8,128)}, bf16[64]{0}) all-reduce(%a, %b), channel_id=1
  %all-reduce.81 = (f32[128,128]{1,0}, bf16[64]{0}) all-reduce(%a, %b), channel_id=1
  ROOT %g = (f32[2,8]{1,0}, f32[8,8]{1,0}, u32[]{:S(2)}) all-gather-start(%c), channel_id=2, \
metadata={op_name="jit(step)/slice"}
  %r = (f32[128]{0}, f32[64]{0}) all-reduce-start(%a, %b), channel_id=3
  %done = f32[8,8]{1,0} all-gather-done(%g)
  %fusion = f32[4]{0} fusion(%done), kind=kLoop
"""
    found = list(compile_ahead.collectives(text))
    assert found == [
        ("all-reduce", 128 * 128 * 4 + 64 * 2, ""),
        ("all-gather", 8 * 8 * 4, "jit(step)/slice"),
        ("all-reduce", 128 * 4 + 64 * 4, ""),
    ]
    assert compile_ahead.largest([*found[:2], found[1]])[0] == found[0]
    assert compile_ahead.largest([found[1]] * 300)[0].size == 300 * 256
