"""The published tables: their runs against the papers, and our scores beside the published ones."""

import collections
import json
import math
import runpy

import jax
import pytest

from dml_jax._utils import sharding
from dml_jax.cli import packaged_configs
from dml_jax.report import papers
from dml_jax.report.dry_run import Listing
from dml_jax.training import cells, config
from tests.helpers import object_storage, tiny


def globals_of(name):
    return runpy.run_path(str(packaged_configs.path(name)))


def plan(table, *, root="runs", data_root="images", overrides=None, **selected):
    chosen = {"data_sets": None, "losses": None, "methods": None, "seeds": None} | selected
    return papers.plan(
        table, globals_of, root=root, data_root=data_root, overrides=overrides or {}, **chosen
    )


MEMVIR_LOSSES = ["softmax", "norm_softmax", "cosface", "arcface", "proxy_nca", "proxy_anchor"]
PS_LOSSES = [*MEMVIR_LOSSES[:2], "sphereface", *MEMVIR_LOSSES[2:5], "soft_triple", "proxy_anchor"]
# Data sets, losses, and the runs of each method.
STRUCTURE = {
    "readme": (
        ["cars196"],
        ["norm_softmax", "proxy_nca"],
        {"": 8, "ps_": 8, "memvir_baseline_": 5, "memvir_": 5},
    ),
    "ps-table6": (["cub200", "cars196", "sop", "inshop"], PS_LOSSES, {"": 5, "ps_": 5}),
    "memvir-table4": (
        ["cub200", "cars196", "sop"],
        MEMVIR_LOSSES,
        {"": 5, "memvir_baseline_": 5, "memvir_": 5},
    ),
}


@pytest.mark.parametrize("table", STRUCTURE)
def test_a_table_has_the_cells_of_its_source(table):
    data_sets, losses, runs = STRUCTURE[table]
    planned = plan(table)
    expected = {
        f"{data_set}/{method}{loss}": list(range(count))
        for data_set in data_sets
        for loss in losses
        for method, count in runs.items()
    }
    found = collections.defaultdict(list)
    for cell in planned.cells:
        found[cell.name].append(cell.config.seed)
        data_set, variant = cell.name.split("/")
        assert cell.config.data.name == data_set and cell.config.data.root == f"images/{data_set}"
        assert cell.workdir == f"runs/{cell.name}/seed{cell.config.seed}"
        assert (cell.origin.config_file, cell.origin.variant) == (data_set, variant)
    assert found == expected and list(found) == list(expected)
    assert [x.config.seed for x in planned.cells] == sorted(x.config.seed for x in planned.cells)
    # Every cell of a table is beside its published score, and only the fair baseline has none.
    for data_set, references in planned.references.items():
        assert list(references) == [
            x.split("/")[1] for x in expected if x.startswith(f"{data_set}/")
        ]
        for variant, of_variant in references.items():
            assert bool(of_variant) != variant.startswith("memvir_baseline_")


def test_tables_share_runs():
    by_folder = {}
    for table in STRUCTURE:
        for cell in plan(table, seeds=1).cells:
            made = cell.config.to_dict()
            assert by_folder.setdefault(cell.workdir, made) == made
    assert len(by_folder) == 4 * 8 * 2 + 3 * 6 * 2  # Bare and PS; MemVir and its baseline.


# The settings of METHODS: of the READMEs and, for Proxy-Anchor, of its authors.
OFFICIAL = {
    "epochs": 130,
    "batch_size": 128,
    "model.backbone": "bninception",
    "model.dim": 512,
    "model.pooling": "gap",
    "model.freeze_bn": True,
    "model.freeze_bn_affine": False,
    "proxy_init": "uniform_dim",
    "optimizer.name": "adam",
    "optimizer.learning_rate": 1e-4,
    "optimizer.proxy_learning_rate": 1e-2,
    "optimizer.weight_decay": 1e-4,
    "optimizer.eps": 0.01,
    "optimizer.decay_rate": 0.1,
    "optimizer.decay_epochs": (50,),
    "optimizer.decay_every": 0,
    "optimizer.frozen_epochs": 0,
    "proxy_synthesis.ratio": 0.0,
    "memvir.num_steps": 0,
}
SCALES = {"norm_softmax": 23.0, "proxy_nca": 12.0}
ANCHOR = {
    "epochs": 60,
    "batch_size": 180,
    "model.pooling": "gap+gmp",
    "proxy_init": "normal_classes",
    "optimizer.name": "adamw",
    "optimizer.eps": 1e-8,
    "optimizer.decay_epochs": (),
    "optimizer.frozen_epochs": 1,
    "loss.alpha": 32.0,
    "loss.margin": 0.1,
}
# Learning rate, BN frozen, factor and epochs between decays.
ANCHOR_OF = {
    "cub200": (1e-4, True, 0.5, 10),
    "cars196": (1e-4, True, 0.5, 20),
    "sop": (6e-4, False, 0.25, 20),
    "inshop": (6e-4, False, 0.25, 20),
}
# Epochs, N, M, warm-up. Those of CARS196 are the README's, with N and M of Proxy-NCA apart.
LONG = {"cub200": (2000, 45, 10, 40), "cars196": (2000, 45, 10, 40), "sop": (300, 5, 20, 5)}


