import numpy as np
import pytest

from dml_jax.evaluation import embedding_files

pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


def save(path):
    rng = np.random.default_rng(0)
    arrays = {
        "embeddings": rng.standard_normal((5, 3)).astype(np.float32),
        "labels": np.array([2, 0, 0, 2, 2], np.int32),
        "names": ["a/é.png", "b", "c", "d", "e"],
        "class_names": ["z", "without images", "a"],
    }
    embedding_files.save_embeddings(path, **arrays)
    return arrays


def test_parquet_keeps_what_npz_keeps(tmp_path):
    save(tmp_path / "x.npz")
    save(tmp_path / "x.parquet")
    ours = embedding_files.load_embeddings(tmp_path / "x.parquet")
    theirs = embedding_files.load_embeddings(tmp_path / "x.npz")
    for name in ("embeddings", "labels"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert ours[2:] == theirs[2:]
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".part"] == []


def test_other_programs_read_the_columns(tmp_path):
    arrays = save(tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["name", "class", "label", "embedding"]
    assert table["class"].to_pylist() == ["a", "z", "z", "a", "a"]
    np.testing.assert_array_equal(table["embedding"].to_pylist(), arrays["embeddings"])


def test_other_files_are_rejected(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="not a Parquet file of embeddings"):
        embedding_files.load_embeddings(tmp_path / "x.parquet")
    save(tmp_path / "y.parquet")
    table = pq.read_table(tmp_path / "y.parquet")
    for other in (table.drop_columns("label"), table.replace_schema_metadata({})):
        pq.write_table(other, tmp_path / "x.parquet")
        with pytest.raises(ValueError, match="not a Parquet file of embeddings"):
            embedding_files.load_embeddings(tmp_path / "x.parquet")
    with pytest.raises(FileNotFoundError, match="no embeddings file"):
        embedding_files.load_embeddings(tmp_path / "nothing.parquet")
