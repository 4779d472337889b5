"""Directory layouts of the public data sets: the class and the split of each image.

A layout is a function of a directory. It reads lists, annotations and file names, but no images.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import scipy.io

from dml_jax._utils.errors import UserError
from dml_jax.data import records
from dml_jax.data.prepare import hub_copy, tfds_copy
from dml_jax.data.sources import folder as folder_source
from dml_jax.data.sources import parquet
from dml_jax.data.sources.folder import visible_entries


class ImageFile(Protocol):
    """An encoded image: a path, or a part of a larger file."""

    def is_file(self) -> bool:
        """Returns whether the image exists."""

    def read_bytes(self) -> bytes:
        """Returns the encoded image."""


class ImageEntry(NamedTuple):
    """An image that a data set lists.

    Attributes:
        split: "train", "test" or "gallery"; empty if it is not decided yet.
        class_name: its class.
        name: its name, unique in its split.
        file: its file, which may be missing.
    """

    split: str
    class_name: str
    name: str
    file: ImageFile


class Contents(NamedTuple):
    """A listed data set: its classes in order, and its images."""

    class_names: tuple[str, ...]
    entries: list[ImageEntry]


def read(layout: Callable[[Path], Contents], source: Path) -> Contents:
    """Lists the images of a directory; any damage to its lists raises one of two errors.

    Raises:
        OSError: a file is missing, or cannot be read.
        ValueError: a list or annotation is damaged, or two of them contradict each other.
    """
    try:
        return layout(source)
    except OSError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    except Exception as error:  # Such as a KeyError, if an entry of another list is missing.
        raise UserError(
            f"{source}: its lists are damaged, or contradict each other ({error!r})"
        ) from error


def cars196(source: Path) -> Contents:
    """Lists CARS196; the first half of the classes is for training, the second for testing.

    Reads any of six layouts:

    - `cars_annos.mat` and `car_ims/`;
    - `cars_train/`, `cars_test/` and the devkit, with `cars_test_annos_withlabels.mat` in it or
      beside it;
    - `train/CLASS/*` and `test/CLASS/*`, each with all classes, ordered by their names (which is
      not the official order, but has the same halves) or numbers;
    - the same with disjoint classes, as the official programs write it, which is already split;
    - a copy by TensorFlow Datasets, as ArrayRecord or TFRecord files;
    - a copy on the Hugging Face hub: Parquet files with the columns `image` and `label`.

    Raises:
        FileNotFoundError: none of them is found, or the labels of the test images are missing.
    """
    annotated, root = _find(source, "cars_annos.mat"), _find(source, "car_ims/*.jpg")
    if annotated and root:
        path = annotated / "cars_annos.mat"
        class_names = tuple(map(str, _matlab(path, "class_names")))
        files = [(str(a["relative_im_path"]), a["class"]) for a in _matlab(path, "annotations")]
        entries = [
            ImageEntry("", class_names[k - 1], name, _inside(root, name)) for name, k in files
        ]
        return _split_in_halves(Contents(class_names, entries))
    if devkit := _find(source, "cars_train_annos.mat"):
        return _split_in_halves(_list_cars196_devkit(source, devkit))
    if root := _find(source, "dataset_info.json"):
        return _split_in_halves(_list_tfds_copy(root))
    if parquet.below(source):
        return _split_in_halves(_list_hub_copy(source))
    others = "cars_annos.mat with car_ims/, cars_train_annos.mat, dataset_info.json (of TFDS)"
    tree = _list_tree(_find_or_raise(source, "train/*/*", others, on_hub=True))
    train, test = (
        {entry.class_name for entry in tree.entries if entry.split == split}
        for split in ("train", "test")
    )
    return _split_in_halves(tree) if train & test else tree


def _list_cars196_devkit(source: Path, devkit: Path) -> Contents:
    labelled = "cars_test_annos_withlabels*.mat"  # On Kaggle it has " (1)" in its name.
    directory = _find(source, labelled)
    if directory is None:
        raise FileNotFoundError(
            f"{source} has no cars_test_annos_withlabels.mat. The list of test images in the "
            "devkit has no labels; that file, which was published beside the devkit, has them"
        )
    class_names = tuple(map(str, _matlab(devkit / "cars_meta.mat", "class_names")))
    entries = []
    for folder, annotations in (
        ("cars_train", devkit / "cars_train_annos.mat"),
        ("cars_test", next(directory.glob(labelled))),
    ):
        root = _find_or_raise(source, f"{folder}/*.jpg")
        for annotation in _matlab(annotations, "annotations"):
            name = f"{folder}/{annotation['fname']}"
            file = _inside(root, name)
            entries.append(ImageEntry("", class_names[annotation["class"] - 1], name, file))
    return Contents(class_names, entries)


def cub200(source: Path) -> Contents:
    """Lists CUB-200-2011, from the official archive, a copy by TFDS or one on the hub.

    The first half of the classes is for training, the second for testing.

    Raises:
        FileNotFoundError: the source holds none of them.
    """
    if copy := _find(source, "dataset_info.json"):
        return _split_in_halves(_list_tfds_copy(copy))
    if _find(source, "images.txt") is None and parquet.below(source):
        return _split_in_halves(_list_hub_copy(source))
    root = _find_or_raise(source, "images.txt", "dataset_info.json (of TFDS)", on_hub=True)
    classes = dict(_rows(root / "classes.txt", 2))
    labels = dict(_rows(root / "image_class_labels.txt", 2))
    entries = [
        ImageEntry("", classes[labels[number]], name, _inside(root / "images", name))
        for number, name in _rows(root / "images.txt", 2)
    ]
    return _split_in_halves(Contents(tuple(classes.values()), entries))


def sop(source: Path) -> Contents:
    """Lists Stanford Online Products, split by `Ebay_train.txt` and `Ebay_test.txt`.

    In Parquet files of the Hugging Face hub, the classes are in a column `class_id`, `item_id` or
    `label`, and the names of the files begin with the split.

    Raises:
        FileNotFoundError: the source does not hold these files.
    """
    if _find(source, "Ebay_train.txt") is None and parquet.below(source):
        column = hub_copy.first_column(source, "class_id", "item_id", "label")
        return _list_hub_copy(source, column)
    root = _find_or_raise(source, "Ebay_train.txt", on_hub=True)
    entries = [
        ImageEntry(split, class_id, name, _inside(root, name))
        for split in ("train", "test")
        for _, class_id, _, name in _rows(root / f"Ebay_{split}.txt", 4, header=1)
    ]
    return Contents(_unique(sorted((entry.class_name for entry in entries), key=int)), entries)


def inshop(source: Path) -> Contents:
    """Lists In-Shop Clothes Retrieval, split by `list_eval_partition.txt`; "test" has the queries.

    The images are in `img/`, or in Parquet files of the Hugging Face hub whose column `item_ID` has
    the names of the images with underscores for slashes.

    Raises:
        FileNotFoundError: the source does not hold that file, or no `img/` beside or near it.
        ValueError: the file names an unknown split.
    """
    partition = _find_or_raise(source, "list_eval_partition.txt") / "list_eval_partition.txt"
    on_hub: dict[str, ImageFile] = {}
    if _find(source, "img/*") is None and parquet.below(source):
        on_hub = {row.values[0]: row.file for row in hub_copy.read(source, "item_ID")[0]}
    root = source if on_hub else _find_or_raise(source, "img/*", on_hub=True)
    splits = {"train": "train", "query": "test", "gallery": "gallery"}
    entries = []
    for name, item, split in _rows(partition, 3, header=2):
        if split not in splits:
            raise UserError(f"{partition}: {name} is in a split {split!r}, not in {list(splits)}")
        item_id = name.removeprefix("img/").removesuffix(".jpg").replace("/", "_")
        file = on_hub.get(item_id, _inside(root, name))
        entries.append(ImageEntry(splits[split], item, name, file))
    return Contents(_unique(sorted(entry.class_name for entry in entries)), entries)


def omniglot(source: Path) -> Contents:
    """Lists the small sets of Omniglot; a class is a character of an alphabet.

    The first small set is for training. The second is for testing, without the alphabets that the
    first contains too. They are `images_background_small1/` and `images_background_small2/`, or
    splits of a copy by TFDS.

    Raises:
        FileNotFoundError: the source holds neither.
    """
    if copy := _find(source, "dataset_info.json"):
        small = [_list_tfds_copy(copy, split) for split in ("small1", "small2")]
    else:
        small = [
            _list_characters(source, name)
            for name in ("images_background_small1", "images_background_small2")
        ]
    train, test = (contents.entries for contents in small)
    seen = {_alphabet(entry) for entry in train}
    entries = [
        *(entry._replace(split="train") for entry in train),
        *(entry._replace(split="test") for entry in test if _alphabet(entry) not in seen),
    ]
    return Contents(_unique(entry.class_name for entry in entries), entries)


def grocery(source: Path) -> Contents:
    """Lists the Grocery Store data set: photographs in shops, of fine-grained classes of groceries.

    Its three lists, `train.txt`, `val.txt` and `test.txt`, are those of a classification, and are
    joined. In the alphabetical order of the classes, the first half is for training and the second
    for testing. (In the order of their numbers, fruit would be for training, vegetables for
    testing.)

    Raises:
        FileNotFoundError: the source does not hold these lists.
        ValueError: a line of a list is damaged.
    """
    root = _find_or_raise(source, "classes.csv")
    names = {row[1]: row[0] for row in _comma_rows(root / "classes.csv", 6, header=1)}
    entries = [
        ImageEntry("", names[number], name, _inside(root, name))
        for part in ("train", "val", "test")
        for name, number, _ in _comma_rows(root / f"{part}.txt", 3)
    ]
    return _split_in_halves(Contents(tuple(sorted(names.values())), entries))


def _list_characters(source: Path, name: str) -> Contents:
    """Lists one of the small sets, in `name`/ALPHABET/CHARACTER/*."""
    directory = _find_or_raise(source, f"{name}/*/character*", "dataset_info.json (of TFDS)")
    entries = [
        ImageEntry("", f"{alphabet.name}_{character.name}", str(path.relative_to(directory)), path)
        for alphabet in visible_entries(directory / name)
        for character in visible_entries(alphabet)
        for path in visible_entries(character)
    ]
    return Contents((), entries)