def expected_settings(data_set, method, loss):
    expected = dict(OFFICIAL)
    if loss == "proxy_anchor":
        rate, frozen, factor, every = ANCHOR_OF[data_set]
        expected |= ANCHOR | {
            "optimizer.learning_rate": rate,
            "optimizer.proxy_learning_rate": 100 * rate,
            "model.freeze_bn": frozen,
            "model.freeze_bn_affine": frozen,
            "optimizer.decay_rate": factor,
            "optimizer.decay_every": every,
        }
    if loss in SCALES:
        expected["loss.scale"] = SCALES[loss]
    if method == "ps_":
        expected |= {"proxy_synthesis.ratio": 1.0, "proxy_synthesis.alpha": 0.4}
    if method.startswith("memvir_"):
        epochs, steps, gap, warmup = LONG[data_set]
        expected |= {"epochs": epochs, "optimizer.decay_every": 0}
        expected["optimizer.decay_epochs"] = (epochs,)  # None before the last epoch.
        if data_set == "cars196":
            initial = {"norm_softmax": "uniform_classes", "proxy_nca": "normal_dim"}
            expected["proxy_init"] = initial.get(loss, expected["proxy_init"])
            steps, gap = (20, 25) if loss == "proxy_nca" else (steps, gap)
        if method == "memvir_":
            expected |= {"memvir.num_steps": steps, "memvir.step_gap": gap}
            expected["memvir.warmup_epochs"] = warmup
    return expected


@pytest.mark.parametrize("table", STRUCTURE)
def test_every_cell_has_the_recipe_of_its_source(table):
    data_sets, losses, runs = STRUCTURE[table]
    made = {cell.name: cell.config for cell in plan(table, seeds=1).cells}
    for data_set in data_sets:
        for loss in losses:
            for method in runs:
                of_cell = dict(config.leaves(made[f"{data_set}/{method}{loss}"]))
                expected = expected_settings(data_set, method, loss)
                assert {path: of_cell[path] for path in expected} == expected, (data_set, method)
                assert of_cell["loss.name"] == loss


def test_a_part_of_a_table_keeps_its_order_and_its_baselines():
    planned = plan(
        "memvir-table4",
        data_sets=["sop", "cars196"],
        losses=["proxy_anchor", "cosface"],
        methods=["memvir", "baseline"],
        seeds=2,
    )
    assert [cell.name for cell in planned.cells[:8]] == [
        f"{data_set}/{variant}"
        for data_set in ("cars196", "sop")
        for variant in ("cosface", "memvir_cosface", "proxy_anchor", "memvir_proxy_anchor")
    ]
    assert len(planned.cells) == 16
    # The bare loss on another schedule is no fair baseline.
    assert planned.baselines == {"cars196": {}, "sop": {}}
    with_it = plan("memvir-table4", data_sets=["sop"], losses=["cosface"])
    assert with_it.baselines == {"sop": {"memvir_cosface": "memvir_baseline_cosface"}}
    assert plan("readme", losses=["proxy_nca"], methods=["ps", "baseline"]).baselines == {
        "cars196": {"ps_proxy_nca": "proxy_nca"}
    }


