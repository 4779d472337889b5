"""Computes the retrieval metrics of a run's checkpoint or of exported embeddings.

dml-jax evaluate --workdir=runs/memvir --checkpoint=best_map
dml-jax evaluate --embeddings=runs/memvir/embeddings.npz --nmi --recall_at=1,10,100
"""

import json
from pathlib import Path

from absl import flags

from dml_jax import retrieval
from dml_jax._utils import sharding
from dml_jax._utils.errors import UserError
from dml_jax.cli import command_line
from dml_jax.evaluation import embedding_files
from dml_jax.training import builder, checkpoint, run_directory
from dml_jax.training.config import parse

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint",
    None,
    ["last", *checkpoint.BEST],
    "The checkpoint of the run; default: the last one.",
)
_EMBEDDINGS = flags.DEFINE_string("embeddings", None, "Exported embeddings, instead of a run.")
_GALLERY = flags.DEFINE_string(
    "gallery", None, "Exported embeddings of the gallery; default: --embeddings itself."
)
_RECALL_AT = flags.DEFINE_list(
    "recall_at", None, "Values of k for Recall@k; default: the run's, or 1,2,4,8."
)
_NMI = flags.DEFINE_bool("nmi", None, "Whether to compute NMI; default: as in the run.")


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        recall_at = _recall_at(_RECALL_AT.value) if _RECALL_AT.value else None
        if _EMBEDDINGS.value and not (_WORKDIR.value or _CHECKPOINT.value):
            scores = _score_exported(_EMBEDDINGS.value, recall_at or [1, 2, 4, 8])
        elif _WORKDIR.value and not (_EMBEDDINGS.value or _GALLERY.value):
            scores = _score_run(Path(_WORKDIR.value), recall_at)
        else:
            raise UserError(
                "give either --workdir, optionally with --checkpoint, "
                "or --embeddings, optionally with --gallery"
            )
    print(json.dumps(scores, indent=2))


def _recall_at(given: list[str]) -> list[int]:
    try:
        return [int(k) for k in given]
    except ValueError:
        raise UserError(f"--recall_at={','.join(given)} must be integers, such as 1,2,4") from None


def _score_exported(file: str, recall_at: list[int]) -> dict[str, float]:
    queries = embedding_files.load_embeddings(file)
    gallery = None
    if _GALLERY.value:
        exported = embedding_files.load_embeddings(_GALLERY.value)
        if exported.class_names != queries.class_names:
            raise UserError(
                f"{_GALLERY.value} and {file} have different class names; "
                "export both from one data set"
            )
        gallery = exported.embeddings, exported.labels
    return retrieval.evaluate(
        queries.embeddings,
        queries.labels,
        recall_at=recall_at,
        gallery=gallery,
        nmi=bool(_NMI.value),
    )


def _score_run(folder: Path, recall_at: list[int] | None) -> dict[str, float]:
    config = run_directory.read_config(folder)
    config.evaluation.recall_at = tuple(recall_at or config.evaluation.recall_at)
    config.evaluation.nmi = config.evaluation.nmi if _NMI.value is None else _NMI.value
    built = builder.build(
        parse(config), sharding.make_mesh(), run_directory.read_inspection(folder)
    )
    _, variables = checkpoint.read_network(built.network, folder, _CHECKPOINT.value or "last")
    return built.evaluator.score(built.evaluator.embed(variables, "test"))


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
