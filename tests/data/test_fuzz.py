"""Folders, lists and images of arbitrary content raise only the documented errors."""

import os
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dml_jax import data
from dml_jax.data import images, records
from dml_jax.data.prepare import DATA_SETS, layouts, prepare
from tests.data.test_inspection import BAD, GOOD
from tests.data.test_tar import write_shard
from tests.helpers import public_data
from tests.helpers.fuzz import CHANGES, apply_changes, damaged

EXAMPLES = int(os.environ.get("DML_JAX_FUZZ_EXAMPLES", "100"))
fuzzed = settings(
    max_examples=2 * EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


VALID = st.sampled_from(["cmyk.jpg", "transparent palette.png", "animated.webp"])


@fuzzed
@given(VALID.flatmap(lambda name: damaged(GOOD[name])))
def test_decode(content):
    try:
        assert images.decode(content, "x").shape[2] == 3
    except ValueError as error:
        assert str(error).startswith("x: not a readable image")


NAMES = st.one_of(
    st.sampled_from(["train", "test", "a", "b.jpg", "index.json", "Thumbs.db"]),
    st.text(max_size=9).filter(lambda name: name not in ("", ".", "..") and "/" not in name),
)
TREES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=4).map(tuple),
    st.one_of(
        st.sampled_from([GOOD["cmyk.jpg"], BAD["text.jpg"]]), st.sampled_from([".", "..", "a"])
    ),
    max_size=8,
)


@settings(max_examples=EXAMPLES // 2)
@given(tree=TREES)
def test_folder_sources(tree, tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for path, content in tree.items():
        try:
            file = root.joinpath(*path)
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                file.write_bytes(content)
            else:
                file.symlink_to(content)
        except (OSError, ValueError):  # A name that this file system does not allow.
            continue
    for read in (lambda: data.create("folder", root=root), lambda: {"x": data.images_below(root)}):
        try:
            found = read()
            data.accept(found, data.inspect(found), "skip")
        except (ValueError, OSError) as error:
            assert str(root) in str(error) or "images of" in str(error)


LISTS = {
    "cub200": ("images.txt", "classes.txt", "image_class_labels.txt"),
    "sop": ("Ebay_train.txt", "Ebay_test.txt"),
    "inshop": ("list_eval_partition.txt",),
    "grocery": ("classes.csv", "train.txt", "val.txt"),
}


@pytest.mark.parametrize("name", LISTS)
def test_published_lists(name, tmp_path):
    root = getattr(public_data, name)(tmp_path / "source")
    files = [next(root.rglob(file)) for file in LISTS[name]]
    originals = [file.read_bytes() for file in files]

    @settings(max_examples=EXAMPLES)
    @given(st.tuples(*[CHANGES] * len(files)))
    def try_all(changes):
        for file, content, change in zip(files, originals, changes, strict=True):
            file.write_bytes(apply_changes(content, change))
        check_layout(name, root)

    try_all()


def test_matlab_annotations(tmp_path):
    root = public_data.cars196_annos(tmp_path / "source")
    file = root / "cars_annos.mat"
    original = file.read_bytes()

    @settings(max_examples=EXAMPLES)
    @given(damaged(original))
    def try_all(content):
        file.write_bytes(content)
        check_layout("cars196", root)

    try_all()


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_shards(format, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    members = [
        (f"{'folder' * 20}/{k}.{extension}", content)
        for k in range(3)
        for extension, content in (("json", {"label": k % 2, "x1": k}), ("jpg", GOOD["cmyk.jpg"]))
    ]
    file = write_shard(tmp_path / "a.tar", members, format=format)
    original = file.read_bytes()

    @settings(max_examples=EXAMPLES)
    @given(damaged(original))
    def try_all(content):
        file.write_bytes(content)
        try:
            found = data.create("tar", root=file)
            data.accept(found, data.inspect(found), "skip")
        except (ValueError, OSError) as error:
            assert str(file) in str(error) or "images of" in str(error)

    try_all()


def check_layout(name, root):
    try:
        contents = layouts.read(DATA_SETS[name].layout, root)
    except (ValueError, OSError) as error:
        assert str(root) in str(error)
    else:
        for entry in contents.entries:
            assert entry.file.is_relative_to(root) and ".." not in entry.file.parts


def test_manifest_of_a_prepared_data_set(tmp_path):
    prepare("folder", source=public_data.folder(tmp_path / "images"), out=tmp_path / "out")
    file = tmp_path / "out" / records.MANIFEST
    original = file.read_bytes()

    @settings(max_examples=EXAMPLES)
    @given(CHANGES)
    def try_all(changes):
        file.write_bytes(apply_changes(original, changes))
        try:
            data.inspect(data.create("folder", root=tmp_path / "out"))
        except (ValueError, OSError) as error:
            assert str(tmp_path / "out") in str(error)

    try_all()


def test_listed_files_outside_the_directory_are_rejected(tmp_path):
    root = public_data.sop(tmp_path / "sop")
    file = next(root.rglob("Ebay_test.txt"))
    for name in ("../../secret.jpg", "/etc/passwd", "a/../../b.jpg"):
        file.write_text(f"image_id class_id super_class_id path\n1 12 3 {name}\n")
        with pytest.raises(ValueError, match=f"{root}: a list names '{name}', which would lie"):
            prepare("sop", source=root, out=tmp_path / "out")


def test_link_to_a_parent_directory_is_not_followed_forever(tmp_path):
    root = public_data.folder(tmp_path / "images")
    (root / "train" / "a" / "up").symlink_to("../..")
    source = data.images_below(root)
    assert len(source) == 5 and len(set(source.names)) == 5
