"""Trains a baseline, Proxy Synthesis, MemVir and both together on the embedded letters.

Prints a comparison and writes a report. Started again, it resumes; finished runs are not repeated.
On CPUs, the variants are trained at the same time, each with its share of the cores, which is
faster than one after another with all cores.

dml-jax quickstart --root=runs/quickstart
"""

import concurrent.futures
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from dml_jax import data, retrieval
from dml_jax._utils import sharding
from dml_jax.cli import command_line
from dml_jax.configs import glyphs
from dml_jax.report import render, runs
from dml_jax.training import builder, preemption, resume, run, run_directory
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables
from dml_jax.training.variants import origin_of

_ROOT = flags.DEFINE_string("root", "runs/quickstart", "Folder of the runs.")
_EPOCHS = flags.DEFINE_integer(
    "epochs", None, "Epochs of each run; default: as in the config.", lower_bound=1
)

_VARIANTS = ("baseline", "ps", "memvir", "ps_memvir")
_CAPTION = (
    "One seed each, with the published scale of 23 and settings selected on validation classes. A "
    "smaller scale alone gains more: see README.md, which also has the scores of five seeds."
)


def main() -> None:
    """Runs the program."""
    root = Path(_ROOT.value)
    with command_line.user_errors():
        rows = _untrained(_config("baseline"))
        _train_in_parallel(root)
        for variant in _VARIANTS:
            print(f"\n{variant}: {root / variant}")
            origin = origin_of("glyphs", variant, vars(glyphs), _overrides(variant))
            result = run.train(_config(variant), root / variant, origin=origin)
            rows[variant] = result["last"] | {"seconds": run_directory.seconds(root / variant)}
    Console().print(_table(rows))
    print(f"Runs with checkpoints, metrics and embeddings: {root}\n")
    out = root / "report.html"
    with command_line.user_errors():
        groups = runs.group([runs.read(root / variant) for variant in _VARIANTS])
        newest = max((run.first.folder / run_directory.RESULT).stat().st_mtime for run in groups)
        if not out.exists() or out.stat().st_mtime < newest:
            render.write(groups, out)
    print(f"Report, to open in a browser: {out.absolute()}")


def _train_in_parallel(root: Path) -> None:
    """Trains the unfinished variants in processes of their own, if the devices are CPUs.

    A variant whose process fails is left to the caller, which then meets the same error.

    Raises:
        Stopped: this process was asked to stop; the others have saved their state.
    """
    if jax.default_backend() != "cpu" or not hasattr(os, "sched_getaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    unfinished = [x for x in _VARIANTS if resume.finished(root / x, parse(_config(x))) is None]
    count = min(len(cores), len(unfinished))
    if count < 2:
        return
    shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for i in range(count):
        shares.put(cores[i::count])
    started: list[subprocess.Popen] = []

    def train(variant: str) -> None:
        share = shares.get()
        # A process has the cores of the thread that starts it.
        os.sched_setaffinity(0, share)
        with subprocess.Popen(
            _command(variant, root), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            started.append(process)
            for line in process.stdout or ():
                print(f"{variant}: {line}", end="", flush=True)
        shares.put(share)

    with (
        preemption.listening() as stop,
        concurrent.futures.ThreadPoolExecutor(count) as pool,
    ):
        stop.unsaved = True
        futures = [pool.submit(train, variant) for variant in unfinished]
        while not stop.is_set() and concurrent.futures.wait(futures, timeout=0.2).not_done:
            pass
        if stop.is_set():
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.send_signal(signal.SIGTERM)
    if stop.is_set():
        raise preemption.Stopped("stopped: start again to resume")


def _command(variant: str, root: Path) -> Sequence[str]:
    settings = [f"--config.{path}={value}" for path, value in _overrides(variant).items()]
    program = [sys.executable, "-m", "dml_jax", "train", f"--config=glyphs:{variant}"]
    return [*program, f"--workdir={root / variant}", *settings]


def _config(variant: str) -> ConfigDict:
    config = glyphs.get_config(variant)
    config.update_from_flattened_dict(_overrides(variant))
    return config


def _overrides(variant: str) -> dict[str, int]:
    """Returns the settings that --epochs changes: the memory must be used before the last one."""
    epochs, warmup = _EPOCHS.value, glyphs.get_config(variant).memvir.warmup_epochs
    if not epochs:
        return {}
    return {"epochs": epochs, "memvir.warmup_epochs": min(warmup, epochs - 1)}


def _untrained(config: ConfigDict) -> dict[str, dict[str, float]]:
    """Returns the scores of raw pixels and of the untrained network on the test images."""
    built = builder.build(parse(config), sharding.make_mesh())
    pixels = {"test": _pixels(built.sources["test"])}
    network = built.evaluator.embed(network_variables(built.init()), "test")
    return {
        "raw pixels": built.evaluator.score(pixels),
        "untrained network": built.evaluator.score(network),
    }


def _table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns the comparison in percent, with each regulariser's difference from the baseline."""
    table = Table(
        "",
        *retrieval.SCORES,
        "MAP@R - baseline",
        "seconds",
        title="Letters of scripts that were never seen, %",
        caption=_CAPTION,
    )
    for name, scores in rows.items():
        cells = [f"{100 * scores[metric]:.1f}" for metric in retrieval.SCORES.values()]
        gain = 100 * (scores["map@r"] - rows["baseline"]["map@r"])
        regularised = name in _VARIANTS and name != "baseline"
        seconds = f"{scores['seconds']:.0f}" if "seconds" in scores else ""
        table.add_row(name, *cells, f"{gain:+.1f}" if regularised else "", seconds)
    return table


def _pixels(source: data.Source) -> np.ndarray:
    images = [data.decode(source[i], name) for i, name in enumerate(source.names)]
    return np.stack(images).reshape(len(images), -1).astype(np.float32)


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
