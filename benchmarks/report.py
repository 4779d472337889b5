"""Measures the time and the size of a report of 11,000 images.

python -m benchmarks.report --folder=report_benchmark

The images are 256×256 JPEGs of noise with the spectrum of natural images, in 98 classes; the
embeddings are class centres with noise. Nothing is trained.
"""

import json
import time
from pathlib import Path

import cv2
import numpy as np
from absl import flags

from dml_jax import data, retrieval
from dml_jax._utils import files
from dml_jax.cli import command_line
from dml_jax.configs import folder
from dml_jax.evaluation import embedding_files
from dml_jax.report import render, runs
from dml_jax.training import run_directory

_FOLDER = flags.DEFINE_string(
    "folder", None, "Folder for images, runs and the report.", required=True
)
_IMAGES, _CLASSES, _SIDE, _DIM = 11_000, 98, 256, 512


def main() -> None:
    """Runs the program."""
    root = Path(_FOLDER.value)
    if not (root / "images").exists():
        _write_images(root / "images")
    for seed, name in enumerate(("first", "second")):
        _write_run(root / name, root / "images", seed)
    began, computed = time.perf_counter(), time.process_time()
    groups = runs.group([runs.read(root / name) for name in ("first", "second")])
    render.write(groups, root / "report.html")
    size = (root / "report.html").stat().st_size / 1e6
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - computed
    print(
        f"{_IMAGES} images, 2 runs: {seconds:.0f} s, {cpu_seconds:.0f} s of CPU time, {size:.1f} MB"
    )


def _write_images(root: Path) -> None:
    """Writes crops of noise whose amplitude decreases with frequency as in photographs."""
    rng, size = np.random.default_rng(0), 8 * _SIDE
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    noise = rng.normal(size=(size, size, 3)) @ (np.eye(3) + 1)
    spectrum = np.fft.fft2(noise, axes=(0, 1)) / np.maximum(frequency, 2 / _SIDE)[..., None]
    field = np.fft.ifft2(spectrum, axes=(0, 1)).real
    field = (128 + 50 * field / field.std()).clip(0, 255).astype(np.uint8)
    for i in range(_IMAGES + 2):
        split, label = ("test", i % _CLASSES) if i < _IMAGES else ("train", i)
        path = root / split / f"class{label}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        top, left = rng.integers(size - _SIDE, size=2)
        cv2.imwrite(str(path), field[top : top + _SIDE, left : left + _SIDE])


def _write_run(path: Path, images: Path, seed: int) -> None:
    path.mkdir(exist_ok=True)
    config = folder.get_config()
    config.data.root = str(images.absolute())
    config.model.dim, config.optimizer.eps = _DIM, 0.01 * (seed + 1)
    source = data.create("folder", root=images)["test"]
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(_CLASSES, _DIM))
    noise = 4 * rng.normal(size=(len(source), _DIM))
    embeddings = (centres[source.labels] + noise).astype(np.float32)
    scores = retrieval.evaluate(embeddings, source.labels)
    line = {"step": 1, "epoch": 1}
    timings = {"images_per_second": 1.0, "train_seconds": 1.0, "evaluation_seconds": 1.0}
    timings["peak_memory_gb"] = 1.0
    files.write_json(path / run_directory.CONFIG, json.loads(config.to_json()))
    files.write_json(path / run_directory.INSPECTION, data.InspectionReport({}, {})._asdict())
    files.write_json(path / run_directory.RESULT, {"last": line | scores})
    files.write_text(path / run_directory.METRICS, json.dumps(line | {"loss": 1.0} | scores) + "\n")
    files.write_text(path / run_directory.TIMINGS, json.dumps(line | timings) + "\n")
    embedding_files.save_embeddings(
        path / run_directory.EMBEDDINGS, embeddings, source.labels, source.names, source.class_names
    )


if __name__ == "__main__":
    command_line.run(main)
