from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from dml_jax import losses, proxy_synthesis
from dml_jax._utils import numerics
from tests.helpers.oracles import LOSSES, normalized, prepared

GOLDEN = np.load(Path(__file__).parent / "golden" / "proxy_synthesis.npz")


def synthetic_loss(name, embeddings, proxies, labels, **mixing):
    return losses.create(name)(
        **proxy_synthesis.synthesize(embeddings, proxies, labels, **mixing)._asdict()
    )


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["norm_softmax", "proxy_nca"])
def test_losses_and_gradients_match_the_official_implementation(name, ratio):
    labels = jnp.asarray(GOLDEN["labels"])
    value, gradients = jax.value_and_grad(
        lambda e, p: synthetic_loss(
            name,
            e,
            p,
            labels,
            lam=jnp.asarray(GOLDEN["lam"]),
            partner=jnp.roll(jnp.arange(len(labels)), 1),
            ratio=ratio,
        ),
        argnums=(0, 1),
    )(jnp.asarray(GOLDEN["embeddings"]), jnp.asarray(GOLDEN["proxies"]))
    key = f"{name}_mu{ratio}"
    np.testing.assert_allclose(value, GOLDEN[f"{key}_loss"], rtol=1e-5)
    for gradient, argument in zip(gradients, ("embeddings", "proxies"), strict=True):
        expected = GOLDEN[f"{key}_grad_{argument}"]
        assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_equals_its_definition_with_synthetic_classes(name):
    hyperparameters = {"centers_per_class": 3} if name == "soft_triple" else {}
    loss = losses.create(name, **hyperparameters)
    per_class = loss.proxies_per_class
    embeddings, proxies, labels = make_problem([2, 0, 1, 2], classes=4 * per_class)
    lam, partner = jnp.asarray(0.3), jnp.asarray([1, 3, 0, 2])

    def loss_with_ps(e, p):
        mixed = proxy_synthesis.synthesize(
            e, p, labels, lam=lam, partner=partner, ratio=0.75, loss=loss
        )
        return loss(**mixed._asdict())

    def definition(e, p):
        e, p = prepared(name, e, p)
        class_proxies = [p[per_class * label : per_class * (label + 1)] for label in range(4)]
        for i in range(3):
            j = int(partner[i])
            e = jnp.concatenate([e, (lam * e[i] + (1 - lam) * e[j])[None]])
            mixture = (
                lam * class_proxies[int(labels[i])] + (1 - lam) * class_proxies[int(labels[j])]
            )
            p = jnp.concatenate([p, mixture])
        e, p = prepared(name, e, p)
        all_labels = jnp.concatenate([labels, jnp.arange(4, 7)])
        return LOSSES[name](
            e, p, all_labels, jnp.ones(7, bool), jnp.ones(7, bool), **hyperparameters
        )

    value, gradients = jax.value_and_grad(loss_with_ps, argnums=(0, 1))(embeddings, proxies)
    expected, expected_gradients = jax.value_and_grad(definition, argnums=(0, 1))(
        embeddings, proxies
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def make_problem(labels, classes, dim=4):
    rng = np.random.default_rng(0)
    embeddings = jnp.asarray(rng.normal(size=(len(labels), dim)), jnp.float32)
    proxies = jnp.asarray(rng.normal(size=(classes, dim)), jnp.float32)
    return embeddings, proxies, jnp.asarray(labels)


def test_mixes_embeddings_and_proxies_with_the_same_weight():
    embeddings, proxies, labels = make_problem([2, 0, 1], classes=3)
    mixed = proxy_synthesis.synthesize(
        embeddings,
        proxies,
        labels,
        lam=jnp.asarray(0.3),
        partner=jnp.asarray([1, 2, 0]),
        ratio=1.0,
    )
    e, p = normalized(embeddings), normalized(proxies)
    mixtures = 0.3 * e + 0.7 * e[jnp.asarray([1, 2, 0])]
    chex.assert_trees_all_close(mixed.embeddings[3:], normalized(mixtures), rtol=1e-5)
    mixtures = 0.3 * p[labels] + 0.7 * p[jnp.asarray([0, 1, 2])]
    chex.assert_trees_all_close(mixed.proxies[3:], normalized(mixtures), rtol=1e-5)
    assert mixed.labels.tolist() == [2, 0, 1, 3, 4, 5]


def test_pairs_of_one_class_are_masked_out():
    embeddings, proxies, labels = make_problem([0, 0, 0, 1], classes=2)
    lam, partner = jnp.asarray(0.4), jnp.asarray([1, 2, 3, 0])
    value = synthetic_loss(
        "norm_softmax", embeddings, proxies, labels, lam=lam, partner=partner, ratio=1.0
    )
    e, p = normalized(embeddings), normalized(proxies)
    mix = jnp.asarray([0.4, 0.6])
    valid = [(2, 3), (3, 0)]
    expected = losses.create("norm_softmax")(
        jnp.concatenate([e, *[(mix @ e[jnp.asarray(pair)])[None] for pair in valid]]),
        jnp.concatenate([p, *[(mix @ p[labels[jnp.asarray(pair)]])[None] for pair in valid]]),
        jnp.asarray([0, 0, 0, 1, 2, 3]),
    )
    chex.assert_trees_all_close(value, expected, rtol=1e-6)


@pytest.mark.slow
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=24), seed=st.integers(0, 99))
def test_partners_are_a_permutation_with_the_fewest_possible_pairs_of_one_class(labels, seed):
    labels = np.asarray(labels + [0] * (24 - len(labels)))
    _, partner = proxy_synthesis.draw(
        jax.random.key(seed), jnp.asarray(labels), alpha=0.4, ratio=1.0
    )
    (partner,) = np.asarray(partner)
    assert sorted(partner) == list(range(len(labels)))
    largest = np.bincount(labels).max()
    # At most all pairs, or two for each sample outside the largest class, can be of two classes.
    possible = min(len(labels), 2 * (len(labels) - largest))
    assert np.sum(labels != labels[partner]) == possible


