import json

import pytest

from configs import glyphs
from dml_jax.training import workdir
from dml_jax.training.writer import Writer


def test_a_run_of_another_configuration_is_refused_with_every_difference(tmp_path):
    workdir.claim(tmp_path, glyphs.get_config("ps"))
    other = glyphs.get_config("baseline")
    other.seed = 3
    with pytest.raises(ValueError) as error:
        workdir.check(tmp_path, other)
    assert "config.seed: 0 there, 3 now" in str(error.value)
    assert "config.proxy_synthesis.ratio: 1.0 there, 0.0 now" in str(error.value)


def test_the_same_configuration_is_accepted_again(tmp_path):
    workdir.claim(tmp_path, glyphs.get_config("ps_memvir"))
    workdir.check(tmp_path, glyphs.get_config("ps_memvir"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds files but no config.json"):
        workdir.check(tmp_path, glyphs.get_config())


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        workdir.read_config(tmp_path)


def test_lines_behind_the_step_of_a_resumed_run_are_dropped(tmp_path):
    path = tmp_path / workdir.METRICS
    lines = [{"step": step, "epoch": step, "loss": 1.5} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ep')
    with Writer(tmp_path, step=2, total_steps=9, batch_size=1) as writer:
        writer.epoch(
            {"step": 3, "epoch": 3, "loss": 0.5},
            {"step": 3, "epoch": 3, "images_per_second": 1.0},
        )
    assert [line["loss"] for line in workdir.read_lines(path)] == [1.5, 1.5, 0.5]
