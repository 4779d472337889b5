"""The feature cache: results of the frozen part of a network, computed once and kept on disk.

A cache is a folder named by the digest of all that its values depend on: the images, the frozen
variables, the crops and the settings of the frozen part. So runs share caches, whatever their loss,
seed or validation classes, and a change makes another cache.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
from jaxtyping import Float16, Float32, Int, PyTree

from dml_jax import data
from dml_jax._utils import locks, processes, progress, storage
from dml_jax._utils.errors import UserError
from dml_jax._utils.files import errors_with_path, read_json, write_json
from dml_jax.data import Source
from dml_jax.data.images import IN_STEP
from dml_jax.evaluation.embedding import embed, outputs
from dml_jax.evaluation.network import Network

DTYPE = np.dtype(np.float16)
"""Dtype of cached features. The result of a frozen part is far below its limit of 65504."""

_FORMAT = 1
_FEATURES, _PROGRESS, _COMPLETE, _LOCK = "features.npy", "progress.json", "complete.json", ".lock"
_SAVE_EVERY = 8  # Batches between two records of the progress.


class Features(NamedTuple):
    """Cached features of the images of a split."""

    values: Float16[np.ndarray, "views stored *shape"]
    """Memory-mapped."""
    rows: Int[np.ndarray, " n"]
    """Position of each image of the split in `values`."""

    @property
    def views(self) -> int:
        """Number of views of each image."""
        return len(self.values)

    def take(
        self, index: Int[np.ndarray, " b"], view: Int[np.ndarray, " b"] | int = 0
    ) -> Float16[np.ndarray, "b *shape"]:
        """Returns the features of some views of some images of the split, by their indices."""
        return self.values[view, self.rows[index]]


def embed_features(
    network: Network, variables: dict[str, PyTree], features: Features
) -> Float32[np.ndarray, "images dim"]:
    """Embeds the images of a split from their features.

    Args:
        network: the network.
        variables: variables of the network.
        features: features of the centre crops.

    Returns:
        Raw embeddings in the order of the split.
    """
    count = len(features.rows)
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    indices = data.test_indices(count, batch_size=network.rows, **process)
    # Padding, with the index -1, has the features of the last image.
    batches = ({"image": features.take(index), "index": index} for index in indices)
    return embed(network.embed_features, variables, batches, count, network.mesh)


def load(
    network: Network,
    variables: dict[str, PyTree],
    sources: Mapping[str, Source],
    folder: str | os.PathLike[str],
    interrupt: Callable[[], None] = lambda: None,
) -> dict[str, Features]:
    """Returns the features of all splits, from their caches if these exist.

    Computes missing caches; an interrupted computation is resumed by the next call.

    Args:
        network: the network.
        variables: its variables.
        sources: the images by split.
        folder: folder of all caches, on a file system that all processes share, or a URL.
        interrupt: called from time to time; it may raise an error, and what was computed is kept.

    Returns:
        Features by split: `data.feature_views` random views of the training images, and the centre
        crops of the images of the other splits.

    Raises:
        ValueError: a cache is damaged, or features exceed the range of float16.
    """
    cache = _Cache(network, variables, folder, interrupt)
    # The same images for any choice of validation classes.
    known = data.merge([sources[split] for split in ("train", "validation") if split in sources])
    found = {"train": (cache.values(known, network.data.feature_views), known)}
    for split in sources.keys() - {"train"}:
        images = known if split == "validation" else sources[split]
        found[split] = cache.values(images, None), images
    return {
        split: Features(values, _rows(sources[split], of)) for split, (values, of) in found.items()
    }


def _rows(source: Source, stored: Source) -> Int[np.ndarray, " n"]:
    position = {name: row for row, name in enumerate(stored.names)}
    return np.array([position[name] for name in source.names])


class _Cache:
    """The caches of one network."""

    def __init__(
        self,
        network: Network,
        variables: dict[str, PyTree],
        folder: str | os.PathLike[str],
        interrupt: Callable[[], None],
    ) -> None:
        self._network, self._variables = network, variables
        self._folder, self._interrupt = folder, interrupt
        self._of_network = _digest_of_frozen_part(network, variables)

    def values(self, source: Source, views: int | None) -> Float16[np.ndarray, "v n *shape"]:
        """Returns the features of random views of images, or of centre crops if views is None."""
        about = self._of_network | {"images": _digest_of_images(source), **self._crops(views)}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        url = storage.join(self._folder, digest[:32])
        place = _place(url)
        with contextlib.ExitStack() as stack:
            if processes.is_first_process():
                warning = f"another process computes the features in {place}; waiting for it"
                stack.enter_context(locks.exclusive(place / _LOCK, warning))
            complete = (place / _COMPLETE).exists()
            if not processes.from_first_process({"complete": float(complete)})["complete"]:
                self._compute(place, source, views)
                processes.in_first_process(lambda: _finish(place, url, about))
            else:
                processes.in_first_process(lambda: _check(place))
                processes.in_first_process(lambda: _upload(place, url))
            processes.wait_for_all("features")
        if not processes.is_first_process():
            place = storage.local(url)
        return np.load(place / _FEATURES, mmap_mode="r", allow_pickle=False)

    def _crops(self, views: int | None) -> dict[str, Any]:
        config = self._network.data
        if views is None:
            return {"image_size": config.test_side, "resize": config.resize}
        # Without those of the training step, which are 0 here.
        augmentation = dataclasses.asdict(config.augmentation)
        augmentation = {name: x for name, x in augmentation.items() if name not in IN_STEP}
        return {"image_size": config.image_size, "augmentation": augmentation, "views": views}

    def _compute(self, place: Path, source: Source, views: int | None) -> None:
        """Computes the features of one cache, or the rest of them, and writes them."""
        network, total = self._network, (views or 1) * len(source)
        of_image = network.test_features_shape if views is None else network.features_shape
        shape = (views or 1, len(source), *of_image.shape)
        values, done = None, 0
        if processes.is_first_process():
            values, done = _open(place, shape, network.rows)
        done = int(processes.from_first_process({"done": float(done)})["done"])

        def save(batches: int) -> None:
            if values is not None:
                values.flush()
                write_json(place / _PROGRESS, {"rows": network.rows, "batches": batches})

        batches = self._batches(source, views, done)
        computed = outputs(network.freeze, self._variables, batches, network.mesh)
        with (
            contextlib.closing(batches),
            progress.shown("compute features", total) as advance,
        ):
            advance(min(total, done * network.rows))
            for rows, index in computed:
                done += 1
                if values is not None:
                    is_image = index >= 0
                    values.reshape(total, *shape[2:])[index[is_image]] = _rounded(rows[is_image])
                advance(len(index))
                if done % _SAVE_EVERY == 0:
                    save(done)
                    self._interrupt()
            save(done)

    def _batches(self, source: Source, views: int | None, start: int) -> data.Batches:
        config = self._network.data
        order = {
            "batch_size": self._network.rows,
            "image_size": config.test_side if views is None else config.image_size,
            "start_batch": start,
            "num_workers": config.num_workers,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
        if views is None:
            return data.test_batches(source, resize=config.resize, **order)
        return data.view_batches(source, views=views, augmentation=config.augmentation, **order)


def _digest_of_frozen_part(network: Network, variables: dict[str, PyTree]) -> dict[str, Any]:
    """Returns the settings and the digest of the variables of the frozen part."""
    model, digest = network.model, hashlib.sha256()
    flat = flax.traverse_util.flatten_dict(variables)
    for path in sorted(network.frozen):
        digest.update(repr(path).encode())
        digest.update(np.asarray(jax.device_get(flat[path])).tobytes())
    names = (
        "backbone",
        "width",
        "stem",
        "channels",
        "normalisation",
        "pooling",
        "dtype",
        "train_from",
    )
    settings = {name: getattr(model, name) for name in names}
    return {"format": _FORMAT, "variables": digest.hexdigest(), **settings}


def _digest_of_images(source: Source) -> str:
    """Returns a digest of names and contents of images."""
    digest = hashlib.sha256(json.dumps(source.names).encode())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for of_image in pool.map(lambda i: hashlib.sha256(source[i]).digest(), range(len(source))):
            digest.update(of_image)
    return digest.hexdigest()


def _open(place: Path, shape: tuple[int, ...], rows: int) -> tuple[np.memmap, int]:
    """Opens the features of an incomplete cache for writing.

    Args:
        place: folder of the cache.
        shape: shape of the features.
        rows: number of images in a batch.

    Returns:
        The features, and the number of batches that an interrupted computation has written.

    Raises:
        OSError: there is not enough space for them.
    """
    recorded, file = read_json(place / _PROGRESS) or {}, place / _FEATURES
    # With another batch size, as on other devices, the batches are others.
    if recorded.get("rows") == rows and file.exists():
        return np.lib.format.open_memmap(file, mode="r+"), recorded["batches"]
    (place / _PROGRESS).unlink(missing_ok=True)
    with errors_with_path(file):
        values = np.lib.format.open_memmap(file, mode="w+", dtype=DTYPE, shape=shape)
        # Otherwise, a write to the map of a file on a full disk would kill the process.
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return values, 0


def _rounded(features: Float32[np.ndarray, "b *shape"]) -> Float16[np.ndarray, "b *shape"]:
    with np.errstate(over="ignore"):
        rounded = features.astype(DTYPE)
    if not np.isfinite(rounded).all():
        raise UserError(
            "the results of the frozen part of the network are not finite in float16 (the largest "
            f"is {np.abs(features).max():g}), so config.data.cache cannot be 'features'"
        )
    return rounded


def _place(url: str) -> Path:
    """Returns the local folder of a cache; for a URL, that of its copy, or of one to be made."""
    if not storage.is_url(url):
        return Path(url)
    is_there = _COMPLETE in storage.names(url)
    return storage.local(url) if is_there else storage.local_folder(url, "computed")


def _finish(place: Path, url: str, about: Mapping[str, Any]) -> None:
    """Records that a cache is complete, and uploads it if it belongs to a URL."""
    write_json(place / _COMPLETE, {**about, "sha256": _sha256(place / _FEATURES)})
    (place / _PROGRESS).unlink()
    _upload(place, url)


def _upload(place: Path, url: str) -> None:
    """Uploads a complete cache that belongs to a URL and is not there."""
    if storage.is_url(url) and _COMPLETE not in storage.names(url):
        for name in (_FEATURES, _COMPLETE):
            storage.upload(place, url, [name])


def _check(place: Path) -> None:
    """Checks a complete cache.

    Raises:
        ValueError: it is damaged.
    """
    recorded = read_json(place / _COMPLETE) or {}
    file = place / _FEATURES
    if not file.exists() or _sha256(file) != recorded.get("sha256"):
        raise UserError(f"the feature cache {place} is damaged; delete it to compute it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
