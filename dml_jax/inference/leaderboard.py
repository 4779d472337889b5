"""Retrieval scores of pretrained backbones that were not trained further, with their costs."""

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, PyTree
from ml_collections import ConfigDict

from dml_jax import data
from dml_jax._utils import files, sharding
from dml_jax._utils.errors import UserError
from dml_jax.data.splits import load_splits
from dml_jax.evaluation import zero_shot
from dml_jax.evaluation.network import Network
from dml_jax.models import create_backbone, pretrained
from dml_jax.models.embedder import HEAD, prefix_tokens
from dml_jax.retrieval import SCORES
from dml_jax.training import builder, run_directory
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables

FEATURES, WHITENED = "features", "whitened"
"""The scores of the pooled features, and of the same after PCA-whitening."""

_SIZES = ("image_size", "test_size", "resize")  # Settings of a test image.
_TIMED_CALLS, _TIMED_SECONDS = 3, 1.0  # Minimum number and duration of the calls that are timed.


class Entry(NamedTuple):
    """A backbone with its weights."""

    backbone: str
    pretrained: str

    def __str__(self) -> str:
        """Returns `BACKBONE=LOCATION`."""
        return f"{self.backbone}={self.pretrained}"


class Leaderboard(NamedTuple):
    """The results of a list of backbones."""

    rows: list[dict[str, Any]]
    """Results of the scored backbones, the highest MAP@R first; see `score_one`."""
    failed: dict[str, str]
    """Error messages of the others, by `str(Entry)`."""
    images: dict[str, Any]
    """Numbers of images and classes by split."""


def score(
    config: ConfigDict, entries: Sequence[Entry], chosen: frozenset[str], folder: Path
) -> Leaderboard:
    """Scores backbones on the test images of a configuration, without training.

    Every result is written to the folder, and read from there if the same backbone was scored with
    the same settings and images before.

    Args:
        config: the images, the metrics, and the settings of the networks.
        entries: the backbones.
        chosen: paths of the settings that hold for every backbone, such as `data.image_size`;
            others of `settings_of` are chosen for each.
        folder: the folder of the results.

    Raises:
        ValueError: a setting or an image is invalid.
        FileNotFoundError: the images are not at the configured path.
    """
    config = without_training(config)
    given = parse(config)
    sources, _ = load_splits(given.data, given.evaluation.recall_at)
    images = run_directory.fingerprints(sources)
    folder.mkdir(parents=True, exist_ok=True)
    rows, failed = list[dict[str, Any]](), dict[str, str]()
    for entry in entries:
        try:
            settings = settings_of(entry, config, chosen)
            identity = {"entry": str(entry), "config": _plain(settings), "images": images}
            path = folder / f"{_file_name(entry)}.json"
            known = files.read_json(path)
            if known is None or known["identity"] != identity:
                print(f"scoring {entry}")
                result = score_one(settings, sources)
                known = {"identity": identity, "result": result}
                files.write_json(path, known)
            rows.append(entry._asdict() | known["result"])
        # The last one is that of a device whose memory is too small.
        except (UserError, OSError, jax.errors.JaxRuntimeError) as error:
            print(f"failed: {entry}: {error}")
            failed[str(entry)] = str(error)
    rows.sort(key=lambda row: -max(row[kind][SCORES["MAP@R"]] for kind in (FEATURES, WHITENED)))
    counts = {split: {k: one[k] for k in ("images", "classes")} for split, one in images.items()}
    return Leaderboard(rows, failed, counts)


def without_training(config: ConfigDict) -> ConfigDict:
    """Returns a configuration whose network is frozen up to the head, without caches of images."""
    own = config.copy_and_resolve_references()
    own.model.train_from, own.data.cache = HEAD, "none"
    own.model.lora_rank = own.model.prompts = 0
    return own


def _file_name(entry: Entry) -> str:
    return f"{entry.backbone}-{hashlib.sha256(str(entry).encode()).hexdigest()[:12]}"


def _plain(config: ConfigDict) -> dict[str, Any]:
    """Returns the settings that affect a result, as JSON has them."""
    plain = json.loads(config.to_json())
    kept = {name: plain[name] for name in ("model", "evaluation", "batch_size", "seed")}
    return kept | {"data": {name: plain["data"][name] for name in _SIZES}}


