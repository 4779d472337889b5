"""The train state: everything that the next step depends on, and that a checkpoint holds."""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from clu import metrics
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dml_jax import memvir
from dml_jax.models import Embedder

PROXY_INITS = ("uniform_dim", "uniform_classes", "normal_dim", "normal_classes")


@flax.struct.dataclass
class EpochMetrics(metrics.Collection):
    """Averages over the steps of the epoch that is under way."""

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    gradient_norm: metrics.Average.from_output("gradient_norm")  # type: ignore[valid-type]


class Skipped(NamedTuple):
    """Steps that changed nothing, because a number in them was not finite."""

    total: Int[Array, ""]
    """In the whole run."""
    in_a_row: Int[Array, ""]
    """Up to now, without one in between that was taken."""


class TrainState(NamedTuple):
    """The state before step `step`, counted from 0, which is also the input's position."""

    step: Int[Array, ""]
    params: PyTree
    """`{"embedder": ..., "proxies": [classes, dim]}`."""
    batch_stats: PyTree
    opt_state: optax.OptState
    memory: memvir.Memory | None
    metrics: EpochMetrics
    skipped: Skipped


def initial_proxies(
    key: PRNGKeyArray, *, init: str, shape: tuple[int, int]
) -> Float[Array, "proxies dim"]:
    """Proxies before training.

    Args:
        key: a random key.
        init: `uniform_dim` for U(-1/sqrt(dim), 1/sqrt(dim)), as Proxy Synthesis's authors start;
            `uniform_classes` for U(-1/sqrt(proxies), 1/sqrt(proxies)) or `normal_dim` for
            N(0, 2/dim), as MemVir's authors start Norm-SoftMax and Proxy-NCA; `normal_classes`
            for N(0, 2/proxies), as Proxy-Anchor's authors do.
        shape: how many proxies, and of what size.

    Returns:
        `[proxies, dim]`, float32.
    """
    num_proxies, dim = shape
    distribution, _, count = init.partition("_")
    fan = {"dim": dim, "classes": num_proxies}[count]
    if distribution == "normal":
        return jax.random.normal(key, shape) * (2 / fan) ** 0.5
    return jax.random.uniform(key, shape, minval=-(fan**-0.5), maxval=fan**-0.5)


def create(
    key: PRNGKeyArray,
    *,
    embedder: Embedder,
    optimizer: optax.GradientTransformation,
    image_size: int,
    proxy_shape: tuple[int, int],
    proxy_init: str,
    memory: memvir.Memory | None,
    backbone: PyTree | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
        key: a random key.
        embedder: the network.
        optimizer: its optimizer.
        image_size: height and width of an image in pixels.
        proxy_shape: the loss's, for the classes to train on.
        proxy_init: see `initial_proxies`.
        memory: MemVir's, empty; None without MemVir.
        backbone: its variables, if they are not to be drawn.

    Returns:
        A train state at step 0.
    """
    network_key, proxy_key = jax.random.split(key)
    image = jnp.zeros((1, image_size, image_size, 3), jnp.uint8)
    # A network without batch normalisation has no statistics.
    variables = {"batch_stats": {}, **embedder.init(network_key, image, train=False)}
    if backbone is not None:
        variables = {name: {**tree, "backbone": backbone[name]} for name, tree in variables.items()}
    proxies = initial_proxies(proxy_key, init=proxy_init, shape=proxy_shape)
    params = {"embedder": variables["params"], "proxies": proxies}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        memory=memory,
        metrics=EpochMetrics.empty(),
        skipped=Skipped(total=jnp.zeros((), jnp.int32), in_a_row=jnp.zeros((), jnp.int32)),
    )


def network_variables(train_state: TrainState) -> dict[str, PyTree]:
    """The network's variables in a state, as `Network.embed` takes them."""
    return {"params": train_state.params["embedder"], "batch_stats": train_state.batch_stats}
