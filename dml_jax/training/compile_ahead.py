"""Ahead-of-time compilation: what a training step needs on accelerators that are not here."""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dml_jax import data
from dml_jax._utils.errors import UserError
from dml_jax._utils.sharding import bytes_per_device
from dml_jax.data.device_cache import Cache
from dml_jax.training import builder, memory_check, step
from dml_jax.training.builder import Experiment
from dml_jax.training.config import Config, parse, to_config_dict

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"\s*(?:ROOT )?%?(\S+) = (.*?) ({_KINDS})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_BYTES = {
    **dict.fromkeys(("pred", "u8", "s8"), 1),
    **dict.fromkeys(("bf16", "f16", "u16", "s16"), 2),
    **dict.fromkeys(("f32", "u32", "s32"), 4),
    **dict.fromkeys(("f64", "u64", "s64"), 8),
}
# Either message counts the arguments of the program too.
_NEEDED = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMG])")
_LARGEST = 8  # Operations to list.


class DoesNotFitError(UserError):
    """The compiler needs more memory than a device has."""

    def __init__(self, message: str, needed: float | None) -> None:
        """Creates the error.

        Args:
            message: the message.
            needed: bytes that the compiler needs on a device; None if it does not say.
        """
        super().__init__(message)
        self.needed = needed


class Collective(NamedTuple):
    """A collective operation of a compiled step."""

    kind: str
    size: int
    """Bytes of its result on one device."""
    operation: str
    """Name of the operation in JAX that it is part of."""


class Analysis(NamedTuple):
    """What a step needs on each device, by the account of the compiler."""

    peak: int
    """Largest number of bytes in use."""
    parts: Mapping[str, int]
    """Bytes of the parts of the state and of the batch; `temporary` is the rest, with padding."""
    copied: int
    """Bytes of the state that the step does not update in place."""
    flops: float
    """Floating-point operations."""
    collectives: Sequence[Collective]
    cycles: Mapping[str, int]
    """Cycles of the costliest operations by name, as XLA estimates them, without communication;
    empty for GPUs, whose compiler estimates none."""


def abstract_experiment(
    config: Config, mesh: jax.sharding.Mesh, *, classes: int, images: int
) -> Experiment:
    """Builds the experiment of a configuration for images that nobody reads.

    Args:
        config: the configuration.
        mesh: the devices to compile for.
        classes: number of classes for training.
        images: number of images for training, which are shared evenly among the classes.

    Raises:
        ValueError: a setting is invalid for so many images, classes or devices.
    """
    source = placeholder(classes, images)
    built = builder.build(config, mesh, sources={"train": source, "test": source})
    if config.data.cache != "device":
        return built
    side, rows = config.data.cache_size, -(-images // mesh.size) * mesh.size
    shape = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8)
    cached = Cache(images=cast(jax.Array, shape), sides=np.zeros((images, 2), np.int32))
    return built._replace(cache=lambda _: cached)


def placeholder(classes: int, images: int) -> data.Source:
    """Returns a source of images that cannot be read, shared evenly among the classes."""
    nameless = ("",) * images
    return data.Source(
        records=nameless,
        labels=np.arange(images, dtype=np.int32) % classes,
        class_names=("",) * classes,
        names=nameless,
    )


def analyse(built: Experiment) -> Analysis:
    """Compiles the training step of an experiment, and returns what it needs.

    Args:
        built: the experiment, whose mesh may be of devices that are not here.

    Raises:
        DoesNotFitError: the step needs more memory than a device has.
    """
    state, batch = built.abstract_state, builder.abstract_batch(built)
    compiled = _compile(built.take_step.lower(state, batch))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # TPU and GPU compilers report both.
    parts = {
        "network": bytes_per_device((state.params["embedder"], state.batch_stats)),
        "proxies": bytes_per_device(state.params.get("proxies")),
        "average": bytes_per_device(state.average),
        "optimizer": bytes_per_device(state.opt_state),
        "memory": bytes_per_device(state.memory),
        "batch": bytes_per_device(batch),
    }
    in_place = donated_outputs(text)
    return Analysis(
        peak=memory.peak_memory_in_bytes,
        parts=parts | {"temporary": memory.peak_memory_in_bytes - sum(parts.values())},
        copied=sum(
            bytes_per_device(x) for i, x in enumerate(jax.tree.leaves(state)) if i not in in_place
        ),
        flops=_flops(built, compiled),
        collectives=list(collectives(text)),
        cycles=_cycles(text),
    )


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    # The compilation cache takes programs for devices that are not here, but cannot read them.
    least = "jax_persistent_cache_min_compile_time_secs"
    seconds = getattr(jax.config, least)
    jax.config.update(least, math.inf)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = _NEEDED.search(str(error))
        if used is None:
            message = f"the step does not fit: {str(error).splitlines()[0]}"
            raise DoesNotFitError(message, None) from error
        needed = float(used[1]) * 1024 ** (1 + "KMG".index(used[2]))
        raise DoesNotFitError(f"the step needs {needed / 1e9:.1f} GB", needed) from error
    finally:
        jax.config.update(least, seconds)


