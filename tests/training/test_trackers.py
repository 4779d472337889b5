import importlib
import io
import json
import os
import re
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dml_jax import data
from dml_jax.training import resume, run, run_directory, trackers
from dml_jax.training.config import parse
from dml_jax.training.trackers import composite, examples, projector
from dml_jax.training.trackers.jsonl import JsonlTracker
from dml_jax.training.trackers.mlflow import MlflowTracker
from dml_jax.training.trackers.tensorboard import TensorBoardTracker
from dml_jax.training.trackers.wandb import WandbTracker
from tests.helpers import tiny


@pytest.fixture
def images(tmp_path):
    return tiny.write_images(tmp_path / "images")


@pytest.fixture
def config(images):
    return tiny.config(images)


@pytest.fixture
def folder(config, tmp_path):
    resume.claim(tmp_path / "run", parse(config))
    return tmp_path / "run"


def epoch(number, loss=0.5):
    metrics = {"step": number, "epoch": number, "loss": loss}
    scores = {"recall@1": 0.75, "r_precision": 0.5, "map@r": 0.25}
    return metrics | scores, {"step": number, "epoch": number, "images_per_second": 123.0}


class Recorder(trackers.Tracker):
    def __init__(self, name, log):
        self.name, self.log = name, log

    def epoch(self, metrics, timings):
        self.log.append((self.name, metrics["epoch"]))

    def close(self, failed):
        self.log.append((self.name, "failed" if failed else "finished"))


def test_trackers_are_called_in_order_and_closed_in_reverse():
    log = []
    with trackers.Trackers([lambda: Recorder("a", log), lambda: Recorder("b", log)]) as both:
        both.step(1, loss=0.5, learning_rate=0.1)
        both.epoch(*epoch(1))
    assert log == [("a", 1), ("b", 1), ("b", "finished"), ("a", "finished")]


def test_a_tracker_that_cannot_be_opened_closes_the_others():
    log = []
    with pytest.raises(ValueError, match="refused"):
        trackers.Trackers([lambda: Recorder("a", log), lambda: refuse(ValueError("refused"))])
    assert log == [("a", "failed")]


def test_an_exception_closes_all_trackers_as_failed():
    log = []
    with pytest.raises(KeyError), trackers.Trackers([lambda: Recorder("a", log)]):
        raise KeyError
    assert log == [("a", "failed")]


