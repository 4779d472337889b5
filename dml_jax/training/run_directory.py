"""What a run's folder holds, and whether a folder is this run's."""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from dml_jax import data
from dml_jax._utils.errors import UserError
from dml_jax._utils.files import errors_with_path, read_json, read_json_lines
from dml_jax.training.origin import Origin

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"
EMBEDDINGS = "embeddings.npz"
GALLERY = "gallery.npz"
RESULT = "result.json"
NOT_FINITE = "not_finite.json"
IMAGES = "images.json"
INSPECTION = "findings.json"
FORK = "fork.json"
ORIGIN = "origin.json"
WANDB = "wandb.json"
MLFLOW = "mlflow.json"
PROJECTOR = "projector"
PROJECTOR_CONFIG = "projector_config.pbtxt"  # Under this name TensorBoard looks for it.
LOCK = ".lock"


def read_result(workdir: Path) -> dict[str, Any] | None:
    """The result of a finished run; None if there is none."""
    return read_json(workdir / RESULT)


def read_inspection(workdir: Path) -> data.InspectionReport | None:
    """What the run found in its images before it began; None if it has not begun."""
    found = read_json(workdir / INSPECTION) if (workdir / CONFIG).exists() else None
    return None if found is None else data.InspectionReport.from_json(found)


def seconds(workdir: Path) -> float:
    """How long a run has trained and evaluated, all its interruptions left out."""
    return sum(
        line["train_seconds"] + line["evaluation_seconds"]
        for line in read_json_lines(workdir / TIMINGS)
    )


def fingerprints(sources: Mapping[str, data.Source]) -> dict[str, Any]:
    """What tells one set of images from another: all their names, classes and sizes in bytes.

    Args:
        sources: by split.

    Returns:
        For each split the numbers of images and classes, and a digest.
    """
    made = {}
    for split, source in sources.items():
        digest = hashlib.sha256(json.dumps(source.class_names).encode())
        for index, (name, label) in enumerate(zip(source.names, source.labels, strict=True)):
            digest.update(json.dumps([name, int(label), source.size(index)]).encode())
        made[split] = {
            "images": len(source),
            "classes": len(source.class_names),
            "digest": digest.hexdigest(),
        }
    return made


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other processes from writing into a run's folder, which is made if there is none.

    The system takes the lock back from a process that is killed.

    Args:
        workdir: the run's.

    Raises:
        ValueError: another process has it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another process is training in {workdir} ({file.read().strip()}); wait for its "
                "end, or choose another --workdir"
            ) from None
        except OSError as error:
            logging.warning("%s cannot be locked (%s): start one process in it", workdir, error)
        with errors_with_path(workdir / LOCK):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def read_config(workdir: Path) -> ConfigDict:
    """The configuration of the run in a folder.

    Raises:
        FileNotFoundError: there is no run.
    """
    path = workdir / CONFIG
    read = read_json(path)
    if read is None:
        raise FileNotFoundError(f"{workdir} holds no run: there is no {path}")
    return ConfigDict(read).lock()


def read_origin(workdir: Path) -> Origin | None:
    """Returns where the configuration of a run came from, or None if it was not recorded.

    Raises:
        ValueError: the file is damaged.
    """
    origin = read_json(workdir / ORIGIN)
    try:
        return None if origin is None else Origin.from_json(origin)
    except (KeyError, TypeError) as error:
        raise UserError(f"{workdir / ORIGIN} is damaged: {error!r}") from None
