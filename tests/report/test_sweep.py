"""Sweeps: the grid, what is refused before training, and table and page of what is done."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dml_jax._utils import sharding
from dml_jax.report import sweep, sweep_page
from dml_jax.training import cells, variants
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
RATIO, ALPHA = "proxy_synthesis.ratio=2,0.5,1", "proxy_synthesis.alpha=0.2,0.4"


def plan(*over, images="images", variant="ps", seeds=(0, 1), overrides=None, workdir="sweep"):
    globals = {"get_config": functools.partial(tiny.config, images)}
    return sweep.plan(
        "tiny",
        variant,
        globals,
        over=over,
        seeds=seeds,
        overrides=overrides or {},
        workdir=str(workdir),
    )


def test_a_grid_has_a_run_of_each_pair_of_values_and_seed():
    planned = plan(RATIO, ALPHA, overrides={"epochs": 7})
    expected = [
        (seed, ratio, alpha) for seed in (0, 1) for ratio in (0.5, 1.0, 2.0) for alpha in (0.2, 0.4)
    ]
    found = [
        (x.seed, x.proxy_synthesis.ratio, x.proxy_synthesis.alpha)
        for x in (cell.config for cell in planned.cells)
    ]
    assert found == expected and all(cell.config.epochs == 7 for cell in planned.cells)
    name = "proxy_synthesis.ratio=0.5,proxy_synthesis.alpha=0.4"
    assert planned.cells[1].name == name
    assert planned.cells[1].workdir == f"sweep/{name}/seed0"
    assert len({cell.workdir for cell in planned.cells}) == len(expected)
    command = " ".join(planned.cells[1].origin.command("run"))
    assert "--config=tiny:ps" in command and "--config.proxy_synthesis.alpha=0.4" in command


def test_values_have_the_type_of_their_setting():
    of_memory = plan("memvir.step_gap=10,2", variant="memvir", seeds=[3])
    assert dict(of_memory.axes) == {"memvir.step_gap": [2, 10]}
    assert [cell.config.memvir.step_gap for cell in of_memory.cells] == [2, 10]
    fixed = plan("proxy_synthesis.lam=None,0.5", "proxy_synthesis.mix=both,proxies")
    assert list(fixed.axes.values()) == [[None, 0.5], ["both", "proxies"]]
    assert plan("data.augmentation.flip=True,False").axes["data.augmentation.flip"] == [True, False]


def test_the_default_variant_of_a_config_file_can_be_swept():
    planned = plan("loss.scale=5,10", variant="")
    assert planned.title == "tiny" and planned.cells[0].config.loss.scale == 5
    assert variants.parse_variant("baseline") == ("baseline", planned.cells[0].config.loss.name)


def test_validation_classes_are_scored_instead_of_test_classes():
    of_test = plan(ALPHA)
    assert of_test.scored_on == "test" and sweep.note(of_test) == sweep.TEST_NOTE
    held_out = {"data.validation_classes": 0.5}
    of_validation = plan(ALPHA, overrides=held_out)
    assert of_validation.scored_on == "validation"
    assert not any(cell.config.evaluation.test for cell in of_validation.cells)
    assert plan(ALPHA, overrides=held_out | {"evaluation.test": True}).scored_on == "test"


@pytest.mark.parametrize(
    ("over", "changed", "message"),
    [
        ([], {}, "one or two settings, but --over gives 0"),
        ([RATIO, ALPHA, "loss.scale=1,2"], {}, "one or two settings, but --over gives 3"),
        (["loss.scale"], {}, "--over=loss.scale must be PATH=VALUE"),
        ([RATIO, "proxy_synthesis.ratio=3"], {}, "proxy_synthesis.ratio twice"),
        (["proxy_synthesis.rato=1"], {}, "no setting config.proxy_synthesis.rato"),
        (["proxy_synthesis=1"], {}, "no setting config.proxy_synthesis;"),
        (["loss.margin=1"], {}, "no setting config.loss.margin"),
        (["loss.scale=1,x"], {}, "'x' must be a number"),
        (["batch_size=8,1.5"], {}, "'1.5' must be an integer"),
        (["data.augmentation.flip=1"], {}, "'1' must be True or False"),
        (["loss.scale=1,1.0"], {}, "has a value twice"),
        (["loss.scale=1,"], {}, "'' must be a number"),
        (["loss.scale=-1,0,1"], {}, "(?s)scale=-1: config.loss.scale is -1.0; .*loss.scale=0: "),
        (["loss.scale=None"], {}, "config.loss.scale is None"),
        (["proxy_synthesis.mix=all"], {}, "choose one of both"),
        (["optimizer.decay_epochs=1,2"], {}, "sequences, which cannot be swept"),
        (["memvir.step_gap=1,2"], {}, "no effect, since config.memvir.num_steps is 0"),
        (["data.validation_classes=0.2"], {}, "scored on different images"),
        (["seed=1,2"], {}, "give the seeds as --seeds"),
        ([RATIO], {"overrides": {"seed": 1}}, "give the seeds as --seeds"),
        ([RATIO], {"overrides": {"proxy_synthesis.ratio": 1.0}}, "cannot be --config.proxy"),
        ([RATIO], {"seeds": [0, 0]}, "--seeds=0,0 must be one or more different seeds"),
        ([RATIO], {"seeds": [-1]}, "config.seed is -1"),
    ],
)
def test_what_cannot_be_swept_is_refused(over, changed, message):
    with pytest.raises(ValueError, match=message):
        plan(*over, **changed)


def result(score, scored_on="test"):
    return {
        "last": {"recall@1": score, "r_precision": score / 2, "map@r": score / 4},
        "best_chosen_on": scored_on,
        "scored_on": scored_on,
    }


def results_of(planned, missing=()):
    """Returns a result of each cell: 0.01 more than that of the cell before it."""
    return [
        None if i in missing else result(0.3 + 0.01 * i, planned.scored_on)
        for i in range(len(planned.cells))
    ]


def test_the_table_has_mean_and_deviation_of_what_is_done():
    planned = plan(RATIO, ALPHA)
    text = sweep.summary(planned, results_of(planned, missing=(1, 7, 8)))
    assert "9 of 12 runs are finished" in text and sweep.TEST_NOTE in text
    assert "- proxy_synthesis.ratio=0.5,proxy_synthesis.alpha=0.4: seeds 0, 1\n" in text
    assert "| R@1, test classes, last epoch | 1 | 2 | mean ± std |" in text
    # The runs of a point are six cells apart.
    std = np.std([30, 36], ddof=1)
    assert f"alpha=0.2 | 30.0 | 36.0 | 33.00 ± {std:.2f} |" in text
    assert "ratio=0.5,proxy_synthesis.alpha=0.4 | – | – |  |" in text
    other = results_of(planned)
    other[3] = result(0.5, "validation")
    with pytest.raises(ValueError, match=r"was scored on validation classes, but .* test classes"):
        sweep.summary(planned, other)


def test_the_figures_have_the_scores(monkeypatch, tmp_path):
    drawn = []
    html = sweep_page._html
    monkeypatch.setattr(sweep_page, "_html", lambda figure: drawn.append(figure) or html(figure))
    planned = plan(RATIO, ALPHA, overrides={"data.validation_classes": 0.5})
    sweep_page.write(planned, results_of(planned, missing=(1, 7, 8)), tmp_path / "two.html")
    (of_recall, _, of_map) = (figure.data[0] for figure in drawn)
    assert of_recall.x == ("0.2", "0.4") and of_recall.y == ("0.5", "1", "2")
    # The first index is the ratio. Runs 1 and 7 are one point; of another, run 2 alone is left.
    means = np.array([[33, np.nan], [32, 36], [37, 38]])
    np.testing.assert_allclose(np.array(of_recall.z, float), means)
    np.testing.assert_allclose(np.array(of_map.z, float), means / 4)
    assert of_recall.text[0][1] == "–" and of_recall.text[1][0] == "32.00"
    text = (tmp_path / "two.html").read_text(encoding="utf-8")
    assert "MAP@R on the validation classes" in text and sweep.VALIDATION_NOTE in text
    assert "9 of 12 runs are finished" in text and "data.validation_classes=0.5" in text

    drawn.clear()
    planned = plan(RATIO)
    sweep_page.write(planned, results_of(planned, missing=(0, 3, 4)), tmp_path / "one.html")
    curve, runs = drawn[0].data
    assert curve.x == (1.0, 2.0) and runs.x == (1.0, 2.0, 2.0)
    np.testing.assert_allclose(curve.y, [31, 33.5])
    np.testing.assert_allclose(curve.error_y.array, [0, np.std([32, 35], ddof=1)])
    np.testing.assert_allclose(runs.y, [31, 32, 35])
    assert "MAP@R on the test classes" in (tmp_path / "one.html").read_text(encoding="utf-8")


def test_a_cell_is_trained_once_and_scored_on_the_validation_classes(monkeypatch, tmp_path):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: make_mesh(jax.devices()[:1]))
    planned = plan(
        ALPHA,
        images=tiny.write_images(tmp_path / "images"),
        seeds=[0],
        overrides={"epochs": 1, "data.validation_classes": 0.5, "evaluation.recall_at": (1,)},
        workdir=tmp_path / "sweep",
    )
    trained = cells.train(planned.cells[1])
    assert trained["scored_on"] == "validation"
    assert [cells.finished(cell) for cell in planned.cells] == [None, trained]
    text = sweep.summary(planned, [None, trained])
    assert f"alpha=0.4 | {100 * trained['last']['map@r']:.1f} |" in text


@pytest.mark.slow
def test_the_program_trains_the_grid_and_writes_the_page(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    workdir = tmp_path / "sweep"
    # At the second rate the loss is not finite; the third is trained nevertheless.
    over = "--over=optimizer.learning_rate=1e-3,1e30,2e-3"
    arguments = [f"--workdir={workdir}", *tiny.arguments(images, "ps", epochs=1)]
    program = [sys.executable, "scripts/sweep.py", *arguments, over]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "2 of 3 runs are finished" in done.stdout
    assert "- optimizer.learning_rate=1e+30: seed 0" in done.stdout
    results = sorted(path.parent.parent.name for path in workdir.glob("*/seed0/result.json"))
    assert results == ["optimizer.learning_rate=0.001", "optimizer.learning_rate=0.002"]
    assert "2 of 3 runs are finished" in (workdir / "sweep.html").read_text(encoding="utf-8")

    wrong = subprocess.run([*program, over], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "optimizer.learning_rate twice" in wrong.stderr