def test_without_the_package_a_run_is_refused_before_anything_is_written(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(composite, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        named = config.copy_and_resolve_references()
        named[name] = "letters"
        message = rf"config.{name} needs the package {name}.*dml_jax\[{name}\]"
        with pytest.raises(ModuleNotFoundError, match=message):
            run.train(named, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("room, file", [(10, "metrics.jsonl"), (300, "")])
def test_an_error_on_a_full_disk_has_the_path(config, folder, room, file):
    path = re.escape(str(folder / file).rstrip("/"))
    # The terminal may be a file, too.
    openers = [
        lambda: JsonlTracker(folder, step=0),
        lambda: TensorBoardTracker(folder, step=0),
    ]
    with (
        pytest.raises(OSError, match=f"File too large: '{path}'"),
        trackers.Trackers(openers) as both,
        tiny.full_disk(room),
    ):
        for number in range(1, 9):
            both.epoch(*epoch(number))


def refuse(error):
    raise error


def test_wandb_records_a_run_and_a_resumed_run_is_the_same_one(folder, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 39 + "7")
    for number in (1, 2):
        tracker = WandbTracker(folder, project="letters")
        tracker.epoch(*epoch(number))
        tracker.close(failed=False)
    wandb.teardown()  # It writes in a process of its own, which otherwise ends with this one.
    identity = json.loads((folder / run_directory.WANDB).read_text())["id"]
    records = sorted(folder.glob(f"wandb/offline-run-*/run-{identity}.wandb"))
    assert len(records) == len(list(folder.glob("wandb/offline-run-*"))) == 2
    for record in records:
        recorded = record.read_bytes()
        assert b"letters" in recorded and b"map@r" in recorded and b"123" in recorded
        assert b"learning_rate" in recorded  # A setting.
    key = os.environ["WANDB_API_KEY"].encode()
    assert not any(key in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_an_error_of_wandb_is_a_user_error(folder, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    error = wandb.errors.UsageError("No API key configured")
    monkeypatch.setattr(wandb, "init", lambda **_: refuse(error))
    with pytest.raises(ValueError, match="No API key configured\n.*WANDB_MODE=offline"):
        WandbTracker(folder, project="letters")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_run_may_be_resumed_with_or_without_a_tracker(config, tmp_path, name):
    config[name] = "letters"
    resume.claim(tmp_path / "run", parse(config))
    config[name] = ""
    resume.check(tmp_path / "run", parse(config))


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow with its runs in files."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    return pytest.importorskip("mlflow", reason="the extra mlflow is not installed")


def test_mlflow_records_each_epoch_once_in_one_run(config, folder, mlflow):
    tracker = MlflowTracker(folder, experiment="letters")
    tracker.epoch(*epoch(1))
    tracker.epoch(*epoch(2, loss=0.4))
    tracker.close(failed=True)
    client = mlflow.MlflowClient()
    run_id = json.loads((folder / run_directory.MLFLOW).read_text())["id"]
    assert client.get_run(run_id).info.status == "FAILED"

    # The checkpoint of the second epoch was not written.
    tracker = MlflowTracker(folder, experiment="letters")
    assert client.get_run(run_id).info.status == "RUNNING"
    tracker.epoch(*epoch(2, loss=0.4))
    tracker.epoch(*epoch(3, loss=0.3))
    tracker.close(failed=False)

    (experiment,) = client.search_experiments(filter_string="name = 'letters'")
    (recorded,) = client.search_runs([experiment.experiment_id])
    assert recorded.info.run_id == run_id
    assert (recorded.info.status, recorded.info.run_name) == ("FINISHED", "run")
    losses = client.get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in losses] == [(1, 0.5), (2, 0.4), (3, 0.3)]
    last = {"epoch": 3, "loss": 0.3, "recall_at_1": 0.75, "r_precision": 0.5, "map_at_r": 0.25}
    assert recorded.data.metrics == last | {"images_per_second": 123.0}
    rate = recorded.data.params["optimizer.learning_rate"]
    assert rate == str(config.optimizer.learning_rate)


def test_another_mlflow_experiment_gets_a_new_run(folder, mlflow):
    for experiment in ("letters", "digits"):
        MlflowTracker(folder, experiment=experiment).close(failed=False)
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'digits'")
    (recorded,) = client.search_runs([experiment.experiment_id])
    known = json.loads((folder / run_directory.MLFLOW).read_text())
    assert known == {"experiment": "digits", "id": recorded.info.run_id}


def test_an_error_of_mlflow_at_the_start_is_a_user_error(folder, mlflow):
    (folder / run_directory.MLFLOW).write_text('{"experiment": "letters", "id": "f00"}')
    with pytest.raises(ValueError, match="f00.*\n.*MLFLOW_TRACKING_URI.*mlflow.json"):
        MlflowTracker(folder, experiment="letters")


def test_an_error_of_mlflow_later_is_a_warning(folder, mlflow, monkeypatch, caplog):
    tracker = MlflowTracker(folder, experiment="letters")
    error = mlflow.MlflowException("the server is down")
    for method in ("log_batch", "set_terminated"):
        monkeypatch.setattr(mlflow.MlflowClient, method, lambda *_, **__: refuse(error))
    tracker.epoch(*epoch(1))
    tracker.close(failed=False)
    assert caplog.text.count("the server is down") == 2


def read_events(folder):
    """The events of all event files, in TensorBoard's order."""
    events = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def scalars(events):
    return [
        (event.step, value.tag, value.simple_value)
        for event in events
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def pictures(events):
    return {
        (event.step, value.tag): np.asarray(
            Image.open(io.BytesIO(value.image.encoded_image_string))
        )
        for event in events
        for value in event.summary.value
        if value.HasField("image")
    }


def test_tensorboard_gets_scalars_and_a_resumed_run_hides_later_events(tmp_path):
    for start in (0, 2):
        tracker = TensorBoardTracker(tmp_path, step=start)
        tracker.epoch(*epoch(start + 1))
        tracker.close(failed=False)
    events = read_events(tmp_path)
    # "@" is not among the characters of a tag.
    names = ["loss", "recall_1", "r_precision", "map_r", "images_per_second"]
    assert scalars(events) == [
        (step, *scalar)
        for step in (1, 3)
        for scalar in zip(names, (0.5, 0.75, 0.5, 0.25, 123.0), strict=True)
    ]
    started = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert started == [1, 3]


def embedded(count, dim=3):
    """Embeddings of which neighbours are neighbours."""
    angles = np.linspace(0, 1, count)
    return np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1).astype(np.float32)


def frames(strip):
    """The colours of the frames, in the middle of their left sides."""
    side = strip.shape[0]
    colours = strip[side // 2, 1::side].astype(int)
    names = {"white": (255, 255, 255), "green": (0, 160, 0), "red": (220, 0, 0)}
    distances = [[abs(colour - c).sum() for c in names.values()] for colour in colours]
    assert np.min(distances, axis=1).max() < 30
    return [list(names)[index] for index in np.argmin(distances, axis=1)]


def test_example_queries_have_green_frames_around_correct_neighbours(images, tmp_path):
    sources = data.create("folder", root=images)
    tracker = TensorBoardTracker(tmp_path, step=0)
    tracker.evaluation(8, sources, {"test": embedded(24)})
    tracker.close(failed=False)
    drawn = pictures(read_events(tmp_path))
    assert sorted(drawn) == [(8, f"queries/{number}") for number in range(8)]
    # The first image's neighbours are the other five of its class. The fourth of the next class
    # (9 of 24) is among 7 and 8, 10 and 11, and with the same distance 6 and 12.
    assert frames(drawn[8, "queries/0"]) == ["white"] + ["green"] * 5
    assert frames(drawn[8, "queries/3"])[:5] == ["white"] + ["green"] * 4
    assert frames(drawn[8, "queries/2"])[:3].count("red") == 1
    # The first tile is the query.
    tile = drawn[8, "queries/3"][4:-4, 4:100].mean((0, 1))
    np.testing.assert_allclose(tile, data.decode(sources["test"][9], "").mean((0, 1)), atol=3)


def test_example_queries_are_looked_up_in_the_gallery(images):
    made = data.create("folder", root=images)
    sources = {"test": made["test"], "gallery": made["train"]}
    embeddings = {"test": embedded(24), "gallery": embedded(36)[::-1]}
    (first, *_) = examples.strips(sources, embeddings)
    tiles = [first[4:-4, left : left + 96] for left in range(4, 6 * 104, 104)]
    expected = [("test", 0), ("gallery", 35), ("gallery", 34)]
    for tile, (split, index) in zip(tiles, expected, strict=False):
        np.testing.assert_array_equal(tile, examples.thumbnail(sources[split], index, 96))


def test_few_images_have_few_neighbours(images):
    source = data.create("folder", root=images)["test"]
    few = data.Source(source.records[:3], source.labels[:3], source.class_names, source.names[:3])
    drawn = examples.strips({"test": few}, {"test": embedded(3)})
    assert [strip.shape for strip in drawn] == [(104, 3 * 104, 3)] * 3


def test_an_example_that_cannot_be_read_is_a_warning(images, tmp_path, caplog):
    sources = data.create("folder", root=images)
    os.remove(sources["test"].records[9])
    tracker = TensorBoardTracker(tmp_path, step=0)
    tracker.evaluation(8, sources, {"test": embedded(24)})
    tracker.close(failed=False)
    assert "no example queries after step 8" in caplog.text
    assert not pictures(read_events(tmp_path))
    projector.write(tmp_path, sources["test"], embedded(24))
    assert "the embedding projector shows no images" in caplog.text
    assert "sprite" not in (tmp_path / run_directory.PROJECTOR_CONFIG).read_text()


def test_a_full_disk_ends_an_evaluation_with_an_error(images, tmp_path):
    sources = data.create("folder", root=images)
    tracker = TensorBoardTracker(tmp_path, step=0)
    with pytest.raises(OSError, match="File too large"), tiny.full_disk(20_000):
        tracker.evaluation(8, sources, {"test": embedded(24)})
    tracker.close(failed=True)


def test_the_projector_gets_evenly_spaced_images(images, tmp_path, monkeypatch):
    monkeypatch.setattr(projector, "IMAGES", 6)
    source = data.create("folder", root=images)["test"]
    projector.write(tmp_path, source, embedded(24))
    config = (tmp_path / run_directory.PROJECTOR_CONFIG).read_text()
    tensors, metadata = (
        (tmp_path / re.search(f'{name}_path: "(.*)"', config)[1]).read_text().splitlines()
        for name in ("tensor", "metadata")
    )
    chosen = [0, 4, 8, 12, 16, 20]
    rows = [[float(cell) for cell in line.split("\t")] for line in tensors]
    np.testing.assert_allclose(rows, embedded(24)[chosen], rtol=1e-5)
    assert metadata[0] == "class\timage"
    assert metadata[1:] == [f"class{n // 6}\t{source.names[n]}" for n in chosen]
    sprite = Image.open(tmp_path / re.search('image_path: "(.*?)"', config)[1])
    assert sprite.size == (3 * 48, 3 * 48)  # The smallest square of thumbnails that has six.
    fifth = np.asarray(sprite)[48:96, 48:96].mean((0, 1))
    np.testing.assert_allclose(fifth, data.decode(source[16], "").mean((0, 1)), atol=3)


def test_a_run_shows_its_evaluations_and_its_last_embeddings(images, tmp_path):
    config = tiny.config(images, evaluation__every_epochs=2)
    run.train(config, tmp_path / "new")
    drawn = pictures(read_events(tmp_path / "new"))
    assert {step for step, _ in drawn} == {8, 12} and len(drawn) == 16
    tensors = tmp_path / "new" / run_directory.PROJECTOR / "tensors.tsv"
    assert np.loadtxt(tensors).shape == (24, 16)


def test_no_tracker_package_is_imported_before_it_is_needed():
    for name in ("wandb", "mlflow"):
        module = importlib.import_module(f"dml_jax.training.trackers.{name}")
        assert not hasattr(module, name)
