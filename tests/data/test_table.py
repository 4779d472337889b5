import csv
import json
import pickle
import sys

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dml_jax import data
from dml_jax._utils import sharding, storage
from dml_jax.data.config import DataConfig
from dml_jax.data.sources import parquet, table
from dml_jax.data.sources import rows as rows_module
from dml_jax.data.splits import load_sources
from dml_jax.training import run
from dml_jax.training.config import parse
from tests.helpers import hub, object_storage, tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    parquet.column.cache_clear()


def rows_of(images):
    return [
        {
            "path": str(path.relative_to(images)),
            "label": path.parent.name + ("" if split == "train" else "_test"),
            "split": split if split == "train" else "validation",
        }
        for split in ("train", "test")
        for path in sorted((images / split).rglob("*.png"))
    ]


def whole_file(images):
    return (images / "train/class0/0.png").read_bytes()


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def contents(sources):
    """Returns name, class and pixels of each image by split."""
    return {
        split: [
            (source.class_names[label], source.image(i).pixels().tobytes())
            for i, label in enumerate(source.labels)
        ]
        for split, source in sources.items()
    }


def test_a_csv_file_is_read_like_the_folder_that_it_lists(images):
    file = write_csv(images / "list.csv", rows_of(images))
    listed, folder = (data.create(*x[:1], root=x[1]) for x in (("table", file), ("folder", images)))
    assert listed.keys() == folder.keys()
    for split in folder:
        np.testing.assert_array_equal(listed[split].labels, folder[split].labels)
        assert listed[split].names == folder[split].names
        pixels = [
            [x.image(i).pixels() for i in range(len(x))] for x in (listed[split], folder[split])
        ]
        np.testing.assert_array_equal(*pixels)
    assert listed["test"].class_names == tuple(f"{x}_test" for x in folder["test"].class_names)
    file.unlink()


def test_labels_stay_as_they_are_written(images):
    rows = [row | {"label": "007" if "class0" in row["path"] else "7"} for row in rows_of(images)]
    file = write_csv(images / "numbers.csv", rows)
    assert table.load(file)[rows_module.UNSPLIT].class_names == ("007", "7")
    file.unlink()


def test_queries_are_searched_in_the_gallery(images):
    rows = [
        row
        | {"is_query": str(number % 2 == 0) * (row["split"] != "train")}
        | {"is_gallery": str(number % 2 == 1) * (row["split"] != "train")}
        for number, row in enumerate(rows_of(images))
    ]
    sources = table.load(write_csv(images / "list.csv", rows))
    assert sources.keys() == {"train", "test", "gallery"}
    assert len(sources["test"]) == len(sources["gallery"]) == 12
    assert sources["test"].class_names == sources["gallery"].class_names
    assert not set(sources["test"].names) & set(sources["gallery"].names)
    rows[-1]["is_query"] = rows[-1]["is_gallery"]
    with pytest.raises(ValueError, match=f"row {len(rows)}: is_query and is_gallery are equal"):
        table.load(write_csv(images / "list.csv", rows))
    (images / "list.csv").unlink()


@pytest.mark.parametrize("names", [("x_1", "y_1", "x_2", "y_2"), ("x1", "y1", "x2", "y2")])
def test_images_are_cropped_to_their_boxes(images, names):
    rows = rows_of(images)
    rows[1] |= dict(zip(names, (2, 3, 12, 9), strict=True))
    source = table.load(write_csv(images / "list.csv", rows))["train"]
    whole = np.asarray(Image.open(images / rows[1]["path"]))
    np.testing.assert_array_equal(source.image(1).pixels(), whole[3:9, 2:12])
    assert source.image(0).pixels().shape == (tiny.SIZE, tiny.SIZE, 3)
    for box, message in (
        ((2, 3, 2, 9), "row 2: the box .* is empty"),
        ((2, 3, "", 9), "row 2: the box .* lacks a side"),
    ):
        rows[1] |= dict(zip(names, box, strict=True))
        with pytest.raises(ValueError, match=message):
            table.load(write_csv(images / "list.csv", rows))
    # Not through a source, of whose records the shape checks read any.
    cropped = rows_module._Cropped((whole_file(images),), np.array([[2, 3, 17, 9]]), ("x",))
    with pytest.raises(ValueError, match="x: the box .* exceeds the image of 16x16 pixels"):
        cropped[0]
    (images / "list.csv").unlink()


def write_parquet(path, rows, images, *, features=None, struct=True):
    encoded = [(images / row["path"]).read_bytes() for row in rows]
    pictures = [{"bytes": x, "path": None} for x in encoded] if struct else encoded
    names = sorted({row["label"] for row in rows})
    labels = [names.index(row["label"]) if features else row["label"] for row in rows]
    made = pyarrow.table({"image": pictures, "label": labels})
    if features:
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(about)})
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(made, path, row_group_size=5)


