"""Retrieval scores of deformed test images: how robust the embeddings of a network are."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float32, PyTree

from dml_jax.data.deformations import DEFORMATIONS, deformed
from dml_jax.evaluation.embedding import embed_images
from dml_jax.evaluation.scoring import Evaluator


def score(
    evaluator: Evaluator,
    variables: dict[str, PyTree],
    plain: Mapping[str, Float32[np.ndarray, "images dim"]],
    names: Sequence[str],
    **options: Any,
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Returns the scores of each deformation at each of its strengths.

    The images that the network receives are deformed, so after the centre crop. The metrics are
    those of the neighbours; there is no clustering and no verification.

    Args:
        evaluator: the network and the images.
        variables: variables of the network.
        plain: the result of `Evaluator.embed`, of images that are not deformed.
        names: some of `dml_jax.data.deformations.DEFORMATIONS`.
        options: further arguments of `retrieval.evaluate`.

    Returns:
        Scores by name, strength, and which images are deformed: `queries`, or `both` queries and
        gallery. A query's own image is excluded from the gallery in either case, unless the data
        set has a gallery of its own.
    """
    (split,) = plain.keys() - {"gallery"}
    options |= {"nmi": False, "ami": False, "fmr": (), "diagnostics": False}
    with_plain = {}
    if "gallery" not in plain:
        with_plain = {
            "gallery": (plain[split], evaluator.sources[split].labels),
            "same_images": True,
        }

    def of_strength(name: str, strength: float) -> dict[str, dict[str, float]]:
        change = partial(deformed, name=name, strength=strength)
        embedded = {
            part: embed_images(evaluator.network, variables, evaluator.sources[part], change=change)
            for part in plain
        }
        queries = {**plain, split: embedded[split]}
        return {
            "queries": evaluator.score(queries, **options, **with_plain),
            "both": evaluator.score(embedded, **options),
        }

    return {
        name: {
            f"{strength:g}": of_strength(name, strength)
            for strength in DEFORMATIONS[name].strengths
        }
        for name in names
    }
