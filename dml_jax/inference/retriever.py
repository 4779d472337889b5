"""A trained network that embeds images and searches among embeddings."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np
from jaxtyping import Array, Float, Float32, Int64, UInt8
from PIL import Image
from safetensors.numpy import load_file

from dml_jax._utils import files, hub, sharding
from dml_jax._utils.errors import UserError
from dml_jax.data.config import test_side
from dml_jax.data.images import centre_view, decode, from_pillow
from dml_jax.evaluation import embedding_files
from dml_jax.inference import trained
from dml_jax.retrieval import exact
from dml_jax.training import bucket, run_directory

FUNCTION = "embed.jax_export"
WEIGHTS = "weights.safetensors"
THRESHOLD = "threshold.json"

_BATCH = 64  # Images embedded at a time; smaller batches are padded to a power of two.

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
"""The path of an image, a Pillow image, or upright RGB pixels, uint8 [h, w, 3]."""


class Neighbours(NamedTuple):
    """The nearest embeddings of a gallery, nearest first."""

    indices: Int64[np.ndarray, "q k"]
    """Rows of the gallery."""
    similarities: Float32[np.ndarray, "q k"]
    """Cosine similarities to the query."""
    names: tuple[tuple[str, ...], ...]
    """Names of the images if the gallery has names; else the row numbers as strings."""


class Retriever:
    """A trained network that embeds images and searches with them; see `load`."""

    def __init__(
        self,
        function: Callable[[UInt8[np.ndarray, "b s s 3"]], Float[Array, "b d"]],
        *,
        image_size: int,
        resize: int,
        threshold: float | None = None,
    ) -> None:
        """Wraps an embedding function.

        Args:
            function: the network, compiled for every new batch size.
            image_size: side of its input images, pixels.
            resize: length of the shorter side of an image before the centre crop, pixels.
            threshold: the cosine similarity below which two images are taken to be of different
                classes; None if the export has none.
        """
        self.threshold = threshold
        self._function, self._image_size, self._resize = function, image_size, resize

    def embed(
        self, images: Sequence[ImageLike] | UInt8[np.ndarray, "n h w 3"]
    ) -> Float32[np.ndarray, "n d"]:
        """Embeds images, with the test-time resizing and crop.

        Args:
            images: n images, at least one; see `ImageLike`.

        Returns:
            [n, d] raw embeddings, not normalised, like those that a run saves.

        Raises:
            TypeError: `images` is not a sequence of images.
            ValueError: an image cannot be read, or there is none.
            FileNotFoundError: a file does not exist.
        """
        single = isinstance(images, str | os.PathLike | Image.Image)
        if single or (isinstance(images, np.ndarray) and images.ndim == 3):
            raise TypeError("images must be a list; pass a single image as [image]")
        for number, image in enumerate(images):
            _check(image, number)
        if not len(images):
            raise UserError("there are no images to embed")
        images = list(images)
        blocks = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
        return np.concatenate([self._embed_block(block) for block in blocks])

    def _embed_block(self, images: Sequence[ImageLike]) -> Float32[np.ndarray, "n d"]:
        # Powers of two, because each batch size is compiled.
        rows = 1 << (len(images) - 1).bit_length()
        batch = np.zeros((rows, self._image_size, self._image_size, 3), np.uint8)
        for view, image in zip(batch, images, strict=False):
            view[:] = centre_view(_pixels(image), size=self._image_size, resize_to=self._resize)
        return np.asarray(self._function(batch))[: len(images)]

    def search(
        self,
        images: Sequence[ImageLike] | UInt8[np.ndarray, "n h w 3"],
        gallery: str | os.PathLike[str] | Float32[np.ndarray, "m d"],
        *,
        k: int = 10,
    ) -> Neighbours:
        """Finds the nearest embeddings of a gallery by exact search with cosine similarity.

        Args:
            images: q queries; see `ImageLike`.
            gallery: [m, d] embeddings, or a file of embeddings, as written by a run
                (`embeddings.npz`) or by `scripts/embed.py`.
            k: number of neighbours of each query, at most m.

        Returns:
            [q, k] rows of the gallery with their similarities and names.

        Raises:
            ValueError: the gallery is too small or from another network, or an image cannot be
                read.
            FileNotFoundError: there is no such file.
        """
        vectors, names = _gallery(gallery)
        queries = exact.unit_rows(self.embed(images))
        if queries.shape[1] != vectors.shape[1]:
            raise UserError(
                f"the gallery's embeddings have {vectors.shape[1]} dimensions, those of this "
                f"network {queries.shape[1]}; embed its images with this network"
            )
        indices = exact.Searcher(vectors).nearest(queries, k)
        similarities = np.einsum("qd,qkd->qk", queries, vectors[indices])
        found = [[names[i] if names else str(i) for i in row] for row in indices.tolist()]
        return Neighbours(indices, similarities, tuple(map(tuple, found)))


def load(path: str | os.PathLike[str], *, checkpoint: str | None = None) -> Retriever:
    """Loads the trained network of a run or of an export; the images of the run are not needed.

    Args:
        path: folder or URL of the run, or of the export by `scripts/export.py`; or hf:OWNER/NAME or
            hf:OWNER/NAME@REVISION of an export on the Hugging Face hub.
        checkpoint: checkpoint of a run: `last` (the default), `best_map`, `best_r1`, `best_rp`, or
            that of a step, such as `step1200`.

    Returns:
        An object that embeds and searches.

    Raises:
        FileNotFoundError: the folder holds no run, the run no such checkpoint, the export lacks
            a file, or the hub cannot be reached.
        ValueError: a checkpoint is named for an export, or a file is damaged.
    """
    folder = find(path)
    config = run_directory.read_config(folder)
    if is_export(folder) and checkpoint is not None:
        raise UserError(f"{path} is an export, which holds one checkpoint; omit `checkpoint`")
    function = (
        _load_export(folder) if is_export(folder) else _load_run(folder, checkpoint or "last")
    )
    chosen = files.read_json(folder / THRESHOLD) or {}
    return Retriever(
        function,
        image_size=test_side(config.data),
        resize=config.data.resize,
        threshold=chosen.get("threshold"),
    )


def find(path: str | os.PathLike[str]) -> Path:
    """Returns a local folder of a run or of an export; see `load` for the path and the errors."""
    if hub.is_location(path):
        needed = run_directory.CONFIG, FUNCTION, WEIGHTS
        return hub.folder(os.fspath(path), needed, optional=(THRESHOLD,))
    return bucket.copy(os.fspath(path))


def is_export(folder: Path) -> bool:
    """Returns whether a folder holds an export and not a run."""
    return (folder / FUNCTION).exists()


def _load_export(folder: Path) -> Callable[[np.ndarray], Array]:
    try:
        exported = jax.export.deserialize(bytearray((folder / FUNCTION).read_bytes()))
    except Exception as error:  # The parser raises nearly any exception.
        raise UserError(f"{folder / FUNCTION} cannot be read by this JAX: {error}") from error
    weights = jax.device_put(load_file(folder / WEIGHTS))
    function = jax.jit(exported.call)
    return lambda images: function(weights, images)


def _load_run(folder: Path, checkpoint: str) -> Callable[[np.ndarray], Array]:
    device = sharding.make_mesh(jax.local_devices()[:1])
    network, variables, _ = trained.load(folder, checkpoint, device)
    return lambda images: network.embed(variables, images)


def _check(image: Any, number: int) -> None:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(
                f"image {number} is {image.dtype} of shape {image.shape}; pixels must be uint8 "
                "[height, width, 3]"
            )
    elif isinstance(image, str | os.PathLike):
        if not Path(image).is_file():
            raise FileNotFoundError(f"image {number}: there is no file {image}")
    elif not isinstance(image, Image.Image):
        raise TypeError(
            f"image {number} has type {type(image).__name__}; it must be a path, a Pillow image or "
            "uint8 pixels"
        )


def _pixels(image: ImageLike) -> UInt8[np.ndarray, "h w 3"]:
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, Image.Image):
        return from_pillow(image)
    return decode(Path(image).read_bytes(), str(image))


def _gallery(
    gallery: str | os.PathLike[str] | np.ndarray,
) -> tuple[Float32[np.ndarray, "m d"], tuple[str, ...]]:
    """Returns the unit vectors of a gallery, and the names of its images if it has any."""
    if isinstance(gallery, np.ndarray):
        return exact.unit_rows(gallery.astype(np.float32, copy=False)), ()
    saved = embedding_files.load_embeddings(gallery)
    return exact.unit_rows(saved.embeddings), saved.names
