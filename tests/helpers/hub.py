"""The Hugging Face hub's cache on disk, as a download of a data set leaves it, and its files."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONVERTED = "89abcdef0123456789abcdef0123456789abcdef"


def snapshot(name, *, revision="main", commit=COMMIT):
    """Returns the folder of a new or existing snapshot of somebody/NAME in the hub's cache."""
    repository = Path(constants.HF_HUB_CACHE) / f"datasets--somebody--{name}"
    (repository / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_parquet(path, columns, *, images="image", classes=None):
    """Writes a Parquet file as the `datasets` library does.

    Args:
        path: the file.
        columns: values by column; those of `images` are encoded images.
        images: name of the column that becomes structs of bytes and path.
        classes: names of the numbered classes by column.
    """
    features = {images: {"_type": "Image"}} | {
        name: {"names": list(names), "_type": "ClassLabel"}
        for name, names in (classes or {}).items()
    }
    for name in columns.keys() - features.keys():
        features[name] = {"dtype": "string", "_type": "Value"}
    structs = [{"bytes": image, "path": None} for image in columns[images]]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    made = pyarrow.table(columns | {images: pyarrow.array(structs, kind)})
    about = json.dumps({"info": {"features": features}})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        made.replace_schema_metadata({"huggingface": about}), path, row_group_size=5
    )
