"""Compares methods after an equal search for each, on class-disjoint folds, with statistics.

dml-jax study --config=grocery --methods=ps,memvir --losses=norm_softmax,proxy_nca \
    --trials=50 --folds=4 --seeds=10 --root=runs/study --config.data.root=data/grocery

For each method and loss, Optuna searches settings by the mean MAP@R on folds of the training
classes. The best settings are trained with several seeds on every fold and scored on the test
classes. The loss without a regulariser is always part of a study, with as many trials. The same
command continues a study; several machines may run it at the same time, on one file system.

Protocol: Musgrave, Belongie and Lim, A metric learning reality check, ECCV 2020.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dml_jax.cli import command_line, config_flag
from dml_jax.study import protocol
from dml_jax.study.trials import open_storage

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="FILE.py or the name of a packaged config."
)
_METHODS = flags.DEFINE_list("methods", ["ps", "memvir", "ps_memvir"], "Methods to compare.")
_LOSSES = flags.DEFINE_list("losses", ["norm_softmax"], "Losses to compare them with.")
_TRIALS = flags.DEFINE_integer("trials", 50, "Trials of each method and loss.", lower_bound=1)
_FOLDS = flags.DEFINE_integer("folds", 4, "Folds of the training classes.", lower_bound=2)
_SEEDS = flags.DEFINE_integer("seeds", 10, "Seeds of the final runs.", lower_bound=1)
_ROOT = flags.DEFINE_string("root", None, "Folder of the study.", required=True)
_STORAGE = flags.DEFINE_string(
    "storage", None, "URL of Optuna's database; default: a journal file in the folder."
)

flags.mark_flag_as_required("config")


def main() -> None:
    """Runs the program."""
    root = Path(_ROOT.value)
    with command_line.user_errors():
        config_globals = config_flag.config_globals()
        planned = protocol.plan(
            config_globals["get_config"],
            config_flag.overrides(),
            config_globals.get("SPACE", {}),
            methods=_METHODS.value or [],
            losses=_LOSSES.value or [],
            trials=_TRIALS.value,
            folds=_FOLDS.value,
            seeds=_SEEDS.value,
            root=root,
        )
        text = protocol.carry_out(planned, open_storage(_STORAGE.value, root), root)
    print(f"\n{text}\n\npage: {root / protocol.PAGE}\nall runs: {root / protocol.RUNS}")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
