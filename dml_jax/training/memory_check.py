"""The memory check: whether a run fits into free memory, and which settings would make it fit.

A compiled program states how much memory it needs. This is compared with the free memory before the
first step, because a step that needs more fails, or the kernel kills its process.

Images kept by `config.data.cache=host` are not included, since their size is not known in advance.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from dml_jax import memvir
from dml_jax._utils import free_memory, processes, runtime, sharding
from dml_jax._utils.errors import UserError
from dml_jax.evaluation.embedding import in_flight
from dml_jax.training import builder, resume
from dml_jax.training.builder import Experiment
from dml_jax.training.config import parse, to_config_dict

_PROGRAM = 500_000_000
"""Bytes that a run allocates on the host in addition to its steps and a copy of the state.

Measured with a ResNet-18 (512 dimensions, batches of 64 images of 128 pixels): 0.1 GB resident, and
0.6 GB of address space with a copy of the state of 0.14 GB.
"""
_WORKER = 250_000_000
"""Bytes of a process that decodes images; 275 MB were resident, some of them shared."""
_KEPT = 4
"""How many times a program may hold the memory of a step; see `runtime.prepare`. 3 were seen."""
_SLACK = 1.25  # Factor by which an estimate of the memory of a program may be too low.
_MAX_SPLIT = 8
"""Largest factor of the number of micro-batches that is proposed: compile time grows with it."""
_SIZE_STEP = 32  # Proposed image sizes are multiples of this.


class Need(NamedTuple):
    """Bytes that a run needs on each device."""

    fixed: int
    """Arguments of a step: the state and a batch."""
    temporary: int
    """Temporary memory and new outputs of a step, or of an evaluation if that needs more."""

    @property
    def total(self) -> int:
        """Memory needed during a step."""
        return self.fixed + self.temporary


class Room(NamedTuple):
    """Free memory for a device's share of the run."""

    size: int | float
    """Bytes."""
    where: str
    """Description of the memory that sets this bound."""


def check(built: Experiment, workdir: Path) -> None:
    """Checks that a run fits into memory; compiles its step, which training reuses.

    Args:
        built: the experiment of the run.
        workdir: directory of the run; if it is resumed, only settings that may change are proposed.

    Raises:
        ValueError: the run does not fit; the message proposes settings with which it would.
    """
    needed = need(built)
    runtime.trim_memory()
    room = free_room(built)
    smallest = processes.minimum(room.size)
    if needed.total <= smallest:
        if sharding.on_cpu(built.mesh) and needed.fixed + _KEPT * needed.temporary > smallest:
            runtime.release_freed_memory()
        return
    tightest = math.isclose(room.size, smallest, rel_tol=1e-6)
    where = room.where if tightest else "another process has less"
    problem = (
        f"a training step needs {_gb(needed.total)} of memory on each device, but only "
        f"{_gb(max(smallest, 0.0))} is available: {where}"
    )
    logging.warning("%s; compiling other settings to find some that fit", problem)
    lines = fitting(built, needed, smallest, lambda x: _fits(built, workdir, x, smallest))
    if lines:
        advice = "With any one of these lines it fits:\n" + "\n".join(lines)
    else:
        advice = (
            "No image size, number of micro-batches or rematerialisation was found to fit: "
            "choose a smaller config.model.backbone, config.batch_size or config.memvir.num_steps, "
            "fewer config.data.num_workers, or a machine with more memory"
        )
    raise UserError(f"{problem}. {advice}")


def need(built: Experiment) -> Need:
    """Returns the memory that a run needs on each device, according to its compiled programs.

    Args:
        built: the experiment of the run.
    """
    state, batch = built.abstract_state, builder.abstract_batch(built)
    step = built.take_step.lower(state, batch).compile().memory_analysis()
    rows, size = built.network.rows, built.config.data.test_side
    images = jax.ShapeDtypeStruct(
        (rows, size, size, 3), jnp.uint8, sharding=sharding.batch_sharding(built.mesh)
    )
    embed = built.network.embed.lower(built.network.variables_shape, images).compile()
    evaluation = embed.memory_analysis()
    if step is None or evaluation is None:  # Some backends do not report it.
        return Need(0, 0)
    new = step.output_size_in_bytes - step.alias_size_in_bytes
    pixels = rows * size * size * 3 // built.mesh.size
    embedding = pixels + evaluation.temp_size_in_bytes + evaluation.output_size_in_bytes
    return Need(
        fixed=step.argument_size_in_bytes,
        temporary=max(step.temp_size_in_bytes + new, in_flight(built.mesh) * embedding),
    )


