"""A complete run, from a configuration to its result."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from dml_jax import data
from dml_jax._utils import processes, sharding, storage
from dml_jax.models import pretrained
from dml_jax.training import (
    bucket,
    builder,
    loop,
    memory_check,
    preemption,
    resume,
    run_directory,
    trackers,
)
from dml_jax.training.config import Config, parse
from dml_jax.training.fork import forked_from, initial_state
from dml_jax.training.origin import Origin


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    overview: bool = False,
    fork_from: str | Path | None = None,
    origin: Origin | None = None,
    tracker: trackers.Tracker | None = None,
    inspection: data.InspectionReport | None = None,
) -> dict[str, Any]:
    """Trains a run to its end, or resumes it, and returns its result.

    Args:
        config: all settings.
        workdir: directory of the run: new, or that of the run to resume. A URL of object storage
            may be given as a string; see `dml_jax.training.bucket`.
        overview: whether to print a table of the parameters first.
        fork_from: directory or URL of another run. A new run starts with the network of its last
            checkpoint; nothing else is taken from it.
        origin: config file and variant of the configuration, recorded for the report.
        tracker: records the run in addition to the trackers of the configuration. An error that it
            raises ends the run, which can be resumed.
        inspection: inspection report of the images, if another run has just inspected them.

    Returns:
        The contents of `result.json`.

    Raises:
        Stopped: the process was asked to stop; call again to resume.
        ValueError: a setting or an image is invalid, a step does not fit into memory, the workdir
            holds another run, or another process trains in it.
        FileNotFoundError: images or weights are not at the configured path.
        ModuleNotFoundError: a tracker that the config names, or the package for the protocol of a
            URL, is not installed.
        FloatingPointError: the loss or its gradient became nonfinite.
    """
    given = parse(config)
    if given.deterministic:
        # JAX reads the flags when it initialises its devices.
        flag, flags = "--xla_gpu_deterministic_ops=true", os.environ.get("XLA_FLAGS", "")
        if flag not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}"
    arguments = (overview, fork_from, origin, tracker, inspection)
    if not storage.is_url(workdir):
        return _train(given, Path(workdir), None, *arguments)
    with bucket.opened(str(workdir)) as opened:
        return _train(given, opened.folder, opened, *arguments)


def finished(config: ConfigDict, workdir: str | Path) -> dict[str, Any] | None:
    """Returns the result of a run, or None if it has not finished; nothing is trained.

    Args:
        config: all settings.
        workdir: directory or URL of the run; it need not exist.

    Raises:
        ValueError: a setting is invalid, or the workdir holds another run.
        OSError: the storage cannot be reached.
    """
    with bucket.small_files(str(workdir)) as folder:
        settings = _resolved(parse(config), forked=forked_from(folder, None) is not None)
        return resume.finished(folder, settings)


def _train(
    given: Config,
    workdir: Path,
    published: bucket.Bucket | None,
    overview: bool,
    fork_from: str | Path | None,
    origin: Origin | None,
    tracker: trackers.Tracker | None,
    inspection: data.InspectionReport | None,
) -> dict[str, Any]:
    fork = forked_from(workdir, fork_from)
    settings = _resolved(given, forked=fork is not None)
    result = resume.finished(workdir, settings)
    if result is not None:
        return result
    trackers.check(settings)
    is_new = not (workdir / run_directory.CONFIG).exists()
    if is_new:
        pretrained.find(settings.model.pretrained)  # Before images are read and a step compiled.
    with preemption.listening() as stop, contextlib.ExitStack() as lock:
        # Other processes would wait for one that exits alone.
        stop.unsaved = jax.process_count() > 1
        inspection = run_directory.read_inspection(workdir) or inspection
        built = builder.build(settings, sharding.make_mesh(), inspection)
        if overview and processes.is_first_process():
            params = built.abstract_state.params
            print(parameter_overview.get_parameter_overview(params, include_stats=False))
        images = run_directory.fingerprints(built.sources)
        resume.check_images(workdir, images)
        memory_check.check(built, workdir)
        # Other errors in the weights are raised before anything is written.
        initial = initial_state(built, fork) if is_new else None
        processes.wait_for_all("checked")

        def claim() -> None:
            lock.enter_context(run_directory.locked(workdir))
            resume.claim(workdir, settings, images, built.inspection, fork, origin)

        processes.in_first_process(claim)
        if published is not None:
            published.share()
        return loop.train(built, workdir, stop, tracker, initial, published)


def _resolved(config: Config, *, forked: bool) -> Config:
    """Returns the config with absolute paths, and without pretrained weights for a fork."""
    weights = pretrained.NONE if forked else pretrained.absolute(config.model.pretrained)

    def absolute(path: str) -> str:
        return storage.absolute(path) if path and not path.startswith("hf:") else path

    of_data = dataclasses.replace(
        config.data, root=absolute(config.data.root), features=absolute(config.data.features)
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, pretrained=weights),
        data=of_data,
    )
