"""The files of a run, and the lock of its workdir."""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dml_jax import data
from dml_jax._utils import locks
from dml_jax._utils.errors import LockedError, UserError
from dml_jax._utils.files import errors_with_path, read_json, read_json_lines
from dml_jax.training.config import completed
from dml_jax.training.origin import Origin

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"
EMBEDDINGS = "embeddings.npz"
GALLERY = "gallery.npz"
RESULT = "result.json"
ZERO_SHOT = "zero_shot.json"
NOT_FINITE = "not_finite.json"
IMAGES = "images.json"
INSPECTION = "findings.json"
FORK = "fork.json"
ORIGIN = "origin.json"
WANDB = "wandb.json"
MLFLOW = "mlflow.json"
PROJECTOR = "projector"
PROJECTOR_CONFIG = "projector_config.pbtxt"  # The name that TensorBoard reads.
LOCK = ".lock"


def read_result(workdir: Path) -> dict[str, Any] | None:
    """Returns the result of a finished run; None if there is none."""
    return read_json(workdir / RESULT)


def read_inspection(workdir: Path) -> data.InspectionReport | None:
    """Returns the inspection report of the images of a run; None if the run has not begun."""
    report = read_json(workdir / INSPECTION) if (workdir / CONFIG).exists() else None
    return None if report is None else data.InspectionReport.from_json(report)


def seconds(workdir: Path) -> float:
    """Returns how many seconds a run has trained and evaluated, without interruptions."""
    return sum(
        line["train_seconds"] + line["evaluation_seconds"]
        for line in read_json_lines(workdir / TIMINGS)
    )


def fingerprints(sources: Mapping[str, data.Source]) -> dict[str, Any]:
    """Returns fingerprints of the images, which depend on all names, classes and sizes in bytes.

    Args:
        sources: sources by split.

    Returns:
        For each split, the numbers of images and classes, and a digest.
    """
    fingerprint = {}
    for split, source in sources.items():
        digest = hashlib.sha256(json.dumps(source.class_names).encode())
        for index, (name, label) in enumerate(zip(source.names, source.labels, strict=True)):
            digest.update(json.dumps([name, int(label), source.size(index)]).encode())
        fingerprint[split] = {
            "images": len(source),
            "classes": len(source.class_names),
            "digest": digest.hexdigest(),
        }
    return fingerprint


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Locks a workdir against other processes, and creates it if it does not exist.

    The system releases the lock of a process that is killed.

    Args:
        workdir: directory of the run.

    Raises:
        LockedError: another process holds the lock.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK).open("a+", encoding="utf-8") as file:
        if not locks.acquire(file, workdir):
            file.seek(0)
            raise LockedError(
                f"another process is training in {workdir} ({file.read().strip()}); wait until "
                "it ends, or choose another --workdir"
            )
        with errors_with_path(workdir / LOCK):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def read_config(workdir: Path) -> ConfigDict:
    """Returns the configuration of the run in a workdir.

    Settings that are newer than the run have their defaults.

    Raises:
        FileNotFoundError: there is no run.
    """
    path = workdir / CONFIG
    config = read_json(path)
    if config is None:
        raise FileNotFoundError(f"{workdir} holds no run: there is no {path}")
    return ConfigDict(completed(config)).lock()


def read_origin(workdir: Path) -> Origin | None:
    """Returns the origin of the configuration of a run; None if it was not recorded.

    Raises:
        ValueError: the file is damaged.
    """
    origin = read_json(workdir / ORIGIN)
    try:
        return None if origin is None else Origin.from_json(origin)
    except (KeyError, TypeError) as error:
        raise UserError(f"{workdir / ORIGIN} is damaged: {error!r}") from None
