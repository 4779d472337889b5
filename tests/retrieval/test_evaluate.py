from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dml_jax import retrieval
from dml_jax.retrieval import exact

GOLDEN = Path(__file__).parents[1] / "golden" / "retrieval.npz"


def slow_reference(embeddings, labels, recall_at, gallery=None):
    """Evaluates the definitions one query at a time, in float64."""

    def unit(x):
        x = np.asarray(x, dtype=np.float64)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    targets, target_labels = (embeddings, labels) if gallery is None else gallery
    queries, targets = unit(embeddings), unit(targets)
    sums, count = np.zeros(len(recall_at) + 2), 0
    for i, query in enumerate(queries):
        order = [int(j) for j in np.argsort(-(targets @ query)) if gallery is not None or j != i]
        correct = [bool(target_labels[j] == labels[i]) for j in order]
        r = sum(correct)
        if r == 0:
            continue
        count += 1
        precisions = [sum(correct[: j + 1]) / (j + 1) for j in range(r) if correct[j]]
        sums += [
            *(any(correct[:k]) for k in recall_at),
            sum(correct[:r]) / r,
            sum(precisions) / r,
        ]
    return sums / count, len(queries) - count


def values(result, recall_at):
    return [*(result[f"recall@{k}"] for k in recall_at), result["r_precision"], result["map@r"]]


def test_golden():
    golden = np.load(GOLDEN)
    recall_at = tuple(golden["recall_at"].tolist())
    # The metrics do not depend on the lengths of the embeddings.
    lengths = np.random.default_rng(0).uniform(0.1, 10, size=(len(golden["labels"]), 1))
    for scale in (1, lengths):
        result = retrieval.evaluate(
            golden["embeddings"] * scale, golden["labels"], recall_at=recall_at
        )
        expected = [*golden["recall"], golden["r_precision"], golden["map_at_r"]]
        np.testing.assert_allclose(values(result, recall_at), expected, rtol=0, atol=1e-6)
        assert result["queries_without_match"] == 0


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(3, 40),
    m=st.integers(2, 40),
    classes=st.integers(1, 12),
    dtype=st.sampled_from([np.int8, np.uint16, np.int32, np.int64, np.uint64]),
    split=st.booleans(),
)
def test_against_slow_reference(seed, n, m, classes, dtype, split):
    rng = np.random.default_rng(seed)

    def draw(count):
        labels = rng.integers(classes, size=count).astype(dtype)
        labels[0] = 0
        return rng.standard_normal((count, 6)).astype(np.float32), labels

    embeddings, labels = draw(n)
    labels[1] = 0  # with the first, at least one pair
    gallery = draw(m) if split else None
    recall_at = sorted({1, min(2, n - 1), m if split else n - 1})
    expected, without = slow_reference(embeddings, labels, recall_at, gallery)
    result = retrieval.evaluate(embeddings, labels, recall_at=recall_at, gallery=gallery)
    np.testing.assert_allclose(values(result, recall_at), expected, rtol=0, atol=1e-9)
    assert result["queries_without_match"] == without


def test_many_blocks_of_classes_of_different_sizes(monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2, 3, 4], [150, 60, 40, 2, 1]))
    embeddings = rng.standard_normal((len(labels), 6)).astype(np.float32)
    expected, without = slow_reference(embeddings, labels, (1, 4))
    monkeypatch.setattr(retrieval, "_BLOCK_QUERIES", 32)
    monkeypatch.setattr(retrieval, "_BLOCK_NEIGHBOURS", 1500)
    sizes = []
    nearest = exact.Searcher.nearest

    def spy(self, queries, k, *, own=None):
        sizes.append((len(queries), k))
        return nearest(self, queries, k, own=own)

    monkeypatch.setattr(exact.Searcher, "nearest", spy)
    result = retrieval.evaluate(embeddings, labels, recall_at=(1, 4))
    np.testing.assert_allclose(values(result, (1, 4)), expected, rtol=0, atol=1e-9)
    assert without == result["queries_without_match"] == 1
    assert sizes == [(10, 149)] * 15 + [(25, 59)] * 3 + [(27, 39)]


@pytest.mark.parametrize("split", [False, True])
def test_jax_and_faiss_give_equal_metrics(split):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2, 3, 4], [60, 40, 20, 2, 1]))
    embeddings = rng.standard_normal((len(labels), 16)).astype(np.float32)
    options = {"recall_at": (1, 4), "gallery": (embeddings[:70], labels[:70]) if split else None}
    expected = retrieval.evaluate(embeddings[50:], labels[50:], backend="cpu", **options)
    with jax.transfer_guard("disallow"):  # As in the training loop.
        result = retrieval.evaluate(embeddings[50:], labels[50:], backend="jax", **options)
    assert result == expected
    assert 0 < expected["map@r"] < 0.9


def test_copies_of_the_query_are_neighbours_but_not_the_query_itself():
    rng = np.random.default_rng(0)
    distinct = rng.standard_normal((20, 8)).astype(np.float32)
    # Two copies of each image: R is 1, and the other copy is the nearest.
    twins = np.repeat(distinct, 2, axis=0)
    result = retrieval.evaluate(twins, np.repeat(np.arange(20), 2), recall_at=(1,))
    assert values(result, (1,)) == [1, 1, 1]
    # Ten copies of each image: R is 9, the other copies.
    result = retrieval.evaluate(
        np.tile(distinct, (10, 1)), np.tile(np.arange(20), 10), recall_at=(1, 9)
    )
    assert values(result, (1, 9)) == [1, 1, 1, 1]
    # If a query were its own neighbour, it would be a match.
    result = retrieval.evaluate(twins, np.tile([0, 1], 20), recall_at=(1,))
    assert result["recall@1"] == 0


