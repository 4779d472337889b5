"""Scores a run's checkpoint, or exported embeddings, by retrieval.

python scripts/evaluate.py --workdir=runs/memvir --checkpoint=best
python scripts/evaluate.py --embeddings=runs/memvir/embeddings.npz --nmi --recall_at=1,10,100
"""

import json
from pathlib import Path

from absl import flags

from dml_jax import command_line, retrieval, sharding
from dml_jax.retrieval import embed
from dml_jax.training import checkpoint, experiment, workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "last", ["last", *checkpoint.BEST], "Which of the run's checkpoints."
)
_EMBEDDINGS = flags.DEFINE_string("embeddings", None, "Exported embeddings, in place of a run.")
_RECALL_AT = flags.DEFINE_list("recall_at", None, "Each k of Recall@k; the run's, or 1,2,4,8.")
_NMI = flags.DEFINE_bool("nmi", False, "Whether to cluster and measure NMI too.")


def main() -> None:
    """Runs the program."""
    with command_line.mendable():
        if _EMBEDDINGS.value and not _WORKDIR.value:
            exported = embed.load_embeddings(_EMBEDDINGS.value)
            embeddings, labels = exported.embeddings, exported.labels
            recall_at = (1, 2, 4, 8)
        elif _WORKDIR.value and not _EMBEDDINGS.value:
            folder = Path(_WORKDIR.value)
            config = workdir.read_config(folder)
            built = experiment.build(config, sharding.make_mesh())
            variables = experiment.load_network(built, folder, _CHECKPOINT.value)
            embeddings = experiment.embed_images(built, variables, built.sources["test"])
            labels = built.sources["test"].labels
            recall_at = config.evaluation.recall_at
        else:
            raise ValueError("give either --workdir or --embeddings")
        scores = retrieval.evaluate(
            embeddings,
            labels,
            recall_at=[int(k) for k in _RECALL_AT.value or recall_at],
            nmi=_NMI.value,
        )
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    command_line.run(main)
