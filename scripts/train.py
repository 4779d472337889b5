"""Trains an embedding, or goes on with a run that was interrupted.

python scripts/train.py --config=configs/glyphs.py:memvir --workdir=runs/memvir
python scripts/train.py --config=configs/folder.py:ps --workdir=runs/mine --config.data.root=DIR
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dml_jax import command_line, retrieval, sharding
from dml_jax.models import pretrained
from dml_jax.training import experiment, loop, workdir

_CONFIG = config_flags.DEFINE_config_file("config", help_string="FILE[:variant]")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; one of its own for each run.", required=True
)

flags.mark_flag_as_required("config")


def main() -> None:
    """Runs the program."""
    folder, config = Path(_WORKDIR.value), _CONFIG.value
    # So that the run can be resumed and evaluated from any directory.
    config.model.pretrained = pretrained.absolute(config.model.pretrained)
    if config.data.root:
        config.data.root = str(Path(config.data.root).absolute())
    with command_line.mendable():
        workdir.check(folder, config)
        result = workdir.read_result(folder)
        if result is None:
            built = experiment.build(config, sharding.make_mesh())
            print(experiment.parameter_overview(built))
            if not (folder / workdir.CONFIG).exists():
                experiment.load_weights(config)  # So that bad ones are told before.
            workdir.claim(folder, config)
            result = loop.train(built, folder)
    print(f"last: {retrieval.summary(result['last'])}")
    print(f"best: {retrieval.summary(result['best'])} (epoch {result['best']['epoch']})")
    print(f"results: {folder / workdir.RESULT}")


if __name__ == "__main__":
    command_line.run(main)
