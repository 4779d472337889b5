import dataclasses
import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from dml_jax._utils import files, sharding
from dml_jax.data.prepare import DATA_SETS, prepare
from dml_jax.evaluation import embedding_files
from dml_jax.retrieval import collapse, evaluate
from dml_jax.training import builder, checkpoint, loop, nonfinite, resume, run_directory, step
from dml_jax.training.config import parse
from tests.helpers import public_data, tiny


@pytest.fixture
def images(tmp_path):
    return tiny.write_images(tmp_path / "images")


def start(config, folder):
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:2]))
    resume.check(folder, parse(config))
    resume.claim(folder, parse(config))
    return built


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(
            {"micro_batches": 2, "model__remat": True} | tiny.RESNET, marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_writes_all_its_files(settings, images, tmp_path, monkeypatch, caplog):
    chex.clear_trace_counter()
    monkeypatch.setattr(collapse, "_TOO_FLAT", 1000.0)
    monkeypatch.setattr(step, "train_step", chex.assert_max_traces(n=1)(step.train_step))
    folder = tmp_path / "run"
    config = tiny.config(images, "ps_memvir", **settings)
    built = start(config, folder)
    result = loop.train(built, folder)

    assert result == run_directory.read_result(folder)
    lines = files.read_json_lines(folder / run_directory.METRICS)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 4), (2, 8), (3, 12)]
    assert result["last"] == lines[-1]
    # The first epoch is the warm-up of the memory.
    assert ["memvir_cosine" in line for line in lines] == [False, True, True]
    # Classes join in steps 3 and 5 after the warm-up, of which an epoch has 4.
    assert [line["memvir_classes"] for line in lines] == [6, 12, 18]
    assert -1 <= lines[-1]["memvir_cosine"] < 1 and 0 <= lines[-1]["memvir_separation"] <= 1
    assert result["best"]["map@r"] == max(line["map@r"] for line in lines)
    assert result["images"] == {"train": 36, "test": 24}
    assert json.loads((folder / run_directory.CONFIG).read_text()) == json.loads(config.to_json())
    assert list(folder.glob("events.out.tfevents.*"))

    exported = embedding_files.load_embeddings(folder / run_directory.EMBEDDINGS)
    for name, value in collapse.spread(exported.embeddings)._asdict().items():
        assert lines[-1][name] == pytest.approx(value, abs=1e-6)
    assert caplog.text.count("the embeddings have collapsed") == len(lines)
    scores = evaluate(exported.embeddings, exported.labels)
    assert scores.items() <= result["last"].items()
    assert exported.names[0] == "test/class0/0.png"

    for name, metric in checkpoint.BEST.items():
        _, variables = checkpoint.read_network(built.network, folder, name)
        embeddings = built.evaluator.embed(variables, "test")
        assert built.evaluator.score(embeddings)[metric] == max(line[metric] for line in lines)


