"""Trains baseline, Proxy Synthesis and MemVir on the embedded letters and compares them.

Started again, it goes on where it was; what is finished is not done again.
"""

from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from configs import glyphs
from dml_jax import command_line, data, retrieval, sharding
from dml_jax.report import page, runs
from dml_jax.training import experiment, networks, run, workdir

_ROOT = flags.DEFINE_string("root", "runs/quickstart", "Folder of the runs.")
_EPOCHS = flags.DEFINE_integer(
    "epochs", None, "Epochs of each run; the config's by default.", lower_bound=1
)

_VARIANTS = ("baseline", "ps", "memvir")


def main() -> None:
    """Runs the program."""
    table = Table(
        "", *retrieval.SCORES, "seconds", title="Letters of scripts that were never seen, %"
    )

    def add(name: str, scores: dict[str, float], seconds: float | None = None) -> None:
        cells = [f"{100 * scores[metric]:.1f}" for metric in retrieval.SCORES.values()]
        table.add_row(name, *cells, "" if seconds is None else f"{seconds:.0f}")

    with command_line.mendable():
        for variant in _VARIANTS:
            config = glyphs.get_config(variant)
            config.epochs = _EPOCHS.value or config.epochs
            config.memvir.warmup_epochs = min(config.memvir.warmup_epochs, config.epochs - 1)
            if variant == "baseline":
                built = experiment.build(config, sharding.make_mesh())
                add("raw pixels", experiment.score(built, {"test": _pixels(built.sources["test"])}))
                untrained = networks.variables(built.init())
                embeddings = experiment.embed_split(built, untrained, "test")
                add("untrained network", experiment.score(built, embeddings))
            folder = Path(_ROOT.value) / variant
            print(f"\n{variant}: {folder}")
            result = run.run(config, folder)
            add(variant, result["last"], workdir.seconds(folder))
    Console().print(table)
    print(f"Runs with checkpoints, metrics and embeddings: {_ROOT.value}\n")
    out = Path(_ROOT.value) / "report.html"
    with command_line.mendable():
        groups = runs.group([runs.read(Path(_ROOT.value) / name) for name in _VARIANTS])
        newest = max((run.first.folder / workdir.RESULT).stat().st_mtime for run in groups)
        if not out.exists() or out.stat().st_mtime < newest:
            page.write(groups, vars(glyphs), out)
    print(f"Open in a browser what they find and confuse: {out.absolute()}")


def _pixels(source: data.Source) -> np.ndarray:
    images = [data.decode(source[i], name) for i, name in enumerate(source.names)]
    return np.stack(images).reshape(len(images), -1).astype(np.float32)


if __name__ == "__main__":
    command_line.run(main, embeds=True)
