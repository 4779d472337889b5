"""A data set and settings so small that a complete run takes seconds."""

import contextlib
import resource

import numpy as np
from PIL import Image

from dml_jax.configs import folder

TRAIN_CLASSES, TEST_CLASSES, IMAGES, SIZE = 6, 4, 6, 16


def write_images(root, *, seed=0):
    """Writes classes of different colours as root/train/CLASS/*.png and root/test/CLASS/*.png."""
    rng = np.random.default_rng(seed)
    for split, classes in (("train", TRAIN_CLASSES), ("test", TEST_CLASSES)):
        for c in range(classes):
            directory = root / split / f"class{c}"
            directory.mkdir(parents=True)
            colour = rng.integers(60, 196, size=3)
            for i in range(IMAGES):
                noise = rng.integers(-60, 60, size=(SIZE, SIZE, 3))
                pixels = (colour + noise).astype(np.uint8)
                Image.fromarray(pixels).save(directory / f"{i}.png")
    return root


@contextlib.contextmanager
def full_disk(size):
    """Simulates a full disk by a limit on the size of each file in bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Settings, as in --config.NAME=VALUE.
SETTINGS = {
    "batch_size": 8,
    "epochs": 3,
    "data.image_size": SIZE,
    "data.resize": SIZE,
    "data.num_workers": 0,
    "model.backbone": "conv4",
    "model.pretrained": "none",
    "model.freeze_bn": False,
    "model.width": 4,
    "model.dim": 16,
    "optimizer.eps": 1e-3,
    "evaluation.every_epochs": 1,
}
# Networks of tests/conftest.py, which are registered in the test process only: the default of
# `config`, and one with residual blocks as keywords for it.
NETWORK = {"model.backbone": "conv1"}
RESNET = {"model__backbone": "resnet6", "model__stem": "small"}
MEMVIR_SETTINGS = {
    "memvir.num_steps": 2,
    "memvir.step_gap": 1,
    "memvir.warmup_epochs": 1,
}


def config(root, variant="baseline", **settings):
    """Returns the tiny folder config of a variant; keywords are settings with `__` for `.`."""
    made = folder.get_config(variant)
    made.data.root = str(root)
    memvir = MEMVIR_SETTINGS if "memvir" in variant else {}
    given = {name.replace("__", "."): value for name, value in settings.items()}
    made.update_from_flattened_dict(SETTINGS | NETWORK | memvir | given)
    return made


def arguments(root, variant="baseline", **settings):
    """Returns the arguments of a program for the same config, with Conv4 as the network."""
    memvir = MEMVIR_SETTINGS if "memvir" in variant else {}
    given = {name.replace("__", "."): value for name, value in settings.items()}
    values = SETTINGS | memvir | given | {"data.root": root}
    return [f"--config=configs/folder.py:{variant}"] + [
        f"--config.{name}={value}" for name, value in values.items()
    ]
