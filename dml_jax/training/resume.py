"""Resume policy: whether the run in a workdir may be resumed with a configuration."""

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
    FORK,
    IMAGES,
    INSPECTION,
    LOCK,
    ORIGIN,
    RESULT,
    read_config,
    read_result,
)

_WRITTEN_FIRST = {CONFIG, IMAGES, INSPECTION, FORK, ORIGIN, LOCK}


def check(workdir: Path, config: Config) -> list[str]:
    """Checks that a workdir is new, or holds a run that may be resumed with a configuration.

    Args:
        workdir: directory of the run; it need not exist.
        config: configuration of the run.

    Returns:
        The differences between the configurations, all of which are allowed.

    Raises:
        ValueError: the workdir holds other files, or a run whose configuration differs in settings
            that may not change; the message names all of them.
    """
    path = workdir / CONFIG
    if not path.exists():
        # A run that was killed at its start leaves at most these files.
        names = {x.name for x in workdir.iterdir()} if workdir.exists() else set()
        if {name.removesuffix(PART_SUFFIX) for name in names} - _WRITTEN_FIRST:
            raise UserError(
                f"{workdir} holds files but no {CONFIG}, so it is not a run to resume; "
                "choose a new folder for --workdir"
            )
        return []
    old, new = read_config(workdir).to_dict(), json.loads(json.dumps(to_dict(config)))
    differences = list(_differences(old, new))
    allowed = tuple(_resumable(old, new))
    _refuse(workdir, "configuration", [x for x in differences if not x.startswith(allowed)])
    return differences


def _resumable(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yields the prefixes of the differences that are allowed on resume."""
    for described in describe(Config):
        resumable = described.about.resumable
        if callable(resumable):
            resumable = resumable(*(_group_of(described.path, x) for x in (old, new)))
        if resumable:
            yield from (f"{described.path}.", f"{described.path}:")


def _group_of(path: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in path.split(".")[1:-1]:
        config = config[name]
    return config


def check_images(workdir: Path, images: Mapping[str, Any]) -> None:
    """Checks that the run in a workdir, if there is one, has the same images.

    Args:
        workdir: directory of the run; it need not exist.
        images: fingerprints of the images; see `fingerprints`.

    Raises:
        ValueError: the images differ.
    """
    # Without a config, the file was left by a run that was killed at its start.
    recorded = read_json(workdir / IMAGES) if (workdir / CONFIG).exists() else None
    if recorded is not None:
        _refuse(workdir, "set of images", list(_differences(recorded, images, "images")))


def finished(workdir: Path, config: Config) -> dict[str, Any] | None:
    """Returns the result of a finished run, or None; logs changed settings without effect.

    A run is not finished if it is given more epochs, or more patience after it stopped early.

    Args:
        workdir: directory of the run.
        config: configuration of the run, perhaps changed.

    Raises:
        ValueError: see `check`.
    """
    changed = check(workdir, config)
    result = read_result(workdir)
    if result is None:
        return None
    if result["last"]["epoch"] < config.epochs:  # It stopped early, or now has more epochs.
        longer = ("config.epochs:", "config.evaluation.patience:")
        if any(difference.startswith(longer) for difference in changed):
            return None
    for difference in changed:
        logging.warning("the run is finished; the change has no effect: %s", difference)
    if any(difference.startswith("config.evaluation.") for difference in changed):
        logging.warning("use scripts/evaluate.py to score its checkpoints with other settings")
    return result


def claim(
    workdir: Path,
    config: Config,
    images: Mapping[str, Any] | None = None,
    inspection: data.InspectionReport | None = None,
    fork_from: str | None = None,
    origin: Origin | None = None,
) -> None:
    """Records a new run in its workdir, or the changed settings of a resumed one.

    Args:
        workdir: directory of the run, locked; it is created if it does not exist.
        config: configuration of the run.
        images: fingerprints of the images; see `fingerprints`.
        inspection: inspection report of the images.
        fork_from: directory or URL of the run that a new run is forked from.
        origin: origin of the configuration, for the report.

    Raises:
        ValueError: see `check` and `check_images`; another process may have started a run since
            they were called.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    changed = check(workdir, config)
    for difference in changed:
        logging.warning("resumed with a changed setting: %s", difference)
    if images is not None:
        check_images(workdir, images)
        write_json(workdir / IMAGES, images)
    if inspection is not None:
        write_json(workdir / INSPECTION, inspection._asdict())
    is_new = not (workdir / CONFIG).exists()
    if is_new:
        # A run that was killed at its start may have left one.
        (workdir / FORK).unlink(missing_ok=True)
        if fork_from is not None:
            write_json(workdir / FORK, {"from": fork_from})
    # A resumed run has no result yet.
    (workdir / RESULT).unlink(missing_ok=True)
    if is_new or changed:
        # An earlier origin would be that of other settings.
        (workdir / ORIGIN).unlink(missing_ok=True)
        if origin is not None:
            write_json(workdir / ORIGIN, origin.to_json())
        write_json(workdir / CONFIG, to_dict(config))


def _refuse(workdir: Path, kind: str, differences: list[str]) -> None:
    if differences:
        raise UserError(
            f"{workdir} holds a run with another {kind}; choose another --workdir, or undo:\n"
            + "\n".join(f"  {line}" for line in differences)
        )


def _differences(old: Any, new: Any, path: str = "config") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}")
    elif old != new:
        yield f"{path}: {old!r} before, {new!r} now"
