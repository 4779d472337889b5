"""Trains an embedding, or goes on with a run that was interrupted.

python scripts/train.py --config=configs/glyphs.py:memvir --workdir=runs/memvir
python scripts/train.py --config=configs/folder.py:ps --workdir=runs/mine --config.data.root=DIR

Asked to stop (Ctrl-C, SIGTERM) it saves and ends with exit code 75: start it again to go on.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dml_jax import retrieval
from dml_jax._utils import processes
from dml_jax.cli import command_line
from dml_jax.training import run, run_directory

_CONFIG = config_flags.DEFINE_config_file("config", help_string="FILE[:variant]")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; one of its own for each run.", required=True
)
_FORK_FROM = flags.DEFINE_string(
    "fork_from", None, "Folder of another run, whose network in its last checkpoint to start from."
)

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Whether to join the processes that SLURM, a TPU pod or MPI has started."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of --num_processes processes, to join them."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")

flags.mark_flag_as_required("config")


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        processes.join_processes(
            detect=_DISTRIBUTED.value,
            coordinator=_COORDINATOR.value,
            num_processes=_NUM_PROCESSES.value,
            process_id=_PROCESS_ID.value,
        )
        fork_from = Path(_FORK_FROM.value) if _FORK_FROM.value else None
        folder = Path(_WORKDIR.value)
        result = run.train(_CONFIG.value, folder, overview=True, fork_from=fork_from)
    if not processes.is_first_process():
        return
    print(f"last: {retrieval.summary(result['last'])}")
    best = f"epoch {result['best']['epoch']}, chosen on the {result['best_chosen_on']} classes"
    print(f"best: {retrieval.summary(result['best'])} ({best})")
    print(f"results: {folder / run_directory.RESULT}")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
