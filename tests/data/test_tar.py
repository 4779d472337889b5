import io
import json
import pickle
import shutil
import tarfile

import jax
import numpy as np
import pytest

from dml_jax import data
from dml_jax._utils import sharding, storage
from dml_jax.data.config import DataConfig
from dml_jax.data.sources import rows, tar
from dml_jax.data.splits import load_sources
from dml_jax.training import loop, run
from tests.helpers import object_storage, tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_shard(path, members, **options):
    """Writes a tar file of (name, content) pairs; content that is no bytes is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as file:
        for name, content in members:
            encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(encoded)
            file.addfile(info, io.BytesIO(encoded))
    return path


def samples(images, split, made=lambda name, image, label: [(f"{name}.png", image)]):
    """Returns the members of all images of a split, made from name, encoded image and class."""
    return [
        member
        for number, path in enumerate(sorted((images / split).rglob("*.png")))
        for member in made(f"{number:06}", path.read_bytes(), f"{path.parent.name}_of_{split}")
    ]


def with_cls(name, image, label):
    return [(f"{name}.cls", label.encode()), (f"{name}.png", image)]


def with_json(name, image, label):
    return [(f"a/{name}.png", image), (f"a/{name}.json", {"label": label, "caption": "x"})]


def with_txt(name, image, label):
    return [(f"{name}.PNG", image), (f"{name}.seg.png", b"a mask"), (f"{name}.txt", label.encode())]


def shards(images, root, made=with_cls, name="{split}-{number:06}.tar"):
    """Writes two shards of each split."""
    for split in ("train", "test"):
        members = samples(images, split, made)
        size = len(made("", b"", ""))
        half = len(members) // size // 2 * size
        for number, part in enumerate((members[:half], members[half:])):
            write_shard(root / name.format(split=split, number=number), part)
    return root


def shards_of_training(images, tmp_path):
    root = shards(images, tmp_path / "only")
    for file in root.glob("test-*"):
        file.unlink()
    return root


def contents(sources):
    """Returns class and encoded image of each image by split."""
    return {
        split: [(source.class_names[label], source[i]) for i, label in enumerate(source.labels)]
        for split, source in sources.items()
    }


def expected(images):
    folder = data.create("folder", root=images)
    return {
        split: [(f"{label}_of_{split}", image) for label, image in members]
        for split, members in contents(folder).items()
    }


@pytest.mark.parametrize("made", [with_cls, with_json, with_txt])
def test_shards_are_read_like_the_folder_of_their_images(images, tmp_path, made):
    sources = data.create("tar", root=shards(images, tmp_path / "shards", made))
    assert contents(sources) == expected(images)
    assert contents(pickle.loads(pickle.dumps(sources))) == contents(sources)
    assert sources["train"][7] not in pickle.dumps(sources)
    assert sources["test"].where(1).startswith("test-000000.tar:")
    assert not any(data.inspect(sources).unreadable.values())


def test_the_index_is_made_once_and_again_for_another_file(images, tmp_path, monkeypatch):
    root = shards(images, tmp_path / "shards", name="{split}/part-{number}.tar")
    assert contents(data.create("tar", root=root)) == expected(images)
    with monkeypatch.context() as patch:
        patch.setattr(tar, "_index", lambda shard: pytest.fail("indexed again"))
        assert contents(data.create("tar", root=root)) == expected(images)
    members = [(f"b{name}", content) for name, content in samples(images, "test", with_cls)]
    write_shard(root / "test" / "part-0.tar", members)
    assert len(data.create("tar", root=root)["test"]) == 24 + 12


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_and_long_names_are_read(images, tmp_path, format):
    members = [
        (f"{'folder' * 12}/{'ö' * 20}{name}", content)
        for name, content in samples(images, "train", with_cls)
    ]
    file = write_shard(tmp_path / "images.tar", members, format=format)
    assert contents(data.create("tar", root=file)) == {rows.UNSPLIT: expected(images)["train"]}


def test_shards_that_are_not_split_are_split_by_class(images, tmp_path):
    members = samples(images, "train", with_cls)
    file = write_shard(tmp_path / "images.tar", members)
    config = DataConfig(name="tar", root=str(file), split_classes=0.5)
    sources = load_sources(config)
    assert {split: len(x.class_names) for split, x in sources.items()} == {"train": 3, "test": 3}
    # Shards of training images only are not split either.
    assert list(data.create("tar", root=shards_of_training(images, tmp_path))) == [rows.UNSPLIT]
    # A classification split, with the same classes in both, is joined first.
    root = tmp_path / "shards"
    write_shard(root / "train-0.tar", members[::2] + members[1::2])
    half = len(members) // 2
    write_shard(root / "train-0.tar", members[:half])
    write_shard(root / "test-0.tar", members[half:] + members[:2])
    joined = load_sources(DataConfig(name="tar", root=str(root), split_classes=0.5))
    assert sum(map(len, joined.values())) == 37
    assert joined["test"].class_names == sources["test"].class_names
    with pytest.raises(ValueError, match="not split .* with different classes in both"):
        load_sources(DataConfig(name="tar", root=str(root)))


def test_columns_of_tables_are_read_from_json(images, tmp_path):
    def made(name, image, label):
        columns = {"label": label, "split": "train"}
        if label.endswith("test"):
            columns |= {"split": "val", "is_query": int(name) % 2 == 0}
            columns |= {"is_gallery": int(name) % 2 == 1}
        if name == "000001":
            columns |= {"x1": 2, "y1": 3, "x2": 12, "y2": 9}
        return [(f"{label}{name}.png", image), (f"{label}{name}.json", columns)]

    members = samples(images, "test", made) + samples(images, "train", made)
    sources = data.create("tar", root=write_shard(tmp_path / "all.tar", members))
    assert {split: len(x) for split, x in sources.items()} == {
        "train": 36,
        "test": 12,
        "gallery": 12,
    }
    assert sources["test"].class_names == sources["gallery"].class_names
    whole = data.decode(sorted((images / "train/class0").iterdir())[1].read_bytes(), "x")
    np.testing.assert_array_equal(sources["train"].image(1).pixels(), whole[3:9, 2:12])


@pytest.mark.slow
def test_a_run_trains_on_shards_as_on_the_folder_and_is_resumed(images, tmp_path, monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: make_mesh(jax.devices()[:1]))
    root = shards(images, tmp_path / "shards")
    config = tiny.config(root, epochs=1, data__name="tar")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.result, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run.train(config, tmp_path / "run")
    # The fingerprint tells other images from these.
    file = root / "train-000000.tar"
    before = file.read_bytes()
    write_shard(file, samples(images, "train", with_cls)[:30])
    with pytest.raises(ValueError, match="images"):
        run.train(config, tmp_path / "run")
    file.write_bytes(before)
    resumed = run.train(config, tmp_path / "run")
    assert resumed == run.train(tiny.config(images, epochs=1), tmp_path / "folder")


IMAGE = ("a.png", b"not decoded here")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([IMAGE], "0.tar, member a.png: there is no label"),
        ([IMAGE, ("a.cls", b" \n")], "member a.png: there is no label"),
        ([IMAGE, ("b.cls", b"1")], "member a.png: there is no label"),
        ([IMAGE, ("a.cls", b"\xff\xfe")], "member a.cls: it is no text"),
        ([IMAGE, ("a.cls", b"1" * (1 << 21))], "member a.cls: 2097152 bytes are no label"),
        ([IMAGE, ("a.json", b"{")], "member a.json: it holds no JSON object"),
        ([IMAGE, ("a.json", [1])], "member a.json: it holds no JSON object"),
        ([IMAGE, ("a.json", {"label": [1]})], "a.json: .* its label is no text or number"),
        ([IMAGE, ("a.jpg", b""), ("a.cls", b"1")], "member a.jpg: its sample has another image"),
        ([IMAGE, ("a.cls", b"1"), ("b.txt", b""), IMAGE, ("a.cls", b"1")], "is listed twice"),
        ([IMAGE, ("a.json", {"label": 1, "split": "dev"})], "member a.png: the split is 'dev'"),
        ([IMAGE, ("a.json", {"label": 1, "x_1": 2})], "member a.png: the box .* lacks a side"),
        ([("notes.cls", b"1")], "holds no images"),
    ],
)
def test_a_wrong_sample_is_named(tmp_path, members, message):
    write_shard(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=message):
        data.create("tar", root=tmp_path)


def test_wrong_files_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match="'tar' needs root"):
        data.create("tar")
    with pytest.raises(FileNotFoundError, match="missing is no .tar file, and no folder with one"):
        data.create("tar", root=tmp_path / "missing")
    members = samples(images, "train", with_cls)
    compressed = write_shard(tmp_path / "a.tar.gz", members, mode="w:gz")
    with pytest.raises(ValueError, match="a.tar.gz is compressed, .* `gunzip a.tar.gz` does"):
        data.create("tar", root=tmp_path)
    shutil.move(compressed, tmp_path / "a.tar")
    with pytest.raises(ValueError, match="a.tar is damaged, or no uncompressed tar file"):
        data.create("tar", root=tmp_path)
    whole = write_shard(tmp_path / "a.tar", members).read_bytes()
    for size in (len(whole) // 2, 512 * 12, 512 * 11 + 100, 700, 0):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="a.tar is damaged"):
            data.create("tar", root=tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    with pytest.raises(ValueError, match="a.tar, member 0.png: it is a link or a special file"):
        data.create("tar", root=tmp_path)


def test_a_shard_that_becomes_shorter_is_named(images, tmp_path):
    file = write_shard(tmp_path / "a.tar", samples(images, "train", with_cls))
    source = data.create("tar", root=file)[rows.UNSPLIT]
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="a.tar:000035.png: its tar file has become shorter"):
        source[35]


def test_shards_in_object_storage_are_copied(images, tmp_path):
    local = shards(images, tmp_path / "shards")
    with object_storage.served():
        url = object_storage.new_bucket("s3") + "/cars"
        for file in local.iterdir():
            storage.write(f"{url}/{file.name}", file.read_bytes())
        assert contents(data.create("tar", root=url)) == expected(images)