def test_the_loop_forbids_implicit_transfers(images, tmp_path, monkeypatch):
    built = start(tiny.config(images), tmp_path / "run")
    monkeypatch.setattr(sharding, "put_batch", lambda mesh, batch: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.train(built, tmp_path / "run")


@pytest.fixture
def poison(monkeypatch):
    """Makes the losses of some steps NaN; returns the labels of these steps."""
    batches, labels = loop.device_batches, {}

    def poison_steps(*bad, killed_at=None):
        def poisoned(experiment, start, total_steps):
            for done, batch in batches(experiment, start, total_steps):
                if done == killed_at:
                    raise InterruptedError
                if done in bad:
                    labels[done] = jax.device_get(batch["label"])
                    out_of_range = np.full_like(labels[done], 10**6)
                    batch["label"] = jax.device_put(out_of_range, batch["label"].sharding)
                yield done, batch

        monkeypatch.setattr(loop, "device_batches", poisoned)
        return labels

    return poison_steps


def test_a_nonfinite_loss_stops_the_run_and_keeps_the_last_checkpoint(images, tmp_path, poison):
    folder = tmp_path / "run"
    built = start(tiny.config(images), folder)
    labels = poison(7)  # The third step of the second epoch.
    with pytest.raises(FloatingPointError, match="step 7 .* nan, .*checkpoint is that of step 4"):
        loop.train(built, folder)
    with checkpoint.Checkpoints(folder) as checkpoints:
        assert checkpoints.latest == 4
    assert [line["step"] for line in files.read_json_lines(folder / run_directory.METRICS)] == [4]

    def strict(constant):
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads((folder / run_directory.NOT_FINITE).read_text(), parse_constant=strict)
    numbers = ("step", "epoch", "in_a_row", "loss")
    assert [report[name] for name in numbers] == [7, 2, 1, "nan"]
    assert (report["learning_rate"], report["proxy_learning_rate"]) == built.learning_rate(6)
    assert [int(Path(name).parent.name[-1]) for name in report["images"]] == labels[7].tolist()
    assert len(set(report["images"])) == 8
    assert len(report["norms"]) == len(jax.tree.leaves(built.abstract_state.params))
    gradients = [norms["gradient"] for norms in report["norms"].values()]
    assert gradients == sorted(gradients, reverse=True)
    np.testing.assert_allclose(report["gradient_norm"], np.linalg.norm(gradients), rtol=1e-5)
    assert 0 < report["norms"]["proxies"]["parameter"] < 100


def test_a_nonfinite_loss_is_reported_on_a_full_disk(images, tmp_path, poison, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    built = start(tiny.config(images), tmp_path / "run")
    poison(1)
    monkeypatch.setattr(nonfinite, "write_json", full)
    with pytest.raises(FloatingPointError, match="step 1 .*not_finite.json could not be written: "):
        loop.train(built, tmp_path / "run")


def test_nonfinite_steps_are_skipped_and_counted_across_interruptions(images, tmp_path, poison):
    config = tiny.config(images, skip_nonfinite=2)
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    # Steps 3 and 4 are skipped in a row; step 4 ends an epoch, whose checkpoint has the count.
    bad = (3, 4, 7)
    poison(*bad)
    result = loop.train(start(config, uninterrupted), uninterrupted)
    lines = files.read_json_lines(uninterrupted / run_directory.METRICS)
    assert [line["skipped_steps"] for line in lines] == [2, 3, 3]
    assert np.isfinite([line["loss"] for line in lines]).all()
    assert result["skipped_steps"] == 3
    assert json.loads((uninterrupted / run_directory.NOT_FINITE).read_text())["step"] == 7

    poison(*bad, killed_at=6)
    with pytest.raises(InterruptedError):
        loop.train(start(config, interrupted), interrupted)
    poison(*bad)
    assert loop.train(start(config, interrupted), interrupted) == result
    assert (uninterrupted / run_directory.METRICS).read_bytes() == (
        interrupted / run_directory.METRICS
    ).read_bytes()

    # The checkpoint counts steps 3 and 4, so that step 5 is the third in a row.
    failed = tmp_path / "failed"
    poison(3, 4, 5, killed_at=5)
    with pytest.raises(InterruptedError):
        loop.train(start(config, failed), failed)
    poison(3, 4, 5)
    with pytest.raises(FloatingPointError, match="step 5 .*checkpoint is that of step 4"):
        loop.train(start(config, failed), failed)
    assert json.loads((failed / run_directory.NOT_FINITE).read_text())["in_a_row"] == 3


def test_validation_classes_select_the_epoch_and_test_classes_score_it(images, tmp_path):
    folder = tmp_path / "run"
    config = tiny.config(images, data__validation_classes=0.34, batch_size=4)
    built = start(config, folder)
    assert len(built.sources["train"].class_names) == 4
    assert len(built.sources["validation"].class_names) == 2
    result = loop.train(built, folder)
    lines = files.read_json_lines(folder / run_directory.METRICS)
    selected = max(lines, key=lambda line: (line["map@r"], line["step"]))
    assert result["best_chosen_on"] == "validation"
    assert result["best"]["epoch"] == selected["epoch"]
    _, variables = checkpoint.read_network(built.network, folder, "best_map")
    on_test = built.evaluator.score(built.evaluator.embed(variables, "test"))
    assert on_test.items() <= result["best"].items()
    exported = embedding_files.load_embeddings(folder / run_directory.EMBEDDINGS)
    assert evaluate(exported.embeddings, exported.labels).items() <= result["last"].items()
    assert exported.names[0] == "test/class0/0.png"


def test_early_stopping_ends_a_run_and_a_restart_does_not_train(images, tmp_path):
    folder = tmp_path / "run"
    # Nothing is learned at this learning rate, so that no score improves.
    frozen = {"optimizer__learning_rate": 1e-30, "model__freeze_bn": True}
    config = tiny.config(images, epochs=9, evaluation__patience=2, **frozen)
    result = loop.train(start(config, folder), folder)
    assert result["last"]["epoch"] == 3
    (folder / run_directory.RESULT).unlink()
    assert loop.train(start(config, folder), folder) == result


def test_queries_are_searched_in_the_gallery(tmp_path):
    made = public_data.inshop(tmp_path / "source")
    published = dataclasses.replace(DATA_SETS["inshop"], counts=public_data.INSHOP_COUNTS)
    prepare("inshop", source=made, out=tmp_path / "inshop", published=published)
    settings = {"data__name": "inshop", "batch_size": 2, "evaluation__recall_at": (1, 4)}
    config = tiny.config(tmp_path / "inshop", epochs=1, **settings)
    folder = tmp_path / "run"
    result = loop.train(start(config, folder), folder)
    queries, gallery = (
        embedding_files.load_embeddings(folder / file)
        for file in (run_directory.EMBEDDINGS, run_directory.GALLERY)
    )
    assert (len(queries.labels), len(gallery.labels)) == (2, 4)
    scores = evaluate(
        queries.embeddings,
        queries.labels,
        recall_at=(1, 4),
        gallery=(gallery.embeddings, gallery.labels),
    )
    assert scores.items() <= result["last"].items()
    assert result["last"]["recall@4"] == 1


def test_the_latest_and_the_best_checkpoints_are_kept(tmp_path):
    state = {"x": jax.numpy.zeros(3)}
    with checkpoint.Checkpoints(tmp_path, keep_last=2) as checkpoints:
        for at, scores in enumerate([(0.1, 0.9, 0.1), (0.8, 0.2, 0.2), (0.3, 0.3, 0.9)] * 2):
            metrics = dict(zip(("recall@1", "r_precision", "map@r"), scores, strict=True))
            # The second round of scores is lower.
            checkpoints.save(at, state, {k: v - 0.01 * (at > 2) for k, v in metrics.items()})
        checkpoints.save(6, state, None)
    kept = sorted(int(path.name) for path in (tmp_path / run_directory.CHECKPOINTS).iterdir())
    assert kept == [0, 1, 2, 5, 6]
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.find("last") == 6
        assert checkpoints.find("best_r1") == 1
        assert checkpoints.find("best_rp") == 0
        assert checkpoints.find("best_map") == 2


def test_a_missing_checkpoint_is_reported(tmp_path):
    with (
        checkpoint.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(FileNotFoundError, match="no best_map checkpoint"),
    ):
        checkpoints.find("best_map")
