"""Retrieval by the features of a backbone that was not trained for it: the zero-shot baseline."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PyTree

from dml_jax.evaluation import network as networks
from dml_jax.evaluation.scoring import Evaluator
from dml_jax.models.embedder import HEAD
from dml_jax.retrieval import exact

_SMALLEST = 1e-10  # Eigenvalue of the covariance, relative to the largest, that is still whitened.


def pooled_features(
    evaluator: Evaluator, variables: dict[str, PyTree], split: str
) -> dict[str, Float32[np.ndarray, "_ features"]]:
    """Returns the pooled features of a split, and of its gallery if it has one, by name.

    Args:
        evaluator: evaluator of a network; its cached features are used if they are pooled ones.
        variables: variables of the network.
        split: a split of the evaluator's sources; of `train`, too, the features of centre crops.
    """
    network, cached = evaluator.network, evaluator.features
    if network.model.train_from != HEAD:
        model = dataclasses.replace(network.model, train_from=HEAD)
        network = networks.make(model, network.data, network.mesh, batch_size=network.rows)
        cached = {}
    network = network._replace(embed=network.freeze, embed_features=_as_float32)
    return evaluator._replace(network=network, features=cached).embed(variables, split)


@jax.jit
def _as_float32(variables: PyTree, features: Array) -> Array:
    del variables
    return features.astype(jnp.float32)


def whiten(
    features: Mapping[str, Float32[np.ndarray, "_ features"]],
    training: Float32[np.ndarray, "_ features"],
    dim: int,
) -> dict[str, Float32[np.ndarray, "_ components"]]:
    """Returns PCA-whitened features, with the PCA fitted on the training images.

    Features are normalised to unit length first. Components without variance are dropped.

    Source: Jégou and Chum, Negative evidences and co-occurences in image retrieval, ECCV 2012.

    Args:
        features: features to whiten, by name.
        training: features of the training images.
        dim: maximum number of principal components that are kept.
    """
    fitted = exact.unit_rows(training).astype(np.float64)
    mean = fitted.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(fitted, rowvar=False))
    kept = np.argsort(-values)[:dim]
    kept = kept[values[kept] > _SMALLEST * values.max()]
    projection = vectors[:, kept] / np.sqrt(values[kept])
    return {
        name: ((exact.unit_rows(x) - mean) @ projection).astype(np.float32)
        for name, x in features.items()
    }
