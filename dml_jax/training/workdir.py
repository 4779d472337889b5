"""What a run's folder holds, and whether a folder is this run's."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
CHECKPOINTS = "checkpoints"
EMBEDDINGS = "embeddings.npz"
GALLERY = "gallery.npz"
RESULT = "result.json"
WANDB = "wandb.json"

FREE = ("config.data.num_workers", "config.wandb")
"""Settings that may change when a run goes on: they change no result."""


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = _part(path)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_result(workdir: Path) -> dict[str, Any] | None:
    """The result of a finished run; None if there is none."""
    path = workdir / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of one JSON object a line; none if there is no file.

    A last line that was cut short, as by a kill, is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def seconds(workdir: Path) -> float:
    """How long a run has trained and evaluated, all its interruptions left out."""
    return sum(
        line["train_seconds"] + line["evaluation_seconds"] for line in read_lines(workdir / TIMINGS)
    )


def check(workdir: Path, config: ConfigDict) -> None:
    """Makes sure that a folder is new, or holds a run of this very configuration.

    Args:
        workdir: the folder; it need not exist.
        config: the run's.

    Raises:
        ValueError: it holds another run, or something that is no run; every difference is named.
    """
    path = workdir / CONFIG
    if not path.exists():
        # A run that was killed when it began leaves at most a part of that file.
        if workdir.exists() and {x.name for x in workdir.iterdir()} - {_part(path).name}:
            raise ValueError(
                f"{workdir} holds files but no {CONFIG}, so it is not a run to resume; "
                "choose a new folder for --workdir"
            )
        return
    there, here = read_config(workdir).to_dict(), json.loads(config.to_json())
    differences = list(_differences(there, here))
    if differences:
        raise ValueError(
            f"{workdir} holds a run of another configuration; choose another --workdir, or go back "
            "to these settings:\n" + "\n".join(f"  {line}" for line in differences)
        )


def claim(workdir: Path, config: ConfigDict) -> None:
    """Makes the folder of a checked run."""
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / CONFIG).exists():
        write_json(workdir / CONFIG, json.loads(config.to_json()))


def read_config(workdir: Path) -> ConfigDict:
    """The configuration of the run in a folder.

    Raises:
        FileNotFoundError: there is no run.
    """
    path = workdir / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run: there is no {path}")
    try:
        return ConfigDict(json.loads(path.read_text(encoding="utf-8"))).lock()
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _differences(there: Any, here: Any, path: str = "config") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() | here.keys()):
            yield from _differences(there.get(name), here.get(name), f"{path}.{name}")
    elif there != here and path not in FREE:
        yield f"{path}: {there!r} there, {here!r} now"