def _alphabet(entry: ImageEntry) -> str:
    return entry.class_name.rpartition("_")[0]


def folder(source: Path) -> Contents:
    """Lists images in `train/CLASS/*` and `test/CLASS/*`.

    Raises:
        FileNotFoundError: the source holds no such directories.
        ValueError: a class directory is empty, or holds a file that is not named like an image.
    """
    return _list_tree(_find_or_raise(source, "train/*/*"))


def _list_tree(root: Path) -> Contents:
    entries = [
        ImageEntry(split, source.class_names[label], name, root / name)
        for split, source in folder_source.load(root).items()
        for label, name in zip(source.labels.tolist(), source.names, strict=True)
    ]
    names = {entry.class_name for entry in entries}
    are_numbers = all(name.isdecimal() for name in names)
    return Contents(tuple(sorted(names, key=int if are_numbers else str)), entries)


def _list_tfds_copy(directory: Path, *splits: str) -> Contents:
    """Lists the named splits, or all, of a TFDS data set."""
    class_names, examples = tfds_copy.read(directory, splits)
    return Contents(class_names, [ImageEntry(*example) for example in examples])


def _list_hub_copy(source: Path, column: str = "label") -> Contents:
    """Lists Parquet files of the hub; the split of an image is that of its file, if it has one."""
    rows, order = hub_copy.read(source, column)
    entries = [ImageEntry(row.split or "", str(row.values[0]), row.name, row.file) for row in rows]
    return Contents(tuple(order) or hub_copy.in_order({x.class_name for x in entries}), entries)


