"""The similarity below which two images are taken to be of different classes."""

from typing import NamedTuple

from dml_jax._utils.errors import UserError
from dml_jax.evaluation.embedding_files import Embeddings
from dml_jax.retrieval import exact, verification


class Threshold(NamedTuple):
    """A threshold, and the errors that it made on the images that it was chosen with."""

    threshold: float
    fmr: float | None = None
    """False match rate that it was chosen for; None if it was given."""
    fnmr: float | None = None
    """False non-match rate."""


def checked(given: float) -> Threshold:
    """Returns a threshold that the user gives.

    Raises:
        ValueError: it is no cosine similarity.
    """
    if not -1 <= given <= 1:
        raise UserError(f"the threshold {given} must be a cosine similarity, in -1..1")
    return Threshold(given)


def at_fmr(fmr: float, images: Embeddings, gallery: Embeddings | None = None) -> Threshold:
    """Returns the threshold for a false match rate.

    Args:
        fmr: the false match rate, among all pairs of images.
        images: raw embeddings of labelled images.
        gallery: those that they are compared with; by default each other.

    Raises:
        ValueError: the rate is out of range, or there are too few pairs for it.
    """
    if not 0 < fmr < 1:
        raise UserError(f"the false match rate {fmr} must be above 0 and below 1")
    others = None
    if gallery is not None:
        others = exact.unit_rows(gallery.embeddings), gallery.labels
    unit = exact.unit_rows(images.embeddings)
    ((threshold, fnmr),) = verification.operating_points(unit, images.labels, others, [fmr])
    return Threshold(threshold, fmr, fnmr)
