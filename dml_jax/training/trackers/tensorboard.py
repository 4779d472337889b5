"""TensorBoard: scalars, and example queries with their nearest neighbours."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from absl import logging
from jaxtyping import Float32
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from dml_jax import data
from dml_jax._utils import files
from dml_jax.training.trackers import examples
from dml_jax.training.trackers.base import Tracker


class TensorBoardTracker(Tracker):
    """Writes an event file, in the calling thread.

    `tensorboardX.SummaryWriter` writes in a thread of its own. A full disk would end that thread,
    and the run would wait for it forever.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        """Opens a new event file, which hides events of later steps in earlier files.

        Args:
            folder: the run's.
            step: steps done.
        """
        self._folder = folder
        # TensorBoard reads the files of a folder in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{nanoseconds:09d}"
        with files.errors_with_path(folder):
            self._records = RecordWriter(str(folder / name))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def epoch(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Writes all metrics and timings as scalars.

        Raises:
            OSError: they cannot be written; the message names the run's folder.
        """
        for name, value in {**metrics, **timings}.items():
            if name not in ("step", "epoch"):
                self._write(Event(step=metrics["step"], summary=summary.scalar(name, value)))
        self._flush()

    def evaluation(
        self,
        step: int,
        sources: Mapping[str, data.Source],
        embeddings: Mapping[str, Float32[np.ndarray, "_ d"]],
    ) -> None:
        """Writes an image per example query; see `examples.strips`.

        Raises:
            OSError: they cannot be written; the message names the run's folder.
        """
        try:
            strips = examples.strips(sources, embeddings)
        except (OSError, ValueError) as error:  # An image that cannot be read costs no run.
            logging.warning("TensorBoard gets no example queries after step %d: %s", step, error)
            return
        for number, strip in enumerate(strips):
            height, width, _ = strip.shape
            # As PNG, which `summary.image` writes, photographs would take five times as much.
            encoded = simplejpeg.encode_jpeg(strip, quality=85, colorsubsampling="444")
            value = Summary.Value(
                tag=f"queries/{number}",
                image=Summary.Image(
                    height=height, width=width, colorspace=3, encoded_image_string=encoded
                ),
            )
            self._write(Event(step=step, summary=Summary(value=[value])))
        self._flush()

    def close(self, failed: bool) -> None:
        """Closes the event file."""
        with files.errors_with_path(self._folder):
            self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with files.errors_with_path(self._folder):
            self._records.write(event.SerializeToString())

    def _flush(self) -> None:
        with files.errors_with_path(self._folder):
            self._records.flush()
