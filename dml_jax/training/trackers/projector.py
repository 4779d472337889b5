"""Files for TensorBoard's embedding projector."""

import io
import math
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float32, Int64
from PIL import Image

from dml_jax import data
from dml_jax._utils import files
from dml_jax.training import run_directory
from dml_jax.training.trackers.examples import evenly_spaced, thumbnail

IMAGES = 2000
_SIDE = 48  # Of an image in the sprite, pixels.


def write(folder: Path, source: data.Source, embeddings: Float32[np.ndarray, "images d"]) -> None:
    """Writes up to `IMAGES` embeddings with class names, image names and thumbnails.

    TensorBoard finds them through `projector_config.pbtxt`.

    Args:
        folder: the run's.
        source: the images.
        embeddings: of all images.

    Raises:
        OSError: a file cannot be written; the message has its path.
    """
    directory = folder / run_directory.PROJECTOR
    directory.mkdir(exist_ok=True)
    chosen = evenly_spaced(len(source), IMAGES)
    table = io.StringIO()
    np.savetxt(table, embeddings[chosen], fmt="%.6g", delimiter="\t")
    files.write_text(directory / "tensors.tsv", table.getvalue())
    rows = ["class\timage"]
    rows += [
        f"{_cell(source.class_names[source.labels[index]])}\t{_cell(source.names[index])}"
        for index in chosen.tolist()
    ]
    files.write_text(directory / "metadata.tsv", "\n".join(rows) + "\n")
    lines = [
        'tensor_name: "test images"',
        f'tensor_path: "{run_directory.PROJECTOR}/tensors.tsv"',
        f'metadata_path: "{run_directory.PROJECTOR}/metadata.tsv"',
    ]
    if _write_sprite(directory / "sprite.png", source, chosen):
        lines.append(
            f'sprite {{ image_path: "{run_directory.PROJECTOR}/sprite.png" '
            f"single_image_dim: {_SIDE} single_image_dim: {_SIDE} }}"
        )
    # Last: it names the other files.
    text = "embeddings {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"
    files.write_text(folder / run_directory.PROJECTOR_CONFIG, text)


def _cell(text: str) -> str:
    """Returns text for a cell of a TSV file."""
    return " ".join(text.split())


def _write_sprite(path: Path, source: data.Source, chosen: Int64[np.ndarray, " n"]) -> bool:
    """Writes thumbnails row by row into a square image; returns False if one cannot be read."""
    columns = math.ceil(math.sqrt(len(chosen)))
    sprite = np.full((columns * _SIDE, columns * _SIDE, 3), 255, np.uint8)
    try:
        for number, index in enumerate(chosen.tolist()):
            top, left = _SIDE * (number // columns), _SIDE * (number % columns)
            sprite[top : top + _SIDE, left : left + _SIDE] = thumbnail(source, index, _SIDE)
    except (OSError, ValueError) as error:  # It costs no result.
        logging.warning("the embedding projector shows no images: %s", error)
        return False
    with files.errors_with_path(path):
        Image.fromarray(sprite).save(path, "PNG")
    return True
