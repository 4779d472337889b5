import csv
import functools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import optuna
import pytest

from dml_jax import retrieval
from dml_jax.evaluation import embedding_files
from dml_jax.study import finals, protocol, summary, trials
from dml_jax.study.space import Range
from dml_jax.training import preemption, run_directory
from tests.helpers import tiny

FOLDS, TRIALS, SEEDS = 2, 2, 2
SEARCHED = {"optimizer.proxy_learning_rate": None, "loss.scale": Range(5.0, 20.0)}
SETTINGS = {"model__train_from": "head", "data__cache": "features", "epochs": 2}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


def planned(images, root, **changes):
    settings = {"trials": TRIALS, "folds": FOLDS, "seeds": SEEDS, "losses": ["norm_softmax"]}
    settings = settings | {"methods": ["ps"]} | changes
    get_config = functools.partial(tiny.config, images, **SETTINGS)
    return protocol.plan(get_config, {}, SEARCHED, root=root, **settings)


def carry_out(images, root, **changes):
    plan = planned(images, root, **changes)
    return protocol.carry_out(plan, trials.open_storage(None, root), root)


@pytest.fixture(scope="module")
def study(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: devices)
        printed = carry_out(images, root)
    return root, printed


def loaded(root, name):
    return optuna.load_study(study_name=name, storage=trials.open_storage(None, root))


@pytest.mark.slow
def test_every_variant_has_as_many_trials_and_its_best_settings_are_trained(study):
    root, printed = study
    for name in ("baseline_norm_softmax", "ps_norm_softmax"):
        search = loaded(root, name)
        assert len(search.trials) == TRIALS
        best = max(search.trials, key=lambda trial: trial.value)
        assert best.value == pytest.approx(np.mean(best.user_attrs["folds"]))
        for seed in range(SEEDS):
            for fold in range(FOLDS):
                workdir = root / "final" / name / f"seed{seed}" / f"fold{fold}"
                config = run_directory.read_config(workdir)
                assert (config.seed, config.data.validation_fold) == (seed, fold)
                assert config.data.validation_classes == 1 / FOLDS
                assert config.loss.scale == best.params["loss.scale"]
        assert f"| {name} |" in printed
    assert "ps_norm_softmax" in (root / protocol.PAGE).read_text()


@pytest.mark.slow
def test_a_search_never_sees_the_test_classes_and_keeps_no_checkpoints(study):
    root, _ = study
    runs = sorted((root / "trials").glob("*/*/fold*"))
    assert len(runs) == 2 * TRIALS * FOLDS
    for workdir in runs:
        assert run_directory.read_result(workdir)["scored_on"] == "validation"
        assert not (workdir / run_directory.EMBEDDINGS).exists()
        assert not (workdir / run_directory.CHECKPOINTS).exists()


@pytest.mark.slow
def test_scores_are_separated_and_concatenated(study):
    root, _ = study
    final = finals._score(root, "ps_norm_softmax", 1, FOLDS)
    workdirs = [root / "final/ps_norm_softmax/seed1" / f"fold{fold}" for fold in range(FOLDS)]
    results = [run_directory.read_result(workdir)["last"] for workdir in workdirs]
    assert final.separated["map@r"] == np.mean([x["map@r"] for x in results])
    embedded = [
        embedding_files.load_embeddings(workdir / run_directory.EMBEDDINGS) for workdir in workdirs
    ]
    unit = [x.embeddings / np.linalg.norm(x.embeddings, axis=1)[:, None] for x in embedded]
    scores = retrieval.evaluate(np.hstack(unit), embedded[0].labels, recall_at=(1,))
    assert final.concatenated["map@r"] == pytest.approx(scores["map@r"])
    assert final.average_precision.mean() == pytest.approx(scores["map@r"])


@pytest.mark.slow
def test_all_runs_are_in_the_csv_file(study):
    root, _ = study
    with (root / protocol.RUNS).open() as file:
        lines = list(csv.DictReader(file))
    assert len([x for x in lines if x["phase"] == "search"]) == 2 * TRIALS * FOLDS
    assert len([x for x in lines if x["phase"] == "final"]) == 2 * SEEDS * (FOLDS + 1)
    assert all(0 <= float(x["map@r"]) <= 1 for x in lines)


@pytest.mark.slow
def test_a_finished_study_trains_nothing(images, study, monkeypatch):
    root, printed = study
    before = {path: path.stat().st_mtime_ns for path in root.rglob("result.json")}
    assert carry_out(images, root) == printed
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("result.json")}


