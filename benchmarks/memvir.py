"""Measures time and memory of a step with MemVir against its dense formulation.

python -m benchmarks.memvir --json=memvir.json --out=memvir.png
python -m benchmarks.memvir --classes=11318 --steps=1,5,15 --torch

The dense formulation is the reference of the tests, compiled: loss and gradients. Ours also updates
the memory, which is full. `--torch` adds the dense formulation in PyTorch. The implementations take
turns in one process; the fastest call of each counts. Megabytes are those that the compiled program
allocates: its arguments (the whole memory for ours, the N steps in use for the dense formulation),
its results and temporary arrays.
"""

import json
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from dml_jax import losses, memvir
from dml_jax.cli import command_line
from tests.helpers.oracles import NO_MIXING, DenseMemVir, normalized

_STEPS = flags.DEFINE_list("steps", ["1", "5", "15", "45"], "Values of N.")
_GAP = flags.DEFINE_integer("gap", 10, "M.")
_BATCH = flags.DEFINE_integer("batch", 128, "B.")
_CLASSES = flags.DEFINE_integer("classes", 98, "C.")
_DIM = flags.DEFINE_integer("dim", 512, "D.")
_DENSE_STEPS = flags.DEFINE_integer("dense_steps", 45, "Largest N of the dense formulations.")
_TORCH = flags.DEFINE_bool("torch", False, "Also time the dense formulation in PyTorch.")
_JSON = flags.DEFINE_string("json", None, "JSON file for the results.")
_OUT = flags.DEFINE_string("out", None, "Image file to plot the times to.")

LOSS = "norm_softmax"
_TURNS, _SECONDS = 5, 0.5  # Number of turns of each, and minimum duration of a turn.


class Implementation(NamedTuple):
    """An implementation of MemVir."""

    call: Callable[[], Any]
    memory: dict[str, int]
    """Bytes that the compiled program allocates: `all` and `temporary`; empty if unknown."""


def main() -> None:
    """Runs the program."""
    table = Table(
        *("N", "ours, ms", "dense, ms", "PyTorch, ms"),
        *("ours, MB (temporary)", "dense, MB (temporary)"),
    )
    rows, found = [], {}
    for steps in map(int, _STEPS.value):
        implementations = {"ours": _ours(steps)}
        if steps <= _DENSE_STEPS.value:
            implementations["dense"] = _dense(steps)
            if _TORCH.value:
                implementations["torch"] = _torch(steps)
        seconds = _fastest({name: one.call for name, one in implementations.items()})
        used = {name: one.memory for name, one in implementations.items()}
        rows.append((steps, seconds))
        table.add_row(
            str(steps),
            f"{1e3 * seconds['ours']:.1f}",
            _against(seconds.get("dense"), seconds["ours"]),
            _against(seconds.get("torch"), seconds["ours"]),
            _megabytes(used["ours"]),
            _megabytes(used.get("dense")),
        )
        found[steps] = {"seconds": seconds, "bytes": used}
    Console().print(table)
    if len(rows) > 2:
        n, ours = np.transpose([(steps, seconds["ours"]) for steps, seconds in rows])
        slope, offset = np.polyfit(n, ours, 1)
        fit = np.corrcoef(n, ours)[0, 1] ** 2
        print(f"ours: {1e3 * offset:.1f} ms + {1e3 * slope:.3f} ms * N, R2 = {fit:.4f}")
    if _JSON.value:
        chosen = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
        about = {
            "devices": [device.device_kind for device in jax.devices()],
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flags": {flag.name: flag.value for flag in chosen},
        }
        Path(_JSON.value).write_text(json.dumps(about | {"steps": found}, indent=2) + "\n")
    if _OUT.value:
        _draw(rows, _OUT.value)


def _against(seconds: float | None, ours: float) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f} ({seconds / ours:.1f}x)"


