import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest

from dml_jax._utils import files
from dml_jax.configs import cars196, folder
from dml_jax.evaluation.embedding_files import Embeddings
from dml_jax.report import comparison, runs, tables
from dml_jax.training import run_directory
from dml_jax.training.variants import origin_of


def make(path, config, score=0.5, names=("a", "b"), origin=None):
    embedded = Embeddings(np.eye(2, dtype=np.float32), np.arange(2), tuple(names), ("x", "y"))
    return runs.Run(
        folder=Path(path),
        place=str(path),
        config=config,
        metrics=[],
        timings=[],
        scores={"recall@1": score, "r_precision": score / 2, "map@r": score / 4},
        queries=embedded,
        gallery=None,
        origin=origin,
    )


def seeded(module, variant, seed, **settings):
    config = module.get_config(variant)
    config.update_from_flattened_dict({"seed": seed, **settings})
    return config


def of_cars(variant, **overrides):
    return origin_of("configs/cars196.py", variant, vars(cars196), overrides)


def test_runs_in_a_bucket_are_named_like_runs_on_disk():
    found = [
        make(f"gs://bucket/cub/{name}/seed{seed}", seeded(cars196, name, seed))
        for name in ("baseline", "ps")
        for seed in range(2)
    ]
    assert [group.name for group in runs.group(found)] == ["baseline", "ps"]
    on_disk = make("/r/memvir", seeded(cars196, "memvir", 0))
    names = [group.name for group in runs.group([found[0], on_disk])]
    assert names == ["gs/bucket/cub/baseline/seed0", "r/memvir"]
    with pytest.raises(ValueError, match="gs://bucket/cub/baseline/seed0/ is given twice"):
        runs.group([make("gs://bucket/cub/baseline/seed0/", found[0].config), found[0]])


def test_runs_that_differ_in_the_seed_alone_are_one_group():
    found = [
        make("/r/ps/seed1", seeded(cars196, "ps", 1), 0.6, origin=of_cars("ps")),
        make("/r/base/seed0", seeded(cars196, "baseline", 0), 0.5),
        make("/r/ps/seed0", seeded(cars196, "ps", 0), 0.7, origin=of_cars("ps")),
        make("/r/ps_slow", seeded(cars196, "ps", 0, **{"optimizer.learning_rate": 1e-5})),
    ]
    groups = runs.group(found)
    assert [group.name for group in groups] == ["ps", "base/seed0", "ps_slow"]
    assert [run.config.seed for run in groups[0].runs] == [0, 1]

    rows = tables.scores(groups)
    assert rows[0]["cells"][0] == {
        "value": "65.00 ± 7.07",
        "best": True,
        "spread": "70.00, 60.00",
        "published": "84.25 ± 0.31 (PS README, 8 runs); 84.7 (PS paper, table 6)",
        "against": "+15.00",
    }
    assert rows[1]["cells"][0]["against"] == "" and not rows[1]["cells"][0]["best"]
    assert rows[2]["baseline"] == ""  # No other run has this learning rate.
    assert rows[1]["cells"][0]["published"] == ""  # Not started from a config file.

    first, *rest = tables.settings(groups)
    assert first["differ"] and not rest[-1]["differ"]
    differing = {row["path"]: row["values"] for row in (first, *rest) if row["differ"]}
    assert differing["optimizer.learning_rate"] == ["0.0001", "0.0001", "1e-05"]
    assert differing.keys() == {"optimizer.learning_rate", "proxy_synthesis.ratio"}


def test_each_row_is_compared_with_the_baseline_on_its_schedule():
    names = ("baseline", "ps", "memvir_baseline", "memvir", "ps_memvir")
    found = [make(f"/r/{name}", seeded(cars196, name, 0), origin=of_cars(name)) for name in names]
    rows = {row["name"]: row for row in tables.scores(runs.group(found))}
    assert {name: row["baseline"] for name, row in rows.items()} == {
        "baseline": "",
        "ps": "baseline",
        "memvir_baseline": "",
        "memvir": "memvir_baseline",
        "ps_memvir": "memvir_baseline",
    }
    recall, precision, _ = rows["memvir"]["cells"]
    assert (
        recall["published"] == "86.11 ± 0.19 (MemVir README, 5 runs); 86.8 (MemVir paper, table 4)"
    )
    assert precision["published"] == "38.29 ± 0.21 (MemVir README, 5 runs)"
    # There are no published scores of the baseline on MemVir's schedule.
    assert {cell["published"] for cell in rows["memvir_baseline"]["cells"]} == {""}
    assert rows["baseline"]["cells"][0]["published"].startswith("83.08 ± 0.21 (PS README")
    for row in tables.commands(runs.group(found)):
        name = row["name"].removesuffix(", seed 0")
        assert f"--config=configs/cars196.py:{name} " in row["command"]
        assert "--config." not in row["command"]


