"""Optimizers of embedder and proxies with the update rules of torch, and their settings."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import jax
import optax
from flax import traverse_util
from jaxtyping import Array, Int, PyTree
from ml_collections import ConfigDict

from dml_jax.models import vit
from dml_jax.settings import (
    Check,
    Setting,
    choice,
    flag,
    integer,
    number,
    optional,
    registered,
    setting,
    several,
    together,
)
from dml_jax.training import schedules

NAMES = ("adam", "adamw", "rmsprop", "sgd")


def _ascending(epochs: Collection[int]) -> bool:
    return list(epochs) == sorted(set(epochs))


def _parse_arguments(values: Any, path: str, problems: dict[str, str]) -> dict[str, Any]:
    if not isinstance(values, Mapping | ConfigDict):
        problems[path] = f"{path} is {values!r}; it must be the arguments of the schedule by name"
        return {}
    bad = {key: x for key, x in values.items() if not isinstance(x, int | float | str | bool)}
    for key, value in bad.items():
        problems[f"{path}.{key}"] = f"{path}.{key} is {value!r}; it must be a number or text"
    return {key: value for key, value in values.items() if key not in bad}


def _arguments() -> Any:
    about = Setting("Arguments of the schedule; see `dml_jax.training.schedules`.", None, False)
    metadata = {"group": about, "parse": _parse_arguments, "to_dict": dict}
    return dataclasses.field(default_factory=dict, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rates and their schedule."""

    name: str = setting(
        "adam",
        choice(NAMES),
        help="`adam`, `adamw`, `rmsprop` (alpha 0.99, momentum 0.9) or `sgd` (Nesterov 0.9).",
    )
    learning_rate: float = setting(
        1e-4, number(above=0.0), help="Learning rate of backbone and head."
    )
    proxy_learning_rate: float = setting(
        1e-2, number(above=0.0), help="Learning rate of the proxies."
    )
    eps: float = setting(
        0.01,
        number(above=0.0),
        help="Added to the root of the second moment by adam and adamw; rmsprop adds 1e-8.",
    )
    weight_decay: float = setting(
        1e-4,
        number(least=0.0),
        help="Coefficient of the weight decay of every parameter, proxies too.",
    )
    decay_vectors: bool = setting(
        True,
        flag(),
        help="Whether biases, scales of normalisations and tokens have weight decay too.",
    )
    layer_decay: float = setting(
        1.0,
        number(above=0.0, most=1.0),
        help="Factor of the learning rate from each part of the backbone to the one below it (a "
        "block of a ViT, a stage of a ResNet); the head has the full rate.",
    )
    schedule: str = setting(
        schedules.STEP_DECAY,
        Check(
            lambda: schedules.SCHEDULES.choices.replace("of", f"of {schedules.STEP_DECAY},", 1),
            lambda name: (
                name == schedules.STEP_DECAY or registered(schedules.SCHEDULES).holds(name)
            ),
        ),
        help="Schedule of both learning rates: `step_decay`, one of optax's by name, or your own.",
    )
    schedule_arguments: Mapping[str, Any] = _arguments()
    decay_rate: float = setting(
        0.1, number(above=0.0, most=1.0), help="Factor of the learning rates at each decay."
    )
    decay_epochs: tuple[int, ...] = setting(
        (50,),
        several(integer(1), "it must be ascending integers of at least 1, or none", _ascending),
        help="Epochs that begin with a decay, counted from 1.",
    )
    decay_every: int = setting(
        0,
        integer(0),
        help="Epochs from one decay to the next, in place of `decay_epochs`; 0 for none.",
    )
    clip_value: float | None = setting(
        None,
        optional(number(above=0.0)),
        help="Bound on the size of each element of a gradient; none by default.",
    )
    clip_norm: float | None = setting(
        None,
        optional(number(above=0.0)),
        help="Bound on the norm of the gradient of all parameters together; none by default.",
    )
    frozen_epochs: int = setting(
        0,
        integer(0),
        help="Epochs at the start in which the backbone does not change.",
    )
    average_decay: float = setting(
        0.0,
        number(least=0.0, below=1.0),
        help="Decay of the moving average of the network over steps, which is then evaluated and "
        "exported in its place, such as 0.999; 0 for no average.",
    )

    @together("decay_every", "decay_epochs")
    def _decays(self) -> str | None:
        if not self.decay_every or not self.decay_epochs:
            return None
        return (
            f"config.optimizer.decay_every is {self.decay_every} and "
            f"config.optimizer.decay_epochs {self.decay_epochs}; set the first to 0, or the second "
            "to ()"
        )

    @together("schedule", "schedule_arguments")
    def _schedule(self) -> str | None:
        if self.schedule == schedules.STEP_DECAY:
            if not self.schedule_arguments:
                return None
            return (
                "config.optimizer.schedule_arguments are given, but step_decay is set by "
                "decay_rate, decay_epochs and decay_every"
            )
        try:
            schedules.create(self.schedule, self.schedule_arguments, 1)
        except ValueError as error:
            return f"config.optimizer.schedule: {error}"
        return None


