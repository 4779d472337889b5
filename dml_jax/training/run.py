"""A whole run, from a configuration to its result."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dml_jax._utils import processes, sharding
from dml_jax.models import pretrained
from dml_jax.training import (
    builder,
    loop,
    memory_check,
    preemption,
    resume,
    run_directory,
    trackers,
)
from dml_jax.training.config import Config, parse
from dml_jax.training.fork import forked_from, read_fork
from dml_jax.training.origin import Origin


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    overview: bool = False,
    fork_from: Path | None = None,
    origin: Origin | None = None,
) -> dict[str, Any]:
    """Trains what a configuration says, goes on with it, or finds that it is done.

    Args:
        config: a whole config.
        workdir: the run's, new or with an earlier part of this run in it.
        overview: whether to print the network's parameters first.
        fork_from: another run's workdir: a new run starts with its network, from its last
            checkpoint, and with nothing else of it.
        origin: config file and variant of the configuration, recorded for the report.

    Returns:
        The contents of `result.json`.

    Raises:
        Stopped: the process was asked to; started again, the run goes on.
        ValueError: a setting or an image is wrong, or a step does not fit into memory, or the
            workdir holds another run, or another process trains in it.
        FileNotFoundError: images or weights are not where the config says.
        ModuleNotFoundError: the config names a tracker that is not installed.
        FloatingPointError: the loss is no longer finite.
    """
    fork = forked_from(workdir, fork_from)
    settings = _resolved(parse(config), forked=fork is not None)
    result = resume.finished(workdir, settings)
    if result is not None:
        return result
    trackers.check(settings)
    if settings.deterministic:
        # Read when JAX first looks for its devices.
        wanted, given = "--xla_gpu_deterministic_ops=true", os.environ.get("XLA_FLAGS", "")
        if wanted not in given:
            os.environ["XLA_FLAGS"] = f"{given} {wanted}"
    with preemption.listening() as asked, contextlib.ExitStack() as held:
        asked.unsaved = jax.process_count() > 1  # The others would wait for one that ended alone.
        inspection = run_directory.read_inspection(workdir)
        built = builder.build(settings, sharding.make_mesh(), inspection)
        if overview and processes.is_first_process():
            print(builder.parameter_overview(built))
        images = run_directory.fingerprints(built.sources)
        resume.check_images(workdir, images)
        if not (workdir / run_directory.CONFIG).exists():
            # So that bad ones are told before anything is written.
            builder.load_pretrained(settings.model)
            if fork is not None:
                read_fork(built.network, fork)
        memory_check.check(built, workdir)

        processes.wait_for_all("checked")

        def claim() -> None:
            held.enter_context(run_directory.locked(workdir))
            resume.claim(workdir, settings, images, built.inspection, fork, origin)

        processes.in_first_process(claim)
        return loop.train(built, workdir, asked)


def _resolved(config: Config, *, forked: bool) -> Config:
    """Returns the config as it is recorded, with absolute paths."""
    place = pretrained.NONE if forked else pretrained.absolute(config.model.pretrained)
    root = str(Path(config.data.root).absolute()) if config.data.root else ""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, pretrained=place),
        data=dataclasses.replace(config.data, root=root),
    )