def test_backbones_before_training_have_one_row_each():
    scores = {"recall@1": 0.5, "r_precision": 0.25, "map@r": 0.125}
    small = {"data.image_size": 96, "data.resize": 112}
    found = [
        make("a/0", seeded(cars196, "ps", 0)),
        make("a/1", seeded(cars196, "baseline", 0)),
        make("a/2", seeded(cars196, "memvir", 0, **small)),
        make("a/3", seeded(folder, "ps", 0)),
    ]
    measured = [dataclasses.replace(run, zero_shot=scores) for run in found[:3]] + found[3:]
    values = ["50.00", "25.00", "12.50"]
    assert tables.zero_shot(runs.group(measured)) == 2 * [{"name": "bninception", "values": values}]


@pytest.mark.parametrize("loss", ["", "_proxy_nca", "_softmax"])
def test_baseline_returns_the_variant_on_the_same_schedule(loss):
    plain = loss.removeprefix("_") or "baseline"
    long = f"memvir_baseline{loss}"
    expected = {
        plain: plain,
        f"ps{loss}": plain,
        f"memvir{loss}": long,
        f"ps_memvir{loss}": long,
        long: long,
    }
    for variant, baseline in expected.items():
        assert comparison.baseline(variant, cars196.get_config) == baseline
    # Without a schedule of its own, MemVir has the usual baseline.
    assert comparison.baseline(f"memvir{loss}", folder.get_config) == plain


def test_the_table_has_a_column_of_published_scores_if_there_are_any():
    scores = {"plain": [0.5, 0.52], "mixed": [0.6, 0.62]}
    without = comparison.table("R@1", scores, baselines={}, published={"plain": "", "mixed": ""})
    assert "published" not in without
    with_one = comparison.table(
        "R@1", scores, baselines={}, published={"plain": "", "mixed": "61 (me)"}
    )
    head, _, *rows = with_one.splitlines()
    assert head.endswith("| published |")
    assert [row.split(" | ")[-1] for row in rows] == [" |", "61 (me) |"]


def test_the_command_reproduces_the_configuration():
    given = {"seed": 3, "optimizer.decay_epochs": (3,), "data.root": "my images"}
    origin = origin_of("folder", "ps_memvir", {}, given)
    config = seeded(folder, "ps_memvir", **given)
    (row,) = tables.commands(runs.group([make("/r/a b", config, origin=origin)]))
    assert shlex.split(row["command"].replace("\\\n", "")) == [
        "dml-jax",
        "train",
        "--config=folder:ps_memvir",
        "--workdir=/r/a b",
        "--config.seed=3",
        "--config.optimizer.decay_epochs=(3,)",
        "--config.data.root=my images",
    ]


def test_the_command_of_a_fork_names_its_origin(tmp_path):
    files.write_text(tmp_path / run_directory.CONFIG, "{}")
    files.write_json(tmp_path / run_directory.FORK, {"from": "/runs/a b"})
    run = make(tmp_path, folder.get_config(), origin=origin_of("folder", "", {}, {}))
    (row,) = tables.commands(runs.group([run]))
    assert "--config=folder \\\n" in row["command"]
    assert "--fork_from='/runs/a b'" in row["command"]


def test_an_origin_is_read_as_it_was_written(tmp_path):
    origin = of_cars("memvir", seed=1, epochs=3)
    assert len(origin.published) == 2
    files.write_json(tmp_path / run_directory.ORIGIN, origin.to_json())
    assert run_directory.read_origin(tmp_path) == origin
    assert run_directory.read_origin(tmp_path / "elsewhere") is None


def test_refuses_a_configuration_with_a_path_as_data_set_name(tmp_path):
    config = folder.get_config()
    config = config.copy_and_resolve_references()
    config.data.name = "../../elsewhere/evil"
    files.write_text(tmp_path / run_directory.CONFIG, config.to_json())
    with pytest.raises(ValueError, match=r"config\.data\.name is '\.\./\.\./elsewhere/evil'"):
        runs.read(tmp_path)


def test_refuses_to_compare_runs_on_different_images():
    config = folder.get_config()
    first, second = make("/r/a", config), make("/r/b", config, names=("a", "c"))
    with pytest.raises(ValueError, match="/r/b and /r/a were tested on different images"):
        runs.group([first, second])
    with pytest.raises(ValueError, match="/r/a is given twice"):
        runs.group([first, first])


def test_refuses_an_unfinished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        runs.read(tmp_path)
    config = seeded(folder, "baseline", 0, **{"data.root": "images"})
    files.write_text(tmp_path / run_directory.CONFIG, config.to_json())
    with pytest.raises(FileNotFoundError, match="has not finished"):
        runs.read(tmp_path)
