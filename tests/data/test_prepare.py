import dataclasses
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dml_jax import data
from dml_jax.data import prepare as preparation
from dml_jax.data import records
from tests.helpers import hub, public_data

LAYOUTS = {
    "cars196_annos": ("cars196", public_data.cars196_annos, public_data.CARS_COUNTS),
    "cars196_devkit": ("cars196", public_data.cars196_devkit, public_data.CARS_COUNTS),
    "cars196_tree": ("cars196", public_data.cars196_tree, public_data.CARS_COUNTS),
    "cars196_numbers": ("cars196", public_data.cars196_numbers, public_data.CARS_COUNTS),
    "cars196_prepared": ("cars196", public_data.cars196_prepared, public_data.CARS_COUNTS),
    "cars196_tfrecord": ("cars196", public_data.cars196_tfds, public_data.CARS_COUNTS),
    "cars196_array_record": (
        "cars196",
        lambda root: public_data.cars196_tfds(root, "array_record"),
        public_data.CARS_COUNTS,
    ),
    "cub200": ("cub200", public_data.cub200, public_data.CUB_COUNTS),
    "cars196_hub": ("cars196", public_data.cars196_hub, public_data.CARS_COUNTS),
    "cub200_hub": ("cub200", public_data.cub200_hub, public_data.CUB_COUNTS),
    "cub200_hub_numbers": ("cub200", public_data.cub200_hub_numbers, public_data.CUB_COUNTS),
    "sop_hub": ("sop", public_data.sop_hub, public_data.SOP_COUNTS),
    "inshop_hub": ("inshop", public_data.inshop_hub, public_data.INSHOP_COUNTS),
    "sop": ("sop", public_data.sop, public_data.SOP_COUNTS),
    "inshop": ("inshop", public_data.inshop, public_data.INSHOP_COUNTS),
    "omniglot": ("omniglot", public_data.omniglot, public_data.OMNIGLOT_COUNTS),
    "grocery": ("grocery", public_data.grocery, public_data.GROCERY_COUNTS),
    "folder": ("folder", public_data.folder, public_data.FOLDER_COUNTS),
}


def prepare(name, source, out, counts, **options):
    published = dataclasses.replace(preparation.DATA_SETS[name], counts=counts)
    return preparation.prepare(name, source=source, out=out, published=published, **options)


@pytest.fixture
def cub(tmp_path):
    return public_data.cub200(tmp_path / "cub")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_prepared_with_disjoint_classes(layout, tmp_path):
    name, make, counts = LAYOUTS[layout]
    source = make(tmp_path / "source")
    out = tmp_path / "data" / "out"
    prepare(name, source, out, counts)
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    found = data.create(name, root=out)
    assert list(found) == list(counts)
    assert not any(data.inspect(found).unreadable.values())
    for split, source in found.items():
        classes, images = counts[split]
        assert (len(source.class_names), len(source)) == (classes, images)
        assert sorted(set(source.labels.tolist())) == list(range(classes))
        assert source.labels.dtype == np.int32
        assert len(set(source.names)) == images
    assert not set(found["train"].class_names) & set(found["test"].class_names)

    if layout == "grocery":
        assert found["train"].class_names == ("Apple", "Banana")
    numbers = {
        "cars196_numbers": ["1", "2"],
        "cars196_prepared": ["1", "98"],
        "cub200_hub_numbers": ["2", "9"],
    }
    if layout in numbers:
        assert list(found["train"].class_names) == numbers[layout]

    # TFDS reads the same images in the same order.
    builder = tfds.builder_from_directory(out)
    class_names = builder.info.features["label"].names
    for split, source in found.items():
        decoders = {"image": tfds.decode.SkipDecoding()}
        for i, example in enumerate(builder.as_data_source(split, decoders=decoders)):
            assert example["image"] == source[i]
            assert example["name"].decode() == source.names[i]
            assert class_names[example["label"]] == source.class_names[source.labels[i]]
        pixels = builder.as_data_source(split)[0]["image"]
        assert pixels.shape == data.decode(source[0], "x").shape
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", ["sop", "inshop"])
def test_copies_on_the_hub_have_the_classes_and_images_of_the_archives(name, tmp_path):
    found = []
    for layout in (name, f"{name}_hub"):
        _, make, counts = LAYOUTS[layout]
        prepare(name, make(tmp_path / layout), tmp_path / f"out_{layout}", counts)
        sources = data.create(name, root=tmp_path / f"out_{layout}")
        found.append({split: sorted(contents(source)) for split, source in sources.items()})
    assert found[0] == found[1]


