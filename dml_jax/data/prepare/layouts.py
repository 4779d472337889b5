"""How each public data set lies on people's disks: which image has which class and split.

A layout is a function of a directory. It reads lists, annotations and names of files, no images.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import scipy.io

from dml_jax.data import records, sources
from dml_jax.data.prepare import tfds_copy


class ImageFile(Protocol):
    """An encoded image: a path, or a place in a larger file."""

    def is_file(self) -> bool:
        """Whether it exists."""

    def read_bytes(self) -> bytes:
        """The encoded image."""


class Picture(NamedTuple):
    """An image of a data set.

    Attributes:
        split: "train", "test" or "gallery".
        class_name: its class.
        name: what to call it, unique in its split.
        file: where it is, or should be.
    """

    split: str
    class_name: str
    name: str
    file: ImageFile


class Contents(NamedTuple):
    """A data set: its classes in order, and its pictures."""

    class_names: tuple[str, ...]
    pictures: list[Picture]


def read(layout: Callable[[Path], Contents], source: Path) -> Contents:
    """Lists what a directory holds, whatever its lists and annotations may hold.

    Raises:
        OSError: a file is missing, or cannot be read.
        ValueError: a list or annotation is damaged, or they do not fit each other.
    """
    try:
        return layout(source)
    except OSError:
        raise
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    except Exception as error:  # Lists that refer to what other lists do not have.
        raise ValueError(
            f"{source}: its lists are damaged, or do not fit each other ({error!r})"
        ) from error


def cars196(source: Path) -> Contents:
    """CARS196; the first half of its classes trains, the second tests.

    In any of five layouts:

    - `cars_annos.mat` and `car_ims/`;
    - `cars_train/`, `cars_test/` and the devkit, with `cars_test_annos_withlabels.mat` in it or
      beside it;
    - `train/CLASS/*` and `test/CLASS/*`, both with all classes, whose order is that of their names
      (not the official order, but its halves are the same) or numbers;
    - the same with no class in both, as the official programs prepare it: split already;
    - a copy by TensorFlow Datasets, as ArrayRecord or TFRecord files.

    Raises:
        FileNotFoundError: there is none of them, or the test images' labels are missing.
    """
    annotated, root = _find(source, "cars_annos.mat"), _find(source, "car_ims/*.jpg")
    if annotated and root:
        path = annotated / "cars_annos.mat"
        class_names = tuple(map(str, _matlab(path, "class_names")))
        files = [(str(a["relative_im_path"]), a["class"]) for a in _matlab(path, "annotations")]
        pictures = [Picture("", class_names[k - 1], name, _inside(root, name)) for name, k in files]
        return _halves(Contents(class_names, pictures))
    if devkit := _find(source, "cars_train_annos.mat"):
        return _halves(_cars196_devkit(source, devkit))
    if root := _find(source, "dataset_info.json"):
        return _halves(_copied(root))
    others = "cars_annos.mat with car_ims/, cars_train_annos.mat, dataset_info.json (of TFDS)"
    tree = _tree(_need(source, "train/*/*", others))
    train, test = (
        {picture.class_name for picture in tree.pictures if picture.split == split}
        for split in ("train", "test")
    )
    return _halves(tree) if train & test else tree


def _cars196_devkit(source: Path, devkit: Path) -> Contents:
    labelled = "cars_test_annos_withlabels*.mat"  # On Kaggle it has " (1)" in its name.
    directory = _find(source, labelled)
    if directory is None:
        raise FileNotFoundError(
            f"{source} has no cars_test_annos_withlabels.mat. The list of test images that comes "
            "in the devkit has no labels; that file, which was published beside it, has them"
        )
    class_names = tuple(map(str, _matlab(devkit / "cars_meta.mat", "class_names")))
    pictures = []
    for folder, annotations in (
        ("cars_train", devkit / "cars_train_annos.mat"),
        ("cars_test", next(directory.glob(labelled))),
    ):
        root = _need(source, f"{folder}/*.jpg")
        for annotation in _matlab(annotations, "annotations"):
            name = f"{folder}/{annotation['fname']}"
            file = _inside(root, name)
            pictures.append(Picture("", class_names[annotation["class"] - 1], name, file))
    return Contents(class_names, pictures)


def cub200(source: Path) -> Contents:
    """CUB-200-2011, the official tree or a copy by TFDS; its first half of classes trains.

    Raises:
        FileNotFoundError: the source holds neither.
    """
    if copy := _find(source, "dataset_info.json"):
        return _halves(_copied(copy))
    root = _need(source, "images.txt", "dataset_info.json (of TFDS)")
    classes = dict(_rows(root / "classes.txt", 2))
    labels = dict(_rows(root / "image_class_labels.txt", 2))
    pictures = [
        Picture("", classes[labels[number]], name, _inside(root / "images", name))
        for number, name in _rows(root / "images.txt", 2)
    ]
    return _halves(Contents(tuple(classes.values()), pictures))


def sop(source: Path) -> Contents:
    """Stanford Online Products, split by `Ebay_train.txt` and `Ebay_test.txt`.

    Raises:
        FileNotFoundError: the source does not hold them.
    """
    root = _need(source, "Ebay_train.txt")
    pictures = [
        Picture(split, class_id, name, _inside(root, name))
        for split in ("train", "test")
        for _, class_id, _, name in _rows(root / f"Ebay_{split}.txt", 4, header=1)
    ]
    return Contents(_in_order(sorted((p.class_name for p in pictures), key=int)), pictures)


def inshop(source: Path) -> Contents:
    """In-Shop Clothes Retrieval, split by `list_eval_partition.txt`; "test" are the queries.

    Raises:
        FileNotFoundError: the source does not hold that file, or no `img/` beside or near it.
        ValueError: the file names an unknown split.
    """
    partition = _need(source, "list_eval_partition.txt") / "list_eval_partition.txt"
    root = _need(source, "img/*")
    splits = {"train": "train", "query": "test", "gallery": "gallery"}
    pictures = []
    for name, item, split in _rows(partition, 3, header=2):
        if split not in splits:
            raise ValueError(f"{partition}: {name} is in a split {split!r}, not in {list(splits)}")
        pictures.append(Picture(splits[split], item, name, _inside(root, name)))
    return Contents(_in_order(sorted(p.class_name for p in pictures)), pictures)


def omniglot(source: Path) -> Contents:
    """Omniglot's small sets; a class is a character of an alphabet.

    The first small set trains. The second tests, without the alphabets that are in the first too.
    They are `images_background_small1/` and `..2/`, or splits of a copy by TFDS.

    Raises:
        FileNotFoundError: the source holds neither.
    """
    if copy := _find(source, "dataset_info.json"):
        small = [_copied(copy, split) for split in ("small1", "small2")]
    else:
        small = [
            _characters(_need(source, f"{name}/*/character*", "dataset_info.json (of TFDS)") / name)
            for name in ("images_background_small1", "images_background_small2")
        ]
    train, test = (contents.pictures for contents in small)
    seen = {_alphabet(picture) for picture in train}
    pictures = [
        *(picture._replace(split="train") for picture in train),
        *(picture._replace(split="test") for picture in test if _alphabet(picture) not in seen),
    ]
    return Contents(_in_order(picture.class_name for picture in pictures), pictures)


def _characters(root: Path) -> Contents:
    pictures = [
        Picture("", f"{alphabet.name}_{character.name}", str(path.relative_to(root.parent)), path)
        for alphabet in sources.visible(root)
        for character in sources.visible(alphabet)
        for path in sources.visible(character)
    ]
    return Contents((), pictures)


def _alphabet(picture: Picture) -> str:
    return picture.class_name.rpartition("_")[0]


def folder(source: Path) -> Contents:
    """Any images: `train/CLASS/*` and `test/CLASS/*`.

    Raises:
        FileNotFoundError: the source holds no such directories.
        ValueError: a class directory is empty, or holds something that is not an image.
    """
    return _tree(_need(source, "train/*/*"))


def _tree(root: Path) -> Contents:
    pictures = [
        Picture(split, images.class_names[label], name, root / name)
        for split, images in sources.create("folder", root=root).items()
        for label, name in zip(images.labels.tolist(), images.names, strict=True)
    ]
    names = {picture.class_name for picture in pictures}
    numbered = all(name.isdecimal() for name in names)
    return Contents(tuple(sorted(names, key=int if numbered else str)), pictures)


def _copied(directory: Path, *splits: str) -> Contents:
    """Some splits, or all, of a TFDS data set."""
    class_names, examples = tfds_copy.read(directory, splits)
    return Contents(class_names, [Picture(*example) for example in examples])


def _halves(contents: Contents) -> Contents:
    """The data set with the first half of its classes for training, the second for testing."""
    train = set(contents.class_names[: len(contents.class_names) // 2])
    return contents._replace(
        pictures=[
            picture._replace(split="train" if picture.class_name in train else "test")
            for picture in contents.pictures
        ]
    )


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _find(source: Path, pattern: str) -> Path | None:
    """The directory in which a file's pattern matches: the source or one up to two levels below.

    Archives and download tools wrap what they hold into a directory, some of them into two.
    """
    level = [source]
    for _ in range(3):
        for directory in level:
            if any(True for _ in directory.glob(pattern)):
                return directory
        level = [path for directory in level for path in sources.visible(directory)]
        level = [path for path in level if path.is_dir() and path.name != "__MACOSX"]
    return None


def _need(source: Path, pattern: str, others: str = "") -> Path:
    directory = _find(source, pattern)
    if directory is None:
        expected = f"{others} or {pattern}" if others else pattern
        raise FileNotFoundError(
            f"found no {expected} in {source}, nor one or two directories below it"
        )
    return directory


def _rows(path: Path, columns: int, header: int = 0) -> Iterator[list[str]]:
    """The lines of a table, split at white space, after a header of some lines."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = line.split()
        if number <= header or not row:
            continue
        if len(row) != columns:
            raise ValueError(f"{path}, line {number}: expected {columns} columns, got {line!r}")
        yield row


def _inside(root: Path, name: str) -> Path:
    """A file that a list names; ValueError if that would lie outside the directory."""
    if records.leads_elsewhere(name):
        raise ValueError(f"a list names {name!r}, which would lie outside {root}")
    return root / name


def _matlab(path: Path, variable: str) -> Any:
    """A variable of a MATLAB file; its structs are dicts, its cells and arrays are sequences."""
    try:
        return scipy.io.loadmat(path, simplify_cells=True, variable_names=[variable])[variable]
    except Exception as error:  # scipy's reader raises nearly anything on a broken file.
        if isinstance(error, OSError) and error.errno is not None:
            raise  # The disk's fault, not the file's.
        raise ValueError(f"{path}: cannot read {variable!r} in it ({error})") from error