@pytest.mark.slow
def test_an_interrupted_study_continues(images, tmp_path, monkeypatch):
    train, calls = protocol.run.train, []

    def stops(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 4:
            raise preemption.Stopped("asked to stop")
        return train(*arguments, **options)

    monkeypatch.setattr(protocol.run, "train", stops)
    with pytest.raises(preemption.Stopped):
        carry_out(images, tmp_path, methods=[], seeds=1, trials=3)
    # The second trial was interrupted on its second fold.
    interrupted = loaded(tmp_path, "baseline_norm_softmax").trials[1]
    assert interrupted.state == optuna.trial.TrialState.RUNNING
    carry_out(images, tmp_path, methods=[], seeds=1, trials=3)
    search = loaded(tmp_path, "baseline_norm_softmax")
    states = [trial.state.name for trial in search.trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    repeated = search.trials[2]
    assert repeated.params == interrupted.params and repeated.user_attrs["repeats"] == 1
    # Three trials on two folds, of which one is interrupted and one is found finished, and finals.
    assert len(calls) == 4 + 2 + 2 + FOLDS
    assert len(list((tmp_path / "trials").glob("*/*/fold*"))) == 3 * FOLDS


@pytest.mark.slow
def test_a_trial_of_a_killed_process_is_repeated(images, tmp_path):
    plan = planned(images, tmp_path, methods=[], seeds=1, trials=1)
    storage = trials.open_storage(None, tmp_path)
    killed = optuna.create_study(
        study_name="baseline_norm_softmax", storage=storage, direction="maximize"
    )
    trial = killed.ask()
    settings = trials._suggest(trial, plan.variants[0].space)
    protocol.carry_out(plan, storage, tmp_path)
    first, second = loaded(tmp_path, "baseline_norm_softmax").trials
    assert first.state == optuna.trial.TrialState.FAIL
    assert second.params == settings and second.user_attrs["repeats"] == 0


def test_two_processes_run_each_trial_once_and_wait_for_each_other(images, tmp_path, monkeypatch):
    variants = planned(images, tmp_path).variants
    monkeypatch.setattr(trials, "PAUSE", 0.01)
    running, most = set(), []
    guard, done = threading.Lock(), trials._done

    def slow_done(study):
        count = done(study)
        time.sleep(0.05)  # Another process may start a trial between counting and asking.
        return count

    monkeypatch.setattr(trials, "_done", slow_done)

    def train(config, workdir, tracker):
        with guard:
            assert workdir not in running
            running.add(workdir)
            most.append(len(running))
        time.sleep(0.1)
        with guard:
            running.remove(workdir)
        return {"last": {"map@r": float(config.loss.scale)}}

    def search(_):
        storage = trials.open_storage(None, tmp_path)
        found = trials.search(variants, storage, tmp_path, train, trials=5, folds=FOLDS)
        return [trials.best_settings(study) for study in found]

    # Threads hold their own locks, as processes do.
    with ThreadPoolExecutor(3) as pool:
        best = list(pool.map(search, range(3)))
    assert best[0] == best[1] == best[2]
    assert max(most) > 1
    for variant in variants:
        states = [trial.state.name for trial in loaded(tmp_path, variant.name).trials]
        assert states == ["COMPLETE"] * 5


def test_a_worse_trial_is_pruned(images, tmp_path):
    study = optuna.create_study(
        direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=0.5)
    )
    reporter = trials._Reporter(study.ask(), tmp_path)
    reporter.epoch({"epoch": 1, "loss": 3.0}, {})
    reporter.epoch({"epoch": 2, "map@r": 0.6}, {})
    with pytest.raises(optuna.TrialPruned):
        reporter.epoch({"epoch": 4, "map@r": 0.4}, {})


@pytest.mark.parametrize("error", [optuna.TrialPruned(), FloatingPointError("loss is nan")])
def test_a_pruned_trial_keeps_no_checkpoints(images, tmp_path, error):
    def train(config, workdir, tracker):
        (workdir / run_directory.CHECKPOINTS).mkdir(parents=True)
        raise error

    variant = planned(images, tmp_path, methods=[]).variants[0]
    trial = optuna.create_study(direction="maximize").ask()
    with pytest.raises(optuna.TrialPruned):
        trials._evaluate(trial, variant, {"loss.scale": 9.0}, tmp_path, train, FOLDS)
    assert list(tmp_path.glob("*/fold0")) and not list(tmp_path.rglob(run_directory.CHECKPOINTS))


def test_another_study_in_the_folder_is_refused(images, tmp_path):
    def claim(**changes):
        protocol._claim(planned(images, tmp_path, **changes), tmp_path)

    claim()
    claim(trials=9, seeds=9)
    claim(methods=["memvir"])
    with pytest.raises(ValueError, match=r"undo the changes of: --folds \(2 before, 3 now\)"):
        claim(folds=3)
    recorded = json.loads((tmp_path / protocol.PLAN).read_text())
    assert len(recorded["variants"]) == 3
    recorded["variants"]["ps_norm_softmax"]["config"]["epochs"] = 7
    (tmp_path / protocol.PLAN).write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match="undo the changes of: ps_norm_softmax$"):
        claim()


def test_folds_with_too_few_classes_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match="are all of one class|too few"):
        planned(images, tmp_path, folds=6)
    with pytest.raises(ValueError, match="at least two folds"):
        planned(images, tmp_path, folds=1)


def test_the_table_compares_with_the_bare_loss():
    def final(seed, score):
        scores = dict.fromkeys(retrieval.SCORES.values(), score)
        precision = np.array([score, score, score + 0.01, score - 0.01])
        return finals.Final(seed, [scores, scores], scores, precision, np.array([0, 0, 1, 1]))

    found = summary.rows(
        {
            "baseline_x": [final(i, s) for i, s in enumerate((0.50, 0.51, 0.49))],
            "ps_x": [final(i, s) for i, s in enumerate((0.60, 0.61, 0.59))],
            "memvir_x": [final(i, s) for i, s in enumerate((0.50, 0.52, 0.49))],
        },
        {"ps_x": "baseline_x", "memvir_x": "baseline_x"},
        "concatenated",
    )
    bare, ps, memvir = found
    assert bare.baseline == "" and np.isnan(bare.p)
    assert ps.gain == pytest.approx(10) and ps.p < 1e-3 and ps.p_holm == 2 * ps.p
    assert memvir.p_holm == memvir.p > 0.5
    assert ps.scores["map@r"].mean == pytest.approx(60)
    assert ps.over_classes.mean == pytest.approx(60)
    text = summary.markdown(found, "concatenated, %")
    assert "| ps_x | 60.00 [57.52, 62.48] |" in text and "baseline_x +10.00" in text
