"""Trains variants with several seeds each, and prints how they compare.

python scripts/reproduce.py --config=configs/glyphs.py --variants=baseline,ps,memvir --seeds=3 \
    --root=runs/glyphs
python scripts/reproduce.py --config=configs/cars196.py:ps_proxy_nca --seeds=8 --root=runs/cars196 \
    --config.data.root=data/cars196

Started again it goes on where it was; what is finished is not done again. A variant is compared
with the bare loss on the same schedule, which is trained too: a variant with MemVir with
`memvir_baseline`, if the config file gives MemVir another schedule or initialiser of the proxies,
and otherwise with `baseline`. The column "against" names it.

Scores are of the last epoch. `--epoch=best` gives each metric's own best epoch instead, as the
official programs do: chosen on the test classes, unless classes are held out. Published scores
are given with their sources; see dml_jax/published.py.
"""

import runpy
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from dml_jax import published, retrieval
from dml_jax.cli import command_line
from dml_jax.report import comparison
from dml_jax.training import run, variants

_CONFIG = config_flags.DEFINE_config_file("config", help_string="FILE, or FILE:variant")
_VARIANTS = flags.DEFINE_list("variants", None, "Variants; that of --config, or the methods.")
_SEEDS = flags.DEFINE_integer("seeds", 8, "Runs of each variant, seeds 0, 1, ...", lower_bound=1)
_ROOT = flags.DEFINE_string("root", None, "Folder of the runs.", required=True)
_EPOCH = flags.DEFINE_enum(
    "epoch", "last", ["last", "best"], "Scores to compare: the last epoch's, or each one's best."
)

flags.mark_flag_as_required("config")


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        flag = flags.FLAGS["config"]
        file, _, variant = config_flags.get_config_filename(flag).partition(":")
        recipe, overrides = runpy.run_path(file), config_flags.get_override_values(flag)
        wanted = _VARIANTS.value or ([variant] if variant else ["ps", "memvir", "ps_memvir"])
        bare = {name: comparison.baseline(name, recipe["get_config"]) for name in wanted}
        trained = list(dict.fromkeys(name for x in wanted for name in (bare[x], x)))
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in trained}
        # Seed by seed, so that what is done compares all variants, however far it is.
        for seed in range(_SEEDS.value):
            for name in trained:
                config = recipe["get_config"](name)
                config.update_from_flattened_dict(overrides | {"seed": seed})
                folder = Path(_ROOT.value) / name / f"seed{seed}"
                print(f"\n{name}, seed {seed}: {folder}")
                results[name].append(run.train(config, folder))
    references = recipe.get("PUBLISHED", {})
    for title, metric in retrieval.SCORES.items():
        epoch, scores = comparison.scores(results, metric, best=_EPOCH.value == "best")
        table = comparison.table(
            f"{title}, {epoch}",
            scores,
            baselines={name: against for name, against in bare.items() if name != against},
            published={
                name: published.describe(references.get(variants.parse_variant(name), ()), metric)
                for name in trained
            },
        )
        print(f"\n{table}")
    if references:
        print("\nPublished by READMEs: each metric's best epoch on the test classes.")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
