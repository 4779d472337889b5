"""The settings of the evaluation."""

import dataclasses

from dml_jax.settings import flag, integer, setting, several


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When a run is evaluated, by which metrics, and when it stops early."""

    every_epochs: int = setting(5, integer(1), help="Epochs from one evaluation to the next.")
    recall_at: tuple[int, ...] = setting(
        (1, 2, 4, 8),
        several(
            integer(1), "it must be integers of at least 1, with 1 among them", lambda ks: 1 in ks
        ),
        help="Each k of Recall@k.",
    )
    nmi: bool = setting(
        False, flag(), help="Whether to cluster the embeddings and measure NMI too."
    )
    patience: int = setting(
        0,
        integer(0),
        help="Evaluations without a better R@1, RP or MAP@R that end a run early; 0 for none.",
    )
