"""Example queries with their nearest neighbours, drawn as images."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from dml_jax import data
from dml_jax.data.splits import gallery_of
from dml_jax.retrieval import exact

QUERIES = 8
NEIGHBOURS = 5
_SIDE = 96  # Of an image, pixels.
_FRAME = 4  # Around it, pixels.
_WHITE, _GREEN, _RED = (255, 255, 255), (0, 160, 0), (220, 0, 0)


def strips(
    sources: Mapping[str, data.Source],
    embeddings: Mapping[str, Float32[np.ndarray, "_ d"]],
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Returns an image per query: the query and its nearest neighbours, side by side.

    There are up to `QUERIES` queries, the same in every call, with `NEIGHBOURS` neighbours each,
    nearest first. A neighbour of the query's class has a green frame, any other a red one.

    Args:
        sources: the images by split.
        embeddings: of the evaluated split, and of its gallery if it has one, by split; see
            `Evaluator.embed`.

    Raises:
        OSError: an image cannot be read.
        ValueError: an image cannot be decoded, or embeddings are not finite.
    """
    (split,) = embeddings.keys() - {"gallery"}
    queries, gallery = sources[split], gallery_of(sources, split)
    chosen = evenly_spaced(len(queries), QUERIES)
    units = exact.unit_rows(embeddings[split] if gallery is None else embeddings["gallery"])
    k = min(NEIGHBOURS, len(units) - (gallery is None))
    nearest = exact.make(units, "cpu").nearest(
        exact.unit_rows(embeddings[split][chosen]), k, own=chosen if gallery is None else None
    )
    found_in = queries if gallery is None else gallery
    return [
        _draw(queries, int(query), found_in, row)
        for query, row in zip(chosen, nearest, strict=True)
    ]


def _draw(
    queries: data.Source, query: int, gallery: data.Source, neighbours: Int64[np.ndarray, " k"]
) -> UInt8[np.ndarray, "h w 3"]:
    tiles = [_framed(thumbnail(queries, query, _SIDE), _WHITE)]
    for index in neighbours.tolist():
        correct = gallery.labels[index] == queries.labels[query]
        tiles.append(_framed(thumbnail(gallery, index, _SIDE), _GREEN if correct else _RED))
    return np.concatenate(tiles, axis=1)


def thumbnail(source: data.Source, index: int, side: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """Returns the centre square of an image, resized to `side` pixels.

    Raises:
        OSError: the image cannot be read.
        ValueError: the image cannot be decoded.
    """
    # Not `source.image`, which may keep decoded images in memory.
    image = data.decode(source[index], source.where(index), min_side=side)
    return data.centre_view(image, size=side, resize_to=side)


def evenly_spaced(count: int, most: int) -> Int64[np.ndarray, " n"]:
    """Returns up to `most` indices below `count`, evenly spaced.

    >>> evenly_spaced(10, 4)
    array([0, 2, 5, 7])
    >>> evenly_spaced(3, 4)
    array([0, 1, 2])
    """
    number = min(count, most)
    return np.arange(number) * count // max(number, 1)


def _framed(image: UInt8[np.ndarray, "h w 3"], colour: Sequence[int]) -> np.ndarray:
    height, width, _ = image.shape
    framed = np.full((height + 2 * _FRAME, width + 2 * _FRAME, 3), colour, np.uint8)
    framed[_FRAME:-_FRAME, _FRAME:-_FRAME] = image
    return framed
