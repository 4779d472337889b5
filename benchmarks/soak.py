"""Checks that memory, open files, threads and step time do not grow during a long run.

python -m benchmarks.soak --steps=20000 --out=soak.png

Trains a tiny network with Proxy Synthesis, MemVir and two input workers on noise, with regular
evaluations and checkpoints, and samples its processes from /proc once a second. Fails if the median
of a quantity in the last tenth of the run exceeds that of the first tenth by more than `BOUNDS`.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image
from rich.console import Console
from rich.table import Table

from dml_jax._utils import files
from dml_jax.cli import command_line
from dml_jax.training import run_directory

_STEPS = flags.DEFINE_integer("steps", 20_000, "Training steps.", lower_bound=1000)
_OUT = flags.DEFINE_string("out", None, "Image file to plot the curves to.")

_CLASSES, _IMAGES, _SIZE, _BATCH = 8, 20, 16, 16
_STEPS_PER_EPOCH = _CLASSES * _IMAGES // _BATCH
STEP = "step, ms"
BOUNDS = {"memory, MB": 1.1, "open files": 1.1, "threads": 1.1, "processes": 1.0, STEP: 1.3}
"""Maximum growth factor of each quantity from the first tenth of a run to the last.

The first twentieth is excluded, because the first checkpoint starts orbax's threads. The bound of
the step time allows for other load on the machine.
"""


def main() -> None:
    """Runs the program."""
    with tempfile.TemporaryDirectory() as root, command_line.user_errors():
        _write_images(Path(root) / "images")
        run = Path(root) / "run"
        process = subprocess.Popen(_command(Path(root) / "images", run), stdout=subprocess.DEVNULL)
        samples = []
        while process.poll() is None:
            # A process may end while it is sampled; then this sample is skipped.
            with contextlib.suppress(OSError, IndexError):
                if (run / run_directory.TIMINGS).exists():
                    samples.append(_sample(process.pid))
            time.sleep(1)
        if process.returncode:
            raise ValueError(f"the training run failed with exit code {process.returncode}")
        epochs = files.read_json_lines(run / run_directory.TIMINGS)
    milliseconds = [1e3 * line["train_seconds"] / _STEPS_PER_EPOCH for line in epochs]
    sampled = np.array(samples)
    series = dict(zip(BOUNDS, [*sampled.T, np.array(milliseconds)], strict=True))
    # Evaluations start further workers; exclude samples with an unusual number of processes.
    usual = sampled[:, 3] == np.median(sampled[:, 3])
    between = series | {name: series[name][usual] for name in list(BOUNDS)[:4]}
    table = Table("", "first tenth", "last tenth", "maximum", title="Medians")
    for name, values in between.items():
        cells = (*tenths(values), series[name].max())
        table.add_row(name, *(f"{x:.1f}" for x in cells))
    Console().print(table)
    if _OUT.value:
        _draw(series, _OUT.value)
    if found := grown(between):
        sys.exit(f"error: these grow during the run: {', '.join(found)}")


def tenths(values: np.ndarray) -> tuple[float, float]:
    """Returns the medians of the first tenth, after the warm-up, and of the last tenth."""
    first, *_, last = np.array_split(values[len(values) // 20 :], 10)
    return float(np.median(first)), float(np.median(last))


def grown(series: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the names of the quantities that grow beyond their bounds."""
    return [
        name
        for name, values in series.items()
        if tenths(values)[1] > BOUNDS[name] * tenths(values)[0]
    ]


def _command(images: Path, run: Path) -> list[str]:
    settings = {
        "data.root": images,
        "data.image_size": _SIZE,
        "data.resize": _SIZE,
        "data.num_workers": 2,
        "model.backbone": "conv4",
        "model.width": 8,
        "model.pretrained": "none",
        "model.dim": 16,
        "batch_size": _BATCH,
        "epochs": _STEPS.value // _STEPS_PER_EPOCH,
        "memvir.num_steps": 4,
        "memvir.step_gap": 2,
        "memvir.warmup_epochs": 1,
        "evaluation.every_epochs": 100,
        "checkpoint.every_epochs": 20,
    }
    program = [sys.executable, "scripts/train.py", "--config=configs/folder.py:ps_memvir"]
    return [
        *program,
        f"--workdir={run}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def _write_images(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c in range(_CLASSES):
            directory = root / split / f"class{c}"
            directory.mkdir(parents=True)
            for i in range(_IMAGES):
                noise = rng.integers(256, size=(_SIZE, _SIZE, 3), dtype=np.uint8)
                Image.fromarray(noise).save(directory / f"{i}.png")


def _sample(process: int) -> tuple[float, int, int, int]:
    """Returns resident megabytes, open files, threads and number of a process and its children."""
    family = [process, *_children(process)]
    status = [Path(f"/proc/{one}/status").read_text() for one in family]
    kilobytes = [int(text.split("VmRSS:")[1].split()[0]) for text in status]
    threads = [int(text.split("Threads:")[1].split()[0]) for text in status]
    files = [len(list(Path(f"/proc/{one}/fd").iterdir())) for one in family]
    return sum(kilobytes) / 1000, sum(files), sum(threads), len(family)


def _children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").iterdir()
    direct = [int(x) for task in tasks for x in (task / "children").read_text().split()]
    return [x for child in direct for x in (child, *_children(child))]


def _draw(series: dict[str, np.ndarray], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(series), figsize=(6, 7), sharex=True)
    for axis, (name, values) in zip(axes, series.items(), strict=True):
        axis.plot(np.linspace(0, 100, len(values)), values, linewidth=1)
        axis.set(ylabel=name, ylim=(0, 1.2 * np.quantile(values, 0.99)))
        axis.grid(alpha=0.3)
    axes[-1].set(xlabel="% of the run")
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    command_line.run(main)
