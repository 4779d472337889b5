import json
import os

import pytest

from dml_jax.training import resume, run, run_directory, trackers
from dml_jax.training.config import parse
from tests.helpers import tiny


@pytest.fixture
def config(tmp_path):
    return tiny.config(tiny.write_images(tmp_path / "images"), wandb="letters")


def epoch(number):
    metrics = {"step": number, "epoch": number, "loss": 0.5}
    scores = {"recall@1": 0.75, "r_precision": 0.5, "map@r": 0.25}
    return metrics | scores, {"step": number, "epoch": number, "images_per_second": 123.0}


def test_weights_and_biases_is_told_and_a_resumed_run_is_the_same_one(
    config, tmp_path, monkeypatch
):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 39 + "7")
    folder = tmp_path / "run"
    resume.claim(folder, parse(config))
    for step in range(2):
        options = {"step": step, "total_steps": 2, "batch_size": 8, "wandb": config.wandb}
        with trackers.Writer(folder, **options) as open_writer:
            open_writer.epoch(*epoch(step + 1))
    wandb.teardown()  # It writes in a process of its own, which otherwise ends with this one.
    identity = json.loads((folder / run_directory.WANDB).read_text())["id"]
    records = sorted(folder.glob(f"wandb/offline-run-*/run-{identity}.wandb"))
    assert len(records) == len(list(folder.glob("wandb/offline-run-*"))) == 2
    for record in records:
        told = record.read_bytes()
        assert b"letters" in told and b"map@r" in told and b"123" in told
        assert b"learning_rate" in told  # Of the configuration.
    key = os.environ["WANDB_API_KEY"].encode()
    assert not any(key in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_what_weights_and_biases_refuses_is_told(config, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    resume.claim(tmp_path / "run", parse(config))
    with pytest.raises(ValueError, match="No API key configured\n.*WANDB_MODE=offline"):
        trackers.Writer(tmp_path / "run", step=0, total_steps=1, batch_size=8, wandb="letters")


def test_without_the_package_it_is_told_before_anything_is_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="config.wandb needs the package wandb"):
        run.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("room, file", [(10, "metrics.jsonl"), (300, "")])
def test_a_full_disk_is_told_with_the_path(tmp_path, room, file):
    path = str(tmp_path / file).rstrip("/")
    with (
        pytest.raises(OSError, match=f"File too large: '{path}'"),
        trackers.Writer(tmp_path, step=0, total_steps=9, batch_size=1) as open_writer,
        tiny.full_disk(room),
    ):
        for number in range(1, 9):
            open_writer.epoch(*epoch(number))
    assert all(opened.closed for opened in open_writer._files)


def test_a_run_may_go_on_with_or_without_weights_and_biases(config, tmp_path):
    resume.claim(tmp_path / "run", parse(config))
    config.wandb = ""
    resume.check(tmp_path / "run", parse(config))