def contents(source):
    return [(source.class_names[label], source[i]) for i, label in enumerate(source.labels)]


def test_damaged_copies_on_the_hub_are_refused(tmp_path):
    root = public_data.inshop_hub(tmp_path / "inshop")
    names = (root / "list_eval_partition.txt").read_text()
    (root / "list_eval_partition.txt").write_text(names.replace("4/00_1_front", "4/07_1_front"))
    with pytest.raises(ValueError, match="test, class id_00000004: 1 of 1 images are missing"):
        prepare("inshop", root, tmp_path / "out", public_data.INSHOP_COUNTS)
    (root / "list_eval_partition.txt").unlink()
    with pytest.raises(FileNotFoundError, match="found no list_eval_partition.txt"):
        prepare("inshop", root, tmp_path / "out", public_data.INSHOP_COUNTS)

    root = tmp_path / "copy"

    def write(name, columns, **options):
        columns = {"image": [public_data.jpeg(0)]} | columns
        hub.write_parquet(root / f"{name}.parquet", columns, **options)

    write("train-0", {"name": ["a"]})
    with pytest.raises(ValueError, match="has the columns image, name; it needs label and image"):
        prepare("cars196", root, tmp_path / "out", public_data.CARS_COUNTS)
    with pytest.raises(ValueError, match="it needs one of class_id, item_id, label"):
        prepare("sop", root, tmp_path / "out", public_data.SOP_COUNTS)
    write("train-0", {"label": [None]})
    with pytest.raises(ValueError, match="train-0.parquet, row 1: a value is missing"):
        prepare("cars196", root, tmp_path / "out", public_data.CARS_COUNTS)
    write("train-0", {"label": [0]}, classes={"label": ["a", "b"]})
    write("test-0", {"label": [0]}, classes={"label": ["b", "a"]})
    with pytest.raises(ValueError, match="number their classes differently"):
        prepare("cub200", root, tmp_path / "out", public_data.CUB_COUNTS)
    # A row without an image is counted as missing.
    write("train-0", {"label": [0], "image": [None]}, classes={"label": ["a", "b"]})
    write("test-0", {"label": [1]}, classes={"label": ["a", "b"]})
    with pytest.raises(ValueError, match="train, class a: 1 of 1 images are missing"):
        prepare("cub200", root, tmp_path / "out", {"train": (1, 1), "test": (1, 1)})


def test_images_are_stored_unchanged_with_their_labels(tmp_path):
    root = public_data.cars196_annos(tmp_path / "cars")
    (tmp_path / "out").mkdir()  # An empty directory may exist.
    prepare("cars196", root, tmp_path / "out", public_data.CARS_COUNTS)
    test = data.create("cars196", root=tmp_path / "out")["test"]
    assert test.names[0] == "car_ims/000001.jpg"
    assert test[0] == public_data.jpeg(0)
    assert test.class_names[test.labels[0]] == public_data.CARS[3]  # (0·5 + 3) mod 4


def test_lists_of_the_devkit_are_merged_with_distinct_names(tmp_path):
    root = public_data.cars196_devkit(tmp_path / "cars")
    prepare("cars196", root, tmp_path / "out", public_data.CARS_COUNTS)
    found = data.create("cars196", root=tmp_path / "out")
    assert found["train"].class_names == public_data.CARS[:2]
    images = {name: s[i] for s in found.values() for i, name in enumerate(s.names)}
    assert images["cars_train/00001.jpg"] == public_data.jpeg(1)
    assert images["cars_test/00001.jpg"] == public_data.jpeg(101)


def test_devkit_without_test_labels_is_rejected(tmp_path):
    root = public_data.cars196_devkit(tmp_path / "cars", labelled=False)
    with pytest.raises(FileNotFoundError, match="no cars_test_annos_withlabels.mat.*has them"):
        prepare("cars196", root, tmp_path / "out", public_data.CARS_COUNTS)


