"""Learning-rate schedules: the official step decay, those of optax, and custom ones.

A schedule is a function of the step that returns the factor of both learning rates.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Int

from dml_jax._utils.errors import UserError
from dml_jax._utils.registry import Registry

STEP_DECAY = "step_decay"
"""The official schedule, set by `decay_rate`, `decay_epochs` and `decay_every`."""

SCHEDULES: Registry[Callable[..., optax.Schedule]] = Registry("schedule")
"""Functions that return an `optax.Schedule`; `register` adds one."""

register = SCHEDULES.register

for _name in (
    "constant_schedule",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "exponential_decay",
    "linear_onecycle_schedule",
    "linear_schedule",
    "polynomial_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
):
    register(_name)(getattr(optax.schedules, _name))

_FACTORS = {"value": 1.0, "init_value": 1.0, "peak_value": 1.0, "end_value": 0.0}
# A warm-up starts at 0.
_WARM_UP_FACTORS = {**_FACTORS, "init_value": 0.0}


def step_decay(
    rate: float, epochs: Sequence[int], every: int, steps_per_epoch: int
) -> Callable[[int | Int[Array, ""]], Any]:
    """Returns a schedule that multiplies by `rate` at each decay.

    It is computed on the host for a step of type int, otherwise on the device.

    Args:
        rate: factor at each decay.
        epochs: epochs that begin with a decay, counted from 1.
        every: epochs between decays instead of `epochs`; 0 for none.
        steps_per_epoch: optimizer steps in an epoch.
    """
    # First steps of the epochs that begin with a decay.
    first_steps = (np.asarray(epochs, np.int32) - 1) * steps_per_epoch

    def factor(step: int | Int[Array, ""]) -> Any:
        decays: Any = step // (every * steps_per_epoch) if every else (first_steps <= step).sum()
        if isinstance(step, int):
            return rate ** int(decays)
        return rate ** decays.astype(np.float32)

    return factor


def create(name: str, arguments: Mapping[str, Any], steps_per_epoch: int) -> optax.Schedule:
    """Returns a schedule by name.

    Values are factors of the learning rate. Their defaults are 1 at the start or peak, and 0 at the
    end and at the start of a warm-up.

    Args:
        name: name in `SCHEDULES`, or import path of a function that returns an `optax.Schedule`.
        arguments: arguments of the schedule. Those named `..._steps` may be given as `..._epochs`.
        steps_per_epoch: optimizer steps in an epoch.

    Raises:
        ValueError: unknown name, or unknown or missing argument.
    """
    make = SCHEDULES.get(name)
    parameters = inspect.signature(make).parameters
    defaults = (
        _WARM_UP_FACTORS if any("warmup" in parameter for parameter in parameters) else _FACTORS
    )
    given = {name: value for name, value in defaults.items() if name in parameters}
    for argument, value in arguments.items():
        in_steps = argument.removesuffix("_epochs") + "_steps"
        if argument.endswith("_epochs") and in_steps in parameters:
            given[in_steps] = round(value * steps_per_epoch)
        else:
            given[argument] = value
    try:
        inspect.signature(make).bind(**given)
        return make(**given)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the schedule {name} cannot be created with {dict(arguments)}: {error}; its arguments "
            f"are {', '.join(parameters)}, and those named ..._steps may be given as ..._epochs"
        ) from None


def on_host(schedule: optax.Schedule) -> Callable[[int], float]:
    """Returns a schedule that computes on the host, also while transfers are disallowed."""
    cpu = jax.local_devices(backend="cpu")[0]

    def value(step: int) -> float:
        with jax.transfer_guard("allow"), jax.default_device(cpu):
            return float(schedule(step))

    return value