def _fastest(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Returns the seconds of the fastest call of each; the calls take turns."""
    seconds = dict.fromkeys(calls, math.inf)
    for call in calls.values():
        call()
    for name, call in [*calls.items()] * _TURNS:
        turn = time.perf_counter()
        while time.perf_counter() < turn + _SECONDS:
            began = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def _megabytes(used: Mapping[str, int] | None) -> str:
    return f"{used['all'] / 1e6:.0f} ({used['temporary'] / 1e6:.0f})" if used else ""


def _bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    temporary = analysis.temp_size_in_bytes
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return {"all": temporary + kept - analysis.alias_size_in_bytes, "temporary": temporary}


def _problem() -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return (
        jax.random.normal(keys[0], (_BATCH.value, _DIM.value)),
        jax.random.normal(keys[1], (_CLASSES.value, _DIM.value)),
        jnp.arange(_BATCH.value) % _CLASSES.value,
    )


def _memory(loss: losses.ProxyLoss, steps: int) -> memvir.Memory:
    return memvir.init(
        num_steps=steps,
        step_gap=_GAP.value,
        batch_size=_BATCH.value,
        num_classes=_CLASSES.value,
        dim=_DIM.value,
        loss=loss,
    )


def _ours(steps: int) -> Implementation:
    loss = losses.create(LOSS)
    problem = _problem()

    def step(memory: memvir.Memory, embeddings: Any, proxies: Any, labels: Any) -> Any:
        return jax.value_and_grad(
            lambda e, p: memvir.loss_and_update(loss, memory, e, p, labels),
            argnums=(0, 1),
            has_aux=True,
        )(embeddings, proxies)

    memory = _memory(loss, steps)
    compiled = jax.jit(step, donate_argnums=0).lower(memory, *problem).compile()
    kept = [memory]

    def call() -> None:
        (_, kept[0]), _ = jax.block_until_ready(compiled(kept[0], *problem))

    for _ in range(steps * (_GAP.value + 1)):
        call()
    return Implementation(call, _bytes(compiled))


def _dense(steps: int) -> Implementation:
    dense = DenseMemVir(
        LOSS, num_steps=steps, step_gap=0, batch=_BATCH.value, classes=_CLASSES.value
    )
    embeddings, proxies, labels = _problem()
    virtual = [(normalized(embeddings), normalized(proxies), labels)] * steps
    problem = (embeddings, proxies, labels, virtual, jnp.ones(steps, bool), *NO_MIXING)
    compiled = dense.value_and_grad.lower(*problem).compile()
    return Implementation(lambda: jax.block_until_ready(compiled(*problem)), _bytes(compiled))


def _torch(steps: int) -> Implementation:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    embeddings, proxies = (
        torch.tensor(np.asarray(x), device=device, requires_grad=True) for x in _problem()[:2]
    )
    labels = torch.tensor(np.asarray(_problem()[2]), device=device, dtype=torch.int64)
    normalize = torch.nn.functional.normalize
    old_rows = normalize(embeddings).detach().repeat(steps, 1)
    old_proxies = normalize(proxies).detach().repeat(steps, 1)
    all_labels = torch.cat([labels + k * _CLASSES.value for k in range(steps + 1)])
    scale = losses.NormSoftmax().scale

    def call() -> None:
        rows = torch.cat([normalize(embeddings), old_rows])
        columns = torch.cat([normalize(proxies), old_proxies])
        loss = torch.nn.functional.cross_entropy(scale * rows @ columns.T, all_labels)
        torch.autograd.grad(loss, (embeddings, proxies))
        if device == "cuda":
            torch.cuda.synchronize()

    return Implementation(call, {})


def _draw(rows: list[tuple[int, dict[str, float]]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    names = {"ours": "this project", "dense": "dense, JAX", "torch": "dense, PyTorch"}
    for form, name in names.items():
        if points := [(steps, 1e3 * seconds[form]) for steps, seconds in rows if form in seconds]:
            axes.plot(*np.transpose(points), marker="o", label=name)
    axes.set(xlabel="N, remembered steps", ylabel="milliseconds", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    command_line.run(main)
