"""The listing of the runs of a comparison before they are trained: commands and costs."""

from collections.abc import Iterator, Sequence

import jax

from dml_jax._utils import sharding, topologies
from dml_jax.data.config import DataConfig
from dml_jax.models import pretrained
from dml_jax.training import cells as runs
from dml_jax.training import compile_ahead, cost
from dml_jax.training.cells import Cell
from dml_jax.training.compile_ahead import DoesNotFitError
from dml_jax.training.config import Config, parse
from dml_jax.training.cost import Amount, Operations

_GIGA, _HOUR = 1e9, 3600


class Listing:
    """Lists runs, with all costs that runs have in common computed once."""

    def __init__(
        self,
        *,
        device: str,
        utilisation: float,
        images_per_second: float | None,
        topology: str | None,
    ) -> None:
        """Chooses what costs are computed from.

        Args:
            device: a key of `cost.PEAKS`.
            utilisation: share of the peak of the device that training is assumed to reach.
            images_per_second: measured rate to use instead of these two.
            topology: accelerators to compile each step for, see `topologies.get`; None for none.

        Raises:
            ValueError: the topology is unknown.
            ModuleNotFoundError: JAX's package for the topology is not installed.
        """
        self._device, self._utilisation, self._rate = device, utilisation, images_per_second
        self._topology_name = topology
        jax.config.update("jax_platforms", "cpu")  # No accelerator is used.
        self._topology = None if topology is None else topologies.get(topology)
        self._sources: dict[DataConfig, tuple] = {}
        self._operations: dict[tuple, Operations] = {}
        self._memory: dict[str, str] = {}
        self._notes: dict[str, None] = {}

    def lines(self, cells: Sequence[Cell]) -> Iterator[str]:
        """Yields the lines of all runs, and what their numbers are based on.

        Raises:
            ValueError: a setting is invalid, or a folder holds another run.
            FileNotFoundError: images are not found, and their published number is not known.
        """
        remaining, finished = 0.0, 0
        for index, cell in enumerate(cells):
            config = parse(cell.config)
            is_finished = runs.finished(cell) is not None
            amount = cost.amount(config, self._find(config))
            hours = self._hours(config, amount)
            finished += is_finished
            remaining += 0.0 if is_finished else hours
            yield f"{index:4}  {cell.name}, seed {config.seed}" + ", finished" * is_finished
            yield (
                f"      {amount.epochs:,} epochs of {amount.steps_per_epoch:,} steps, "
                f"{amount.epochs * amount.steps_per_epoch:,} steps of {config.batch_size} images, "
                f"{amount.evaluated_images:,} images evaluated, {hours:.2f} device hours"
                + self._memory_of(cell, config)
            )
            yield "      " + " ".join(cell.origin.command(cell.workdir))
        yield (
            f"\n{len(cells)} cells, {finished} finished; the others take {remaining:,.1f} device "
            "hours."
        )
        yield from self._notes
        if self._topology is None:
            yield (
                "memory: not estimated; --topology=h100:1, for example, compiles each step, some "
                "minutes for each variant"
            )

    def _find(self, config: Config) -> dict:
        if config.data not in self._sources:
            found, is_found = self._sources[config.data] = cost.sources(config.data)
            counted = ", ".join(f"{len(x):,} {split}" for split, x in found.items())
            where = (
                f"found at {config.data.root}"
                if is_found
                else (f"NOT FOUND at {config.data.root}; these are the published numbers")
            )
            self._note(f"images of {config.data.name}: {counted}, {where}")
        try:
            pretrained.find(config.model.pretrained)
        except FileNotFoundError as error:
            self._note(f"weights: NOT FOUND: {str(error).splitlines()[0]}")
        return self._sources[config.data][0]

    def _hours(self, config: Config, amount: Amount) -> float:
        """Returns the hours of one device."""
        if self._rate is not None:
            self._note(
                f"hours: {self._rate:g} images/s, as given, for training and evaluation alike"
            )
            return (amount.trained_images + amount.evaluated_images) / self._rate / _HOUR
        peak = cost.PEAKS[self._device][config.model.dtype]
        key = (config.model, config.data.image_size, config.data.test_side)
        if key not in self._operations:
            self._operations[key] = cost.operations(config)
        training, evaluation = self._operations[key]
        reached = self._utilisation * peak
        self._note(
            f"hours: an ASSUMPTION, not measured: {100 * self._utilisation:g} % of the "
            f"{peak / 1e12:g} TFLOP/s of one {self._device} for {config.model.dtype} "
            f"(--utilisation). The network needs {training / _GIGA:.2g} GFLOP for an image of "
            f"training and {evaluation / _GIGA:.2g} for one of evaluation by XLA's count, so this "
            f"is about {round(reached / training, -2):,.0f} images/s of training. If reading the "
            "images is slower, it takes longer. --images_per_second=RATE computes the hours from a "
            "rate that you measured, such as that of the first epochs"
        )
        work = amount.trained_images * training + amount.evaluated_images * evaluation
        return work / reached / _HOUR

    def _memory_of(self, cell: Cell, config: Config) -> str:
        """Returns the memory of a step by the account of the compiler; "" without a topology."""
        if self._topology is None:
            return ""
        if cell.name not in self._memory:
            devices, room = self._topology
            train = self._find(config)["train"]
            built = compile_ahead.abstract_experiment(
                config,
                sharding.make_mesh(devices),
                classes=len(train.class_names),
                images=len(train),
            )
            try:
                peak = compile_ahead.analyse(built).peak
                fits = "" if peak <= room else ", which does not fit"
                self._memory[cell.name] = f", {peak / _GIGA:.2f} GB{fits}"
            except DoesNotFitError as error:
                self._memory[cell.name] = f", does not fit: {error}"
            self._note(
                f"memory: of a step on each device of {self._topology_name}, by its compiler"
            )
        return self._memory[cell.name]

    def _note(self, text: str) -> None:
        self._notes[text] = None
