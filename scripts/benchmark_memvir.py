"""Times MemVir against its dense form: loss, gradients and, for ours, the memory update too.

python -m scripts.benchmark_memvir --steps=1,5,15,45 --out=memvir.png
python -m scripts.benchmark_memvir --classes=11318 --gap=10 --steps=1,5 --torch

The dense form is what the tests hold ours against, compiled; `--torch` adds the same in PyTorch.
Times are of the fastest of several calls, all in one process.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from dml_jax import command_line, losses, memvir
from tests.oracles import DenseMemVir, normalized

_STEPS = flags.DEFINE_list("steps", ["1", "5", "15", "45"], "Values of N.")
_GAP = flags.DEFINE_integer("gap", 10, "M.")
_BATCH = flags.DEFINE_integer("batch", 128, "B.")
_CLASSES = flags.DEFINE_integer("classes", 98, "C.")
_DIM = flags.DEFINE_integer("dim", 512, "D.")
_CALLS = flags.DEFINE_integer("calls", 5, "Calls of which the fastest counts.", lower_bound=1)
_TORCH = flags.DEFINE_bool("torch", False, "Whether to time the dense form in PyTorch as well.")
_OUT = flags.DEFINE_string("out", None, "An image to draw the times to.")

LOSS = "norm_softmax"


def main() -> None:
    """Runs the program."""
    table = Table("N", "ours, ms", "dense, ms", "PyTorch, ms", "ring, MB", "temporary, MB")
    rows = []
    for steps in map(int, _STEPS.value):
        ours, ring, temporary = _time_ours(steps)
        dense = _time_dense(steps)
        torch = _time_torch(steps) if _TORCH.value else None
        rows.append((steps, ours, dense, torch))
        table.add_row(
            str(steps),
            f"{1e3 * ours:.1f}",
            f"{1e3 * dense:.1f} ({dense / ours:.1f}x)",
            "" if torch is None else f"{1e3 * torch:.1f} ({torch / ours:.1f}x)",
            f"{ring / 1e6:.0f}",
            f"{temporary / 1e6:.0f}",
        )
    Console().print(table)
    n, seconds = (np.array([row[column] for row in rows]) for column in (0, 1))
    if len(rows) > 2:
        slope, offset = np.polyfit(n, seconds, 1)
        rest = np.corrcoef(n, seconds)[0, 1] ** 2
        print(f"ours: {1e3 * offset:.1f} ms + {1e3 * slope:.2f} ms * N, R2 = {rest:.4f}")
    if _OUT.value:
        _draw(rows, _OUT.value)


def _fastest(call: Callable[[], Any]) -> float:
    call()
    seconds = []
    for _ in range(_CALLS.value):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _problem() -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return (
        jax.random.normal(keys[0], (_BATCH.value, _DIM.value)),
        jax.random.normal(keys[1], (_CLASSES.value, _DIM.value)),
        jnp.arange(_BATCH.value) % _CLASSES.value,
    )


def _time_ours(steps: int) -> tuple[float, int, int]:
    """Seconds, and bytes of the memory and of what the compiled step needs beside it."""
    loss = losses.create(LOSS)
    memory = memvir.init(
        num_steps=steps,
        step_gap=_GAP.value,
        batch_size=_BATCH.value,
        num_classes=_CLASSES.value,
        dim=_DIM.value,
        loss=loss,
    )
    problem = _problem()

    def step(memory: memvir.Memory, embeddings: Any, proxies: Any, labels: Any) -> Any:
        return jax.value_and_grad(
            lambda e, p: memvir.loss_and_update(loss, memory, e, p, labels),
            argnums=(0, 1),
            has_aux=True,
        )(embeddings, proxies)

    compiled = jax.jit(step, donate_argnums=0).lower(memory, *problem).compile()
    ring = sum(x.nbytes for x in jax.tree.leaves(memory))
    state = [memory]

    def call() -> None:
        (_, state[0]), _ = jax.block_until_ready(compiled(state[0], *problem))

    analysis = compiled.memory_analysis()
    return _fastest(call), ring, 0 if analysis is None else analysis.temp_size_in_bytes


def _time_dense(steps: int) -> float:
    dense = DenseMemVir(
        LOSS, num_steps=steps, step_gap=0, batch=_BATCH.value, classes=_CLASSES.value
    )
    embeddings, proxies, labels = _problem()
    virtual = [(normalized(embeddings), normalized(proxies), labels)] * steps
    exist = jnp.ones(steps, bool)
    return _fastest(
        lambda: jax.block_until_ready(
            dense.value_and_grad(embeddings, proxies, labels, virtual, exist)
        )
    )


def _time_torch(steps: int) -> float:
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

    return _fastest(call)


def _draw(rows: list[tuple[int, float, float, float | None]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    n = [row[0] for row in rows]
    for name, seconds in (
        ("this project", [row[1] for row in rows]),
        ("dense, JAX", [row[2] for row in rows]),
        ("dense, PyTorch", [row[3] for row in rows if row[3] is not None]),
    ):
        if seconds:
            axes.plot(n, [1e3 * value for value in seconds], marker="o", label=name)
    axes.set(xlabel="N, remembered steps in a loss", ylabel="milliseconds", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    command_line.run(main)
