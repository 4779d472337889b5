"""Compiles a training step for accelerators that are not here, and prints what it needs there.

dml-jax compile --config=cars196:ps_memvir --topology=v5e:4x4 --classes=98 --config.batch_size=2048
dml-jax compile --config=sop:ps --topology=h100:8 --config.model.dtype=bfloat16 --json \
    --config.data.root=data/sop

Memory, operations and collectives are those of the compiler, for one device and one step. Nothing
is run, and neither the accelerators nor their drivers are needed: TPUs take the extra `tpu`, GPUs
the extra `cuda`. Without --classes, the images are counted at config.data.root.

If the step does not fit, settings are tried with which it would, and the exit code is 2.
"""

import collections
import json
import time
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from dml_jax import data
from dml_jax._utils import sharding, topologies
from dml_jax._utils.errors import UserError
from dml_jax.cli import command_line, config_flag, packaged_configs
from dml_jax.data.splits import load_sources
from dml_jax.training import compile_ahead
from dml_jax.training.builder import Experiment
from dml_jax.training.compile_ahead import Analysis, DoesNotFitError
from dml_jax.training.config import Config, parse

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="FILE.py or the name of a packaged config; then, optionally, :variant."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Accelerators: v5e, v5p, v6e or h100 with their shape, as in v5e:4x4, h100:8 or h100:2x8.",
    required=True,
)
_CLASSES = flags.DEFINE_integer(
    "classes", None, "Classes for training; default: those of the data set.", lower_bound=2
)
_IMAGES = flags.DEFINE_integer(
    "images",
    None,
    "Images for training; default: those of the data set, or with --classes two of each class and "
    "at least 100 batches.",
    lower_bound=1,
)
_JSON = flags.DEFINE_bool(
    "json", False, "Whether to print one JSON object as the last line, if the settings are valid."
)

flags.mark_flag_as_required("config")

_UNNAMED = "(made by the compiler)"


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        topology = topologies.get(_TOPOLOGY.value)
        config = parse(_CONFIG.value)
        classes, images = _size(config)
        mesh = sharding.make_mesh(topology.devices)
        built = compile_ahead.abstract_experiment(config, mesh, classes=classes, images=images)
        file, variant = config_flag.file_and_variant()
        name = packaged_configs.shortened(file) + (variant and f":{variant}")
        kind = topology.devices[0].device_kind
        print(
            f"{name}, {classes} classes, {config.batch_size} images a step, on {mesh.size} x "
            f"{kind} of {_gb(topology.memory)}"
        )
        if config.data.cache == "device":
            print(f"the cache holds {images} images, taken as squares of config.data.cache_size")
        began = time.perf_counter()
        try:
            analysis = compile_ahead.analyse(built)
        except DoesNotFitError as error:
            _refuse(built, topology.memory, error.needed, str(error))
        print(f"compiled in {time.perf_counter() - began:.0f} s\n\n{_text(analysis)}")
        if analysis.peak > topology.memory:
            message = f"the step needs {_gb(analysis.peak)}"
            _refuse(built, topology.memory, analysis.peak, message)
        _print_json(
            devices=mesh.size,
            fits=True,
            peak_bytes_per_device=analysis.peak,
            bytes_per_device=dict(analysis.parts),
            copied_bytes_per_device=analysis.copied,
            flops_per_device=analysis.flops,
            collectives={kind: count for kind, (count, _) in _by_kind(analysis).items()},
            collective_bytes=sum(one.size for one in analysis.collectives),
        )


def _size(config: Config) -> tuple[int, int]:
    """Returns the numbers of classes and of images for training."""
    if _CLASSES.value:
        if _IMAGES.value is None and config.data.cache == "device":
            raise UserError("config.data.cache is 'device', which needs --images beside --classes")
        images = _IMAGES.value or max(2 * _CLASSES.value, 100 * config.batch_size)
        return _CLASSES.value, images
    try:
        train = load_sources(config.data)["train"]
    except FileNotFoundError as error:
        raise UserError(f"{error}; give --classes to compile without the images") from error
    if config.data.validation_classes:
        train, _ = data.split_classes(
            train, config.data.validation_classes, seed=0, fold=config.data.validation_fold
        )
    return len(train.class_names), _IMAGES.value or len(train)


def _refuse(built: Experiment, room: float, needed: float | None, problem: str) -> NoReturn:
    """Raises a UserError with settings that would fit.

    Args:
        built: the experiment, of which a step does not fit.
        room: bytes of a device.
        needed: bytes that the step needs; None if that is not known.
        problem: start of the message.
    """
    print(f"{problem}; compiling other settings to find some that fit", flush=True)
    lines = compile_ahead.fitting(built, room, needed)
    if lines:
        advice = "With any one of these lines it fits:\n" + "\n".join(lines)
    else:
        advice = "Use more devices, or choose a smaller batch, image, network or memory"
    _print_json(devices=built.mesh.size, fits=False, peak_bytes_per_device=needed, fitting=lines)
    raise UserError(f"{problem} on each device, which has {_gb(room)}. {advice}")


def _text(analysis: Analysis) -> str:
    lines = [f"peak memory of a device: {_gb(analysis.peak)}"]
    lines += [f"  {_gb(size):>12}  {name}" for name, size in analysis.parts.items() if size]
    if analysis.copied:
        lines.append(f"{_gb(analysis.copied)} of the state are not updated in place")
    else:
        lines.append("the whole state is updated in place")
    lines += [f"operations of a device: {analysis.flops / 1e9:,.1f} GFLOP", "collectives:"]
    for kind, (count, size) in _by_kind(analysis).items():
        lines.append(f"  {count:5}  {kind:<20}{_gb(size):>12}")
    if not analysis.collectives:
        lines.append("  none")
    for one in compile_ahead.largest(analysis.collectives):
        lines.append(f"  {_gb(one.size):>12}  {one.kind:<20}{one.operation or _UNNAMED}")
    if analysis.cycles:
        lines.append("costliest operations, cycles by XLA's estimate:")
        lines += [
            f"  {cycles / 1e6:10.2f} M  {name or _UNNAMED}"
            for name, cycles in analysis.cycles.items()
        ]
    return "\n".join(lines)


def _by_kind(analysis: Analysis) -> dict[str, tuple[int, int]]:
    """Returns the number and the bytes of the collectives of each kind."""
    sizes = collections.defaultdict(list)
    for one in analysis.collectives:
        sizes[one.kind].append(one.size)
    return {kind: (len(of_kind), sum(of_kind)) for kind, of_kind in sorted(sizes.items())}


def _print_json(**found: Any) -> None:
    """Prints one line for programs, if it is wanted."""
    if _JSON.value:
        print(json.dumps(found))


def _gb(size: float) -> str:
    return f"{size / 1e6:.3f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main)
