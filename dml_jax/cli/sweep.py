"""Trains a grid of runs over one or two settings, and draws their scores.

dml-jax sweep --config=cars196:ps --over=proxy_synthesis.ratio=0.5,1,2 \
    --over=proxy_synthesis.alpha=0.2,0.4,1 --seeds=0,1 --workdir=runs/sweep \
    --config.data.root=data/cars196 --config.data.validation_classes=0.25
dml-jax sweep --config=cars196:memvir --over=memvir.step_gap=5,10,20 --workdir=runs/gaps --print

A cell is a run of `dml-jax train` at WORKDIR/SETTINGS/seedN. The same command resumes; finished
cells are not repeated. It prints a table with mean and standard deviation over the seeds, and
writes WORKDIR/sweep.html: a heat map of two settings, or a curve of one.

Choose settings by validation classes, never by test classes. With config.data.validation_classes,
the scores are those of the classes held out, and no test image is embedded.

With --cell=INDEX or --array one cell is trained, for jobs of a cluster; see
examples/launch/array.sh. --print makes table and page of the cells that have finished.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from dml_jax._utils import storage
from dml_jax.cli import cell_flags, command_line, config_flag, packaged_configs
from dml_jax.report import sweep, sweep_page

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="FILE.py or the name of a packaged config; then, optionally, :variant."
)
_OVER = flags.DEFINE_multi_string(
    "over",
    [],
    "A setting and its values, such as proxy_synthesis.ratio=0.5,1,2; give --over once or twice.",
)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of the runs of each cell of the grid.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or URL of the sweep.", required=True)

flags.mark_flag_as_required("config")
flags.adopt_module_key_flags(cell_flags)


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        file, variant = config_flag.file_and_variant()
        planned = sweep.plan(
            packaged_configs.shortened(file),
            variant,
            config_flag.config_globals(),
            over=_OVER.value,
            seeds=command_line.numbers(_SEEDS, int),
            overrides=config_flag.overrides(),
            workdir=_WORKDIR.value,
        )

        def write(results: list[dict[str, Any] | None]) -> None:
            print(f"\n{sweep.summary(planned, results)}")
            page = storage.join(_WORKDIR.value, "sweep.html")
            with storage.writing(page) as path:
                path.parent.mkdir(parents=True, exist_ok=True)
                sweep_page.write(planned, results, path)
            print(f"\npage: {page}")

        cell_flags.carry_out(planned.cells, write)


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
