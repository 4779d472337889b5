"""Trains an embedding or resumes an interrupted run.

dml-jax train --config=glyphs:memvir --workdir=runs/memvir
dml-jax train --config=folder:ps --workdir=runs/mine --config.data.root=DIR

On Ctrl-C or SIGTERM it saves a checkpoint and ends with exit code 75. The same command resumes.
"""

from absl import flags
from ml_collections import config_flags

from dml_jax import retrieval
from dml_jax._utils import processes, storage
from dml_jax.cli import command_line, config_flag
from dml_jax.training import run, run_directory

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="FILE.py or the name of a packaged config; then, optionally, :variant."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder or URL of the run; each run needs its own.", required=True
)
_FORK_FROM = flags.DEFINE_string(
    "fork_from",
    None,
    "Folder or URL of another run; training starts from the network of its last checkpoint.",
)

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Whether to join the processes that SLURM, a TPU pod or MPI started."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of the --num_processes processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "The number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The index of this process, from 0.")

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
        result = run.train(
            _CONFIG.value,
            _WORKDIR.value,
            overview=True,
            fork_from=_FORK_FROM.value,
            origin=config_flag.origin(),
        )
    if not processes.is_first_process():
        return
    print(f"last: {retrieval.summary(result['last'])}")
    best = f"epoch {result['best']['epoch']}, selected on the {result['best_chosen_on']} classes"
    print(f"best: {retrieval.summary(result['best'])} ({best})")
    print(f"results: {storage.join(_WORKDIR.value, run_directory.RESULT)}")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
