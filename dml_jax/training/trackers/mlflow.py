"""MLflow."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from dml_jax._utils import files
from dml_jax._utils.errors import UserError
from dml_jax.training import config as configs
from dml_jax.training import run_directory
from dml_jax.training.trackers.base import Tracker


class MlflowTracker(Tracker):
    """Logs metrics and timings to MLflow; a resumed run continues the same run there.

    MLflow allows no "@" in names: `recall@1` becomes `recall_at_1`. The settings of the run's
    beginning are its parameters, which MLflow never changes. The server may fail later without
    harm to the run: what it does not take is lost there, with a warning.
    """

    def __init__(self, folder: Path, *, experiment: str) -> None:
        """Creates a run, or resumes the one whose id is in `mlflow.json`.

        Args:
            folder: the run's, with its config.
            experiment: name of an MLflow experiment, which is created if there is none. A run
                that is resumed with another one starts a new MLflow run there.

        Raises:
            ValueError: MLflow refuses the run.
        """
        import mlflow

        self._mlflow = mlflow
        try:
            self._client = mlflow.MlflowClient()
            self._run_id = self._resume(folder, experiment) or self._create(folder, experiment)
            # Every epoch has a loss. A run that was killed may have logged epochs that it has to
            # train again, with equal metrics.
            losses = self._client.get_metric_history(self._run_id, "loss")
        except mlflow.MlflowException as error:
            raise UserError(
                f"MLflow: {error}\nMLFLOW_TRACKING_URI says where it keeps its runs, "
                f"{folder / run_directory.MLFLOW} holds the id of this run, if there is one, and "
                "--config.mlflow= trains without MLflow"
            ) from error
        self._logged = max((metric.step for metric in losses), default=0)

    def _resume(self, folder: Path, experiment: str) -> str | None:
        """Returns the id of the run to continue; None if there is none in this experiment."""
        known = files.read_json(folder / run_directory.MLFLOW)
        if known is None or known["experiment"] != experiment:
            return None
        self._client.update_run(known["id"], status="RUNNING")
        return known["id"]

    def _create(self, folder: Path, experiment: str) -> str:
        experiment_id = self._mlflow.set_experiment(experiment).experiment_id
        run_id = self._client.create_run(experiment_id, run_name=folder.name).info.run_id
        settings = configs.leaves(run_directory.read_config(folder))
        parameters = [self._mlflow.entities.Param(path, str(value)) for path, value in settings]
        self._client.log_batch(run_id, params=parameters)
        files.write_json(folder / run_directory.MLFLOW, {"experiment": experiment, "id": run_id})
        return run_id

    def epoch(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Logs all metrics and timings, unless the epoch is logged already."""
        if metrics["step"] <= self._logged:
            return
        now = int(time.time() * 1000)
        values = [
            self._mlflow.entities.Metric(
                name.replace("@", "_at_"), float(value), now, metrics["step"]
            )
            for name, value in {**metrics, **timings}.items()
            if name != "step"
        ]
        try:
            self._client.log_batch(self._run_id, metrics=values)
        except self._mlflow.MlflowException as error:
            logging.warning("MLflow has not logged epoch %d: %s", metrics["epoch"], error)

    def close(self, failed: bool) -> None:
        """Marks the run as finished or failed."""
        try:
            self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")
        except self._mlflow.MlflowException as error:
            logging.warning("MLflow has not noted that the run has ended: %s", error)