def donated_outputs(text: str) -> set[int]:
    """Returns the positions of the outputs of a program that reuse the memory of an argument.

    Args:
        text: the program, as XLA prints it.
    """
    header = text.partition("\n")[0]
    return {int(output) for output in re.findall(r"\{(\d+)\}: \(\d+, \{\}", header)}


def _flops(built: Experiment, compiled: jax.stages.Compiled) -> float:
    """Returns the operations of a step on each device."""
    counted = (compiled.cost_analysis() or {}).get("flops", 0.0)
    if counted > 0:
        return counted
    # The compiler for GPUs does not count; before it is compiled, the step can be counted here.
    plain = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        (built.abstract_state, builder.abstract_batch(built)),
    )
    lowered = jax.jit(partial(step.train_step, built.step_config)).lower(*plain)
    return (lowered.cost_analysis() or {}).get("flops", 0.0) / built.mesh.size


def collectives(text: str) -> Iterator[Collective]:
    """Yields the collectives of a compiled program, each once.

    Args:
        text: the program, as XLA prints it. A collective that overlaps computation may stand in it
            several times, with the same channel.
    """
    seen = set()
    for line in text.splitlines():
        found = _COLLECTIVE.match(line)
        if not found:
            continue
        name, result, kind, starts = found.groups()
        channel = re.search(r"channel_id=(\d+)", line)
        identity = channel[1] if channel else name
        if identity in seen:
            continue
        seen.add(identity)
        shapes = _SHAPE.findall(re.sub(r"\{[^}]*\}", "", result))
        if starts and kind != "all-reduce":
            # Operands come before the results, and scalars of the compiler's own after.
            shapes = [shape for shape in shapes if shape[1]]
            shapes = shapes[len(shapes) // 2 :]
        size = sum(
            _BYTES.get(dtype, 0) * math.prod(int(side) for side in sides.split(",") if side)
            for dtype, sides in shapes
        )
        yield Collective(kind, size, _operation(line))


def _operation(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1] if found else ""


def _cycles(text: str) -> dict[str, int]:
    """Returns the cycles of the costliest operations of a program for TPUs, by name."""
    total: collections.Counter[str] = collections.Counter()
    for line in text[text.index("\nENTRY") :].splitlines():
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
            total[_operation(line)] += int(cycles[1])
    return dict(total.most_common(_LARGEST))


def fitting(built: Experiment, room: int | float, needed: int | float | None) -> list[str]:
    """Returns settings with which a step would fit, of those that are tried.

    Args:
        built: the experiment, of which a step does not fit.
        room: bytes of a device.
        needed: bytes that the step needs; None if that is not known.
    """
    if needed is None:
        return []
    fixed = bytes_per_device((built.abstract_state, builder.abstract_batch(built)))
    need = memory_check.Need(fixed, max(0, int(needed) - fixed))
    source = built.sources["train"]

    def fits(settings: Mapping[str, Any]) -> bool:
        changed = to_config_dict(built.config)
        changed.update_from_flattened_dict(settings)
        try:
            other = abstract_experiment(
                parse(changed), built.mesh, classes=len(source.class_names), images=len(source)
            )
            return analyse(other).peak <= room
        except ValueError:  # It does not fit either, or the backbone does not allow it.
            return False

    return memory_check.fitting(built, need, room, fits)


def largest(found: Sequence[Collective]) -> list[Collective]:
    """Returns the largest collectives, those of one operation and kind together."""
    sizes: collections.Counter[tuple[str, str]] = collections.Counter()
    for one in found:
        sizes[one.kind, one.operation] += one.size
    return [Collective(kind, size, of) for (kind, of), size in sizes.most_common(_LARGEST)]