def test_annotations_without_their_images_do_not_hide_the_devkit(tmp_path):
    root = public_data.cars196_devkit(tmp_path / "cars")
    (root / "cars_annos.mat").write_text("beside cars_train/ and cars_test/, as on Kaggle")
    labels = root / "car_devkit/devkit/cars_test_annos_withlabels.mat"
    labels.rename(root / "cars_test_annos_withlabels (1).mat")
    prepare("cars196", root, tmp_path / "out", public_data.CARS_COUNTS)


def test_cub_from_a_tfds_copy_without_class_names(tmp_path):
    splits = {
        split: [(public_data.jpeg(i), i, "x") for i in range(4)] for split in ("train", "test")
    }
    copy = tmp_path / "copy" / "caltech_birds2011" / "0.1.1"
    public_data.tfds_copy(copy, "caltech_birds2011", 4, splits, "tfrecord")
    counts = {"train": (2, 4), "test": (2, 4)}
    prepare("cub200", tmp_path / "copy", tmp_path / "out", counts)
    test = data.create("cub200", root=tmp_path / "out")["test"]
    assert [test[i] for i in range(4)] == [public_data.jpeg(i) for i in (2, 3, 2, 3)]


def test_halves_of_the_cars_classes_do_not_depend_on_their_order():
    """A folder tree, which has no class numbers, thus gives the official split."""
    builder = tfds.builder_cls("cars196")  # Its module has the official list.
    official = sys.modules[builder.__module__]._NAMES
    assert len(official) == 196 and official != sorted(official)
    assert set(official[:98]) == set(sorted(official)[:98])
    # A folder name cannot contain a slash.
    assert set(sorted(name.replace("/", "-") for name in official)[:98]) == set(official[:98])


def test_queries_and_gallery_share_one_numbering_of_classes(tmp_path):
    root = public_data.inshop(tmp_path / "inshop")
    prepare("inshop", root, tmp_path / "out", public_data.INSHOP_COUNTS)
    found = data.create("inshop", root=tmp_path / "out")
    assert found["test"].class_names == found["gallery"].class_names
    for split in ("test", "gallery"):
        for label, name in zip(found[split].labels, found[split].names, strict=True):
            assert found[split].class_names[label] in name
    assert "/00_1" in found["test"].names[0] and "/01_1" in found["gallery"].names[0]


def test_classes_of_sop_are_in_numerical_order(tmp_path):
    root = public_data.sop(tmp_path / "sop")
    prepare("sop", root, tmp_path / "out", public_data.SOP_COUNTS)
    train = data.create("sop", root=tmp_path / "out")["train"]
    assert train.class_names == tuple(map(str, range(1, 12)))


def test_omniglot_splits_have_disjoint_alphabets(tmp_path):
    root = public_data.omniglot(tmp_path / "omniglot")
    prepare("omniglot", root, tmp_path / "out", public_data.OMNIGLOT_COUNTS)
    test = data.create("omniglot", root=tmp_path / "out")["test"]
    assert test.class_names == ("Greek_character01", "Greek_character02")


def test_omniglot_from_a_tfds_copy(tmp_path):
    classes = ["Korean_0", "Korean_1", "Japanese_(katakana)_0", "Greek_0"]
    splits = {
        "train": [(public_data.jpeg(0), 1, "a")],
        "small1": [(public_data.jpeg(i), i, "b") for i in (0, 2)],
        "small2": [(public_data.jpeg(10 + i), i, "c") for i in (1, 2, 3)],
    }
    copy = tmp_path / "copy" / "omniglot" / "3.0.0"
    public_data.tfds_copy(copy, "omniglot", classes, splits, "tfrecord")
    counts = {"train": (2, 2), "test": (1, 1)}
    prepare("omniglot", tmp_path / "copy", tmp_path / "out", counts)
    found = data.create("omniglot", root=tmp_path / "out")
    assert found["train"].class_names == ("Korean_0", "Japanese_(katakana)_0")
    assert found["test"].class_names == ("Greek_0",)
    assert found["test"][0] == public_data.jpeg(13)
    with pytest.raises(ValueError, match=r"no split 'small2', only \['small1', 'train'\]"):
        del splits["small2"]
        public_data.tfds_copy(tmp_path / "less", "omniglot", classes, splits, "tfrecord")
        prepare("omniglot", tmp_path / "less", tmp_path / "other", counts)