@pytest.mark.parametrize(("features", "struct"), [(True, True), (False, False)])
def test_parquet_files_of_the_hub_hold_the_images(images, tmp_path, features, struct):
    rows = {"train": rows_of(images)[:36], "test": rows_of(images)[36:]}
    options = {"features": features, "struct": struct}
    folder = tmp_path / "cars" / "data"
    folder.parent.mkdir()
    for number in range(2):
        shard = folder / f"train-0000{number}-of-00002.parquet"
        write_parquet(shard, rows["train"][number::2], images, **options)
    write_parquet(folder / "test-00000-of-00001.parquet", rows["test"], images, **options)
    listed = data.create("table", root=folder.parent)
    folders = contents(data.create("folder", root=images))
    found = contents(pickle.loads(pickle.dumps(listed)))
    assert sorted(found["train"]) == sorted(folders["train"])
    assert sorted(x for _, x in found["test"]) == sorted(x for _, x in folders["test"])
    assert listed["train"].where(3) == "train-00000-of-00002.parquet:3"

    # The copies are made once.
    (copies,) = tmp_path.glob("cache/dml_jax/parquet")
    before = {path: path.stat().st_mtime_ns for path in copies.iterdir()}
    parquet.column.cache_clear()
    contents(data.create("table", root=folder.parent))
    after = {path: path.stat().st_mtime_ns for path in copies.glob("*.arrow")}
    assert after == {path: before[path] for path in after} and len(after) == 3


def test_a_run_trains_on_a_table_as_on_the_folder(images, tmp_path, monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: make_mesh(jax.devices()[:1]))
    file = write_csv(images / "list.csv", rows_of(images))
    results = [
        run.train(tiny.config(root, epochs=1, data__name=name), tmp_path / name)
        for name, root in (("table", file), ("folder", images))
    ]
    assert results[0] == results[1]
    file.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ""}, "list.csv, row 3: there is no label"),
        ({"path": ""}, "list.csv, row 3: there is no path"),
        ({"split": "dev"}, "list.csv, row 3: the split is 'dev'"),
        (
            {"path": "train/class0/1.png"},
            "row 3: train/class0/1.png is listed twice, first in .*list.csv, row 2",
        ),
        ({"split": "test", "is_query": "maybe", "is_gallery": "1"}, "row 3: is_query is 'maybe'"),
    ],
)
def test_a_wrong_row_is_named(images, change, message):
    rows = rows_of(images)
    rows[2] |= change
    file = write_csv(images / "list.csv", rows)
    with pytest.raises(ValueError, match=message):
        table.load(file)
    file.unlink()


