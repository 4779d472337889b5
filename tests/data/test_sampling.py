import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dml_jax.data import Order, epoch_order, steps_per_epoch


@st.composite
def balanced(draw):
    """Draws labels, n_instance > 1, and a batch size that they allow."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=12))
    labels = np.random.default_rng(draw(st.integers(0, 99))).permutation(
        np.repeat(np.arange(len(sizes)), sizes)
    )
    n_instance = draw(st.integers(2, 4))
    limit = min(len(sizes), len(labels) // n_instance)
    classes = draw(st.integers(1, limit)) if limit else 0
    return labels, n_instance, classes * n_instance


@given(n=st.integers(1, 60), batch_size=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_unbalanced_epoch_is_a_permutation_without_the_partial_batch(n, batch_size, seed):
    if batch_size > n:
        return
    order = epoch_order(np.zeros(n, int), batch_size=batch_size, n_instance=1, seed=seed, epoch=2)
    assert order.shape == (n // batch_size, batch_size)
    assert len(set(order.flat)) == order.size
    assert set(order.flat) <= set(range(n))


@given(case=balanced(), epoch=st.integers(0, 5))
def test_balanced_batch_has_distinct_classes_and_images(case, epoch):
    labels, n_instance, batch_size = case
    if not batch_size:
        return
    order = epoch_order(labels, batch_size=batch_size, n_instance=n_instance, seed=1, epoch=epoch)
    assert order.shape == (len(labels) // batch_size, batch_size)
    for groups in order.reshape(len(order), -1, n_instance):
        classes = labels[groups]
        assert (classes == classes[:, :1]).all()
        assert len(set(classes[:, 0])) == len(groups)
        for group, label in zip(groups, classes[:, 0], strict=True):
            assert len(set(group)) == min(n_instance, (labels == label).sum())


def test_balanced_batches_draw_classes_uniformly():
    labels = np.repeat(np.arange(5), [2, 4, 40, 40, 114])
    drawn = [
        labels[epoch_order(labels, batch_size=8, n_instance=4, seed=3, epoch=e)] for e in range(40)
    ]
    share = np.bincount(np.concatenate(drawn).ravel()) / np.concatenate(drawn).size
    np.testing.assert_allclose(share, 0.2, atol=0.03)


@pytest.mark.parametrize("n_instance", [1, 2])
def test_order_depends_on_seed_and_epoch_only(n_instance):
    labels = np.repeat(np.arange(10), 5)

    def order(seed, epoch):
        settings = {"batch_size": 10, "n_instance": n_instance, "seed": seed, "epoch": epoch}
        return epoch_order(labels, **settings).tolist()

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert order(1, 2) != order(2, 1)


@pytest.mark.parametrize(
    ("batch_size", "n_instance", "message"),
    [
        (13, 1, "batch_size 13 is larger than the training set of 12 images"),
        (5, 2, "batch_size 5 is not divisible by n_instance 2"),
        (8, 2, "needs 4 classes, the training set has 3"),
        (0, 1, "must be positive, got 0 and 1"),
        (4, 0, "must be positive, got 4 and 0"),
    ],
)
def test_impossible_batches_are_rejected(batch_size, n_instance, message):
    labels = np.repeat(np.arange(3), 4)
    with pytest.raises(ValueError, match=message):
        steps_per_epoch(labels, batch_size=batch_size, n_instance=n_instance)
    with pytest.raises(ValueError, match=message):
        epoch_order(labels, batch_size=batch_size, n_instance=n_instance, seed=0, epoch=0)


def test_order_of_a_step_follows_its_epoch():
    labels = np.repeat(np.arange(5), 4)
    order = Order(labels, batch_size=6, n_instance=2, seed=3)
    epochs = [
        epoch_order(labels, batch_size=6, n_instance=2, seed=3, epoch=epoch) for epoch in range(3)
    ]
    for step in (8, 0, 4, 3):
        np.testing.assert_array_equal(order(step), np.concatenate(epochs)[step])
