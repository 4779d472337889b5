"""Images in tar files, as WebDataset writes them.

A sample is a run of members whose names are equal up to the first dot of the file name: an image
and its label, in a member `.cls`, under the key `label` of a member `.json`, or in a member `.txt`.
The JSON object may have the other columns of tables, such as `split`, `is_query` and `x_1`.
"""

import hashlib
import itertools
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64

from dml_jax._utils import files, locks
from dml_jax._utils.errors import UserError
from dml_jax.data.sources.folder import IMAGE_EXTENSIONS
from dml_jax.data.sources.rows import ALIASES, OPTIONAL, Rows, splits_of_files
from dml_jax.data.sources.source import Sources

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_TEXTS = ("cls", "json", "txt")
_MAX_LABEL = 1 << 20  # Bytes.
_BLOCK = 512  # Bytes; the unit of tar files.


def load(path: Path) -> Sources:
    """Returns the splits of tar shards: train, test and, with queries of their own, gallery.

    The split of a shard is the start of its name, as in `train-000000.tar`, or its folder, unless
    the JSON objects of its samples have one. Shards that are not split, or whose training and test
    images share classes, have one split, `UNSPLIT`.

    Args:
        path: a .tar file, or a folder that holds some, at any depth.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is compressed or damaged, or a sample is wrong; the message has the file
            and the member.
    """
    shards = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.is_file())
    for shard in shards:
        if shard.name.lower().endswith(_COMPRESSED):
            raise UserError(
                f"{shard} is compressed, so that its images cannot be read in any order; unpack it "
                f"to a .tar file, as `gunzip {shard.name}` does"
            )
    shards = [shard for shard in shards if shard.suffix == ".tar"]
    if not shards:
        raise FileNotFoundError(f"{path} is no .tar file, and no folder with one")
    return _rows(shards, path).sources(path)


class _Sample(NamedTuple):
    """An image in a shard: its member, where its data is, its label and its other columns."""

    member: str
    offset: int
    size: int
    label: str | None
    columns: dict[str, Any]


def _rows(shards: Sequence[Path], path: Path) -> Rows:
    samples = [(f, sample) for f, shard in enumerate(shards) for sample in _samples(shard)]
    if not samples:
        raise UserError(f"{path} holds no images named {', '.join(IMAGE_EXTENSIONS)}")
    relative = [Path(x.name) if path.is_file() else x.relative_to(path) for x in shards]
    splits = splits_of_files(relative)

    def column(name: str, missing: Any) -> list[Any]:
        return [sample.columns.get(name, missing) for _, sample in samples]

    columns = {name: column(name, None) for name in OPTIONAL} | {
        name: column(name, True) for name in ("is_query", "is_gallery")
    }
    columns["split"] = [x.columns.get("split", splits[f]) for f, x in samples]
    places = [(f, sample.offset, sample.size) for f, sample in samples]
    names = tuple(f"{relative[f].as_posix()}:{sample.member}" for f, sample in samples)
    return Rows(
        labels=[sample.label for _, sample in samples],
        records=_Members(tuple(shards), np.array(places, np.int64), names),
        names=names,
        columns=columns,
        where=lambda row: f"{shards[samples[row][0]]}, member {samples[row][1].member}",
    )


class _Members(Sequence[bytes | str]):
    """Members of tar files, read on access."""

    def __init__(
        self, shards: tuple[Path, ...], places: Int64[np.ndarray, "n 3"], names: tuple[str, ...]
    ):
        self._shards, self._places, self._names = shards, places, names

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> bytes | str:  # type: ignore[override]  # No slices.
        shard, offset, size = self._places[index].tolist()
        with self._shards[shard].open("rb") as file:
            data = _read(file, offset, size)
        if len(data) < size:
            raise UserError(f"{self._names[index]}: its tar file has become shorter; copy it again")
        return data


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _samples(shard: Path) -> list[_Sample]:
    """Returns the samples of a shard, from an index in the cache folder, which is made once."""
    state = shard.stat()
    identity = f"{shard.absolute()} {state.st_size} {state.st_mtime_ns}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    index = files.cache_folder() / "tar" / f"{name}.json"
    with locks.exclusive(index.with_suffix(".lock")):
        if not index.exists():
            made = [sample._asdict() for sample in _index(shard)]
            files.write_json(index, {"samples": made})
    return [_Sample(**sample) for sample in (files.read_json(index) or {})["samples"]]


def _index(shard: Path) -> list[_Sample]:
    with shard.open("rb") as file:
        groups = itertools.groupby(_members(shard, file), key=lambda member: _parts(member.name)[0])
        return [
            sample
            for _, members in groups
            if (sample := _sample(shard, file, list(members))) is not None
        ]


def _members(shard: Path, file: BinaryIO) -> Iterable[tarfile.TarInfo]:
    """Returns the files in a shard, without hidden ones and WebDataset's own."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = tar.getmembers()
    except tarfile.TarError as error:
        raise UserError(f"{shard} is damaged, or no uncompressed tar file ({error})") from error
    for member in members:
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise UserError(
                f"{shard}, member {member.name}: it is a link or a special file; copy the image "
                "itself"
            )
    end = max((x.offset_data + -(-x.size // _BLOCK) * _BLOCK for x in members), default=0)
    if _read(file, end, _BLOCK) != bytes(_BLOCK):  # The mark of its end.
        raise UserError(f"{shard} is damaged: it ends early; copy it again")
    return [x for x in members if x.isreg() and not Path(x.name).name.startswith((".", "__"))]


def _parts(name: str) -> tuple[str, str]:
    """Returns a name up to the first dot of its last part, and what follows, in lower case."""
    folder, separator, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{separator}{stem}", extension.lower()


def _sample(shard: Path, file: BinaryIO, members: Sequence[tarfile.TarInfo]) -> _Sample | None:
    """Returns a sample; None if it has no image."""
    by_extension = {_parts(member.name)[1]: member for member in members}
    images = [x for x in members if f".{_parts(x.name)[1]}" in IMAGE_EXTENSIONS]
    if not images:
        return None
    if len(images) > 1:
        raise UserError(
            f"{shard}, member {images[1].name}: its sample has another image, {images[0].name}; "
            "keep one of them"
        )
    texts = {
        extension: _text(shard, file, by_extension[extension])
        for extension in _TEXTS
        if extension in by_extension
    }
    columns = _columns(shard, by_extension["json"], texts["json"]) if "json" in texts else {}
    found = (texts.get("cls"), columns.get("label"), texts.get("txt"))
    label = next((text for text in found if text is not None), None)
    return _Sample(
        images[0].name,
        images[0].offset_data,
        images[0].size,
        None if label is None else str(label).strip(),
        {name: columns[name] for name in OPTIONAL if columns.get(name) is not None},
    )


def _text(shard: Path, file: BinaryIO, member: tarfile.TarInfo) -> str:
    if member.size > _MAX_LABEL:
        raise UserError(f"{shard}, member {member.name}: {member.size} bytes are no label")
    try:
        return _read(file, member.offset_data, member.size).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{shard}, member {member.name}: it is no text ({error})") from None


def _columns(shard: Path, member: tarfile.TarInfo, text: str) -> dict[str, Any]:
    try:
        columns = json.loads(text)
        if isinstance(columns, dict) and not isinstance(columns.get("label"), dict | list):
            return {str(ALIASES.get(name, name)): value for name, value in columns.items()}
        reason = "or its label is no text or number"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise UserError(f"{shard}, member {member.name}: it holds no JSON object ({reason})")