def test_wrong_tables_are_refused(images, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="is no .csv or .parquet file"):
        table.load(tmp_path / "missing.csv")
    (tmp_path / "notes.txt").write_text("label,path\n")
    with pytest.raises(FileNotFoundError, match=r"is no .csv or .parquet file, and no folder with"):
        table.load(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="has the columns name; it needs `label`"):
        table.load(write_csv(tmp_path / "a.csv", [{"name": "x"}]))
    with pytest.raises(ValueError, match="has no rows of the split 'test'"):
        table.load(write_csv(tmp_path / "a.csv", rows_of(images)[:36]))
    (tmp_path / "a.csv").write_text("path,label\n")
    with pytest.raises(ValueError, match="a.csv has no rows"):
        table.load(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but nothing else")
    with pytest.raises(ValueError, match="a.parquet cannot be read"):
        table.load(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="needs root"):
        data.create("table")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "dml_jax\[tables\]"'):
        table.load(tmp_path / "a.csv")


def classification(images, root, *, name="{split}-00000-of-00001.parquet", **options):
    """Writes the training images as the hub has classification sets: all classes in both splits."""
    files = sorted((images / "train").rglob("*.png"))
    names = [f"class{k}" for k in reversed(range(tiny.TRAIN_CLASSES))]
    for number, split in enumerate(("train", "test")):
        part = files[number::2]
        columns = {
            options.get("pictures", "image"): [path.read_bytes() for path in part],
            options.get("labels", "label"): [names.index(path.parent.name) for path in part],
        }
        hub.write_parquet(
            root / name.format(split=split),
            columns,
            images=options.get("pictures", "image"),
            classes={options.get("labels", "label"): names},
        )


@pytest.mark.parametrize(
    ("repository", "options"),
    [
        ("plain", {"name": "data/{split}-00000-of-00001.parquet"}),
        ("converted", {"name": "default/{split}/0000.parquet"}),
        ("named", {"pictures": "img", "labels": "fine_label"}),
    ],
)
def test_a_classification_set_of_the_hub_is_joined_and_split_by_class(images, repository, options):
    if repository == "converted":
        hub.snapshot(repository)
        folder = hub.snapshot(repository, revision="refs/convert/parquet", commit=hub.CONVERTED)
    else:
        folder = hub.snapshot(repository)
    classification(images, folder, **options)
    root = f"hf:datasets/somebody/{repository}"
    sources = load_sources(DataConfig(name="table", root=root, split_classes=0.5))
    found = contents(sources)
    expected = contents(data.create("folder", root=images))["train"]
    assert sorted(found["train"] + found["test"]) == sorted(expected)
    assert len(sources["test"].class_names) == 3
    assert not set(sources["train"].class_names) & set(sources["test"].class_names)
    again = load_sources(DataConfig(name="table", root=str(folder), split_classes=0.5))
    assert again["test"].names == sources["test"].names
    with pytest.raises(ValueError, match=f"images at {root} are not split .* different classes"):
        load_sources(DataConfig(name="table", root=root))
    resolved = run._resolved(parse(tiny.config(root, data__name="table")), forked=False)
    assert resolved.data.root == root


def test_wrong_locations_on_the_hub_are_refused(images):
    for name, root in (("table", "hf:datasets/cars"), ("folder", "hf:datasets/a/b")):
        with pytest.raises(ValueError, match=f"root is {root}; .* for a data set of table or tar"):
            data.create(name, root=root)
    with pytest.raises(FileNotFoundError, match="hf:datasets/somebody/nowhere cannot be read"):
        data.create("table", root="hf:datasets/somebody/nowhere")
    folder = hub.snapshot("subsets")
    classification(images, folder, name="small/{split}/0000.parquet")
    classification(images, folder, name="large/{split}/0000.parquet")
    with pytest.raises(ValueError, match="several tables, in the folders large, small; name one"):
        data.create("table", root="hf:datasets/somebody/subsets")
    assert list(data.create("table", root="hf:datasets/somebody/subsets/small")) == ["all"]


def test_only_the_columns_that_are_needed_are_read(images, tmp_path):
    encoded = [path.read_bytes() for path in sorted((images / "train").rglob("*.png"))]
    columns = {"image": encoded, "label": ["a", "b"] * 18, "path": ["x"] * 36, "mask": encoded}
    hub.write_parquet(tmp_path / "all.parquet", columns)
    assert parquet.read(tmp_path / "all.parquet", table._WANTED).values.keys() == {"label", "path"}
    # Encoded images are used, not the paths that they once had.
    source = table.load(tmp_path / "all.parquet")[rows_module.UNSPLIT]
    assert source[5] == encoded[5] and source.names[5] == "all.parquet:5"


def test_a_missing_or_wrong_image_is_named(images, tmp_path):
    hub.write_parquet(tmp_path / "a.parquet", {"image": [None, b"x"], "label": ["a", "b"]})
    found = parquet.Images((tmp_path / "a.parquet",), ("image",), ((0, 0), (0, 1)))
    assert found[1] == b"x"
    with pytest.raises(ValueError, match="a.parquet, row 1: there is no image"):
        found[0]
    about = pyarrow.table({"image": [1, 2], "label": ["a", "b"]})
    pyarrow.parquet.write_table(about, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="column 'image' of .*b.parquet holds no encoded images"):
        parquet.column(tmp_path / "b.parquet", "image")
    hub.write_parquet(
        tmp_path / "c.parquet", {"image": [b"x"], "label": [2]}, classes={"label": ["a", "b"]}
    )
    with pytest.raises(ValueError, match="c.parquet, row 1: there is no class 2 in 'label'"):
        table.load(tmp_path / "c.parquet")


def test_queries_and_gallery_need_classes_of_their_own(images):
    rows = [row | {"label": "a", "is_query": "1", "is_gallery": "0"} for row in rows_of(images)]
    rows[-1] |= {"is_query": "0", "is_gallery": "1"}
    with pytest.raises(ValueError, match="1 classes are both in training and in testing: a;"):
        table.load(write_csv(images / "list.csv", rows))
    for row in rows:
        row |= {"label": row["split"], "is_query": "1", "is_gallery": "0"}
    with pytest.raises(ValueError, match="no test rows in which is_gallery is true"):
        table.load(write_csv(images / "list.csv", rows))
    (images / "list.csv").unlink()


def test_a_box_that_is_no_number_is_named(images):
    rows = rows_of(images)
    rows[2] |= {"x_1": "nan", "y_1": "nan", "x_2": "nan", "y_2": "nan"}
    assert table.load(write_csv(images / "list.csv", rows)).keys() == {"train", "test"}
    rows[2] |= {"x_1": "left"}
    with pytest.raises(ValueError, match="row 3: the box"):
        table.load(write_csv(images / "list.csv", rows))
    (images / "list.csv").unlink()


def test_a_table_in_object_storage_is_copied_with_its_images(images, tmp_path):
    file = write_csv(images / "list.csv", rows_of(images))
    expected = contents(table.load(file))
    with object_storage.served():
        url = object_storage.new_bucket("s3") + "/photos"
        names = [path.relative_to(images).as_posix() for path in images.rglob("*.*")]
        storage.upload(images, url, [name for name in names if (images / name).is_file()])
        for root in (url, f"{url}/list.csv"):
            assert contents(data.create("table", root=root)) == expected
    file.unlink()