def _split_in_halves(contents: Contents) -> Contents:
    """Assigns the first half of the classes to training, the second to testing."""
    train = set(contents.class_names[: len(contents.class_names) // 2])
    return contents._replace(
        entries=[
            entry._replace(split="train" if entry.class_name in train else "test")
            for entry in contents.entries
        ]
    )


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the distinct names in the order of their first occurrence."""
    return tuple(dict.fromkeys(names))


def _find(source: Path, pattern: str) -> Path | None:
    """Returns the directory in which a file pattern matches, at most two levels below the source.

    Archives and download tools often wrap their contents in one or two directories.
    """
    level = [source]
    for _ in range(3):
        for directory in level:
            if any(True for _ in directory.glob(pattern)):
                return directory
        level = [path for directory in level for path in visible_entries(directory)]
        level = [path for path in level if path.is_dir() and path.name != "__MACOSX"]
    return None


def _find_or_raise(source: Path, pattern: str, others: str = "", *, on_hub: bool = False) -> Path:
    directory = _find(source, pattern)
    if directory is None:
        parquet_files = "*.parquet (of the Hugging Face hub)" if on_hub else ""
        expected = " or ".join(filter(None, (others, pattern, parquet_files)))
        raise FileNotFoundError(
            f"found no {expected} in {source}, nor one or two directories below it"
        )
    return directory


def _rows(path: Path, columns: int, header: int = 0) -> Iterator[list[str]]:
    """Yields the rows of a table, split at white space, after `header` lines."""
    return _split_rows(path, columns, header, str.split)


def _comma_rows(path: Path, columns: int, header: int = 0) -> Iterator[list[str]]:
    """Yields the rows of a table, split at commas, after `header` lines."""

    def split(line: str) -> list[str]:
        return [cell.strip() for cell in line.split(",")] if line.strip() else []

    return _split_rows(path, columns, header, split)


def _split_rows(
    path: Path, columns: int, header: int, split: Callable[[str], list[str]]
) -> Iterator[list[str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = split(line)
        if number <= header or not row:
            continue
        if len(row) != columns:
            raise UserError(f"{path}, line {number}: expected {columns} columns, got {line!r}")
        yield row


def _inside(root: Path, name: str) -> Path:
    """Returns the path of a listed file; raises ValueError if it lies outside the directory."""
    if records.escapes_directory(name):
        raise UserError(f"a list names {name!r}, which would lie outside {root}")
    return root / name


def _matlab(path: Path, variable: str) -> Any:
    """Returns a variable of a MATLAB file; structs become dicts, cells and arrays sequences."""
    try:
        return scipy.io.loadmat(path, simplify_cells=True, variable_names=[variable])[variable]
    except Exception as error:  # scipy's reader raises nearly any exception on a damaged file.
        if isinstance(error, OSError) and error.errno is not None:
            raise  # The file could not be read at all.
        raise UserError(f"{path}: cannot read {variable!r} in it ({error})") from error
