"""The train state, which a checkpoint holds: everything that the next step depends on."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from clu import metrics
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dml_jax import memvir, xbm
from dml_jax.models import Embedder

Memory = memvir.Memory | xbm.Memory
PROXY_INITS = ("uniform_dim", "uniform_classes", "normal_dim", "normal_classes")


@flax.struct.dataclass
class EpochMetrics(metrics.Collection):
    """Averages over the steps of the current epoch."""

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    gradient_norm: metrics.Average.from_output("gradient_norm")  # type: ignore[valid-type]


class Skipped(NamedTuple):
    """Counts of nonfinite steps, which were skipped."""

    total: Int[Array, ""]
    """Skipped steps of the run."""
    in_a_row: Int[Array, ""]
    """Skipped steps since the last step that was not skipped."""


class TrainState(NamedTuple):
    """The state before step `step`, counted from 0; `step` is also the position of the input."""

    step: Int[Array, ""]
    params: PyTree
    """`{"embedder": ..., "proxies": [proxies, dim]}`; a loss of pairs has no proxies."""
    batch_stats: PyTree
    average: PyTree | None
    """Moving average of the network's variables, which is evaluated; None for none."""
    opt_state: optax.OptState
    memory: Memory | None
    metrics: EpochMetrics
    skipped: Skipped


def initial_proxies(
    key: PRNGKeyArray, *, init: str, shape: tuple[int, int]
) -> Float[Array, "proxies dim"]:
    """Returns the initial proxies.

    Args:
        key: a random key.
        init: one of `PROXY_INITS`. `uniform_dim` is U(-1/sqrt(dim), 1/sqrt(dim)), used by the
            authors of Proxy Synthesis; `uniform_classes` is U(-1/sqrt(proxies), 1/sqrt(proxies))
            and `normal_dim` N(0, 2/dim), used by the authors of MemVir with Norm-SoftMax and
            Proxy-NCA; `normal_classes` is N(0, 2/proxies), used by the authors of Proxy-Anchor.
        shape: number and dimension of the proxies.

    Returns:
        `[proxies, dim]`, float32.
    """
    num_proxies, dim = shape
    distribution, _, count = init.partition("_")
    fan = {"dim": dim, "classes": num_proxies}[count]
    if distribution == "normal":
        return jax.random.normal(key, shape) * (2 / fan) ** 0.5
    return jax.random.uniform(key, shape, minval=-(fan**-0.5), maxval=fan**-0.5)


def split(params: PyTree, fixed: Collection[tuple[str, ...]]) -> tuple[PyTree, PyTree]:
    """Splits parameters into those that train and those that never change.

    Args:
        params: `{"embedder": ..., "proxies": ...}`.
        fixed: paths of the embedder's parameters that never change.

    Returns:
        The parameters without the fixed ones, and the fixed ones by path.
    """
    flat = flax.traverse_util.flatten_dict(params["embedder"])
    trained = {path: x for path, x in flat.items() if path not in fixed}
    unchanged = {path: x for path, x in flat.items() if path in fixed}
    return {**params, "embedder": flax.traverse_util.unflatten_dict(trained)}, unchanged


def merge(trained: PyTree, fixed: PyTree) -> PyTree:
    """Returns all parameters; the inverse of `split`."""
    flat = flax.traverse_util.flatten_dict(trained["embedder"])
    return {**trained, "embedder": flax.traverse_util.unflatten_dict(flat | fixed)}


def create(
    key: PRNGKeyArray,
    *,
    embedder: Embedder,
    optimizer: optax.GradientTransformation,
    image_size: int,
    proxy_shape: tuple[int, int] | None,
    proxy_init: str,
    padding: int,
    memory: Memory | None,
    averaged: bool = False,
    fixed: Collection[tuple[str, ...]] = (),
    backbone: PyTree | None = None,
) -> TrainState:
    """Returns the state before the first step.

    Args:
        key: a random key.
        embedder: the network.
        optimizer: the optimizer of embedder and proxies.
        image_size: height and width of an image in pixels.
        proxy_shape: number and dimension of the proxies; None for none.
        proxy_init: see `initial_proxies`.
        padding: number of proxies of zeros that follow, so that the number of devices divides the
            whole number. The step masks their classes, so they stay zero.
        memory: the empty memory of MemVir or XBM; None without one.
        averaged: whether the state has a moving average of the network's variables.
        fixed: paths of the embedder's parameters that never change; see `split`.
        backbone: pretrained variables of the backbone; None for random ones.

    Returns:
        A train state at step 0.
    """
    network_key, proxy_key = jax.random.split(key)
    image = jnp.zeros((1, image_size, image_size, 3), jnp.uint8)
    # A network without batch normalisation has no statistics.
    variables = {"batch_stats": {}, **embedder.init(network_key, image, train=False)}
    if backbone is not None:
        given = {name: {"backbone": tree} for name, tree in backbone.items() if tree}
        # Leaf by leaf: adapters are not among the pretrained variables.
        flat = flax.traverse_util.flatten_dict(variables, keep_empty_nodes=True)
        flat |= flax.traverse_util.flatten_dict(given)
        variables = flax.traverse_util.unflatten_dict(flat)
    params = {"embedder": variables["params"]}
    if proxy_shape is not None:
        proxies = initial_proxies(proxy_key, init=proxy_init, shape=proxy_shape)
        params["proxies"] = jnp.pad(proxies, ((0, padding), (0, 0)))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        average=jax.tree.map(jnp.copy, variables) if averaged else None,
        opt_state=optimizer.init(split(params, fixed)[0]),
        memory=memory,
        metrics=EpochMetrics.empty(),
        skipped=Skipped(total=jnp.zeros((), jnp.int32), in_a_row=jnp.zeros((), jnp.int32)),
    )


def network_variables(train_state: TrainState) -> dict[str, PyTree]:
    """Returns the variables to evaluate, as `Network.embed` takes them: the average, if any."""
    if train_state.average is not None:
        return train_state.average
    return {"params": train_state.params["embedder"], "batch_stats": train_state.batch_stats}


def with_network(train_state: TrainState, variables: Mapping[str, PyTree]) -> TrainState:
    """Returns a state that starts from other variables of the network.

    Args:
        train_state: a state before the first step.
        variables: `params` and `batch_stats` of the embedder.
    """
    return train_state._replace(
        params={**train_state.params, "embedder": variables["params"]},
        batch_stats=variables["batch_stats"],
        average=None if train_state.average is None else jax.tree.map(jnp.copy, dict(variables)),
    )


def updated_average(
    before: PyTree, variables: PyTree, *, decay: float, step: Int[Array, ""]
) -> PyTree:
    """Returns the moving average of variables after a step.

    The decay grows to its final value as (1 + step) / (10 + step), so that the average soon leaves
    the initial values.

    Source: Polyak and Juditsky, Acceleration of stochastic approximation by averaging, SIAM J.
    Control Optim. 1992; the exponential form and the growing decay are TensorFlow's.

    Args:
        before: the average before the step.
        variables: the variables after the step.
        decay: final decay, in [0, 1).
        step: number of steps before this one.
    """
    current = jnp.minimum(decay, (1 + step) / (10 + step))
    # In this form a value that does not change is its own average, to the bit.
    return jax.tree.map(lambda old, new: old + (1 - current) * (new - old), before, variables)
