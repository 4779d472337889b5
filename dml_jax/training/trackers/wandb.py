"""Weights & Biases."""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dml_jax._utils import files
from dml_jax._utils.errors import UserError
from dml_jax.training import run_directory
from dml_jax.training.trackers.base import Tracker


class WandbTracker(Tracker):
    """Logs metrics and timings to Weights & Biases; a resumed run continues the same run there."""

    def __init__(self, folder: Path, *, project: str) -> None:
        """Creates or resumes the run whose id is in `wandb.json`.

        Args:
            folder: the run's, with its config.
            project: of Weights & Biases.

        Raises:
            ValueError: Weights & Biases refuses the run.
        """
        import wandb

        path = folder / run_directory.WANDB
        if not path.exists():
            files.write_json(path, {"id": uuid.uuid4().hex[:8]})
        try:
            self._run = wandb.init(
                project=project,
                id=json.loads(path.read_text(encoding="utf-8"))["id"],
                resume="allow",
                name=folder.name,
                dir=folder,
                config=run_directory.read_config(folder).to_dict(),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases: {error}\n`wandb login` stores your API key, "
                "WANDB_MODE=offline keeps everything here until `wandb sync`, and "
                "--config.wandb= trains without it"
            ) from error

    def epoch(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Logs all metrics and timings."""
        self._run.log({**metrics, **timings}, step=metrics["step"])

    def close(self, failed: bool) -> None:
        """Uploads what is left, and marks the run as finished or failed."""
        self._run.finish(exit_code=int(failed))