@pytest.mark.parametrize(
    ("table", "selected", "message"),
    [
        ("table6", {}, "table: 'table6' is unknown; choose from readme, ps-table6, memvir-table4"),
        ("readme", {"losses": ["cosface"]}, "--losses: 'cosface' .* norm_softmax, proxy_nca"),
        ("ps-table6", {"methods": ["memvir"]}, "--methods: 'memvir' .* baseline, ps"),
        (
            "memvir-table4",
            {"data_sets": ["inshop"]},
            "--datasets: 'inshop' .* cars196, sop",
        ),
        ("readme", {"overrides": {"loss.scale": 5.0}}, "--config.loss.scale would be a setting of"),
        ("readme", {"overrides": {"memvir.num_steps": 5}}, "--config.memvir.num_steps would"),
    ],
)
def test_what_a_table_lacks_is_refused(table, selected, message):
    with pytest.raises(ValueError, match=message):
        plan(table, **selected)


def result(recall, best=None):
    best = recall + 0.01 if best is None else best
    scores = {"recall@1": recall, "r_precision": recall / 2, "map@r": recall / 3}
    top = {metric: {**scores, metric: best} for metric in scores}
    return {"last": scores, "best_of": top, "best_chosen_on": "test"}


def rows(text, title):
    """Returns the cells of the rows of the first table with a title, by variant."""
    lines = text[text.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    cut = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cut}


def test_an_unfinished_table_shows_what_is_done_beside_the_published_scores(tmp_path):
    planned = plan("readme", losses=["proxy_nca"], seeds=3)
    done = {
        ("proxy_nca", 0): result(0.80),
        ("proxy_nca", 2): result(0.82),
        ("ps_proxy_nca", 1): result(0.84),
        ("ps_proxy_nca", 2): result(0.86),
        ("memvir_proxy_nca", 0): result(0.9),
    }
    results = [done.get((x.name.split("/")[1], x.config.seed)) for x in planned.cells]
    text = papers.text(planned, results)
    assert "5 of 12 runs are finished" in text
    assert "- cars196/proxy_nca: seed 1\n" in text
    assert "- cars196/memvir_baseline_proxy_nca: seeds 0, 1, 2\n" in text
    last = rows(text, "R@1, last epoch | 1 | 2 | 3")
    # Two runs each, 2 points apart: t = 4 / sqrt(2) with two degrees of freedom.
    p = 1 - (t := 4 / math.sqrt(2)) / math.sqrt(t * t + 2)
    assert last["proxy_nca"][:6] == ["80.0", "–", "82.0", "81.00 ± 1.41", "", ""]
    assert last["ps_proxy_nca"][:6] == ["–", "84.0", "86.0", "85.00 ± 1.41"] + [
        "proxy_nca +4.00",
        f"{p:.2g}",
    ]
    assert last["ps_proxy_nca"][6] == "84.21 ± 0.21 (PS README, 8 runs)"
    assert "83.28 ± 0.36 (PS README, 8 runs)" in last["proxy_nca"][6]
    assert last["memvir_baseline_proxy_nca"] == ["–"] * 3 + [""] * 4
    # Without its baseline, MemVir is compared with nothing.
    assert last["memvir_proxy_nca"] == ["90.0", "–", "–", "90.00", "", ""] + [
        "86.19 ± 0.39 (MemVir README, 5 runs)"
    ]
    best = rows(text, "R@1, best epoch on test classes | 1 | 2 | 3")
    assert best["proxy_nca"][3] == "82.00 ± 1.41"
    for title in ("RP", "MAP@R"):
        assert f"| {title}, last epoch |" in text and f"| {title}, best epoch" in text

    paths = papers.write(planned, results, str(tmp_path))
    markdown, values = (tmp_path / "readme.md").read_text(), tmp_path / "readme.json"
    assert paths == [f"{tmp_path}/readme.md", f"{tmp_path}/readme.json"] and markdown == text
    read = json.loads(values.read_text())
    assert [x["scores"] and x["scores"]["last"]["recall@1"] for x in read["cells"]] == [
        x and x["last"]["recall@1"] for x in results
    ]
    assert read["published_percent"]["cars196"]["memvir_proxy_nca"][0]["scores"]["map@r"] == {
        "mean": 28.17,
        "std": 0.14,
    }


