import pytest

from dml_jax._utils import files


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_appears_when_it_is_complete(before, tmp_path):
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with files.atomic_write(path) as part:
        part.write_text("new")
        assert path.exists() == (before is not None)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep_part", [False, True])
def test_an_error_leaves_the_file_unchanged(keep_part, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), files.atomic_write(path, keep_part=keep_part) as part:
        part.write_text("new")
        raise KeyError
    assert path.read_text() == "old"
    assert part.exists() == keep_part


def test_a_folder_appears_when_it_is_complete_and_replaces_what_a_killed_process_left(tmp_path):
    folder = tmp_path / "out"
    (tmp_path / f"out{files.PART_SUFFIX}").mkdir()
    (tmp_path / f"out{files.PART_SUFFIX}" / "leftover").touch()
    folder.mkdir()
    with files.atomic_write(folder) as part:
        (part / "inner").mkdir(parents=True)
        (part / "inner" / "a.txt").write_text("new")
        assert not any(folder.iterdir())
    assert [path.name for path in folder.rglob("*")] == ["inner", "a.txt"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_with_files_is_not_replaced(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(OSError, match="not empty"), files.atomic_write(folder) as part:
        part.mkdir()
    assert list(tmp_path.rglob("*")) == [folder, folder / "precious"]


def test_json_lines_without_an_incomplete_last_one(tmp_path):
    path = tmp_path / "a.jsonl"
    assert files.read_json_lines(path) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert files.read_json_lines(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl is damaged"):
        files.read_json_lines(path)
