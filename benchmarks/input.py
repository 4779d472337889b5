"""Times the input pipeline against the usual one of Pillow and torchvision.

python -m benchmarks.input
python -m benchmarks.input --torch --json=input.json

Both read the same synthetic JPEGs and take the same crops. Ours produces uint8 pixels, because
normalisation happens on the device. The usual pipeline decodes, crops, resizes, flips, converts to
floats, normalises and moves channels first, image by image. A third variant keeps decoded images,
as config.data.cache=host does. The pipelines take turns. On one core the benchmark measures CPU
time, which is independent of other load; on all cores it measures wall-clock time.
"""

import io
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from absl import flags
from PIL import Image
from rich.console import Console
from rich.table import Table

from dml_jax import data
from dml_jax.cli import command_line
from dml_jax.data import images

_IMAGES = flags.DEFINE_integer("images", 64, "Number of different images.")
_SIZE = flags.DEFINE_integer("size", 224, "Side of a crop in pixels.")
_TURNS = flags.DEFINE_integer("turns", 5, "Number of turns of each.")
_BATCHES = flags.DEFINE_integer("batches", 16, "Batches per turn on all cores.")
_TORCH = flags.DEFINE_bool(
    "torch", False, "On all cores, compare with torchvision and DataLoader instead of Pillow."
)
_JSON = flags.DEFINE_string("json", None, "JSON file for the results.")

HEIGHT, WIDTH = 480, 700
BATCH = 64
_REPEATS = 3  # Passes over the images in a turn on one core.
MEAN = np.array((0.485, 0.456, 0.406), np.float32)[:, None, None]
STD = np.array((0.229, 0.224, 0.225), np.float32)[:, None, None]


@cache
def photographs(count: int) -> tuple[bytes, ...]:
    """Returns JPEGs of quality 90 with structure at all scales, stronger at larger ones."""
    rng = np.random.default_rng(0)
    return tuple(
        simplejpeg.encode_jpeg(_photograph(rng), quality=90, colorsubsampling="420")
        for _ in range(count)
    )


def _photograph(rng: np.random.Generator) -> np.ndarray:
    picture = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for cells, strength in ((4, 50), (16, 25), (64, 12), (256, 6)):
        noise = rng.standard_normal((cells, cells * WIDTH // HEIGHT, 3), np.float32)
        picture += strength * cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    texture = rng.standard_normal((HEIGHT, WIDTH, 1), np.float32)
    return (picture + 3 * texture).clip(0, 255).astype(np.uint8)


def _rng(position: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=position))


def ours(jpeg: bytes, position: int, out: np.ndarray) -> None:
    """Writes the random crop for a position to `out`, as in training."""
    kept(images.LazyImage(jpeg, "x"), position, out)


def kept(picture: images.LazyImage, position: int, out: np.ndarray) -> None:
    """Writes the same crop of a picture that is kept decoded."""
    images.random_view(picture, _rng(position), augmentation=data.Augmentation(), out=out)


def view(jpeg: bytes, position: int, size: int) -> Image.Image:
    """Returns the same crop by Pillow, like RandomResizedCrop and RandomHorizontalFlip."""
    rng, image = _rng(position), Image.open(io.BytesIO(jpeg)).convert("RGB")
    top, left, height, width = images.random_crop_box(HEIGHT, WIDTH, rng, scale=(0.08, 1))
    crop = image.crop((left, top, left + width, top + height))
    resized = crop.resize((size, size), Image.Resampling.BILINEAR)
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else resized


def usual(jpeg: bytes, position: int, size: int) -> np.ndarray:
    """Returns the same crop, normalised."""
    pixels = np.asarray(view(jpeg, position, size)).transpose(2, 0, 1)
    return (pixels.astype(np.float32, order="C") / 255 - MEAN) / STD


class Photographs:
    """A data set for torch.utils.data.DataLoader with the usual pipeline of torchvision."""

    def __init__(self, jpegs: tuple[bytes, ...], count: int, size: int) -> None:
        from torchvision import transforms

        self._jpegs, self._count = jpegs, count
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN.ravel().tolist(), STD.ravel().tolist()),
            ]
        )

    def __len__(self) -> int:
        """Returns the number of images in a turn."""
        return self._count

    def __getitem__(self, position: int) -> Any:
        """Returns a crop of the image at a position."""
        jpeg = self._jpegs[position % len(self._jpegs)]
        return self._transform(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def main() -> None:
    """Runs the program."""
    cv2.setNumThreads(0)
    jpegs, cores = photographs(_IMAGES.value), len(os.sched_getaffinity(0))
    peer = "torchvision, DataLoader" if _TORCH.value else "Pillow"
    view_of_ours = np.empty((_SIZE.value, _SIZE.value, 3), np.uint8)
    pictures = tuple(images.LazyImage(jpeg, "x") for jpeg in jpegs)
    for picture, scale in itertools.product(pictures, pictures[0].scales):
        picture.pixels(scale)
    calls = {
        "ours, one core": lambda: _one_core(partial(ours, out=view_of_ours), jpegs),
        "ours, kept decoded, one core": lambda: _one_core(
            partial(kept, out=view_of_ours), pictures
        ),
        "Pillow, one core": lambda: _one_core(partial(usual, size=_SIZE.value), jpegs),
        f"ours, {cores} cores": lambda: _all_cores(jpegs, cores, None),
        f"ours, kept decoded, {cores} cores": lambda: _all_cores(jpegs, cores, {}),
        f"{peer}, {cores} cores": lambda: (_torch if _TORCH.value else _pool)(jpegs, cores),
    }
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS.value):
        for name, call in calls.items():
            speeds[name].append(call())
    table = Table("pipeline", "images/s: median", "least", "most")
    for name, values in speeds.items():
        numbers = statistics.median(values), min(values), max(values)
        table.add_row(name, *(f"{number:.0f}" for number in numbers))
    Console().print(table)
    pixels = _differences(jpegs)
    print("\n".join(f"{name}: {number:.3g}" for name, number in pixels.items()))
    if _JSON.value:
        found = {"images_per_second": speeds, "pixels": pixels}
        Path(_JSON.value).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _one_core(make: Callable[[Any, int], Any], originals: tuple[Any, ...]) -> float:
    began = time.thread_time()
    for position, image in enumerate(originals * _REPEATS):
        make(image, position)
    return len(originals) * _REPEATS / (time.thread_time() - began)


