"""Embeds the images of a split and scores them by retrieval."""

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, PyTree

from dml_jax import data, retrieval
from dml_jax._utils import processes
from dml_jax.data import device_cache
from dml_jax.data.splits import gallery_of
from dml_jax.evaluation.embedding import embed_images
from dml_jax.evaluation.features import Features, embed_features
from dml_jax.evaluation.network import Network
from dml_jax.retrieval import exact


class Evaluator(NamedTuple):
    """Scores a network on the splits of a run."""

    network: Network
    sources: Mapping[str, data.Source]
    """The images by split."""
    cache: Callable[[str], device_cache.Cache | None]
    """Returns the images of a split in device memory; None if they are read from the source."""
    recall_at: tuple[int, ...]
    """The values of k in Recall@k."""
    nmi: bool
    """Whether to compute NMI too."""
    features: Mapping[str, Features] = MappingProxyType({})
    """Cached features by split; without them the whole network is applied to the images."""

    def embed(
        self, variables: dict[str, PyTree], split: str
    ) -> dict[str, Float32[np.ndarray, "images dim"]]:
        """Returns the raw embeddings of a split, and of its gallery if it has one, by name.

        Args:
            variables: variables of the network.
            split: `test` or `validation`.
        """
        names = [split] if gallery_of(self.sources, split) is None else [split, "gallery"]
        return {name: self._embed(variables, name) for name in names}

    def _embed(self, variables: dict[str, PyTree], name: str) -> Float32[np.ndarray, "images dim"]:
        if name in self.features:
            return embed_features(self.network, variables, self.features[name])
        return embed_images(self.network, variables, self.sources[name], self.cache(name))

    def score(
        self, embeddings: Mapping[str, Float32[np.ndarray, "images dim"]], **options: Any
    ) -> dict[str, float]:
        """Returns the retrieval metrics by name; see `dml_jax.retrieval.evaluate`.

        All processes return the metrics of the first, so that they decide alike. If faiss searches,
        the first process does it alone, since others on its host would share its GPU or its cores.

        Args:
            embeddings: the result of `embed`.
            options: further arguments of `retrieval.evaluate`.
        """
        (split,) = embeddings.keys() - {"gallery"}
        gallery = None
        if "gallery" in embeddings:
            gallery = embeddings["gallery"], self.sources["gallery"].labels
        backend, metrics = exact.choose("auto"), dict[str, float]()
        chosen: dict[str, Any] = {
            "recall_at": self.recall_at,
            "nmi": self.nmi,
            "gallery": gallery,
            **options,
        }

        def evaluate() -> None:
            metrics.update(
                retrieval.evaluate(
                    embeddings[split],
                    self.sources[split].labels,
                    backend=backend,
                    **chosen,
                )
            )

        if backend == "jax":
            evaluate()  # On the devices of all processes.
        else:
            processes.in_first_process(evaluate)
        message = json.dumps(metrics).encode()
        return dict(json.loads(processes.bytes_from_first_process(message)))