def settings_of(entry: Entry, config: ConfigDict, chosen: frozenset[str]) -> ConfigDict:
    """Returns the configuration of a backbone: size and normalisation of its images, its pooling.

    Size, crop and normalisation are those of the training of the weights, if a config.json on the
    hub states them. The features of a backbone with a class token are this token.

    Args:
        entry: the backbone.
        config: the configuration of all backbones.
        chosen: see `score`.

    Raises:
        ValueError: the backbone is unknown.
    """
    own = config.copy_and_resolve_references()
    own.model.backbone, own.model.pretrained = entry
    if "model.pooling" not in chosen and prefix_tokens(create_backbone(entry.backbone)):
        own.model.pooling = "token"
    published = pretrained.published_input(entry.pretrained)
    if published is None:
        return own
    if published.image_size and not chosen & {f"data.{name}" for name in _SIZES}:
        own.data.image_size, own.data.test_size = published.image_size, None
        own.data.resize = published.resize
    if "model.normalisation" not in chosen:
        own.model.normalisation = published.normalisation
    return own


def score_one(
    config: ConfigDict, sources: Mapping[str, data.Source] | None = None
) -> dict[str, Any]:
    """Returns the scores of a backbone and their costs.

    Args:
        config: its configuration.
        sources: the images by split; by default those that the configuration names.

    Returns:
        `features` and `whitened` (see `zero_shot`) with the scores by metric; `dim` and
        `parameters` of the backbone; `image_size`; `images_per_second` of the network alone, and
        `memory`, the bytes that its compiled program needs on one device, of a batch of
        `batch_size`.

    Raises:
        ValueError: a setting, an image or the weights are invalid.
        FileNotFoundError: there are no images or weights.
    """
    settings = parse(config)
    built = builder.build(settings, sharding.make_mesh(), sources=sources)
    variables = network_variables(built.init())
    embedded = embed(built, variables)
    backbone = variables["params"]["backbone"]
    return {
        **{kind: built.evaluator.score(vectors) for kind, vectors in embedded.items()},
        "dim": embedded[FEATURES]["test"].shape[1],
        "whitened_dim": embedded[WHITENED]["test"].shape[1],
        "parameters": sum(x.size for x in jax.tree.leaves(backbone)),
        "image_size": settings.data.test_side,
        "batch_size": built.network.rows,
        **_costs(built.network, variables),
    }


def embed(
    built: builder.Experiment, variables: dict[str, PyTree]
) -> dict[str, dict[str, Float32[np.ndarray, "_ dim"]]]:
    """Returns the pooled features of the test images, and of a gallery, as they are and whitened.

    Args:
        built: experiment of a configuration `without_training`.
        variables: variables of its network.
    """
    features = zero_shot.pooled_features(built.evaluator, variables, "test")
    training = zero_shot.pooled_features(built.evaluator, variables, "train")["train"]
    whitened = zero_shot.whiten(features, training, built.config.model.dim)
    return {FEATURES: features, WHITENED: whitened}


def _costs(network: Network, variables: PyTree) -> dict[str, Any]:
    """Returns speed and memory of the compiled network, without reading of images."""
    shape = (network.rows, network.data.test_side, network.data.test_side, 3)
    images = jax.device_put(jnp.zeros(shape, jnp.uint8), sharding.batch_sharding(network.mesh))
    compiled = network.freeze.lower(variables, images).compile()
    jax.block_until_ready(compiled(variables, images))  # The first call also allocates.
    seconds = list[float]()
    while len(seconds) < _TIMED_CALLS or sum(seconds) < _TIMED_SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(compiled(variables, images))
        seconds.append(time.perf_counter() - start)
    # Not the device's own count, whose peak is that of all backbones so far.
    need = compiled.memory_analysis()
    parts = ("argument", "temp", "output")
    return {
        "images_per_second": network.rows / statistics.median(seconds),
        "memory": need and sum(getattr(need, f"{part}_size_in_bytes") for part in parts),
    }