def create(
    config: OptimizerConfig,
    *,
    steps_per_epoch: int,
    parts_above: Mapping[tuple[str, ...], int] = MappingProxyType({}),
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[int], tuple[float, float]]]:
    """Returns the optimizer of parameters `{"embedder": ..., "proxies": ...}` and its schedule.

    Weight decay applies to every parameter, proxies too, or with `decay_vectors=False` to those of
    two and more dimensions that are no tokens: weight_decay * parameter is added to the gradient
    or, in adamw, to the update before it is multiplied by the learning rate. The schedule
    multiplies the learning rates of both groups. Decay by layer is that of Clark et al. (ELECTRA,
    arXiv 2003.10555).

    Args:
        config: settings of the optimizer.
        steps_per_epoch: optimizer steps in an epoch.
        parts_above: for each parameter of the embedder by path, the number of parts of the network
            above it; see `dml_jax.models.embedder.parts_above`. Needed for `layer_decay` alone.

    Returns:
        The gradient transformation, and a function that returns the learning rates of (embedder,
        proxies) at a step, counted from 0, computed on the host. `update` takes `step=` too: the
        schedule and `frozen_epochs` count the steps of the run, including skipped ones; the
        counters of the optimizer count its updates.
    """
    if config.schedule == schedules.STEP_DECAY:
        factor = schedules.step_decay(
            config.decay_rate, config.decay_epochs, config.decay_every, steps_per_epoch
        )
        factor_on_host: Callable[[int], float] = factor
    else:
        factor = schedules.create(config.schedule, config.schedule_arguments, steps_per_epoch)
        factor_on_host = schedules.on_host(factor)

    def rates(step: int) -> tuple[float, float]:
        current = factor_on_host(step)
        return config.learning_rate * current, config.proxy_learning_rate * current

    direction = _direction(config)
    frozen_steps = config.frozen_epochs * steps_per_epoch
    if frozen_steps:
        late = optax.conditionally_mask(
            direction, lambda _, *, step: step >= frozen_steps, forward_extra_args=True
        )
        direction = optax.partition({"backbone": late, "other": direction}, _labels)
    groups = {
        "embedder": _descend(lambda step: config.learning_rate * factor(step)),
        "proxies": _descend(lambda step: config.proxy_learning_rate * factor(step)),
    }
    transformation = optax.chain(
        optax.identity() if config.clip_value is None else optax.clip(config.clip_value),
        _clip_norm(config.clip_norm),
        direction,
        _decay_by_layer(config.layer_decay, parts_above),
        # A loss of pairs has no proxies.
        optax.partition(groups, lambda params: {group: group for group in params}),
    )
    return transformation, rates


def _clip_norm(bound: float | None) -> optax.GradientTransformation:
    return optax.identity() if bound is None else optax.clip_by_global_norm(bound)


def _decay_by_layer(
    factor: float, parts_above: Mapping[tuple[str, ...], int]
) -> optax.GradientTransformation:
    """Multiplies each update of the embedder by a power of the factor."""
    if factor == 1.0:
        return optax.identity()

    def scale(updates: PyTree, params: PyTree) -> PyTree:
        del params
        flat = traverse_util.flatten_dict(updates["embedder"])
        scaled = {path: factor ** parts_above[path] * x for path, x in flat.items()}
        return {**updates, "embedder": traverse_util.unflatten_dict(scaled)}

    return optax.stateless(scale)


def _has_decay(params: PyTree) -> PyTree:
    """Returns whether each parameter has weight decay if vectors and tokens have none."""
    return jax.tree.map_with_path(
        lambda path, x: x.ndim > 1 and getattr(path[-1], "key", None) not in vit.TOKENS, params
    )


def _direction(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation of a gradient before it is multiplied by the learning rate."""
    mask = None if config.decay_vectors else _has_decay
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=config.eps)
    rms = optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False)
    directions = {
        "adam": (decay, adam),
        "adamw": (adam, decay),
        # As in torch, momentum sums scaled gradients, and the learning rate is applied last.
        "rmsprop": (decay, rms, optax.trace(decay=0.9)),
        "sgd": (decay, optax.trace(decay=0.9, nesterov=True)),
    }
    return optax.chain(*directions[config.name])


def _descend(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by the negative learning rate of the given step; optax would count updates."""

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree = None, *, step: Int[Array, ""]
    ) -> tuple[PyTree, optax.OptState]:
        del params
        rate = schedule(step)
        return jax.tree.map(lambda x: -rate * x, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _labels(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the label of each parameter: "backbone" or "other"."""
    labels = {
        name: jax.tree.map(lambda _, name=name: "backbone" if name == "backbone" else "other", tree)
        for name, tree in params["embedder"].items()
    }
    return {group: "other" for group in params} | {"embedder": labels}
