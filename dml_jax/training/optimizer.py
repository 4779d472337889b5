"""Optimizers over embedder and proxies, to the letter of torch's, with the official step decay."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree

NAMES = ("adam", "adamw", "rmsprop", "sgd")


def create(
    *,
    name: str,
    learning_rate: float,
    proxy_learning_rate: float,
    eps: float,
    weight_decay: float,
    steps_per_epoch: int,
    decay_rate: float,
    decay_epochs: Sequence[int],
    decay_every: int = 0,
    clip_value: float | None = None,
    frozen_epochs: int = 0,
    freeze_bn_affine: bool = False,
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[int], tuple[float, float]]]:
    """Makes the optimizer of a tree `{"embedder": ..., "proxies": ...}`.

    Every parameter, proxies too, decays: weight_decay * parameter joins its gradient, or, in
    adamw, its step before the learning rate multiplies it. The learning rates of both groups are
    multiplied by `decay_rate` at the start of each of `decay_epochs`, counted from 1, or after
    every `decay_every` epochs.

    Args:
        name: "adam", "adamw", "rmsprop" (alpha 0.99, momentum 0.9) or "sgd" (Nesterov 0.9).
        learning_rate: of the embedder.
        proxy_learning_rate: of the proxies.
        eps: added to the root of the second moment by adam and adamw; rmsprop adds 1e-8.
        weight_decay: coefficient of the decay, 0 for none.
        steps_per_epoch: optimizer steps in an epoch.
        decay_rate: factor of the learning rates at each decay.
        decay_epochs: epochs that begin with a decay; none for a constant rate.
        decay_every: epochs from one decay to the next, of which the first comes after as many; 0
            decays at `decay_epochs` instead.
        clip_value: bound on the size of each element of the raw gradient, None for no bound.
        frozen_epochs: epochs at the beginning in which `["embedder"]["backbone"]` and all that is
            known of its gradients stay as they are.
        freeze_bn_affine: whether scale and bias of the batch normalisations stay as they are in
            all epochs: no gradient, decay or state of the optimizer reaches them.

    Returns:
        The transformation, whose updates are to be added to the parameters, and a function from a
        step, counted from 0, to that step's learning rates of (embedder, proxies). The function
        computes on the host only. `update` takes `step=` too: rates and thaw go by the run's steps,
        skipped ones too, and only what the optimizer itself counts goes by the updates it made.

    Raises:
        ValueError: on an unknown name, on an epoch below 1, or on decays of both kinds.
    """
    if name not in NAMES:
        raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(NAMES)}")
    if any(epoch < 1 for epoch in decay_epochs):
        raise ValueError(f"decay_epochs is {tuple(decay_epochs)}; epochs count from 1")
    if decay_every and len(decay_epochs):
        raise ValueError(
            f"decay_every is {decay_every} and decay_epochs {tuple(decay_epochs)}; give one of them"
        )

    decays = _decays(decay_epochs, decay_every, steps_per_epoch)

    def schedule(rate: float) -> optax.Schedule:
        return lambda step: rate * decay_rate ** decays(step).astype(np.float32)

    def rates(step: int) -> tuple[float, float]:
        factor = decay_rate ** int(decays(step))
        return learning_rate * factor, proxy_learning_rate * factor

    direction = _direction(name, eps, weight_decay)
    frozen_steps = frozen_epochs * steps_per_epoch
    parts: dict[str, optax.GradientTransformation] = {"other": direction}
    if frozen_steps:
        parts["backbone"] = optax.conditionally_mask(
            direction, lambda _, *, step: step >= frozen_steps, forward_extra_args=True
        )
    if freeze_bn_affine:
        parts["affine"] = optax.set_to_zero()
    if len(parts) > 1:
        direction = optax.partition(parts, lambda params: _labels(params, parts.keys()))
    groups = {
        "embedder": _descend(schedule(learning_rate)),
        "proxies": _descend(schedule(proxy_learning_rate)),
    }
    transformation = optax.chain(
        optax.identity() if clip_value is None else optax.clip(clip_value),
        direction,
        optax.partition(groups, {group: group for group in groups}),
    )
    return transformation, rates


def _decays(
    epochs: Sequence[int], every: int, steps_per_epoch: int
) -> Callable[[int | Int[Array, ""]], Any]:
    """How often the rates have decayed at a step, computed where the step is: host or device."""
    if every:
        return lambda step: step // (every * steps_per_epoch)
    # First steps of the epochs that begin with a decay.
    first_steps = (np.asarray(epochs, np.int32) - 1) * steps_per_epoch
    return lambda step: (first_steps <= step).sum()


def _direction(name: str, eps: float, weight_decay: float) -> optax.GradientTransformationExtraArgs:
    """What a gradient becomes before the learning rate multiplies it."""
    decay = optax.add_decayed_weights(weight_decay)
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=eps)
    rms = optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False)
    directions = {
        "adam": (decay, adam),
        "adamw": (adam, decay),
        # Like torch's, this momentum sums scaled gradients, and the learning rate comes last.
        "rmsprop": (decay, rms, optax.trace(decay=0.9)),
        "sgd": (decay, optax.trace(decay=0.9, nesterov=True)),
    }
    return optax.chain(*directions[name])


def _descend(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by the negative rate of the step that is given, where optax counts updates."""

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree = None, *, step: Int[Array, ""]
    ) -> tuple[PyTree, optax.OptState]:
        del params
        rate = schedule(step)
        return jax.tree.map(lambda x: -rate * x, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _labels(params: Mapping[str, Any], parts: Collection[str]) -> dict[str, Any]:
    """Which of the parts each parameter belongs to: "affine", "backbone" or "other".

    A batch normalisation is the only layer that has a parameter called scale.
    """
    flat = flax.traverse_util.flatten_dict(params["embedder"])
    batch_norms = {path[:-1] for path in flat if path[-1] == "scale"}

    def label(path: tuple[str, ...]) -> str:
        if "affine" in parts and path[:-1] in batch_norms:
            return "affine"
        return "backbone" if "backbone" in parts and path[0] == "backbone" else "other"

    labels = {path: label(path) for path in flat}
    return {"embedder": flax.traverse_util.unflatten_dict(labels), "proxies": "other"}
