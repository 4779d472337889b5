"""Resume policy: whether a folder holds a run that may go on with a given configuration."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from dml_jax import data
from dml_jax._utils.errors import UserError
from dml_jax._utils.files import PART_SUFFIX, read_json, write_json
from dml_jax.settings import describe
from dml_jax.training.config import Config, to_dict
from dml_jax.training.origin import Origin
from dml_jax.training.run_directory import (
    CONFIG,
    INSPECTION,
    FORK,
    IMAGES,
    LOCK,
    ORIGIN,
    RESULT,
    read_config,
    read_result,
)

_FIRST = {CONFIG, IMAGES, INSPECTION, FORK, ORIGIN, LOCK}


def check(workdir: Path, config: Config) -> list[str]:
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
        names = {x.name for x in workdir.iterdir()} if workdir.exists() else set()
        if {name.removesuffix(PART_SUFFIX) for name in names} - _FIRST:
            raise UserError(
                f"{workdir} holds files but no {CONFIG}, so it is not a run to resume; "
                "choose a new folder for --workdir"
            )
        return []
    there, here = read_config(workdir).to_dict(), json.loads(json.dumps(to_dict(config)))
    differences = list(_differences(there, here))
    free = tuple(_resumable(there, here))
    _refuse(workdir, "configuration", [x for x in differences if not x.startswith(free)])
    return differences


def _resumable(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Yields the beginnings of the differences that a resumed run may have."""
    for described in describe(Config):
        resumable = described.about.resumable
        if callable(resumable):
            resumable = resumable(*(_group_of(described.path, x) for x in (there, here)))
        if resumable:
            yield from (f"{described.path}.", f"{described.path}:")


def _group_of(path: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in path.split(".")[1:-1]:
        config = config[name]
    return config


def check_images(workdir: Path, images: Mapping[str, Any]) -> None:
    """Makes sure that the run in a folder, if there is one, has the same images.

    Args:
        workdir: the folder; it need not exist.
        images: of the run; see `fingerprints`.

    Raises:
        ValueError: it has others.
    """
    # A run that was killed when it began may have left those of images that have changed since.
    there = read_json(workdir / IMAGES) if (workdir / CONFIG).exists() else None
    if there is not None:
        _refuse(workdir, "set of images", list(_differences(there, images, "images")))


def finished(workdir: Path, config: Config) -> dict[str, Any] | None:
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


def claim(
    workdir: Path,
    config: Config,
    images: Mapping[str, Any] | None = None,
    inspection: data.InspectionReport | None = None,
    fork_from: Path | None = None,
    origin: Origin | None = None,
) -> None:
    """Writes into a folder what run it holds, or with which settings it goes on.

    Args:
        workdir: the run's, locked; it is made if there is none.
        config: the run's.
        images: of the run; see `fingerprints`.
        inspection: what was found in them.
        fork_from: the run that a new one gets its weights from.
        origin: of the configuration, for the report.

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
    if inspection is not None:
        write_json(workdir / INSPECTION, inspection._asdict())
    is_new = not (workdir / CONFIG).exists()
    if is_new:
        # One that was killed when it began may have left another.
        (workdir / FORK).unlink(missing_ok=True)
        if fork_from is not None:
            write_json(workdir / FORK, {"from": str(fork_from)})
        (workdir / ORIGIN).unlink(missing_ok=True)
    # A run that goes on has no result yet.
    (workdir / RESULT).unlink(missing_ok=True)
    if origin is not None and (is_new or changed):
        write_json(workdir / ORIGIN, origin.to_json())
    if is_new or changed:
        write_json(workdir / CONFIG, to_dict(config))


def _refuse(workdir: Path, what: str, differences: list[str]) -> None:
    if differences:
        raise UserError(
            f"{workdir} holds a run of another {what}; choose another --workdir, or go back to:\n"
            + "\n".join(f"  {line}" for line in differences)
        )


def _differences(there: Any, here: Any, path: str = "config") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() | here.keys()):
            yield from _differences(there.get(name), here.get(name), f"{path}.{name}")
    elif there != here:
        yield f"{path}: {there!r} there, {here!r} now"