def partners(labels, seed=0):
    """Returns a draw of partners for each row of labels `[draws, batch]`."""
    keys = jax.random.split(jax.random.key(seed), len(labels))
    draw = jax.vmap(lambda key, row: proxy_synthesis.draw(key, row, alpha=0.4, ratio=1.0)[1][0])
    return np.asarray(jax.jit(draw)(keys, jnp.asarray(labels)))


def twins(labels, partner):
    """Returns the number of samples that share their pair of classes with another sample."""
    pairs = np.stack([labels, labels[partner]])
    _, counts = np.unique(pairs, axis=1, return_counts=True)
    return counts[counts > 1].sum()


def draw_batches(classes, n_instance):
    """Returns labels of 200 batches of 128, distributed as in training."""
    rng = np.random.default_rng(0)
    if n_instance == 1:
        return rng.integers(0, classes, (200, 128))
    drawn = [rng.choice(classes, 128 // n_instance, replace=False) for _ in range(200)]
    return np.repeat(drawn, n_instance, axis=1)


@pytest.mark.parametrize(
    ("classes", "n_instance", "limit"), [(98, 1, 2.5), (64, 2, 2.0), (98, 2, 2.0), (11_318, 1, 0.1)]
)
def test_few_synthetic_classes_share_a_pair_of_classes(classes, n_instance, limit):
    labels = draw_batches(classes, n_instance)
    drawn = partners(labels)
    mean = np.mean([twins(*pair) for pair in zip(labels, drawn, strict=True)])
    # The expected number for independent partners.
    independent = np.random.default_rng(1).permuted(np.tile(np.arange(128), (200, 1)), axis=1)
    expected = np.mean([twins(*pair) for pair in zip(labels, independent, strict=True)])
    assert mean <= limit
    assert mean <= 1.25 * expected + 0.1
    assert (np.take_along_axis(labels, drawn, axis=1) != labels).all()


@pytest.mark.parametrize("n_instance", [1, 2])
def test_partners_are_uniform_over_the_other_classes(n_instance):
    labels = np.arange(12) // n_instance
    draws = 6000
    counts = np.zeros((12, 12))
    for partner in partners(np.tile(labels, (draws, 1))):
        counts[np.arange(12), partner] += 1
    allowed = labels[:, None] != labels[None]
    assert not counts[~allowed].any()
    p_values = [
        scipy.stats.chisquare(row[mask]).pvalue for row, mask in zip(counts, allowed, strict=True)
    ]
    assert min(p_values) > 1e-3


def test_partners_of_two_samples_are_nearly_independent():
    labels = np.arange(10)
    counts = np.zeros((10, 10))
    for first, second in partners(np.tile(labels, (20_000, 1)))[:, :2]:
        counts[first, second] += 1
    # Partners form one cycle: two samples differ in their partners, and no two are each other's.
    possible = ~np.eye(10, dtype=bool)
    possible[0] = possible[:, 1] = possible[1, 0] = False
    assert not counts[~possible].any()
    assert scipy.stats.chisquare(counts[possible]).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.05, 0.4, 1.0, 5.0])
