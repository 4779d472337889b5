import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from dml_jax import data
from dml_jax.data import images


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def source():
    """Ten images in 4 classes; all pixels of image i have value i."""
    return data.Source(
        records=tuple(png(np.full((12, 10), i, np.uint8)) for i in range(10)),
        labels=np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3], np.int32),
        class_names=("a", "b", "c", "d"),
        names=tuple(f"image{i}" for i in range(10)),
    )


@pytest.fixture(scope="module")
def textured():
    """Twelve images of noise, so that any change of the crop or the mirroring is visible."""
    rng = np.random.default_rng(0)
    return data.Source(
        records=tuple(png(rng.integers(0, 256, (20, 16, 3), np.uint8)) for _ in range(12)),
        labels=np.repeat(np.arange(4, dtype=np.int32), 3),
        class_names=("a", "b", "c", "d"),
        names=tuple(f"image{i}" for i in range(12)),
    )


def train(source, **changes):
    settings = {
        "batch_size": 4,
        "n_instance": 1,
        "image_size": 8,
        "augmentation": data.Augmentation(crop_scale=(0.3, 1.0)),
        "seed": 7,
        "start_step": 0,
        "num_steps": 9,
        "num_workers": 0,
    }
    return list(data.train_batches(source, **settings | changes))


def test(source, **changes):
    settings = {"batch_size": 4, "image_size": 8, "resize": 10, "num_workers": 0}
    return list(data.test_batches(source, **settings | changes))


test.__test__ = False


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, reference in zip(batches, expected, strict=True):
        assert batch.keys() == reference.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], reference[key])
            assert batch[key].dtype == reference[key].dtype


@pytest.mark.parametrize("n_instance", [1, 2])
def test_training_batches_follow_the_order_of_their_epoch(source, n_instance):
    batches = train(source, n_instance=n_instance, num_steps=5)
    assert len(batches) == 5
    for step, batch in enumerate(batches):
        epoch, position = divmod(step, 2)
        order = data.epoch_order(
            source.labels, batch_size=4, n_instance=n_instance, seed=7, epoch=epoch
        )
        assert batch["image"].shape == (4, 8, 8, 3)
        assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"][:, 3, 3, 0], order[position])
        np.testing.assert_array_equal(batch["label"], source.labels[order[position]])


def test_training_batches_resume_at_any_step(textured):
    batches = train(textured)
    for start in (1, 2, 3, 5, 9):
        assert_same(train(textured, start_step=start), batches[start:])


def test_views_differ_between_seeds_and_epochs(textured):
    first, other = train(textured), train(textured, seed=8)
    assert any((a["image"] != b["image"]).any() for a, b in zip(first, other, strict=True))
    # An image has another view in every epoch.
    views = {}
    for step, batch in enumerate(first):
        order = data.epoch_order(
            textured.labels, batch_size=4, n_instance=1, seed=7, epoch=step // 3
        )
        for index, image in zip(order[step % 3], batch["image"], strict=True):
            views.setdefault(int(index), set()).add(image.tobytes())
    assert all(len(distinct) == 3 for distinct in views.values())


def test_training_images_are_only_resized_without_crop_and_flip(textured):
    square = data.Source(
        tuple(png(np.full((8, 8), i, np.uint8) + np.eye(8, dtype=np.uint8)) for i in range(12)),
        textured.labels,
        textured.class_names,
        textured.names,
    )
    order = data.epoch_order(square.labels, batch_size=4, n_instance=1, seed=7, epoch=0)
    batch = train(square, augmentation=data.Augmentation(crop_scale=(1.0, 1.0), flip=False))[0]
    for index, image in zip(order[0].tolist(), batch["image"], strict=True):
        np.testing.assert_array_equal(image, images.decode(square[index], "x"))


def test_processes_share_the_rows_of_a_batch(textured):
    for read, last in ((train, "label"), (test, "index")):
        batches = read(textured)
        shares = [read(textured, process_index=p, process_count=2) for p in range(2)]
        joined = [
            {key: np.concatenate([low[key], high[key]]) for key in ("image", last)}
            for low, high in zip(*shares, strict=True)
        ]
        assert_same(joined, batches)


def test_test_batches_hold_every_image_once_in_equal_shapes(source):
    batches = test(source)
    assert [batch["index"].tolist() for batch in batches] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, -1, -1],
    ]
    for batch in batches:
        assert batch["image"].shape == (4, 8, 8, 3)
        assert batch["index"].dtype == np.int32
        brightness = batch["image"][:, 4, 4, 0]
        np.testing.assert_array_equal(brightness, np.maximum(batch["index"], 0))
    assert test(source, batch_size=16)[0]["index"].tolist() == [*range(10), *[-1] * 6]


