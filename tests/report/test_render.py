import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dml_jax import data
from dml_jax._utils import files
from dml_jax.evaluation import embedding_files
from dml_jax.report import ranking, render, runs, tables, thumbnails
from dml_jax.training import run_directory
from dml_jax.training.run import train
from dml_jax.training.variants import origin_of
from tests.helpers import chromium, tiny

ROOT = Path(__file__).parents[2]
HOSTILE = "<!--<script>console.error('let in')<img onerror=alert(1) src=x>"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A baseline with two seeds, the second a copy, and a run with both regularisers."""
    root = tmp_path_factory.mktemp("report")
    images = tiny.write_images(root / "images")
    (images / "test" / "class0" / "bad.png").write_text("skipped by all runs and by the report")
    (images / "test" / "class1").rename(images / "test" / HOSTILE)
    plain = {"model__backbone": "conv4", "model__stem": None}
    settings = plain | {"epochs": 2, "data__unreadable": "skip"}
    origin = origin_of("configs/folder.py", "baseline", {}, {"epochs": 2})
    train(tiny.config(images, **settings), root / "plain" / "seed0", origin=origin)
    shutil.copytree(root / "plain" / "seed0", root / "plain" / "seed1")
    config = run_directory.read_config(root / "plain" / "seed1")
    config.seed = 1
    files.write_json(root / "plain" / "seed1" / run_directory.CONFIG, json.loads(config.to_json()))
    train(tiny.config(images, "ps_memvir", **settings), root / "both")
    return root


@pytest.fixture(scope="module")
def groups(root):
    return runs.group([runs.read(root / x) for x in ("plain/seed0", "plain/seed1", "both")])


@pytest.fixture(scope="module")
def written(root, groups):
    path = root / "report.html"
    with run_directory.locked(root / "both"):  # Readers need no lock.
        render.write(groups, path, log=lambda _: None)
    return path


def content(path):
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', text)
    return json.loads(found[1])


def unpack(text):
    return np.frombuffer(base64.b64decode(text), "<u2").astype(int)


def test_the_page_has_the_scores_of_the_runs(groups, written):
    shown = content(written)
    labels = unpack(shown["images"]["labels"])
    assert shown["images"]["names"] == list(groups[0].first.queries.names)
    assert [one["name"] for one in shown["runs"]] == ["plain", "both"]
    for group, one in zip(groups, shown["runs"], strict=True):
        near = unpack(one["neighbours"]).reshape(-1, one["perQuery"])
        right = labels[near] == labels[unpack(shown["queries"])][:, None]
        scores = group.first.scores
        np.testing.assert_allclose(right[:, 0].mean(), scores["recall@1"])
        np.testing.assert_allclose(right[:, :8].any(axis=1).mean(), scores["recall@8"])
        np.testing.assert_allclose(
            unpack(one["precision"]).mean() / 1e4, scores["map@r"], atol=1e-4
        )
        wrong = sum(pair["first_as_second"] + pair["second_as_first"] for pair in one["confused"])
        assert wrong == round((1 - scores["recall@1"]) * len(labels))
    assert all(float(cost["memory"].removesuffix(" GB")) > 0 for cost in tables.costs(groups))
    assert [curve["seed"] for curve in shown["curves"]] == [0, 1, 0]
    lines = shown["curves"][2]["lines"]["map@r"]
    assert lines[-1][2] == round(groups[1].first.scores["map@r"], 5)
    grown = [[line[2] for line in one["lines"]["memvir_classes"]] for one in shown["curves"]]
    assert grown[:2] == [[], []] and grown[2][-1] == 2 * tiny.TRAIN_CLASSES


def test_the_training_map_has_synthetic_and_remembered_points(written):
    (drawn,) = content(written)["training"]
    counts = np.bincount(drawn["kind"], minlength=7)
    assert counts[0] == tiny.TRAIN_CLASSES * tiny.IMAGES
    # Of the test classes as well; images come first.
    assert counts[6] == tiny.TEST_CLASSES * tiny.IMAGES
    images = counts[0] + counts[6]
    assert len(drawn["names"]) == images and set(drawn["kind"][:images]) == {0, 6}
    of_test = np.array(drawn["kind"]) == 6
    assert set(np.array(drawn["label"])[of_test]) == set(range(6, 10))
    assert drawn["classes"][6] == HOSTILE and drawn["names"][counts[0]].startswith("test/<!--")
    assert counts[1] == tiny.TRAIN_CLASSES
    assert 0 < counts[2] == counts[3] <= counts[0]
    # The memory holds 2 * 2 steps of 8 images and of all classes.
    assert counts[4] == 4 * 8 and counts[5] == 4 * tiny.TRAIN_CLASSES
    synthetic = np.isin(drawn["kind"], (2, 3))
    assert ((np.array(drawn["second"]) >= 0) == synthetic).all()
    assert (np.array(drawn["second"]) != drawn["label"])[synthetic].all()
    assert sorted(set(drawn["age"])) == [0, 1, 2, 3, 4]


def test_the_page_has_the_confidence_between_classes(written):
    shown = content(written)
    assert shown["positions"][0] == 0 and shown["positions"][-1] == 1
    assert len(shown["confidences"]) == 2
    for curve in shown["confidences"]:
        assert len(curve) == len(shown["positions"]) and 0 < min(curve) < max(curve) < 1


def test_thumbnails_show_the_images(root, groups, written):
    sheet = re.findall(r'class="sheet">(.*?)</script>', written.read_text(encoding="utf-8"))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet[0]))).convert("RGB"))
    side = content(written)["images"]["side"]
    for i, name in enumerate(groups[0].first.queries.names):
        row, column = divmod(i, thumbnails.COLUMNS)
        ours = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]
        image = data.decode((root / "images" / name).read_bytes(), name)
        expected = image.mean(axis=(0, 1))
        np.testing.assert_allclose(ours.mean(axis=(0, 1)), expected, atol=4)


def test_a_large_test_set_shows_a_subset_of_queries_with_all_neighbours(groups, monkeypatch):
    first = groups[0].first
    ranked = [ranking.rank(group.first.queries, group.first.gallery) for group in groups]
    monkeypatch.setattr(render, "MOST_IMAGES", 20)
    queries, shown = render._choose(first, ranked)
    assert 0 < len(queries) < len(first.queries.labels) and len(shown) <= 20
    assert set(queries) <= set(shown)
    for one in ranked:
        assert set(one.neighbours[queries].ravel()) <= set(shown)


def test_refuses_images_that_differ_from_those_of_the_run(root, groups):
    first = groups[0].first
    renamed = tuple(f"other/{name}" for name in first.queries.names)
    path = root / "renamed" / run_directory.EMBEDDINGS
    shutil.copytree(first.folder, path.parent, dirs_exist_ok=True)
    embedding_files.save_embeddings(
        path, first.queries.embeddings, first.queries.labels, renamed, first.queries.class_names
    )
    with pytest.raises(ValueError, match="the test images in .* differ from those"):
        render.write(runs.group([runs.read(path.parent)]), root / "no.html")
    assert not (root / "no.html").exists()
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        render.write(groups, root / "no" / "page.html")


def test_the_program_writes_the_page(root, tmp_path):
    out = tmp_path / "page.html"
    folders = [str(root / "plain" / seed) for seed in ("seed0", "seed1")]
    command = [sys.executable, "scripts/report.py", *folders, "--checkpoint=best_map"]
    command.append(f"--out={out}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and len(content(out)["curves"]) == 2
    assert "at the best_map checkpoint" in out.read_text(encoding="utf-8")


@pytest.mark.slow
@chromium.needed
def test_the_page_works_in_a_browser(written, tmp_path):
    with chromium.Page(tmp_path / "profile") as browser:
        browser.open(written.as_uri())
        assert not [
            url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))
        ]

        # Hovering over the map shows an image with its neighbours.
        assert browser.get("document.querySelectorAll('#map-panel .thumb').length") == 0
        x, y, width, height = browser.place("#map-canvas")
        for i in range(20):
            for j in range(20):
                browser.mouse("mouseMoved", x + width * i / 20, y + height * j / 20)
            if browser.get("!!document.querySelector('#map-panel .thumb')"):
                break
        subject = "document.querySelector('#map-panel .subject')"
        assert "blob:" in browser.get(f"getComputedStyle({subject}).backgroundImage")
        assert browser.get("document.querySelectorAll('#map-panel .strip .thumb').length") == 8

        # The arrow keys select images too.
        before = browser.get(f"{subject}.dataset.image")
        browser.get("document.querySelector('#map-canvas').focus()")
        seen = set()
        for key in ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"):
            browser.key(key)
            seen.add(browser.get(f"{subject}.dataset.image"))
        assert seen - {before}

        # The gallery and the table of classes can be sorted.
        precisions = (
            "[...document.querySelectorAll('.result')].map(x => Number(x.dataset.precision))"
        )
        worst = browser.get(precisions)
        assert worst == sorted(worst) and worst[0] < worst[-1]
        order = "document.querySelector('#gallery-order')"
        browser.get(f"{order}.value = 'best'; {order}.dispatchEvent(new Event('change'))")
        best = browser.get(precisions)
        assert best == sorted(best, reverse=True) and best[0] > worst[0]
        frames = (
            "document.querySelectorAll('.result .strip .correct, .result .strip .wrong').length"
        )
        assert browser.get(frames) == 8 * 8 * 2
        column = (
            "[...document.querySelectorAll('#class-table tbody tr')]"
            ".map(row => row.cells[1].textContent)"
        )
        browser.click("#class-table thead th:nth-child(2) button")
        names = browser.get(column)
        assert names == sorted(names) and HOSTILE in names
        browser.click("#class-table thead th:nth-child(2) button")
        assert browser.get(column) == names[::-1]

        # No chart is wider than its place.
        overflow = (
            "[...document.querySelectorAll('.chart')].map(x => "
            "x.querySelector('.main-svg').getBoundingClientRect().right"
            " - x.getBoundingClientRect().right)"
        )
        assert max(browser.get(overflow)) <= 1

        # The map of training classes in the colours of the steps; one run is no choice.
        field = "getComputedStyle(document.getElementById('training-{}-field')).display"
        assert browser.get(field.format("run")) == "none"
        assert browser.get(field.format("colour")) != "none"
        canvas = "document.getElementById('training-canvas')"
        by_class = browser.get(f"{canvas}.toDataURL()")
        colouring = "document.getElementById('training-colour')"
        browser.get(f"{colouring}.value = 'step'; {colouring}.dispatchEvent(new Event('change'))")
        browser.until(f"{canvas}.toDataURL() !== {json.dumps(by_class)}")
        lines = "document.querySelectorAll('#confidence-charts .scatterlayer .trace').length"
        assert browser.get(lines) == 2

        # Curves over time, the other run, and no errors in the console.
        browser.get("document.querySelector('input[name=axis][value=\"1\"]').click()")
        assert (
            browser.get("document.querySelector('#curve-charts .xtitle').textContent") == "seconds"
        )
        browser.get("chooseRun(1)")
        assert browser.get("document.querySelectorAll('select[data-run]')[1].value") == "1"
        assert browser.problems == []


@pytest.mark.slow
@chromium.needed
def test_the_page_fits_a_phone(written, tmp_path):
    with chromium.Page(tmp_path / "profile", width=390, dark=True, touch=True) as browser:
        browser.open(written.as_uri())
        assert browser.get("document.documentElement.scrollWidth") == 390
        assert browser.get("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        assert browser.problems == []
