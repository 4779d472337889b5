"""Parquet files with encoded images, as the data sets of the Hugging Face hub have them."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from dml_jax._utils import extras, files, locks
from dml_jax._utils.errors import UserError
from dml_jax.data.sources import rows

_ROWS = 256  # Rows that are read at once when images are copied.
_NOT_SUBSETS = ("data",)  # Folders that the hub's tools make.


def below(root: Path) -> list[Path]:
    """Returns the Parquet files below a folder in order; none if there are none.

    Folders such as `data/` or `default/train/` may hold them.

    Raises:
        ValueError: there are several subsets of the data set.
    """
    found = [
        path
        for path in sorted(root.rglob("*.parquet"))
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    subsets = {
        "/".join(
            part
            for part in path.relative_to(root).parent.parts
            if part not in _NOT_SUBSETS and not rows.is_split_name(part)
        )
        for path in found
    }
    if len(subsets) > 1:
        raise UserError(
            f"{root} holds several tables, in the folders {', '.join(sorted(subsets))}; name one, "
            "as in config.data.root=FOLDER/SUBSET or hf:datasets/OWNER/NAME/SUBSET"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns of a Parquet file.

    Attributes:
        values: the values by column name; those of numbered classes are replaced by their names.
        class_names: the names of numbered classes by column, in the order of their numbers.
        image: name of the column with encoded images; None without one.
        count: number of rows.
    """

    values: dict[str, list[Any]]
    class_names: dict[str, list[str]]
    image: str | None
    count: int


def read(path: Path, wanted: Collection[str]) -> Columns:
    """Reads columns of a Parquet file, without images.

    The hub's data sets keep the kinds of their columns beside them. So if there is no column
    `label`, the only one of numbered classes is read as `label`.

    Args:
        path: the file.
        wanted: names of columns; those that the file lacks are left out.

    Raises:
        ValueError: the file cannot be read, or a number has no class.
        ModuleNotFoundError: pyarrow is not installed.
    """
    with _errors_of(path):
        import pyarrow.parquet

        schema = pyarrow.parquet.read_schema(path)
        features = _features(schema)
        source_of = {name: name for name in wanted if name in schema.names}
        classes = {x: list(f["names"]) for x, f in features.items() if f["_type"] == "ClassLabel"}
        if "label" in wanted and "label" not in source_of and len(classes) == 1:
            source_of["label"] = next(iter(classes))
        table = pyarrow.parquet.read_table(path, columns=sorted(set(source_of.values())))
    values = {name: table.column(source).to_pylist() for name, source in source_of.items()}
    class_names = {x: classes[source] for x, source in source_of.items() if source in classes}
    for name, known in class_names.items():
        for row, number in enumerate(values[name]):
            if number is not None and not 0 <= number < len(known):
                raise UserError(f"{path}, row {row + 1}: there is no class {number} in {name!r}")
        values[name] = [None if number is None else known[number] for number in values[name]]
    images = [name for name, feature in features.items() if feature["_type"] == "Image"]
    if "image" in schema.names:
        images = ["image"]
    image = images[0] if len(images) == 1 else None
    return Columns(values, class_names, image, table.num_rows)


def names_of(path: Path) -> list[str]:
    """Returns the names of the columns of a Parquet file.

    Raises:
        ValueError: the file cannot be read.
        ModuleNotFoundError: pyarrow is not installed.
    """
    with _errors_of(path):
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(path).names)


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    with extras.required_by("tables"):
        import pyarrow
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"{path} cannot be read: {error}") from error


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Returns the kinds of columns that the hub's data sets keep beside them."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {
            name: feature
            for name, feature in features.items()
            if name in schema.names
            and (feature["_type"] != "ClassLabel" or isinstance(feature["names"], list))
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


@dataclasses.dataclass(frozen=True)
class Images(Sequence[bytes | str]):
    """Images in Parquet files, read from copies that allow random access.

    Attributes:
        files: the Parquet files.
        columns: name of the column with images of each file.
        numbers: of each image, the number of its file and of its row in it.
    """

    files: tuple[Path, ...]
    columns: tuple[str, ...]
    numbers: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.numbers)

    def __getitem__(self, index: int) -> bytes | str:  # type: ignore[override]  # No slices.
        """Returns an encoded image.

        Raises:
            ValueError: there is none.
        """
        file, row = self.numbers[index]
        image = column(self.files[file], self.columns[file])[row].as_py()
        if image is None:
            raise UserError(f"{where(self.files, (file, row))}: there is no image")
        return image


def where(listed: Sequence[Path], number: tuple[int, int]) -> str:
    """Returns a file and a row in it, counted from 1, for messages.

    Args:
        listed: files.
        number: number of the file and of the row, from 0.
    """
    return f"{listed[number[0]]}, row {number[1] + 1}"


@functools.cache
def column(path: Path, name: str) -> Any:
    """Returns the images of a Parquet file as a column in mapped memory.

    A row of a Parquet file cannot be read without all of its group, which may be gigabytes. So the
    images are copied to an Arrow file in the cache folder once.

    Args:
        path: the file.
        name: name of the column, of bytes or of structs with a field `bytes`.

    Raises:
        ValueError: it holds something else.
    """
    import pyarrow

    state = path.stat()
    identity = f"{path.absolute()} {state.st_size} {state.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
    copy = files.cache_folder() / "parquet" / f"{digest}.arrow"
    with locks.exclusive(copy.with_suffix(".lock")):
        if not copy.exists():
            _copy_images(path, name, copy)
    mapped = pyarrow.ipc.open_file(pyarrow.memory_map(str(copy)))
    return mapped.read_all().column("image")


def _copy_images(path: Path, name: str, copy: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("image", pyarrow.large_binary())])
    with (
        _errors_of(path),
        files.atomic_write(copy) as part,
        pyarrow.OSFile(str(part), "wb") as sink,
        pyarrow.ipc.new_file(sink, schema) as writer,
    ):
        parquet = pyarrow.parquet.ParquetFile(path)
        for batch in parquet.iter_batches(_ROWS, columns=[name]):
            images = batch.column(0)
            if pyarrow.types.is_struct(images.type):
                # `flatten`, since `field` would ignore that a struct itself is missing.
                images = dict(zip(images.type.names, images.flatten(), strict=True)).get("bytes")
            if images is None or not _is_binary(images.type):
                raise UserError(f"the column {name!r} of {path} holds no encoded images")
            encoded = images.cast(pyarrow.large_binary())
            writer.write_batch(pyarrow.record_batch([encoded], schema=schema))


def _is_binary(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
