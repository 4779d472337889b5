import dataclasses

import pytest

from dml_jax.data.config import DataConfig
from dml_jax.data.splits import load_sources
from tests.helpers import tiny


def configured(root, **settings):
    return dataclasses.replace(DataConfig(), root=str(root), **settings)


def unsplit(root):
    """Moves the classes of the tiny images into one folder, where their names differ."""
    for split in ("train", "test"):
        for folder in (root / split).iterdir():
            folder.rename(root / f"{folder.name}_of_{split}")
        (root / split).rmdir()


def test_images_that_are_not_split_are_split_by_class(tmp_path, capsys):
    root = tiny.write_images(tmp_path / "images")
    with pytest.raises(ValueError, match="split_classes is 0.5, but the images are split already"):
        load_sources(configured(root, split_classes=0.5))
    unsplit(root)
    with pytest.raises(
        ValueError, match="not split .* config.data.split_classes=0.5 tests on half of them"
    ):
        load_sources(configured(root))
    sources = load_sources(configured(root, split_classes=0.4))
    assert capsys.readouterr().out.startswith("6 classes are trained on, and 4 tested: class")
    assert {name: len(x.class_names) for name, x in sources.items()} == {"train": 6, "test": 4}
    assert not set(sources["train"].class_names) & set(sources["test"].class_names)
    again = load_sources(configured(root, split_classes=0.4))
    assert again["test"].names == sources["test"].names

    # The same from a table without splits.
    rows = "".join(f"{x.relative_to(root)},{x.parent.name}\n" for x in sorted(root.rglob("*.png")))
    (root / "list.csv").write_text("path,label\n" + rows)
    listed = load_sources(configured(root / "list.csv", name="table", split_classes=0.4))
    assert listed["test"].names == sources["test"].names
    assert listed["train"].class_names == sources["train"].class_names