def test_weights_follow_the_beta_distribution(alpha):
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.vmap(lambda key: proxy_synthesis.draw(key, jnp.arange(2), alpha=alpha, ratio=2.0)[0])
    lam = np.asarray(jax.jit(draw)(keys))
    assert lam.shape == (20_000, 2)
    # In float32 the smallest and largest weights of a small alpha are 0 and 1.
    inside = np.clip(lam.reshape(-1).astype(np.float64), 1e-45, 1 - 1e-8)
    values, counts = np.unique(inside, return_counts=True)
    expected = scipy.stats.beta(alpha, alpha).cdf(values)
    reached = np.cumsum(counts) / inside.size
    is_inside = (values > 1e-37) & (values < 1 - 1e-6)
    assert np.abs(reached - expected)[is_inside].max() < 1.63 / inside.size**0.5
    assert abs(scipy.stats.spearmanr(lam[:, 0], lam[:, 1]).statistic) < 0.03


def test_the_weights_of_extreme_alphas_are_in_their_range():
    for alpha in (1e-6, 1e6, 1e30):
        quantiles = numerics._beta_quantiles(alpha)
        assert quantiles.min() >= 0 and quantiles.max() <= 1
        np.testing.assert_allclose(quantiles.mean(), 0.5, atol=1e-6)


def test_a_ratio_above_one_uses_further_draws():
    embeddings, proxies, labels = make_problem(list(range(6)), classes=6)
    lam, partner = proxy_synthesis.draw(jax.random.key(3), labels, alpha=0.4, ratio=1.5)
    assert lam.shape == (2,) and partner.shape == (2, 6)
    assert lam[0] != lam[1] and (partner[0] != partner[1]).any()
    mixed = proxy_synthesis.synthesize(
        embeddings, proxies, labels, lam=lam, partner=partner, ratio=1.5
    )
    assert mixed.embeddings.shape[0] == mixed.proxies.shape[0] == 6 + 9
    e = normalized(embeddings)
    mixture = normalized(lam[1] * e[0] + (1 - lam[1]) * e[partner[1, 0]])
    chex.assert_trees_all_close(mixed.embeddings[12], mixture, atol=1e-6)


def test_too_few_draws_raise():
    embeddings, proxies, labels = make_problem([0, 1], classes=2)
    with pytest.raises(ValueError, match="ratio=2.0 needs 4 synthetic classes"):
        proxy_synthesis.synthesize(
            embeddings,
            proxies,
            labels,
            lam=jnp.asarray(0.5),
            partner=jnp.asarray([1, 0]),
            ratio=2.0,
        )


def test_the_number_of_synthetic_classes_is_robust_to_rounding():
    labels = list(range(100))
    mixed = proxy_synthesis.synthesize(
        *make_problem(labels, classes=100),
        lam=jnp.asarray(0.5),
        partner=jnp.roll(jnp.arange(100), 1),
        ratio=0.29,
    )
    assert len(mixed.labels) == 129