def free_room(built: Experiment) -> Room:
    """Returns the free memory for each device's share of a run, before the state is created.

    Args:
        built: the experiment of the run, whose images may be on the devices already.
    """
    state = built.abstract_state
    shares = len(built.mesh.local_devices) if sharding.on_cpu(built.mesh) else 0
    sharing = processes.processes_on_this_host()
    program = _PROGRAM + sharding.bytes_per_device(state)
    reads_images = built.config.data.cache in ("none", "features")
    workers = _WORKER * built.config.data.num_workers * reads_images
    rooms = [
        *(
            _room(where, free, shares * sharing, (program + workers) * sharing)
            for where, free in free_memory.of_host().items()
        ),
        *(_room(where, free, shares, program) for where, free in free_memory.of_process().items()),
        *(
            _room(f"device {device.id}", stats["bytes_limit"] - stats["bytes_in_use"], 1, 0)
            for device in built.mesh.local_devices
            if "bytes_limit" in (stats := device.memory_stats() or {})
        ),
        Room(math.inf, "no limit is known"),
    ]
    # Cached images are arguments of the step, and no longer count as free.
    cache = built.cache("train")
    cached = 0 if cache is None else cache.images.nbytes // built.mesh.size
    tightest = min(rooms)
    return tightest._replace(size=tightest.size + cached)


def _room(where: str, free: int, shares: int, rest: int) -> Room:
    """Returns what each of `shares` devices may use of free memory after `rest` is reserved."""
    where = f"{where} has {_gb(free)} free"
    if rest:
        where += f", of which the rest of the program needs {_gb(rest)}"
    if shares > 1:
        where += f", and {shares} devices share it"
    if shares:
        return Room((free - rest) / shares, where)
    return Room(math.inf if rest <= free else 0, where)


def fitting(
    built: Experiment,
    needed: Need,
    room: int | float,
    fits: Callable[[Mapping[str, Any]], bool],
) -> list[str]:
    """Returns settings with which a run fits, as lines of flags; at most five are tried.

    Args:
        built: the experiment of a run that does not fit.
        needed: memory that the run needs.
        room: bytes that are free on each device.
        fits: returns whether the run fits with some settings changed.
    """
    alone = list(_candidates(built, needed, room))
    found = [settings for settings in alone if fits(settings)]
    together = {name: value for settings in alone for name, value in settings.items()}
    if not found and len(alone) > 1 and fits(together):
        found = [together]
    return [
        "  " + " ".join(f"--config.{name}={value}" for name, value in settings.items())
        for settings in found
    ]


def _candidates(built: Experiment, needed: Need, room: int | float) -> Iterator[Mapping[str, Any]]:
    """Yields changes of settings that could make a run fit, ordered by their effect on results."""
    config, memory = built.config, built.abstract_state.memory
    is_wide = isinstance(memory, memvir.Memory) and config.memvir.dtype == "float32"
    if is_wide and needed.total - sharding.bytes_per_device(memory) / 2 <= room:
        yield {"memvir.dtype": "bfloat16"}
    available = (room - needed.fixed) / _SLACK
    if available <= 0 or needed.temporary <= 0:
        return
    if not config.model.remat:
        yield {"model.remat": True}
    times = needed.temporary / available
    for count in range(config.micro_batches + 1, _MAX_SPLIT * config.micro_batches + 1):
        divisible = config.batch_size % (count * built.mesh.size) == 0
        if divisible and count >= times * config.micro_batches:
            yield {"micro_batches": count}
            break
    size = int(config.data.image_size / math.sqrt(times)) // _SIZE_STEP * _SIZE_STEP
    if 0 < size < config.data.image_size:
        yield {"data.image_size": size} | {
            f"data.{name}": round(getattr(config.data, name) * size / config.data.image_size)
            for name in ("test_size", "resize")
            if getattr(config.data, name)
        }


def _fits(built: Experiment, workdir: Path, settings: Mapping[str, Any], room: int | float) -> bool:
    """Returns whether a run with other settings is allowed and fits into the room."""
    changed = to_config_dict(built.config)
    changed.update_from_flattened_dict(settings)
    try:
        config = parse(changed)
        resume.check(workdir, config)
        other = builder.build(config, built.mesh, built.inspection)
    except ValueError:  # The resumed run or the backbone does not allow it.
        return False
    return -processes.minimum(-need(other._replace(cache=built.cache)).total) <= room


def _gb(size: int | float) -> str:
    return f"{size / 1e9:.2f} GB"
