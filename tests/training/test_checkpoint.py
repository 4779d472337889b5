import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from dml_jax.training import checkpoint, integrity, run_directory
from tests.helpers import tiny

SCORES = {"recall@1": 0.5, "r_precision": 0.5, "map@r": 0.5}
STATE = {"x": jax.numpy.asarray(np.random.default_rng(0).normal(size=(40, 50)), "float32")}
LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with checkpoint.Checkpoints(folder, keep_last=2) as checkpoints:
        for step, scores in ((1, SCORES), (2, None), (3, SCORES)):
            checkpoints.save(step, STATE, scores)
    return folder


def steps(folder):
    return sorted(int(path.name) for path in (folder / run_directory.CHECKPOINTS).iterdir())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def unreadable(path):
    """Makes reads of a file fail with an input/output error, as on a failing disk."""
    path.unlink()
    path.symlink_to("/proc/self/mem" if sys.platform == "linux" else path)


def test_checkpoints_at_an_interval_are_kept_and_found_by_their_step(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep_last=1, keep_every=4) as checkpoints:
        for step in range(2, 15, 2):
            state = jax.tree.map(lambda x, step=step: x + step, STATE)
            checkpoints.save(step, state, SCORES | {"map@r": 1 / step})
    assert steps(tmp_path) == [2, 4, 8, 12, 14]
    step, found = checkpoint.read(tmp_path, "step8", LIKE)
    assert step == 8
    chex.assert_trees_all_equal(found, jax.tree.map(lambda x: x + 8, STATE))
    assert checkpoint.read(tmp_path, "last", LIKE)[0] == 14
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 6, but of 2, 4, 8, 12, 14"):
        checkpoint.read(tmp_path, "step6", LIKE)
    for name in ("epoch8", "step", "step-8", "step8.tmp", "../step8", "best"):
        with pytest.raises(ValueError, match="must be last, best_map, best_r1, best_rp, or step"):
            checkpoint.read(tmp_path, name, LIKE)


DAMAGES = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "missing": lambda path: path.unlink(),
    "unreadable": unreadable,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damaged_file_is_detected_and_the_newest_intact_checkpoint_is_used(
    saved, tmp_path, damage, caplog
):
    names = [
        path.relative_to(saved)
        for path in (saved / run_directory.CHECKPOINTS / "3").glob("*/**/*")
        if path.is_file()
    ]
    assert len(names) > 8
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        DAMAGES[damage](folder / name)
        with (
            pytest.raises(ValueError, match="is damaged"),
            checkpoint.Checkpoints(folder) as checkpoints,
        ):
            checkpoints.restore(3, LIKE)
        assert steps(folder) == [2, 3]  # A reader changes nothing.
        caplog.clear()
        with checkpoint.Checkpoints(folder, keep_last=2) as checkpoints:
            assert checkpoints.latest == 2
            chex.assert_trees_all_equal(checkpoints.restore(2, LIKE), STATE)
        assert (
            name.name in caplog.text and "newest intact checkpoint is that of step 2" in caplog.text
        )
        assert steps(folder) == [2]
        assert (folder / run_directory.DAMAGED / "3").is_dir()


@pytest.mark.parametrize("when", ["before its check", "after its check"])
def test_a_reader_retries_when_the_run_deletes_the_checkpoint(saved, tmp_path, monkeypatch, when):
    folder, check = tmp_path / "run", integrity.damage
    shutil.copytree(saved, folder)
    checkpoints, checked = folder / run_directory.CHECKPOINTS, []

    def damage(path):
        found = check(path)
        checked.append(int(path.name))
        if checked == [3]:
            shutil.copytree(checkpoints / "3", checkpoints / "4")
            shutil.rmtree(checkpoints / "3")
        return found if when == "after its check" else check(path)

    monkeypatch.setattr(integrity, "damage", damage)
    step, state = checkpoint.read(folder, "last", LIKE)
    assert step == 4 and checked == [3, 4]
    chex.assert_trees_all_equal(state, STATE)
    flip(next((checkpoints / "4").glob("state/d/*")))
    with pytest.raises(ValueError, match="4 is damaged: .* move it elsewhere, and the next best"):
        checkpoint.read(folder, "last", LIKE)
    shutil.move(checkpoints / "4", tmp_path)
    assert checkpoint.read(folder, "last", LIKE)[0] == 2


def test_no_intact_checkpoint_is_deleted_in_favour_of_a_damaged_one(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    flip(next((folder / run_directory.CHECKPOINTS / "3").glob("state/d/*")))
    # If 3 counted as one of the latest two, 2 would be deleted.
    with checkpoint.Checkpoints(folder, keep_last=2) as checkpoints:
        checkpoints.save(4, STATE, SCORES)
    assert steps(folder) == [2, 4]


@pytest.mark.parametrize("deleted", ["digests.json", "state/manifest.ocdbt"])
def test_an_interrupted_deletion_is_finished(saved, tmp_path, deleted):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (folder / run_directory.CHECKPOINTS / "2" / deleted).unlink()
    with checkpoint.Checkpoints(folder, keep_last=2) as checkpoints:
        assert checkpoints.latest == 3
    assert steps(folder) == [3]
    assert not (folder / run_directory.DAMAGED).exists()


def test_nothing_is_changed_if_no_checkpoint_is_intact(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    for step in (2, 3):
        (folder / run_directory.CHECKPOINTS / str(step) / "digests.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* is intact.*\n.*step 2: digests.json"):
        checkpoint.Checkpoints(folder, keep_last=2)
    assert steps(folder) == [2, 3]


def test_a_full_disk_fails_the_save_and_keeps_earlier_checkpoints(saved, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    large = {"x": jax.numpy.asarray(np.random.default_rng(1).normal(size=(400, 500)), "float32")}
    with (
        tiny.full_disk(100_000),
        pytest.raises(OSError, match="checkpoint of step 4 could not be written; earlier ones"),
        checkpoint.Checkpoints(folder, keep_last=1) as checkpoints,
    ):
        checkpoints.save(4, large, SCORES)
    with checkpoint.Checkpoints(folder, keep_last=1) as checkpoints:
        assert checkpoints.latest == 3
        chex.assert_trees_all_equal(checkpoints.restore(3, LIKE), STATE)
        checkpoints.save(4, large, SCORES)
    assert steps(folder) == [4]
    assert not caplog.text  # The error alone reports it.


def test_saves_leave_no_threads(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep_last=1) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, STATE, SCORES)
        # Each save has its own event loop in a thread; the last one may still be running.
        loops = [thread for thread in threading.enumerate() if "_run_loop" in thread.name]
    assert len(loops) <= 2


def test_a_checkpoint_directory_without_write_permission_is_reported(saved):
    # Root may write everywhere, so it becomes another user, who may not read pytest's folders.
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as open_to_all:
        folder = Path(open_to_all, "run")
        shutil.copytree(saved, folder)
        folder.parent.chmod(0o755)
        (folder / run_directory.CHECKPOINTS).chmod(0o555)
        with pytest.raises(OSError, match="ermission denied"):
            os.seteuid(user or 65534)
            try:
                with checkpoint.Checkpoints(folder, keep_last=2) as checkpoints:
                    checkpoints.save(4, STATE, SCORES)
            finally:
                os.seteuid(user)
        (folder / run_directory.CHECKPOINTS).chmod(0o755)
        assert steps(folder) == [2, 3]