def test_the_papers_tables_have_the_papers_metric_and_their_own_baselines():
    planned = plan("memvir-table4", losses=["norm_softmax", "proxy_nca", "proxy_anchor"], seeds=1)
    text = papers.text(planned, [None] * len(planned.cells))
    assert "MAP@R" not in text and "| RP" not in text
    cars = rows(text[text.index("## cars196") :], "R@1, last epoch | 1")
    # The first equals the PS paper's, the second does not.
    assert cars["norm_softmax"][-1] == "83.3 (MemVir paper, table 4)"
    assert cars["proxy_nca"][-1] == "82.0 (MemVir paper, table 4)"
    assert cars["memvir_proxy_nca"][-1] == "86.5 (MemVir paper, table 4)"
    assert cars["proxy_anchor"][-1] == "84.9 (MemVir paper, table 4 and supplement C.2.1)"
    assert papers.NOTES["proxy_anchor"] in text and papers.NOTES["memvir"] in text
    other = plan("ps-table6", losses=["arcface"], seeds=1)
    text = papers.text(other, [None] * len(other.cells))
    assert papers.NOTES["proxy_anchor"] not in text and papers.NOTES["memvir"] not in text
    assert rows(text[text.index("## inshop") :], "R@1, last epoch | 1")["ps_arcface"][-1] == (
        "91.7 (PS paper, table 6)"
    )


@pytest.fixture
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: make_mesh(jax.devices()[:1]))


def test_cells_are_trained_once_and_the_table_is_made_of_what_is_done(one_device, tmp_path, capsys):
    tiny.write_images(tmp_path / "data" / "cars196")
    root = object_storage.new_bucket("memory")
    tiny_settings = tiny.SETTINGS | tiny.NETWORK | {"epochs": 1, "evaluation.recall_at": (1, 2)}
    given = {
        "losses": ["proxy_nca"],
        "methods": ["baseline", "ps"],
        "seeds": 1,
        "data_root": str(tmp_path / "data"),
    }
    planned = plan("readme", root=root, overrides=tiny_settings | {"data.name": "folder"}, **given)
    first, second = planned.cells
    assert [cells.finished(cell) for cell in planned.cells] == [None, None]
    trained = cells.train(second)
    assert [cells.finished(cell) for cell in planned.cells] == [None, trained]
    capsys.readouterr()
    assert cells.train(second) == trained  # Not again.
    assert "epoch 1" not in capsys.readouterr().out
    lines = list(listing().lines(planned.cells))
    assert lines[0].endswith("cars196/proxy_nca, seed 0") and lines[3].endswith("0, finished")
    assert any(line.startswith("images of folder: 36 train, 24 test, found") for line in lines)
    text = papers.text(planned, [cells.finished(cell) for cell in planned.cells])
    assert "1 of 2 runs are finished" in text and "batch_size=8" in text
    assert rows(text, "MAP@R, last epoch | 1")["ps_proxy_nca"][0] == (
        f"{100 * trained['last']['map@r']:.1f}"
    )
    # A folder with a run of other settings is not a cell of the table.
    other = plan("readme", root=root, overrides={"data.name": "folder"}, **given)
    with pytest.raises(ValueError, match=f"{second.workdir} holds a run with another config"):
        cells.finished(other.cells[1])


def listing(**changed):
    given = {"device": "h100", "utilisation": 0.1, "images_per_second": 1000.0, "topology": None}
    return Listing(**given | changed)


def test_a_dry_run_needs_no_images_and_states_what_its_numbers_are_from(tmp_path):
    planned = plan("memvir-table4", losses=["norm_softmax"], seeds=2, data_root=str(tmp_path))
    lines = list(listing().lines(planned.cells))
    of_cars = lines.index("   5  cars196/memvir_norm_softmax, seed 0")
    # 62 steps of 128 images; 200 evaluations of 8,131.
    hours = (2000 * 62 * 128 + 200 * 8131) / 1000 / 3600
    assert lines[of_cars + 1].strip() == (
        "2,000 epochs of 62 steps, 124,000 steps of 128 images, 1,626,200 images evaluated, "
        f"{hours:.2f} device hours"
    )
    assert lines[of_cars + 2].strip() == (
        "dml-jax train --config=cars196:memvir_norm_softmax "
        "--workdir=runs/cars196/memvir_norm_softmax/seed0 "
        f"--config.data.root={tmp_path}/cars196 --config.seed=0"
    )
    text = "\n".join(lines)
    assert "18 cells, 0 finished" in text
    assert f"8,054 train, 8,131 test, NOT FOUND at {tmp_path}/cars196" in text
    assert "weights: NOT FOUND" in text and "hours: 1000 images/s, as given" in text
    assert text.count("hours: ") == 1 and "memory: not estimated" in text