def _steady_rate(batches: Iterator[Any], cores: int) -> float:
    """Returns images per second, after the prefetched batches are consumed."""
    for _ in range(4 * cores):
        next(batches)
    began = time.perf_counter()
    for _ in range(_BATCHES.value):
        next(batches)
    return _BATCHES.value * BATCH / (time.perf_counter() - began)


def _all_cores(
    jpegs: tuple[bytes, ...], cores: int, kept: dict[int, images.LazyImage] | None
) -> float:
    records = jpegs * -(-BATCH // len(jpegs))
    batches = data.train_batches(
        data.Source(
            records,
            np.zeros(len(records), np.int32),
            class_names=("x",),
            names=tuple(map(str, range(len(records)))),
            cache=kept,
        ),
        batch_size=BATCH,
        n_instance=1,
        image_size=_SIZE.value,
        augmentation=data.Augmentation(),
        seed=0,
        start_step=0,
        num_steps=10**9,
        num_workers=cores,
    )
    try:
        return _steady_rate(batches, cores)
    finally:
        batches.close()


def _pool(jpegs: tuple[bytes, ...], cores: int) -> float:
    """Times the usual pipeline in processes that do not send their batches, in its favour."""
    with multiprocessing.get_context("spawn").Pool(cores, cv2.setNumThreads, (0,)) as pool:
        work = partial(_usual_batch, jpegs, _SIZE.value)
        return _steady_rate(pool.imap(work, range(_BATCHES.value + 8 * cores)), cores)


def _usual_batch(jpegs: tuple[bytes, ...], size: int, number: int) -> None:
    positions = range(number * BATCH, (number + 1) * BATCH)
    np.stack([usual(jpegs[i % len(jpegs)], i, size) for i in positions])


def _torch(jpegs: tuple[bytes, ...], cores: int) -> float:
    from torch.utils.data import DataLoader

    photos: Any = Photographs(jpegs, BATCH * (_BATCHES.value + 8 * cores), _SIZE.value)
    loader = DataLoader(photos, BATCH, num_workers=cores, multiprocessing_context="spawn")
    return _steady_rate(iter(loader), cores)


def _differences(jpegs: tuple[bytes, ...]) -> dict[str, float]:
    """Returns mean differences of the same crops, in levels of 256, by decoding scale."""
    out = np.empty((_SIZE.value, _SIZE.value, 3), np.uint8)
    apart: dict[bool, list[float]] = {True: [], False: []}
    for position, jpeg in enumerate(jpegs * _REPEATS):
        ours(jpeg, position, out)
        theirs = np.asarray(view(jpeg, position, len(out)), np.float32)
        box = images.random_crop_box(HEIGHT, WIDTH, _rng(position), scale=(0.08, 1))
        small = images.LazyImage(jpeg, "x").scale_for(*box[2:], len(out)) > 1
        apart[small].append(float(np.abs(out - theirs).mean()))
    return {
        "mean absolute difference": statistics.fmean(apart[False] + apart[True]),
        "of crops decoded at full scale": statistics.fmean(apart[False]),
        "of crops decoded at a reduced scale": statistics.fmean(apart[True])
        if apart[True]
        else 0.0,
        "share of these": len(apart[True]) / (len(jpegs) * _REPEATS),
    }


if __name__ == "__main__":
    command_line.run(main)
