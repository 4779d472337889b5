"""What of a data set cannot be read, or is there twice, is known before a run begins."""

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
    """A PNG of a hundred bytes that claims to be as large as asked for."""

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
    whole = encoded(Image.fromarray(noise(1, 64, 64)), file_format)
    return whole[: len(whole) * 3 // 4]


BAD = {
    "truncated.jpg": truncated("JPEG"),
    "truncated.png": truncated("PNG"),
    "zero bytes.jpg": b"",
    "text.jpg": "a text, not an image ☹\n".encode() * 20,
    "bomb.png": bomb(50_000, 50_000),
    "smaller bomb.png": bomb(8200, 8200),
    "no pixels.ppm": b"P6 0 0 255\n",
    # Pillow would hand the first to Ghostscript, and sees the second's size too late.
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


def put(root, files):
    for name, content in files.items():
        (root / name).write_bytes(content)


def spoil(root):
    """Adds every kind of bad file; two of the links go on for ever, and one leads nowhere."""
    put(root / "train" / "class1", BAD)
    (root / "train/class1/loop.jpg").symlink_to("loop.jpg")
    (root / "train/class1/nowhere.jpg").symlink_to("missing.jpg")
    (root / "train/class1/device.jpg").symlink_to("/dev/zero")
    (root / "train/class1/directory.jpg").mkdir()
    os.mkfifo(root / "train/class1/pipe.jpg")
    (root / "test/class1/text.png").write_text("text")
    return len(BAD) + 5, 1


def test_every_kind_of_bad_file_is_found_and_named_with_its_path(root):
    train, test = spoil(root)
    sources = data.create("folder", root=root)
    findings = data.inspect(sources)
    assert findings.counts()["unreadable"] == {"train": train, "test": test}
    for names in findings.unreadable.values():
        for name, reason in names.items():
            assert str(root / name) in reason
            assert len(reason) < len(str(root)) + 200
    reasons = findings.unreadable["train"]
    assert "Premature end" in reasons["train/class1/truncated.jpg"] or (
        "truncated" in reasons["train/class1/truncated.jpg"].partition("(")[2]
    )
    assert "2500000000 pixels" in reasons["train/class1/bomb.png"]
    assert "8200 x 8200 pixels" in reasons["train/class1/smaller bomb.png"]
    with pytest.raises(ValueError) as refusal:
        data.accept(sources, findings, "fail")
    lines = str(refusal.value).splitlines()
    assert lines[0] == f"{train + test} of {60 + train + test} images cannot be read:"
    assert lines[-2:] == [
        f"  and {train + test - 5} more",
        "Mend or remove them, or set config.data.unreadable to skip",
    ]


def test_what_is_odd_but_an_image_trains_and_is_tested(root):
    put(root / "train" / "class0", GOOD)
    sources = data.create("folder", root=root)
    findings = data.inspect(sources)
    assert not any(findings.unreadable.values())
    train = sources["train"]
    moved = data.Augmentation(rotation=10.0, zoom=0.1, shift=0.1)
    settings = {"image_size": 16, "num_workers": 0}
    trained = data.train_batches(
        train,
        batch_size=len(train),
        n_instance=1,
        augmentation=moved,
        seed=0,
        start_step=0,
        num_steps=2,
        **settings,
    )
    tested = data.test_batches(train, batch_size=len(train), resize=18, **settings)
    for batch in (*trained, *tested):
        assert batch["image"].shape == (len(train), 16, 16, 3)


def test_of_an_animation_the_first_frame_is_taken():
    np.testing.assert_array_equal(images.decode(GOOD["animated.webp"], "x"), noise(5))
    np.testing.assert_array_equal(images.decode(GOOD["animated.png"], "x"), noise(7))


def test_a_bomb_is_refused_in_one_message_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"8200 x 8200 pixels; up to 67108864 are read"):
        images.decode(BAD["smaller bomb.png"], "x")


def test_bad_images_stop_a_run_before_anything_is_written(root, tmp_path):
    spoil(root)
    with pytest.raises(ValueError, match=f"images cannot be read:\n  .*{root}/train/class1/"):
        run.train(tiny.config(root), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_skipped_images_are_counted_and_the_rest_trains_as_ever(root, tmp_path, capfd):
    config = tiny.config(root, data__unreadable="skip", epochs=1)
    undisturbed = run.train(config, tmp_path / "undisturbed")
    train, test = spoil(root)
    result = run.train(config, tmp_path / "run")
    assert "images cannot be read" in capfd.readouterr().err
    assert result["unreadable"] == {"train": train, "test": test}
    assert undisturbed["unreadable"] == {"train": 0, "test": 0}
    assert result["images"] == {"train": 36, "test": 24}
    for name in (run_directory.METRICS,):
        assert (tmp_path / "run" / name).read_bytes() == (
            tmp_path / "undisturbed" / name
        ).read_bytes()


def test_a_run_that_goes_on_keeps_to_what_was_found_when_it_began(root, tmp_path, monkeypatch):
    spoil(root)
    config = tiny.config(root, data__unreadable="skip", epochs=2)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.result, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run.train(config, tmp_path / "run")
    # Mended since, but the batches must stay the same ones.
    (root / "train/class1/text.jpg").write_bytes(GOOD["cmyk.jpg"])
    monkeypatch.setattr(data, "inspect", lambda sources: pytest.fail("looked again"))
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


def test_queries_and_gallery_still_number_their_classes_alike():
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


def test_copies_are_counted_by_what_they_spoil(root, capfd):
    def copy(source, to):
        (root / to).write_bytes((root / source).read_bytes())

    copy("train/class0/0.png", "test/class0/across.png")
    copy("train/class1/0.png", "train/class2/between.png")
    copy("test/class2/0.png", "test/class2/within.png")
    copy("test/class2/0.png", "test/class2/within again.png")
    findings = data.inspect(data.create("folder", root=root))
    assert findings.counts()["copies"] == {
        "across_splits": 2,
        "between_classes": 2,
        "within_class": 3,
    }
    data.report(findings)
    assert capfd.readouterr().err.splitlines() == [
        f"warning: 2 images have a copy in another split, which inflates scores, such as "
        f"{root}/test/class0/across.png and {root}/train/class0/0.png",
        f"warning: 2 images have a copy in another class, so one of the two labels is wrong, such "
        f"as {root}/train/class1/0.png and {root}/train/class2/between.png",
        f"warning: 3 images have a copy in their own class, which inflates scores if it is a test "
        f"class, such as {root}/test/class2/0.png and {root}/test/class2/within.png",
    ]


def test_findings_are_the_same_after_they_were_written(root):
    spoil(root)
    (root / "test/class0/copy.png").write_bytes((root / "train/class0/0.png").read_bytes())
    findings = data.inspect(data.create("folder", root=root))
    assert data.InspectionReport.from_json(json.loads(json.dumps(findings._asdict()))) == findings


def test_one_class_alone_is_refused_and_a_class_of_one_image_trains(root, tmp_path):
    for path in list((root / "train/class0").iterdir())[1:]:
        path.unlink()
    mesh = sharding.make_mesh()
    built = builder.build(parse(tiny.config(root)), mesh)
    assert np.bincount(built.sources["train"].labels).tolist() == [1, 6, 6, 6, 6, 6]
    tiniest = {"model__backbone": "colours", "model__width": None, "model__stem": None}
    result = run.train(tiny.config(root, epochs=1, **tiniest), tmp_path / "run")
    assert np.isfinite(result["last"]["loss"]) and result["classes"]["train"] == 6
    for split in ("train", "test"):
        alone = tmp_path / split
        tiny.write_images(alone)
        for directory in sorted((alone / split).iterdir())[1:]:
            directory.rename(tmp_path / f"{split}-{directory.name}")
        config = tiny.config(alone, batch_size=4, evaluation__recall_at=(1,))
        with pytest.raises(ValueError, match=f"of '{split}' are all of one class, class0"):
            builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
