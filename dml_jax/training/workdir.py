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
FINDINGS = "findings.json"
FORK = "fork.json"
WANDB = "wandb.json"
LOCK = ".lock"
_FIRST = {CONFIG, IMAGES, FINDINGS, FORK, LOCK}

FREE = (
    "config.checkpoint",
    "config.data.num_workers",
    "config.data.root",
    "config.epochs",
    "config.evaluation",
    "config.model.remat",
    "config.skip_nonfinite",
    "config.wandb",
)
"""Settings, and groups of them, that may change when a run goes on: no step depends on them.

The images may have moved (`data.root`), but must be the same: see `fingerprints`. So may the
host's cache come or go (`data.cache`), but not the device's. A batch may be taken in other parts
(`micro_batches`) if batch normalisation is frozen, so that they have no statistics of their own.
"""

_FREE_PATHS = tuple(f"{path}{end}" for path in FREE for end in (".", ":"))
_CACHE_PATHS = ("config.data.cache:", "config.data.cache_size:")
_PARTS_PATH = "config.micro_batches:"
_PART = ".part"


def _part(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = _part(path)
    with naming(path), part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # Or after a power failure the name might be there without it.
    os.replace(part, path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file that could not be written, as where the disk is full Python does not.

    Args:
        path: the file's.

    Raises:
        OSError: as what is raised within, with the path.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_result(workdir: Path) -> dict[str, Any] | None:
    """The result of a finished run; None if there is none."""
    return _read_json(workdir / RESULT)


def read_findings(workdir: Path) -> data.Findings | None:
    """What the run found in its images before it began; None if it has not begun."""
    found = _read_json(workdir / FINDINGS) if (workdir / CONFIG).exists() else None
    return None if found is None else data.Findings.from_json(found)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of one JSON object a line; none if there is no file.

    A last line that was cut short, as by a kill, is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def seconds(workdir: Path) -> float:
    """How long a run has trained and evaluated, all its interruptions left out."""
    return sum(
        line["train_seconds"] + line["evaluation_seconds"] for line in read_lines(workdir / TIMINGS)
    )


def check(workdir: Path, config: ConfigDict) -> list[str]:
    """Makes sure that a folder is new, or holds a run that may go on with a configuration.

    Args:
        workdir: the folder; it need not exist.
        config: the run's.

    Returns:
        Settings that have changed, and may.

    Raises:
        ValueError: it holds another run, or something that is no run; every difference is named.
    """
    path = workdir / CONFIG
    if not path.exists():
        # A run that was killed when it began leaves at most these.
        if workdir.exists() and {x.name.removesuffix(_PART) for x in workdir.iterdir()} - _FIRST:
            raise ValueError(
                f"{workdir} holds files but no {CONFIG}, so it is not a run to resume; "
                "choose a new folder for --workdir"
            )
        return []
    there, here = read_config(workdir).to_dict(), json.loads(config.to_json())
    differences = list(_differences(there, here))
    # Whether the host keeps images changes no step; crops on the device are others.
    on_device = "device" in (there["data"].get("cache"), here["data"]["cache"])
    free = _FREE_PATHS if on_device else _FREE_PATHS + _CACHE_PATHS
    free += (_PARTS_PATH,) if here["model"]["freeze_bn"] else ()
    _refuse(workdir, "configuration", [x for x in differences if not x.startswith(free)])
    return differences


def check_images(workdir: Path, images: Mapping[str, Any]) -> None:
    """Makes sure that the run in a folder, if there is one, has the same images.

    Args:
        workdir: the folder; it need not exist.
        images: of the run; see `fingerprints`.

    Raises:
        ValueError: it has others.
    """
    # A run that was killed when it began may have left those of images that have changed since.
    there = _read_json(workdir / IMAGES) if (workdir / CONFIG).exists() else None
    if there is not None:
        _refuse(workdir, "set of images", list(_differences(there, images, "images")))


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


def finished(workdir: Path, config: ConfigDict) -> dict[str, Any] | None:
    """The result of a run that has nothing more to do; says which settings come too late for it.

    Args:
        workdir: the run's.
        config: the run's, perhaps with more epochs or another patience than it has had.

    Raises:
        ValueError: see `check`.
    """
    changed = check(workdir, config)
    result = read_result(workdir)
    if result is None:
        return None
    if result["last"]["epoch"] < config.epochs:  # Either it has lost its patience, or goes on.
        longer = ("config.epochs:", "config.evaluation.patience:")
        if any(difference.startswith(longer) for difference in changed):
            return None
    for difference in changed:
        logging.warning("the run is finished and stays as it is, without another %s", difference)
    if any(difference.startswith("config.evaluation.") for difference in changed):
        logging.warning("scripts/evaluate.py scores its checkpoints in other ways")
    return result


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
            raise ValueError(
                f"another process is training in {workdir} ({file.read().strip()}); wait for its "
                "end, or choose another --workdir"
            ) from None
        except OSError as error:
            logging.warning("%s cannot be locked (%s): start one process in it", workdir, error)
        with naming(workdir / LOCK):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def claim(
    workdir: Path,
    config: ConfigDict,
    images: Mapping[str, Any] | None = None,
    findings: data.Findings | None = None,
    fork_from: Path | None = None,
) -> None:
    """Writes into a folder what run it holds, or with which settings it goes on.

    Args:
        workdir: the run's, locked; it is made if there is none.
        config: the run's.
        images: of the run; see `fingerprints`.
        findings: what was found in them.
        fork_from: the run that a new one gets its weights from.

    Raises:
        ValueError: see `check` and `check_images`; another process may just have begun a run.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    changed = check(workdir, config)
    for difference in changed:
        logging.warning("goes on with another %s", difference)
    if images is not None:
        check_images(workdir, images)
        write_json(workdir / IMAGES, images)
    if findings is not None:
        write_json(workdir / FINDINGS, findings._asdict())
    is_new = not (workdir / CONFIG).exists()
    if is_new:
        # One that was killed when it began may have left another.
        (workdir / FORK).unlink(missing_ok=True)
        if fork_from is not None:
            write_json(workdir / FORK, {"from": str(fork_from)})
    # A run that goes on has no result yet.
    (workdir / RESULT).unlink(missing_ok=True)
    if is_new or changed:
        write_json(workdir / CONFIG, json.loads(config.to_json()))


def forked_from(workdir: Path, given: Path | None) -> Path | None:
    """The run that a run has its first weights from; None if it has them from elsewhere.

    Args:
        workdir: the run's; it need not exist.
        given: what the user says, who need not say it again when a run goes on.

    Raises:
        ValueError: the run in the folder began in another way.
    """
    recorded = _read_json(workdir / FORK)
    begun = (workdir / CONFIG).exists()
    there = Path(recorded["from"]) if begun and recorded else None
    given = None if given is None else given.absolute()
    if begun and given not in (None, there):
        raise ValueError(f"{workdir} holds a run that was forked from {there}, not from {given}")
    return there if begun else given


def read_config(workdir: Path) -> ConfigDict:
    """The configuration of the run in a folder.

    Raises:
        FileNotFoundError: there is no run.
    """
    path = workdir / CONFIG
    read = _read_json(path)
    if read is None:
        raise FileNotFoundError(f"{workdir} holds no run: there is no {path}")
    return ConfigDict(read).lock()


def _refuse(workdir: Path, what: str, differences: list[str]) -> None:
    if differences:
        raise ValueError(
            f"{workdir} holds a run of another {what}; choose another --workdir, or go back to:\n"
            + "\n".join(f"  {line}" for line in differences)
        )


def _differences(there: Any, here: Any, path: str = "config") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() | here.keys()):
            yield from _differences(there.get(name), here.get(name), f"{path}.{name}")
    elif there != here:
        yield f"{path}: {there!r} there, {here!r} now"
