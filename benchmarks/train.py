"""Times training steps: baseline, Proxy Synthesis, MemVir, both, and the baseline in PyTorch.

python -m benchmarks.train --torch --json=train.json
python -m benchmarks.train --backbone=resnet50 --image_size=224 --dtype=bfloat16 --torch
python -m benchmarks.train --profile

Each variant is timed with three sources of images: a batch of noise on the device; JPEGs in the
device cache (config.data.cache=device); JPEGs decoded for each batch. The variants take turns.
PyTorch runs in separate processes, so that each framework uses its own settings. In the second of
them glibc keeps freed memory, as dml_jax configures it for its own programs. Utilisation is the
rate of floating-point operations that XLA counts in a step, relative to the fastest matrix product
of the same type on the same device.

With --profile it prints the operations that take most time in a step with both regularisers.
"""

import collections
import contextlib
import itertools
import json
import multiprocessing
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from dml_jax import losses
from dml_jax._utils import runtime, sharding
from dml_jax.cli import command_line
from dml_jax.configs import folder
from dml_jax.models import BACKBONES
from dml_jax.training import builder, step
from dml_jax.training.batches import device_batches
from dml_jax.training.config import parse

_BACKBONE = flags.DEFINE_enum("backbone", "conv4", BACKBONES.names(), "Backbone.")
_WIDTH = flags.DEFINE_integer("width", None, "Width of the backbone; by default its usual one.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 32, "Side of an image in pixels.")
_BATCH = flags.DEFINE_integer("batch", 128, "Batch size.")
_DIM = flags.DEFINE_integer("dim", 512, "Dimension of the embeddings.")
_CLASSES = flags.DEFINE_integer("classes", 98, "Number of training classes.")
_STEPS = flags.DEFINE_integer("steps", 45, "N of MemVir.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Type of the network's activations."
)
_WORKERS = flags.DEFINE_integer("workers", 0, "Number of input workers.")
_TORCH = flags.DEFINE_bool("torch", False, "Also time the step in PyTorch.")
_TURNS = flags.DEFINE_integer("turns", 5, "Number of turns of each variant.", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 10, "Steps in a turn.", lower_bound=1)
_PROFILE = flags.DEFINE_bool("profile", False, "Profile a step instead.")
_JSON = flags.DEFINE_string("json", None, "JSON file for the results.")

_JPEG = (480, 700)  # Height and width.


def main() -> None:
    """Runs the program."""
    with command_line.user_errors(), tempfile.TemporaryDirectory() as root:
        _write_images(Path(root))
        if _PROFILE.value:
            _print_profile(
                builder.build(parse(_config(root, 1.0, _STEPS.value)), sharding.make_mesh())
            )
            return
        turns: dict[str, Callable[[], None]] = {}
        if _TORCH.value:
            turns["PyTorch, baseline"] = _torch_steps(tuned=False)
            turns["PyTorch, baseline, glibc tuned"] = _torch_steps(tuned=True)
        for mixing, steps in itertools.product((0.0, 1.0), (0, _STEPS.value)):
            parts = [*(["PS"] if mixing else []), *(["MemVir"] if steps else [])]
            variant = " + ".join(parts) or "baseline"
            built = builder.build(parse(_config(root, mixing, steps)), sharding.make_mesh())
            turns[variant] = _Step(built, _noise(built)).take
            turns[f"{variant}, JPEGs"] = _Step(built, _training_batches(built)).take
            if not parts:
                flops = _flops(built)
            config = _config(root, mixing, steps, cache="device")
            built = builder.build(parse(config), sharding.make_mesh())
            turns[f"{variant}, device cache"] = _Step(built, _training_batches(built)).take
        rates = _rates(turns)
    peak = _peak()
    table = Table("step", "images/s", "relative to baseline", "spread", "utilisation")
    baseline = np.median(rates["baseline"])
    for name, rate in rates.items():
        middle = np.median(rate)
        table.add_row(
            name,
            f"{middle:.0f}",
            f"{middle / baseline:.3f}",
            f"{min(rate):.0f} to {max(rate):.0f}",
            f"{100 * middle / _BATCH.value * flops / peak:.0f} %",
        )
    device = jax.devices()[0]
    print(f"{jax.device_count()} x {device.device_kind}, {peak / 1e9:.0f} GFLOP/s peak")
    Console().print(table)
    if _JSON.value:
        chosen = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
        about = {
            "device": device.device_kind,
            "devices": jax.device_count(),
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flags": {flag.name: flag.value for flag in chosen},
        }
        Path(_JSON.value).write_text(json.dumps(about | {"images_per_second": rates}, indent=2))


def _config(root: str, mixing_ratio: float, memory_steps: int, cache: str = "none") -> ConfigDict:
    config = folder.get_config("ps_memvir")
    config.update_from_flattened_dict(
        {
            "batch_size": _BATCH.value,
            "epochs": 10_000,
            "data.root": root,
            "data.image_size": _IMAGE_SIZE.value,
            "data.resize": _IMAGE_SIZE.value,
            "data.num_workers": _WORKERS.value,
            "data.cache": cache,
            "data.cache_size": max(320, _IMAGE_SIZE.value),
            "model.backbone": _BACKBONE.value,
            "model.width": _WIDTH.value,
            "model.dim": _DIM.value,
            "model.dtype": _DTYPE.value,
            "optimizer.eps": 1e-2,
            "proxy_synthesis.ratio": mixing_ratio,
            "memvir.num_steps": memory_steps,
            "memvir.warmup_epochs": 0,
        }
    )
    return config


def _write_images(root: Path) -> None:
    """Writes one batch of training images, and a few test images."""
    rng = np.random.default_rng(0)
    for split, classes, images in (
        ("train", _CLASSES.value, -(-_BATCH.value // _CLASSES.value)),
        ("test", 2, 16),
    ):
        for c, i in itertools.product(range(classes), range(images)):
            path = root / split / f"class{c}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(256, size=(12, 16, 3), dtype=np.uint8)
            cv2.imwrite(str(path), cv2.resize(coarse, _JPEG[::-1], interpolation=cv2.INTER_CUBIC))


def _noise(built: builder.Experiment) -> Iterator[dict[str, jax.Array]]:
    shape = (_BATCH.value, _IMAGE_SIZE.value, _IMAGE_SIZE.value, 3)
    batch = {
        "image": np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8),
        "label": np.arange(_BATCH.value, dtype=np.int32) % _CLASSES.value,
    }
    return itertools.repeat(sharding.put_batch(built.mesh, batch))


def _training_batches(built: builder.Experiment) -> Iterator[dict[str, jax.Array]]:
    for _, batch in device_batches(built, 0, built.config.epochs * built.steps_per_epoch):
        yield batch


class _Step:
    """A training step with its state and its batches."""

    def __init__(
        self, built: builder.Experiment, batches: Iterator[Mapping[str, jax.Array]]
    ) -> None:
        self._batches, self._state = batches, built.init()
        self._step = step.compile_step(built.step_config, built.abstract_state, built.mesh)

    def take(self) -> None:
        """Takes the steps of a turn, dispatched asynchronously as in a run."""
        for batch in itertools.islice(self._batches, _CALLS.value):
            self._state, observed = self._step(self._state, batch)
        jax.block_until_ready(observed)


def _rates(turns: Mapping[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Returns images per second of each variant in each turn; a first turn compiles."""
    for take in turns.values():
        take()
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for name, take in [*turns.items()] * _TURNS.value:
        began = time.perf_counter()
        take()
        rates[name].append(_CALLS.value * _BATCH.value / (time.perf_counter() - began))
    return rates


def _flops(built: builder.Experiment) -> float:
    batch = jax.eval_shape(lambda: next(_noise(built)))
    traced = jax.jit(lambda state, batch: step.train_step(built.step_config, state, batch))
    cost = traced.lower(built.abstract_state, batch).cost_analysis()
    return cost["flops"] if cost else np.nan


def _peak() -> float:
    """Returns the operations per second of a large matrix product, summed over devices."""
    size = 2048 if jax.devices()[0].platform == "cpu" else 8192
    x = jnp.ones((size, size), _DTYPE.value)
    multiply = jax.jit(lambda x: x @ x)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(multiply(x))
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) * jax.device_count()


def _print_profile(built: builder.Experiment) -> None:
    """Prints the operations of a step that take longest, with their names in the program."""
    batch, state = next(_noise(built)), built.init()
    function = jax.jit(
        lambda state, batch: step.train_step(built.step_config, state, batch), donate_argnums=0
    )
    with jax.set_mesh(built.mesh):
        compiled = function.lower(state, batch).compile()
    for _ in range(_CALLS.value):
        state, _ = compiled(state, batch)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_CALLS.value):
                state, _ = jax.block_until_ready(compiled(state, batch))
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    took: collections.Counter[str] = collections.Counter()
    for event in (e for plane in profile.planes for line in plane.lines for e in line.events):
        operation = dict(event.stats).get("hlo_op", "")
        # Skips operations that contain others, which would be counted twice.
        if operation and not operation.startswith(("while", "call", "conditional")):
            took[operation] += event.duration_ns
    # Operations added by the compiler have no name; show the shape of their result.
    text = compiled.as_text() or ""
    names = dict(re.findall(r"%(\S+) = (\w+\[[\d,]*\])", text))
    names |= dict(re.findall(r'%(\S+) = .*op_name="[^/"]*/([^"]+)"', text))
    table = Table("ms", "share", "operation", "name")
    for operation, nanoseconds in took.most_common(10):
        share = 100 * nanoseconds / took.total()
        milliseconds = nanoseconds / _CALLS.value / 1e6
        table.add_row(f"{milliseconds:.2f}", f"{share:.1f} %", operation, names[operation])
    print(f"{took.total() / _CALLS.value / 1e6:.1f} ms in {len(took)} operations")
    Console(width=200).print(table)


def _torch_steps(*, tuned: bool) -> Callable[[], None]:
    """Returns a function that takes the steps of a turn in a separate process.

    Raises:
        ValueError: the process failed to build the network.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve_torch, args=(theirs, sys.argv, tuned), daemon=True).start()
    theirs.close()
    try:
        ours.recv()  # Waits until the process is ready.
    except EOFError as error:
        raise ValueError("the PyTorch process has failed; see its error message above") from error

    def take() -> None:
        ours.send(None)
        ours.recv()

    return take


def _serve_torch(pipe: Connection, arguments: list[str], tuned: bool) -> None:
    flags.FLAGS(arguments)
    if tuned:
        runtime.prepare(embeds=True)
    take = _torch_step()
    pipe.send(None)
    with contextlib.suppress(EOFError):  # The parent process has ended.
        while True:
            pipe.recv()
            pipe.send(take())


def _torch_step() -> Callable[[], None]:
    """Returns the baseline step in PyTorch: channels last, autocast, compiled on GPUs."""
    import torch
    from torch import nn

    if _BACKBONE.value == "conv4":
        width = _WIDTH.value or 64
        blocks = (
            [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            for channels in (3, width, width, width)
        )
        backbone, features = nn.Sequential(*itertools.chain(*blocks)), width
    else:
        import torchvision

        if _BACKBONE.value not in torchvision.models.list_models():
            raise ValueError(f"torchvision has no {_BACKBONE.value}; choose a backbone that it has")
        network = torchvision.models.get_model(_BACKBONE.value)
        features = network.fc.in_features
        backbone = nn.Sequential(*list(network.children())[:-2])
    head = [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(features, _DIM.value)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = nn.Sequential(backbone, *head).to(device, memory_format=torch.channels_last)
    proxies = nn.Parameter(torch.randn(_CLASSES.value, _DIM.value, device=device))
    adam = torch.optim.Adam(
        [*network.parameters(), proxies], lr=1e-3, eps=1e-2, weight_decay=1e-4, fused=True
    )
    shape = (_BATCH.value, _IMAGE_SIZE.value, _IMAGE_SIZE.value, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    labels = torch.arange(_BATCH.value, device=device) % _CLASSES.value
    normalize, scale = nn.functional.normalize, losses.NormSoftmax().scale

    def objective(images: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=_DTYPE.value == "bfloat16"):
            embeddings = network(images.permute(0, 3, 1, 2) / 127.5 - 1)
        logits = scale * normalize(embeddings.float()) @ normalize(proxies).T
        return nn.functional.cross_entropy(logits, labels)

    if device == "cuda":
        objective = torch.compile(objective)

    def take() -> None:
        for _ in range(_CALLS.value):
            adam.zero_grad(set_to_none=True)
            objective(images).backward()
            adam.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return take


if __name__ == "__main__":
    command_line.run(main, embeds=True)