def test_invalid_arguments_are_rejected_at_once(source):
    for changes, message in [
        ({"batch_size": 11}, "larger than the training set of 10 images"),
        ({"n_instance": 3}, "not divisible by n_instance 3"),
        ({"process_count": 3}, "multiple of the number of processes, 3"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 is not below 2"),
        ({"seed": -1}, "seed must not be negative"),
        ({"num_workers": -1}, "num_workers must not be negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(source, **changes)
    with pytest.raises(ValueError, match="resize 7 is smaller than image_size 8"):
        test(source, resize=7)


def test_closed_iterator_ends(source):
    batches = data.test_batches(source, batch_size=2, image_size=8, resize=8, num_workers=0)
    next(batches)
    batches.close()
    assert list(batches) == []


def test_damaged_image_is_named_in_the_error(source):
    records = (*source.records[:9], source.records[9][:-30])
    damaged = data.Source(records, source.labels, source.class_names, source.names)
    for num_workers in (0, 1):
        settings = {"batch_size": 4, "image_size": 8, "resize": 8, "num_workers": num_workers}
        batches = data.test_batches(damaged, **settings)
        assert next(batches)["index"].tolist() == [0, 1, 2, 3]
        next(batches)
        with pytest.raises(ValueError, match="image9: not a readable image"):
            next(batches)
        batches.close()


PROGRAM = """
import multiprocessing, sys, time, zlib
from dml_jax import data

if __name__ == "__main__":
    source = data.create("folder", root=sys.argv[1])["train"]
    settings = dict(batch_size=4, n_instance=1, image_size=8,
                    augmentation=data.Augmentation(crop_scale=(0.3, 1.0)))
    settings |= dict(seed=7, start_step=2, num_steps=10**6, num_workers=2)
    batches = data.train_batches(source, **settings)
    print([zlib.crc32(next(batches)["image"].tobytes()) for _ in range(5)])
    print([child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[2] == "killed":
        time.sleep(600)
"""


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("end", ["killed", pytest.param("finished", marks=pytest.mark.slow)])
def test_workers_read_the_same_batches_and_end_with_the_program(tmp_path, textured, end):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for name, record in zip(textured.names, textured.records, strict=True):
            (tmp_path / split / "a" / f"{name.zfill(8)}.png").write_bytes(record)
    (tmp_path / "program.py").write_text(PROGRAM)
    program = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", tmp_path, end],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Any use of a device fails, in the program and in its workers.
        env=os.environ | {"JAX_PLATFORMS": "none", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    checksums, workers = (
        json.loads(program.stdout.readline()),
        json.loads(program.stdout.readline()),
    )
    assert checksums == [
        zlib.crc32(batch["image"].tobytes()) for batch in train(textured, start_step=2, num_steps=7)
    ]
    assert len(workers) == 2
    if end == "killed":
        program.send_signal(signal.SIGKILL)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == (-signal.SIGKILL if end == "killed" else 0)
    assert errors == "" or end == "killed"
    deadline = time.monotonic() + 30
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, workers))


DYING_WORKER = """
import gc, multiprocessing, os, signal, sys, time, traceback
import numpy as np
from dml_jax import data
from dml_jax.data import reading

if sys.argv[1] == "exits":
    reading._CLEAN_EXIT_SECONDS = 3

class Records(tuple):
    def __getitem__(self, index):
        if sys.argv[1] == "raises" and index == 5:
            raise LookupError("an unexpected error")
        if sys.argv[1] == "exits" and index == 5:
            os._exit(0)
        return super().__getitem__(index)

if __name__ == "__main__":
    image = b"P6 100 100 255 " + bytes(range(200)) * 150
    labels, names = np.zeros(8, np.int32), tuple("abcdefgh")
    batches = data.train_batches(
        data.Source(Records([image] * 8), labels, ("x",), names), batch_size=8, n_instance=1,
        image_size=224, augmentation=data.Augmentation(), seed=0, start_step=0, num_steps=10**6,
        num_workers=2,
    )
    start = time.monotonic()
    try:
        for step, _ in enumerate(batches):
            if step == 2:
                time.sleep(0.5)  # Both workers now wait while they send a batch.
                workers = multiprocessing.active_children()
                os.kill(workers[0].pid, signal.SIGKILL)
                start = time.monotonic()
    except Exception as error:
        traceback.print_exc()
        print(time.monotonic() - start, flush=True)
    batches.close()
    del batches
    gc.collect()
    print([child.pid for child in multiprocessing.active_children()], flush=True)
"""


SLOW_WORKER = """
import time
import grain
import numpy as np
from dml_jax import data
from dml_jax.data import reading

def load(index):
    time.sleep(2.5 * reading._POLL_SECONDS * (index == 1))
    return {"index": index}

if __name__ == "__main__":
    batches = grain.MapDataset.source(range(3)).map(load)
    empty = data.Source((), np.zeros(0, np.int32), (), ())
    print(len(list(reading.read(batches, 2, empty))))
"""


@pytest.mark.slow
def test_worker_that_finishes_first_is_not_reported(tmp_path):
    (tmp_path / "program.py").write_text(SLOW_WORKER)
    program = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"JAX_PLATFORMS": "none", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert program.stdout == "3\n", program.stderr


@pytest.mark.parametrize(
    "how",
    [
        "killed",
        pytest.param("raises", marks=pytest.mark.slow),
        pytest.param("exits", marks=pytest.mark.slow),
    ],
)
def test_dead_worker_is_reported(tmp_path, how):
    (tmp_path / "program.py").write_text(DYING_WORKER)
    program = subprocess.run(
        [sys.executable, tmp_path / "program.py", how],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"JAX_PLATFORMS": "none", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert program.returncode == 0, program.stderr
    if how == "killed":
        message = r"ChildProcessError: process \d+, which read images, was ended by SIGKILL;"
        assert re.search(message, program.stderr)
        assert float(program.stdout.splitlines()[0]) < 10
    elif how == "exits":
        assert "which read images, was ended by exit code 0;" in program.stderr
    else:  # The traceback has the lines of the worker.
        assert "LookupError: an unexpected error" in program.stderr
        assert "raise LookupError(" in program.stderr
    assert not any(map(running, json.loads(program.stdout.splitlines()[1])))
