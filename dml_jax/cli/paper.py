"""Trains the runs of a published table, and prints our scores beside the published ones.

dml-jax paper readme --root=runs/papers --data_root=data
dml-jax paper ps-table6 --datasets=cub200,cars196 --losses=proxy_nca --seeds=3 --root=runs/papers
dml-jax paper memvir-table4 --root=runs/papers --dry_run --device=a100
dml-jax paper memvir-table4 --root=runs/papers --print

`readme` has the CARS196 tables of both official READMEs, `ps-table6` and `memvir-table4` those of
the papers. A cell is a run of `dml-jax train` at ROOT/DATASET/VARIANT/seedN; the tables share
cells. The same command resumes; finished cells are not repeated. Settings of all cells may be
changed by --config.PATH=VALUE.

With --cell=INDEX or --array one cell is trained, for jobs of a cluster; see
examples/launch/array.sh. --print makes the table of the cells that have finished.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from dml_jax.cli import cell_flags, command_line, config_flag
from dml_jax.report import papers
from dml_jax.training.config import default

_ROOT = flags.DEFINE_string("root", None, "Folder or URL of the runs of all tables.", required=True)
_DATA_ROOT = flags.DEFINE_string(
    "data_root", "data", "Folder or URL with the prepared data sets: cars196, cub200, sop, inshop."
)
_DATA_SETS = flags.DEFINE_list("datasets", None, "Data sets of the table; default: all.")
_LOSSES = flags.DEFINE_list("losses", None, "Losses of the table; default: all.")
_METHODS = flags.DEFINE_list(
    "methods", None, f"Of {', '.join(papers.METHODS)}; default: all of the table."
)
_SEEDS = flags.DEFINE_integer(
    "seeds",
    None,
    "Runs of each variant; default: those of the READMEs, 8 and 5 with MemVir, and 5 for the "
    "papers, which do not state theirs.",
    lower_bound=1,
)
flags.adopt_module_key_flags(cell_flags)


def main(table: str) -> None:
    """Runs the program."""
    with command_line.user_errors():
        planned = papers.plan(
            table,
            config_flag.packaged_globals,
            data_sets=_DATA_SETS.value,
            losses=_LOSSES.value,
            methods=_METHODS.value,
            seeds=_SEEDS.value,
            root=_ROOT.value,
            data_root=_DATA_ROOT.value,
            overrides=config_flag.overrides(),
        )

        def write(results: list[dict[str, Any] | None]) -> None:
            print(f"\n{papers.text(planned, results)}")
            print("written: " + ", ".join(papers.write(planned, results, _ROOT.value)))

        cell_flags.carry_out(planned.cells, write)


def start() -> None:
    """Parses the command line and runs the program."""
    with command_line.flag_errors():  # It reads the command line when it is defined.
        config_flags.DEFINE_config_dict("config", default(), "Settings that all cells share.")
    command_line.run(main, "TABLE", embeds=True)