def test_queries_without_match_are_excluded():
    embeddings = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], np.float32)
    result = retrieval.evaluate(embeddings, np.array([5, 5, 7, -2]), recall_at=(1,))
    assert result == {"recall@1": 1, "r_precision": 1, "map@r": 1, "queries_without_match": 2}
    gallery = (embeddings, np.array([5, 7, 5, 5]))
    result = retrieval.evaluate(
        embeddings[:2], np.array([5, 9]), recall_at=(1,), gallery=gallery, nmi=True
    )
    # R is 3; the ranks of the matches are 1, 3 and 4, since a gallery includes all images.
    assert result["recall@1"] == 1
    assert result["r_precision"] == pytest.approx(2 / 3)
    assert result["map@r"] == pytest.approx((1 + 2 / 3) / 3)
    assert result["nmi"] == 1
    assert result["queries_without_match"] == 1


def test_nmi_of_separate_and_of_mixed_classes():
    rng = np.random.default_rng(0)
    labels = np.repeat([3, 8], 50)
    embeddings = np.eye(2, 16)[labels // 8] + 0.01 * rng.standard_normal((100, 16))
    assert retrieval.evaluate(embeddings, labels, nmi=True)["nmi"] == pytest.approx(1)
    assert retrieval.evaluate(embeddings, rng.permutation(labels), nmi=True)["nmi"] < 0.1
    assert "nmi" not in retrieval.evaluate(embeddings, labels)


def test_zero_and_extreme_embeddings_give_finite_metrics():
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((12, 4)).astype(np.float32)
    labels = np.arange(12) % 3
    expected = retrieval.evaluate(embeddings, labels)
    scales = np.float32([1e-30, 1e30] * 6)[:, None]
    assert retrieval.evaluate(embeddings * scales, labels) == expected
    embeddings[::2] = 0
    result = retrieval.evaluate(embeddings, labels, nmi=True)
    assert np.isfinite(list(result.values())).all()


X = np.eye(4, 3, dtype=np.float32)
Y = np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((X, Y[:3]), ValueError, "4 embeddings but 3 labels"),
        ((X[0], Y), ValueError, r"must be \[n, d\].*\(3,\)"),
        ((X, Y[:, None]), ValueError, r"labels \[n\]"),
        ((X[:0], Y[:0]), ValueError, "empty"),
        (([[]], []), ValueError, "empty"),
        ((X, Y.astype(np.float32)), TypeError, "integers, got float32"),
        ((X, Y > 0), TypeError, "integers, got bool"),
        ((np.where(X > 0, np.nan, X), Y), ValueError, "3 embeddings are not finite.*row 0"),
        ((X.astype(np.float64) * 1e200, Y), ValueError, "not finite in float32"),
        ((X, np.arange(4)), ValueError, "no query has an image"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        retrieval.evaluate(*arguments, recall_at=(1,))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"recall_at": (1, 4)}, ValueError, r"must be in 1\.\.3"),
        ({"recall_at": (0, 1)}, ValueError, r"must be in 1\.\.3"),
        ({"recall_at": (1, 5), "gallery": (X, Y)}, ValueError, r"must be in 1\.\.4"),
        ({"gallery": (X[:, :2], Y)}, ValueError, "3 dimensions, the gallery's 2"),
        ({"gallery": (X, Y[:2])}, ValueError, "4 gallery embeddings but 2 labels"),
        ({"gallery": (X, Y / 2)}, TypeError, "gallery labels must be integers"),
        ({"recall_at": (1,), "backend": "cuda"}, ValueError, "'cuda'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        retrieval.evaluate(X, Y, **options)


ANYTHING = st.one_of(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.complex64, "U3", bool]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6),
    ),
    st.lists(st.lists(st.floats(width=32), max_size=4), max_size=6),
    st.sampled_from([None, "text", object(), {}, np.array([None, 1])]),
)
FLOATS = hnp.arrays(
    np.float32, st.tuples(st.integers(0, 9), st.integers(0, 4)), elements=st.floats(width=32)
)


@given(
    embeddings=st.one_of(FLOATS, ANYTHING),
    labels=st.one_of(hnp.arrays(np.int32, st.integers(0, 9), elements=st.integers(0, 2)), ANYTHING),
    gallery=st.one_of(st.none(), st.tuples(ANYTHING, ANYTHING)),
    recall_at=st.one_of(st.just((1,)), st.lists(st.one_of(st.integers(), st.floats()), max_size=3)),
    nmi=st.booleans(),
)
def test_arbitrary_arrays_raise_only_documented_errors(embeddings, labels, gallery, recall_at, nmi):
    jaxtyping.config.update("jaxtyping_disable", True)  # As for users.
    try:
        result = retrieval.evaluate(
            embeddings, labels, recall_at=recall_at, gallery=gallery, nmi=nmi
        )
    except (ValueError, TypeError) as error:
        assert len(str(error)) < 500 and "TypeCheckError" not in repr(error)
    else:
        matched = [value for name, value in result.items() if name != "queries_without_match"]
        assert all(0 <= value <= 1 for value in matched)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
