"""Verification: whether two images are of one class, decided by a threshold of their similarity.

Every query is compared with every image of the gallery. The numbers are those of a sort of all
similarities, but the memory does not grow with the pairs: the similarities are counted by the upper
16 bits of their float32 representation, and in a second pass by the lower 16 bits where a threshold
lies.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64, UInt32

from dml_jax._utils.errors import UserError

_BINS = 1 << 16
# Similarities of a block, in a few arrays of 4 or 8 bytes each.
_BLOCK_QUERIES, _BLOCK_GALLERY = 1024, 4096


class OperatingPoint(NamedTuple):
    """The errors of a threshold: pairs with at least this similarity are accepted."""

    threshold: float
    """The smallest float32 number with which the false match rate is at most the given one."""
    fnmr: float
    """False non-match rate: share of the pairs of one class below the threshold."""


def operating_points(
    queries: Float32[np.ndarray, "q d"],
    query_labels: Int[np.ndarray, " q"],
    gallery: tuple[Float32[np.ndarray, "n d"], Int[np.ndarray, " n"]] | None,
    rates: Sequence[float],
) -> list[OperatingPoint]:
    """Returns the FNMR at false match rates, and the thresholds that have them.

    The false match rate (FMR) is the share of the pairs of two classes with at least the
    threshold's similarity. Computes all similarities twice, on the host.

    Source: ISO/IEC 19795-1, Biometric performance testing and reporting, for the terms.

    Args:
        queries: [q, d] unit vectors.
        query_labels: [q] classes.
        gallery: unit vectors [n, d] and classes [n]; without it, each pair of queries counts once.
        rates: false match rates, above 0 and below 1.

    Returns:
        For each rate, its threshold and FNMR.

    Raises:
        ValueError: there are no pairs of one class, or so few of two classes that one of them alone
            exceeds a rate.
    """
    high = np.zeros((2, _BINS), np.int64)
    for keys, same in _pairs(queries, query_labels, gallery):
        high += _count(keys >> 16, same)
    different, same_class = high.sum(axis=1).tolist()
    if not same_class:
        raise UserError("there is no pair of two images of one class, so the FNMR is undefined")
    for rate in rates:
        if not _allowed(rate, max(different, 1)):
            raise UserError(
                f"a false match rate of {rate:g} needs at least {1 / rate:.0f} pairs of different "
                f"classes, but there are {different}; choose a higher rate"
            )
    # The similarity of the first false match that is one too many.
    excess = [_allowed(rate, different) for rate in rates]
    descending = np.cumsum(high[0, ::-1])
    bins = [_BINS - 1 - int(np.searchsorted(descending, k, side="right")) for k in excess]
    low = {number: np.zeros((2, _BINS), np.int64) for number in bins}
    for keys, same in _pairs(queries, query_labels, gallery):
        for number, counts in low.items():
            chosen = (keys >> 16) == number
            counts += _count(keys[chosen] & 0xFFFF, same[chosen])
    return [_point(high, low[number], number, k) for number, k in zip(bins, excess, strict=True)]


def _allowed(rate: float, pairs: int) -> int:
    """Returns the largest number of pairs whose share is at most the rate."""
    count = int(rate * pairs) + 1  # The product is rounded.
    while count / pairs > rate:
        count -= 1
    return count


def _point(
    high: Int64[np.ndarray, "2 bins"], low: Int64[np.ndarray, "2 bins"], number: int, excess: int
) -> OperatingPoint:
    """Returns the operating point just above the similarity of false match number `excess`.

    Args:
        high: pairs of two classes and of one, by the upper half of their keys.
        low: those in the bin `number`, by the lower half.
        number: the bin of that false match.
        excess: how many pairs of two classes have a higher rank, in descending order.
    """
    above = int(high[0, number + 1 :].sum())
    descending = np.cumsum(low[0, ::-1])
    lowest = _BINS - 1 - int(np.searchsorted(descending, excess - above, side="right"))
    key = (number << 16) + lowest
    rejected = int(high[1, :number].sum() + low[1, : lowest + 1].sum())
    return OperatingPoint(
        float(np.nextafter(_similarity(key), np.float32(np.inf))), rejected / int(high[1].sum())
    )


def _pairs(
    queries: Float32[np.ndarray, "q d"],
    query_labels: Int[np.ndarray, " q"],
    gallery: tuple[Float32[np.ndarray, "n d"], Int[np.ndarray, " n"]] | None,
) -> Iterator[tuple[UInt32[np.ndarray, " pairs"], Bool[np.ndarray, " pairs"]]]:
    """Yields the similarities of blocks of pairs, as keys, and whether they are of one class."""
    targets, target_labels = (queries, query_labels) if gallery is None else gallery
    for row in range(0, len(queries), _BLOCK_QUERIES):
        rows = slice(row, row + _BLOCK_QUERIES)
        for column in range(row if gallery is None else 0, len(targets), _BLOCK_GALLERY):
            columns = slice(column, column + _BLOCK_GALLERY)
            keys = _keys(queries[rows] @ targets[columns].T)
            same = query_labels[rows, None] == target_labels[None, columns]
            if gallery is None and column < row + _BLOCK_QUERIES:
                later = np.arange(same.shape[1]) + column > np.arange(len(same))[:, None] + row
                yield keys[later], same[later]
            else:
                yield keys.ravel(), same.ravel()


def _keys(similarities: Float32[np.ndarray, "q n"]) -> UInt32[np.ndarray, "q n"]:
    """Returns integers in the order of float32 numbers; zeros of both signs are equal."""
    bits = (similarities + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _similarity(key: int) -> np.float32:
    """Returns the number of a key."""
    bits = key ^ (1 << 31) if key >> 31 else key ^ 0xFFFFFFFF
    return np.uint32(bits).view(np.float32)


def _count(
    numbers: UInt32[np.ndarray, " pairs"], same: Bool[np.ndarray, " pairs"]
) -> Int64[np.ndarray, "2 bins"]:
    """Returns how many pairs of two classes, and of one, have each number below `_BINS`."""
    cells = numbers + np.uint32(_BINS) * same
    return np.bincount(cells, minlength=2 * _BINS).reshape(2, _BINS)
