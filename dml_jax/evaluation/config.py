"""Settings of the evaluation."""

import dataclasses

from dml_jax.settings import flag, integer, setting, several


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Settings of the evaluation interval, the metrics and early stopping."""

    every_epochs: int = setting(5, integer(1), help="Epochs between evaluations.")
    recall_at: tuple[int, ...] = setting(
        (1, 2, 4, 8),
        several(
            integer(1), "it must be integers of at least 1, with 1 among them", lambda ks: 1 in ks
        ),
        help="The values of k in Recall@k.",
    )
    nmi: bool = setting(
        False, flag(), help="Whether to cluster the embeddings and compute NMI too."
    )
    test: bool = setting(
        True,
        flag(),
        help="Whether to embed and score the test images at the end; without, there must be "
        "validation classes, whose scores are the result.",
    )
    patience: int = setting(
        0,
        integer(0),
        help="Evaluations without a better R@1, RP or MAP@R before a run stops; 0 never stops.",
    )
