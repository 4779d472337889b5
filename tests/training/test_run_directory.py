import json
import os

import pytest

from dml_jax import data
from dml_jax._utils import files
from dml_jax.configs import folder, glyphs
from dml_jax.training import fork, resume, run_directory, variants
from dml_jax.training.config import parse
from dml_jax.training.trackers.jsonl import JsonlTracker
from tests.helpers import tiny


def test_a_different_configuration_is_refused_with_every_difference(tmp_path):
    resume.claim(tmp_path, parse(glyphs.get_config("ps")))
    other = glyphs.get_config("baseline")
    other.seed = 3
    with pytest.raises(ValueError) as error:
        resume.check(tmp_path, parse(other))
    assert "config.seed: 0 before, 3 now" in str(error.value)
    assert "config.proxy_synthesis.ratio: 3.0 before, 0.0 now" in str(error.value)


def test_the_same_configuration_is_accepted_again(tmp_path):
    resume.claim(tmp_path, parse(glyphs.get_config("ps_memvir")))
    resume.check(tmp_path, parse(glyphs.get_config("ps_memvir")))


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds files but no config.json"):
        resume.check(tmp_path, parse(glyphs.get_config()))


def test_a_folder_without_a_run_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        run_directory.read_config(tmp_path)


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / run_directory.METRICS
    lines = [{"step": step, "epoch": step, "loss": 1.5} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ep')
    tracker = JsonlTracker(tmp_path, step=2)
    tracker.epoch(
        {"step": 3, "epoch": 3, "loss": 0.5},
        {"step": 3, "epoch": 3, "images_per_second": 1.0},
    )
    tracker.close(failed=False)
    assert [line["loss"] for line in files.read_json_lines(path)] == [1.5, 1.5, 0.5]


def changed(**settings):
    config = folder.get_config("ps")
    config.data.root = "/images"
    for path, value in settings.items():
        if path == "loss.name":  # The hyper-parameters change too.
            config = folder.get_config(f"ps_{value}")
            config.data.root = "/images"
        else:
            config.update_from_flattened_dict({path: value})
    return config


RESUMABLE = {
    "epochs": 9,
    "evaluation.every_epochs": 7,
    "evaluation.patience": 3,
    "checkpoint.keep_last": 5,
    "data.num_workers": 1,
    "data.cache": "host",
    "data.cache_size": 64,
    "data.root": "/elsewhere",
    "model.remat": True,
    "skip_nonfinite": 2,
    "wandb": "letters",
    "mlflow": "letters",
}


@pytest.mark.parametrize("name", RESUMABLE)
def test_settings_that_do_not_affect_steps_may_change_and_are_recorded(tmp_path, name, caplog):
    resume.claim(tmp_path, parse(changed()))
    (tmp_path / run_directory.RESULT).write_text("{}")
    config = changed(**{name: RESUMABLE[name]})
    (difference,) = resume.check(tmp_path, parse(config))
    assert difference.startswith(f"config.{name}: ") and difference.endswith(
        f" {RESUMABLE[name]!r} now"
    )
    resume.claim(tmp_path, parse(config))
    assert difference in caplog.text
    assert resume.check(tmp_path, parse(config)) == []
    assert not (tmp_path / run_directory.RESULT).exists()


FIXED = {
    "seed": 1,
    "batch_size": 4,
    "micro_batches": 2,
    "model.dim": 8,
    "memvir.num_steps": 3,
    "memvir.step_gap": 1,
    "optimizer.learning_rate": 1.0,
    "proxy_synthesis.ratio": 0.5,
    "data.image_size": 24,
    "data.unreadable": "skip",
    "data.validation_classes": 0.5,
    "data.cache": "device",
    "loss.name": "proxy_nca",
    "loss.scale": 7.0,
    "model.width": 8,
}


@pytest.mark.parametrize("name", FIXED)
def test_settings_that_affect_steps_may_not_change(tmp_path, name):
    resume.claim(tmp_path, parse(changed()))
    with pytest.raises(ValueError, match=rf"another configuration.*\n  config\.{name}: "):
        resume.check(tmp_path, parse(changed(**{name: FIXED[name]})))


def test_the_size_of_images_cached_on_the_device_may_not_change(tmp_path):
    resume.claim(tmp_path, parse(changed(**{"data.cache": "device"})))
    with pytest.raises(ValueError, match=r"config\.data\.cache_size: 320 before, 200 now"):
        resume.check(tmp_path, parse(changed(**{"data.cache": "device", "data.cache_size": 200})))


def test_micro_batches_may_change_if_batch_norm_is_frozen(tmp_path):
    frozen = {"model.freeze_bn": True, "micro_batches": 2}
    resume.claim(tmp_path, parse(changed(**frozen)))
    (difference,) = resume.check(tmp_path, parse(changed(**frozen | {"micro_batches": 1})))
    assert difference == "config.micro_batches: 2 before, 1 now"


def test_a_finished_run_is_resumed_only_if_it_may_train_longer(tmp_path):
    resume.claim(tmp_path, parse(changed(epochs=5)))
    result = {"last": {"epoch": 5}}
    files.write_json(tmp_path / run_directory.RESULT, result)
    assert resume.finished(tmp_path, parse(changed(epochs=5))) == result
    assert resume.finished(tmp_path, parse(changed(epochs=3))) == result
    assert resume.finished(tmp_path, parse(changed(epochs=6))) is None
    # The run stopped early.
    files.write_json(tmp_path / run_directory.RESULT, {"last": {"epoch": 4}})
    assert resume.finished(tmp_path, parse(changed(epochs=5))) is not None
    longer = changed(**{"epochs": 5, "evaluation.patience": 9})
    assert resume.finished(tmp_path, parse(longer)) is None


def test_a_finished_run_reports_settings_without_effect(tmp_path, caplog):
    resume.claim(tmp_path, parse(changed(epochs=5)))
    result = {"last": {"epoch": 5}}
    files.write_json(tmp_path / run_directory.RESULT, result)
    assert resume.finished(tmp_path, parse(changed(epochs=5))) == result and not caplog.text
    late = {"epochs": 3, "evaluation.nmi": True, "evaluation.recall_at": (1, 2), "wandb": "w"}
    assert resume.finished(tmp_path, parse(changed(**late))) == result
    for name in late:
        assert f"finished; the change has no effect: config.{name}: " in caplog.text
    assert "use scripts/evaluate.py to score" in caplog.text
    assert run_directory.read_config(tmp_path).epochs == 5


def test_a_write_error_has_the_path(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("{}")
    with (
        tiny.full_disk(100),
        pytest.raises(OSError, match=f"File too large: '{path}'"),
    ):
        files.write_text(path, "x" * 101)
    assert path.read_text() == "{}"
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match="mine"), files.errors_with_path(path):
        raise ValueError("mine")


def test_different_images_are_refused(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    folder = tmp_path / "run"
    folder.mkdir()
    recorded = run_directory.fingerprints(data.create("folder", root=images))
    files.write_json(folder / run_directory.IMAGES, {"train": "left by a killed run"})
    resume.check_images(folder, recorded)
    resume.claim(folder, parse(glyphs.get_config()), recorded)
    moved = images.rename(tmp_path / "elsewhere")
    same = run_directory.fingerprints(data.create("folder", root=moved))
    assert same == recorded
    resume.check_images(folder, same)
    file = moved / "train" / "class1" / "2.png"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(
        ValueError, match=r"another set of images.*\n  images.train.digest"
    ) as error:
        resume.check_images(folder, run_directory.fingerprints(data.create("folder", root=moved)))
    assert "images.test" not in str(error.value)
    file.unlink()
    with pytest.raises(ValueError, match="images.train.images: 36 before, 35 now"):
        resume.check_images(folder, run_directory.fingerprints(data.create("folder", root=moved)))


def test_a_run_directory_is_locked_by_one_process(tmp_path):
    with (
        run_directory.locked(tmp_path / "run"),
        pytest.raises(ValueError, match=rf"another process is training.*process {os.getpid()}"),
        run_directory.locked(tmp_path / "run"),
    ):
        pass
    with run_directory.locked(tmp_path / "run"):
        resume.check(tmp_path / "run", parse(glyphs.get_config()))


def test_the_origin_of_a_fork_is_recorded(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    assert fork.forked_from(new, old) == str(old)
    resume.claim(new, parse(glyphs.get_config()), fork_from=str(old))
    assert fork.forked_from(new, None) == str(old)
    assert fork.forked_from(new, old) == str(old)
    with pytest.raises(ValueError, match="forked from .*old, not from .*other"):
        fork.forked_from(new, tmp_path / "other")
    resume.claim(old, parse(glyphs.get_config()))
    with pytest.raises(ValueError, match="forked from None"):
        fork.forked_from(old, new)


def test_the_origin_is_that_of_the_current_settings(tmp_path):
    origin = variants.origin_of("folder", "ps", {}, {"epochs": 5})
    resume.claim(tmp_path, parse(changed(epochs=5)), origin=origin)
    resume.claim(tmp_path, parse(changed(epochs=5)))
    assert run_directory.read_origin(tmp_path) == origin
    longer = origin._replace(overrides={"epochs": 6})
    resume.claim(tmp_path, parse(changed(epochs=6)), origin=longer)
    assert run_directory.read_origin(tmp_path) == longer
    resume.claim(tmp_path, parse(changed(epochs=7)))  # Not from a config file.
    assert run_directory.read_origin(tmp_path) is None
