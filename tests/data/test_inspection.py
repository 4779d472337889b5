"""Inspection of unreadable images and copies, and what runs do about them."""

import io
import json
import os
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from dml_jax import data
from dml_jax._utils import sharding
from dml_jax.data import images, inspection
from dml_jax.training import builder, loop, run, run_directory
from dml_jax.training.config import parse
from tests.helpers import tiny


def noise(seed, height=16, width=16, channels=3):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def bomb(width, height):
    """Returns a PNG of a hundred bytes whose header claims the given size."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def truncated(file_format):
    content = encoded(Image.fromarray(noise(1, 64, 64)), file_format)
    return content[: len(content) * 3 // 4]


BAD = {
    "truncated.jpg": truncated("JPEG"),
    "truncated.png": truncated("PNG"),
    "zero bytes.jpg": b"",
    "text.jpg": "a text, not an image ☹\n".encode() * 20,
    "bomb.png": bomb(50_000, 50_000),
    "smaller bomb.png": bomb(8200, 8200),
    "no pixels.ppm": b"P6 0 0 255\n",
    # Pillow would run Ghostscript on the first, and learns the size of the second too late.
    "postscript.jpg": encoded(Image.fromarray(noise(14)), "EPS"),
    "icon.png": encoded(Image.fromarray(noise(15)), "ICO"),
}
PALETTE = Image.fromarray(noise(2)).convert("P", palette=Image.Palette.ADAPTIVE)
GOOD = {
    "cmyk.jpg": encoded(Image.fromarray(noise(3)).convert("CMYK"), "JPEG"),
    "sixteen bits.png": encoded(
        Image.fromarray(noise(4, channels=0).astype(np.uint16) * 257), "PNG"
    ),
    "transparent palette.png": encoded(PALETTE, "PNG", transparency=3),
    "animated.webp": encoded(
        Image.fromarray(noise(5)),
        "WEBP",
        save_all=True,
        append_images=[Image.fromarray(noise(6))],
        lossless=True,
    ),
    "animated.png": encoded(
        Image.fromarray(noise(7)), "PNG", save_all=True, append_images=[Image.fromarray(noise(8))]
    ),
    "1 x 1.png": encoded(Image.fromarray(noise(9, 1, 1)), "PNG"),
    "20000 x 30.png": encoded(Image.fromarray(noise(10, 30, 20_000)), "PNG"),
    "60000 x 1.png": encoded(Image.fromarray(noise(11, 1, 60_000)), "PNG"),
    "1 x 60000.png": encoded(Image.fromarray(noise(12, 60_000, 1)), "PNG"),
    "ünïcödé 图像 \N{GRINNING FACE}.png": encoded(Image.fromarray(noise(13)), "PNG"),
    "x" * 251 + ".png": encoded(Image.fromarray(noise(14)), "PNG"),
}


@pytest.fixture
def root(tmp_path):
    return tiny.write_images(tmp_path / "images")


def write_files(root, files):
    for name, content in files.items():
        (root / name).write_bytes(content)


def add_bad_files(root):
    """Adds every kind of bad file; returns their numbers in train and test.

    Among them are a link to itself, a dangling link and a link to an endless device.
    """
    write_files(root / "train" / "class1", BAD)
    (root / "train/class1/loop.jpg").symlink_to("loop.jpg")
    (root / "train/class1/dangling.jpg").symlink_to("missing.jpg")
    (root / "train/class1/device.jpg").symlink_to("/dev/zero")
    (root / "train/class1/directory.jpg").mkdir()
    os.mkfifo(root / "train/class1/pipe.jpg")
    (root / "test/class1/text.png").write_text("text")
    return len(BAD) + 5, 1


def test_every_kind_of_bad_file_is_found_and_named_with_its_path(root):
    train, test = add_bad_files(root)
    sources = data.create("folder", root=root)
    report = data.inspect(sources)
    assert report.counts()["unreadable"] == {"train": train, "test": test}
    for names in report.unreadable.values():
        for name, reason in names.items():
            assert str(root / name) in reason
            assert len(reason) < len(str(root)) + 200
    reasons = report.unreadable["train"]
    assert "Premature end" in reasons["train/class1/truncated.jpg"] or (
        "truncated" in reasons["train/class1/truncated.jpg"].partition("(")[2]
    )
    assert "2500000000 pixels" in reasons["train/class1/bomb.png"]
    assert "8200 x 8200 pixels" in reasons["train/class1/smaller bomb.png"]
    with pytest.raises(ValueError) as error:
        data.accept(sources, report, "fail")
    lines = str(error.value).splitlines()
    assert lines[0] == f"{train + test} of {60 + train + test} images cannot be read:"
    assert lines[-2:] == [
        f"  and {train + test - 5} more",
        "Repair or remove them, or set config.data.unreadable to skip",
    ]


def test_unusual_but_valid_images_are_trained_on_and_tested(root):
    write_files(root / "train" / "class0", GOOD)
    sources = data.create("folder", root=root)
    report = data.inspect(sources)
    assert not any(report.unreadable.values())
    train = sources["train"]
    augmentation = data.Augmentation(rotation=10.0, zoom=0.1, shift=0.1)
    settings = {"image_size": 16, "num_workers": 0}
    train_batches = data.train_batches(
        train,
        batch_size=len(train),
        n_instance=1,
        augmentation=augmentation,
        seed=0,
        start_step=0,
        num_steps=2,
        **settings,
    )
    test_batches = data.test_batches(train, batch_size=len(train), resize=18, **settings)
    for batch in (*train_batches, *test_batches):
        assert batch["image"].shape == (len(train), 16, 16, 3)


def test_animations_yield_their_first_frame():
    np.testing.assert_array_equal(images.decode(GOOD["animated.webp"], "x"), noise(5))
    np.testing.assert_array_equal(images.decode(GOOD["animated.png"], "x"), noise(7))


def test_decompression_bomb_is_rejected_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"8200 x 8200 pixels; up to 67108864 are read"):
        images.decode(BAD["smaller bomb.png"], "x")


def test_bad_images_stop_a_run_before_anything_is_written(root, tmp_path):
    add_bad_files(root)
    with pytest.raises(ValueError, match=f"images cannot be read:\n  .*{root}/train/class1/"):
        run.train(tiny.config(root), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_skipped_images_are_counted_and_do_not_change_training(root, tmp_path, capfd):
    config = tiny.config(root, data__unreadable="skip", epochs=1)
    clean = run.train(config, tmp_path / "clean")
    train, test = add_bad_files(root)
    result = run.train(config, tmp_path / "run")
    assert "images cannot be read" in capfd.readouterr().err
    assert result["unreadable"] == {"train": train, "test": test}
    assert clean["unreadable"] == {"train": 0, "test": 0}
    assert result["images"] == {"train": 36, "test": 24}
    metrics = [(tmp_path / x / run_directory.METRICS).read_bytes() for x in ("run", "clean")]
    assert metrics[0] == metrics[1]


def test_resumed_run_keeps_its_inspection_report(root, tmp_path, monkeypatch):
    add_bad_files(root)
    config = tiny.config(root, data__unreadable="skip", epochs=2)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.result, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run.train(config, tmp_path / "run")
    # The image is repaired, but the batches must stay the same.
    (root / "train/class1/text.jpg").write_bytes(GOOD["cmyk.jpg"])
    monkeypatch.setattr(data, "inspect", lambda sources: pytest.fail("inspected again"))
    result = run.train(config, tmp_path / "run")
    assert result["images"]["train"] == 36
    assert (
        "train/class1/text.jpg"
        in json.loads((tmp_path / "run/findings.json").read_text())["unreadable"]["train"]
    )


def test_a_class_that_loses_all_its_images_is_left_out(root):
    for path in (root / "train/class2").iterdir():
        path.write_text("")
    sources = data.create("folder", root=root)
    kept = data.accept(sources, data.inspect(sources), "skip")
    assert kept["train"].class_names == ("class0", "class1", "class3", "class4", "class5")
    assert np.bincount(kept["train"].labels).tolist() == [6] * 5
    assert kept["test"].names == sources["test"].names
    for path in (root / "test").rglob("*.png"):
        path.write_text("")
    sources = data.create("folder", root=root)
    with pytest.raises(ValueError, match="none of the 24 images of 'test' can be read"):
        data.accept(sources, data.inspect(sources), "skip")


def test_queries_and_gallery_keep_one_numbering_of_classes():
    def source(labels, prefix):
        return data.Source(
            tuple(bytes([k]) for k in labels),
            np.array(labels, np.int32),
            ("a", "b", "c", "d"),
            tuple(f"{prefix}{i}" for i in range(len(labels))),
        )

    sources = {"train": source([0, 1, 2, 3], "t"), "test": source([0, 1, 2, 3], "q")}
    sources["gallery"] = source([0, 0, 1, 3, 3], "g")
    left_out = {"test": ["q1", "q2"], "gallery": ["g0", "g1"]}
    kept = inspection.leave_out(sources, left_out)
    assert kept["test"].class_names == kept["gallery"].class_names == ("a", "b", "d")
    assert kept["test"].labels.tolist() == [0, 2]
    assert kept["gallery"].labels.tolist() == [1, 2, 2]
    assert kept["train"].class_names == ("a", "b", "c", "d")


def test_copies_are_counted_by_kind(root, capfd):
    def copy(source, to):
        (root / to).write_bytes((root / source).read_bytes())

    copy("train/class0/0.png", "test/class0/across.png")
    copy("train/class1/0.png", "train/class2/between.png")
    copy("test/class2/0.png", "test/class2/within.png")
    copy("test/class2/0.png", "test/class2/within again.png")
    report = data.inspect(data.create("folder", root=root))
    assert report.counts()["copies"] == {
        "across_splits": 2,
        "between_classes": 2,
        "within_class": 3,
    }
    data.report(report)
    assert capfd.readouterr().err.splitlines() == [
        f"warning: 2 images have a copy in another split, which inflates scores, such as "
        f"{root}/test/class0/across.png and {root}/train/class0/0.png",
        f"warning: 2 images have a copy in another class, so one of the two labels is wrong, such "
        f"as {root}/train/class1/0.png and {root}/train/class2/between.png",
        f"warning: 3 images have a copy in their own class, which inflates scores if it is a test "
        f"class, such as {root}/test/class2/0.png and {root}/test/class2/within.png",
    ]


def test_inspection_report_round_trip(root):
    add_bad_files(root)
    (root / "test/class0/copy.png").write_bytes((root / "train/class0/0.png").read_bytes())
    report = data.inspect(data.create("folder", root=root))
    assert data.InspectionReport.from_json(json.loads(json.dumps(report._asdict()))) == report


def test_single_class_is_rejected_and_a_class_of_one_image_trains(root, tmp_path):
    for path in list((root / "train/class0").iterdir())[1:]:
        path.unlink()
    mesh = sharding.make_mesh()
    built = builder.build(parse(tiny.config(root)), mesh)
    assert np.bincount(built.sources["train"].labels).tolist() == [1, 6, 6, 6, 6, 6]
    result = run.train(tiny.config(root, epochs=1), tmp_path / "run")
    assert np.isfinite(result["last"]["loss"]) and result["classes"]["train"] == 6
    for split in ("train", "test"):
        single = tmp_path / split
        tiny.write_images(single)
        for directory in sorted((single / split).iterdir())[1:]:
            directory.rename(tmp_path / f"{split}-{directory.name}")
        config = tiny.config(single, batch_size=4, evaluation__recall_at=(1,))
        with pytest.raises(ValueError, match=f"of '{split}' are all of one class, class0"):
            builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
