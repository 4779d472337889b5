"""Trains variants with several seeds each and prints a comparison.

dml-jax reproduce --config=glyphs --variants=baseline,ps,memvir --seeds=3 --root=runs/glyphs
dml-jax reproduce --config=cars196:ps_proxy_nca --seeds=8 --root=runs/cars196 \
    --config.data.root=data/cars196

The same command resumes it; finished runs are not repeated. Each variant is compared with the bare
loss on the same schedule, which is trained too. That is `memvir_baseline` for a variant with MemVir
if the config file gives MemVir another schedule or proxy initialiser, and `baseline` otherwise. The
column "against" names it.

Scores are those of the last epoch. With `--epoch=best` they are those of each metric's best epoch,
as in the official programs: selected on the test classes, unless validation classes are held out.
Published scores appear with their sources; see dml_jax/published.py.
"""

import itertools
from typing import Any

from absl import flags
from ml_collections import config_flags

from dml_jax import retrieval
from dml_jax.cli import command_line, config_flag, packaged_configs
from dml_jax.report import comparison
from dml_jax.training import cells

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="FILE.py or the name of a packaged config; then, optionally, :variant."
)
_VARIANTS = flags.DEFINE_list(
    "variants", None, "Variants; default: that of --config, or ps, memvir, ps_memvir."
)
_SEEDS = flags.DEFINE_integer("seeds", 8, "Runs per variant, with seeds 0, 1, ...", lower_bound=1)
_ROOT = flags.DEFINE_string("root", None, "Folder of the runs.", required=True)
_EPOCH = flags.DEFINE_enum(
    "epoch",
    "last",
    ["last", "best"],
    "Compare the scores of the last epoch or of each metric's best epoch.",
)

flags.mark_flag_as_required("config")


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        file, variant = config_flag.file_and_variant()
        config_globals, overrides = config_flag.config_globals(), config_flag.overrides()
        requested = _VARIANTS.value or ([variant] if variant else ["ps", "memvir", "ps_memvir"])
        get_config = config_globals["get_config"]
        baselines = {name: comparison.baseline(name, get_config) for name in requested}
        trained = list(dict.fromkeys(name for x in requested for name in (baselines[x], x)))
        results: dict[str, list[dict[str, Any] | None]] = {name: [] for name in trained}
        references = {}
        # Seeds are the outer loop, so that an interrupted comparison covers all variants.
        for seed, name in itertools.product(range(_SEEDS.value), trained):
            cell = cells.make(
                packaged_configs.shortened(file),
                name,
                seed,
                globals=config_globals,
                overrides=overrides,
                root=_ROOT.value,
            )
            references[name] = cell.origin.published
            results[name].append(cells.train(cell))
    for table in comparison.tables(
        results,
        baselines={name: against for name, against in baselines.items() if name != against},
        references=references,
        metrics=retrieval.SCORES,
        best=_EPOCH.value == "best",
    ):
        print(f"\n{table}")
    if any(references.values()):
        print("\nThe scores published in READMEs are each metric's best epoch on the test classes.")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
