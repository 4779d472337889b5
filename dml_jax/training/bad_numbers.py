"""What is told of a step in which a number was not finite."""

import math
from typing import Any

import jax

from dml_jax import data
from dml_jax.training.experiment import Experiment
from dml_jax.training.step import Observed


def describe(experiment: Experiment, step: int, observed: Observed) -> dict[str, Any]:
    """What led to a step that could not be taken, to be written as JSON.

    Args:
        experiment: the run's.
        step: how many steps were done after it.
        observed: of that step, on the host.

    Returns:
        Numbers by name, those that are not finite as strings. The arrays of the parameters are
        ordered by their gradients, the worst first.
    """
    config, train = experiment.config, experiment.sources["train"]
    order = data.Order(train.labels, config.batch_size, config.data.n_instance, config.seed)
    rate, proxy_rate = experiment.learning_rate(step - 1)
    arrays = [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            {"gradient": float(gradient), "parameter": float(parameter)},
        )
        for (path, _), gradient, parameter in zip(
            jax.tree.leaves_with_path(experiment.state_shape.params),
            observed.gradient_norms,
            observed.parameter_norms,
            strict=True,
        )
    ]
    arrays.sort(key=lambda one: _badness(one[1]["gradient"]), reverse=True)
    return {
        "step": step,
        "epoch": (step - 1) // experiment.steps_per_epoch + 1,
        "in_a_row": int(observed.skipped.in_a_row),
        "learning_rate": rate,
        "proxy_learning_rate": proxy_rate,
        "loss": _json(float(observed.loss)),
        "gradient_norm": _json(float(observed.gradient_norm)),
        "images": [train.where(index) for index in order(step - 1).tolist()],
        "norms": {path: {of: _json(norm) for of, norm in norms.items()} for path, norms in arrays},
    }


def _badness(norm: float) -> float:
    return math.inf if math.isnan(norm) else norm


def _json(number: float) -> float | str:
    """JSON knows no number that is not finite."""
    return number if math.isfinite(number) else str(number)