def test_truncated_tfrecord_is_rejected(tmp_path):
    root = public_data.cars196_tfds(tmp_path / "cars")
    path = next(root.rglob("*train.tfrecord-00001*"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{path} is truncated"):
        prepare("cars196", root, tmp_path / "out", public_data.CARS_COUNTS)


def test_different_counts_are_rejected_unless_allowed(cub, tmp_path, capsys):
    counts = {"train": (2, 7), "test": (2, 5)}
    with pytest.raises(ValueError) as error:
        prepare("cub200", cub, tmp_path / "out", counts)
    lines = str(error.value).splitlines()
    assert lines[1:5] == [
        "train: expected 7 images of 2 classes, found 6 of 2",
        "test: expected 5 images of 2 classes, found 6 of 2",
        "train, class 001.Bird_1: 3 images",
        "train, class 002.Bird_2: 3 images",
    ]
    assert "--allow_different_counts" in lines[-1]
    assert not (tmp_path / "out").exists()
    prepare("cub200", cub, tmp_path / "out", counts, allow_different_counts=True)
    assert "found 6 of 2" in capsys.readouterr().err
    assert len(data.create("cub200", root=tmp_path / "out")["train"]) == 6


def test_missing_images_are_counted_and_left_out_if_allowed(cub, tmp_path):
    (cub / "CUB_200_2011/images/003.Bird_3/Bird_0.jpg").unlink()
    message = "test, class 003.Bird_3: 1 of 3 images are missing\n"
    with pytest.raises(ValueError, match=message):
        prepare("cub200", cub, tmp_path / "out", public_data.CUB_COUNTS)
    options = {"allow_different_counts": True}
    prepare("cub200", cub, tmp_path / "out", public_data.CUB_COUNTS, **options)
    test = data.create("cub200", root=tmp_path / "out")["test"]
    assert test.labels.tolist() == [1, 0, 1, 0, 1]


def test_unexpected_split_is_a_difference(tmp_path):
    contents = preparation.DATA_SETS["inshop"].layout(public_data.inshop(tmp_path))
    lines = preparation.differences(contents, public_data.CUB_COUNTS)
    assert "gallery: expected 0 images of 0 classes, found 4 of 2" in lines
    assert preparation.differences(contents, {}) == []


def test_unreadable_images_are_named_and_left_out_if_allowed(tmp_path, capsys):
    root = public_data.folder(tmp_path / "images")
    content = (root / "train/b/2.jpg").read_bytes()
    (root / "train/b/2.jpg").write_bytes(content[: len(content) // 2])
    (root / "test/c/1.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"train/b/2.jpg: not a readable(.|\n)*test/c/1.jpg: not"):
        prepare("folder", root, tmp_path / "out", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    prepare("folder", root, tmp_path / "out", {}, allow_different_counts=True)
    assert "train/b/2.jpg: not a readable image" in capsys.readouterr().err
    found = data.create("folder", root=tmp_path / "out")
    assert found["train"].names == ("train/a/1.jpg", "train/b/1.jpg")
    assert found["test"].names == ("test/c/2.jpg",)


def test_class_in_both_splits_is_rejected(tmp_path):
    root = public_data.folder(tmp_path / "images")
    public_data.put(root / "test/b/1.jpg", public_data.jpeg(0))
    with pytest.raises(ValueError, match="1 classes are both in training and in testing.*: b;"):
        prepare("folder", root, tmp_path / "out", {})


def test_killed_preparation_leaves_no_data_set(cub, tmp_path):
    program = f"""
import os
from pathlib import Path
from dml_jax.data import prepare
from dml_jax.data.prepare import writer

def killed(*arguments):
    os._exit(9)

writer.records.write_manifest = killed
prepare.prepare("cub200", source=Path({str(cub)!r}), out=Path({str(tmp_path / "out")!r}),
                allow_different_counts=True)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    assert list((tmp_path / "out.part").glob("*.array_record-*"))
    with pytest.raises(FileNotFoundError, match="out holds no prepared data set"):
        data.create("cub200", root=tmp_path / "out")
    prepare("cub200", cub, tmp_path / "out", public_data.CUB_COUNTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cub", "out"]
    assert len(data.create("cub200", root=tmp_path / "out")["train"]) == 6


def test_existing_data_set_is_not_prepared_again(cub, tmp_path):
    out = tmp_path / "out"
    manifest = prepare("cub200", cub, out, public_data.CUB_COUNTS)
    shutil.rmtree(cub)
    assert prepare("cub200", cub, out, public_data.CUB_COUNTS) == manifest
    with pytest.raises(ValueError, match="holds the data set 'cub200'; name a new directory"):
        prepare("sop", cub, out, public_data.SOP_COUNTS)
    with pytest.raises(ValueError, match=f"{tmp_path} is not empty; name a new directory"):
        prepare("cub200", cub, tmp_path, public_data.CUB_COUNTS)


def test_damaged_data_set_is_rejected(cub, tmp_path):
    out = tmp_path / "out"
    prepare("cub200", cub, out, public_data.CUB_COUNTS)
    path = out / "cub200-test.array_record-00000"
    path.write_bytes(path.read_bytes()[:70_000])
    for read in (data.create, lambda name, root: prepare(name, cub, root, {})):
        with pytest.raises(ValueError, match=f"cannot read the ArrayRecord files in {out}"):
            read("cub200", root=out)
    shutil.copy(out / "cub200-train.array_record-00000", path)
    manifest = records.read_manifest(out)
    test = dataclasses.replace(manifest.splits["test"], labels=(2, 3))
    manifest.splits["test"] = test
    records.write_manifest(out, manifest)
    with pytest.raises(ValueError, match="6 images but 2 labels in split 'test'"):
        data.create("cub200", root=out)


def test_data_set_of_another_name_is_rejected(cub, tmp_path):
    prepare("cub200", cub, tmp_path / "out", public_data.CUB_COUNTS)
    with pytest.raises(ValueError, match="holds the data set 'cub200', not 'sop'"):
        data.create("sop", root=tmp_path / "out")
    with pytest.raises(ValueError, match="'sop' needs root"):
        data.create("sop")
    with pytest.raises(FileNotFoundError, match="prepare_data.py makes one"):
        data.create("sop", root=cub)


def test_source_is_lazy_and_cheap_to_pickle(cub, tmp_path):
    prepare("cub200", cub, tmp_path / "out", public_data.CUB_COUNTS)
    train = data.create("cub200", root=tmp_path / "out")["train"]
    assert train[0] == public_data.jpeg(2)
    pickled = pickle.dumps(train)
    assert train[1] not in pickled
    assert pickle.loads(pickled)[1] == train[1] == public_data.jpeg(3)
    subset, _ = data.split_classes(train, 0.5, seed=0)
    assert pickle.loads(pickle.dumps(subset))[2] == subset[2]


def test_test_batches_of_a_prepared_data_set(cub, tmp_path):
    prepare("cub200", cub, tmp_path / "out", public_data.CUB_COUNTS)
    test = data.create("cub200", root=tmp_path / "out")["test"]
    batches = data.test_batches(test, batch_size=4, image_size=8, resize=8, num_workers=0)
    assert np.concatenate([b["index"] for b in batches]).tolist() == [*range(6), -1, -1]
    batches.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_of_a_subset_of_a_prepared_data_set(cub, tmp_path, num_workers):
    prepare("cub200", cub, tmp_path / "out", public_data.CUB_COUNTS)
    train = data.create("cub200", root=tmp_path / "out")["train"]
    batches = data.train_batches(
        data.split_classes(train, 0.5, seed=0)[1],
        batch_size=3,
        n_instance=1,
        image_size=8,
        augmentation=data.Augmentation(),
        seed=0,
        start_step=0,
        num_steps=2,
        num_workers=num_workers,
    )
    assert [batch["label"].tolist() for batch in batches] == [[0, 0, 0]] * 2
    batches.close()


def test_reading_imports_neither_tfds_nor_tensorflow(cub, tmp_path):
    prepare("cub200", cub, tmp_path / "out", public_data.CUB_COUNTS)
    program = f"""
import sys
from dml_jax import data
data.inspect(data.create("cub200", root={str(tmp_path / "out")!r}))
print([name for name in sys.modules if name.startswith("tensorflow")])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cars196", "no cars_annos.mat with car_ims/, cars_train_annos.mat, .* or train/"),
        ("cub200", r"no dataset_info.json \(of TFDS\) or images.txt"),
        ("sop", "no Ebay_train.txt"),
        ("inshop", "no list_eval_partition.txt"),
        ("omniglot", "no dataset_info.json .* or images_background_small1"),
        ("grocery", "no classes.csv"),
        ("folder", "no train/"),
    ],
)
def test_unknown_layout_is_rejected(name, message, tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(FileNotFoundError, match=f"found {message}.* in {tmp_path / 'source'}"):
        preparation.prepare(name, source=tmp_path / "source", out=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=f"nowhere does not exist. {name}: "):
        preparation.prepare(name, source=tmp_path / "nowhere", out=tmp_path / "out")


def test_metadata_of_macos_archives_is_ignored(tmp_path):
    root = public_data.folder(tmp_path / "source" / "photos")
    for image in root.rglob("*.jpg"):
        shadow = image.relative_to(root).with_name(f"._{image.name}")
        public_data.put(tmp_path / "source" / "__MACOSX" / shadow, b"Mac OS X")
    prepare("folder", tmp_path / "source", tmp_path / "out", public_data.FOLDER_COUNTS)


def test_damaged_lists_are_rejected_with_their_line(cub, tmp_path):
    path = cub / "CUB_200_2011/images.txt"
    path.write_text(path.read_text() + "13\n")
    with pytest.raises(ValueError, match=f"{path}, line 13: expected 2 columns, got '13'"):
        prepare("cub200", cub, tmp_path / "out", public_data.CUB_COUNTS)
    public_data.inshop(tmp_path / "inshop")
    path = tmp_path / "inshop/Eval/list_eval_partition.txt"
    path.write_text(path.read_text().replace("gallery", "galery"))
    with pytest.raises(ValueError, match="is in a split 'galery', not in"):
        prepare("inshop", tmp_path / "inshop", tmp_path / "out", public_data.INSHOP_COUNTS)
    public_data.cars196_annos(tmp_path / "cars")
    (tmp_path / "cars/cars_annos.mat").write_text("not a MATLAB file")
    with pytest.raises(ValueError, match="cars_annos.mat: cannot read 'class_names' in it"):
        prepare("cars196", tmp_path / "cars", tmp_path / "out", public_data.CARS_COUNTS)


def test_unknown_or_unavailable_data_set_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'birds'; there are cars196, cub200"):
        preparation.prepare("birds", source=tmp_path, out=tmp_path / "out")
    with pytest.raises(ValueError, match="inshop cannot be downloaded: the authors of DeepFashion"):
        preparation.prepare("inshop", source=tmp_path, out=tmp_path / "out", download=True)


@pytest.mark.slow
def test_program(cub, tmp_path):
    program = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
    flags = [f"--source={cub}", f"--out={tmp_path / 'out'}", "--allow_different_counts"]

    def run(*arguments):
        command = [sys.executable, str(program), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("cub200", *flags)
    assert done.returncode == 0, done.stderr
    assert "train: expected 5864 images of 100 classes, found 6 of 2" in done.stderr
    assert done.stdout.startswith("train: 6 images of 2 classes\ntest: 6 images of 2 classes\n")
    public_data.cub200_hub(hub.snapshot("birds"))
    on_hub = ["--source=hf:datasets/somebody/birds", f"--out={tmp_path / 'out2'}", flags[2]]
    done = run("cub200", *on_hub)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("train: 6 images of 2 classes\ntest: 6 images of 2 classes\n")
    wrong = run(*flags)
    assert wrong.returncode == 2 and "the argument 'data_set' is missing" in wrong.stderr
