"""Trackers record a run: metrics files, TensorBoard, Weights & Biases, MLflow, the terminal."""

from dml_jax.training.trackers.base import Tracker
from dml_jax.training.trackers.composite import Trackers, check, create

__all__ = ["Tracker", "Trackers", "check", "create"]
