"""Tests that published scores are consistent and agree with the docstrings of the configs."""

import re
import statistics

import pytest

from dml_jax import losses, retrieval
from dml_jax.configs import cars196, cub200, inshop, sop
from dml_jax.published import PUBLISHED, describe

MODULES = {"cars196": cars196, "cub200": cub200, "sop": sop, "inshop": inshop}
METRICS = list(retrieval.SCORES.values())

# The eight baseline runs of the Proxy Synthesis README on CARS196, sorted by each metric
# separately. The README prints the second MAP@R of Norm-SoftMax as 25.56.
MISPRINT = 25.56
RUNS = {
    ("norm_softmax", "recall@1"): [83.38, 83.25, 83.25, 83.18, 83.05, 82.90, 82.83, 82.79],
    ("norm_softmax", "r_precision"): [35.85, 35.51, 35.28, 35.28, 35.24, 34.95, 34.87, 34.84],
    ("norm_softmax", "map@r"): [25.56, 25.26, 25.00, 24.93, 24.90, 24.59, 24.57, 24.56],
    ("proxy_nca", "recall@1"): [83.74, 83.69, 83.62, 83.32, 83.06, 83.00, 82.97, 82.84],
    ("proxy_nca", "r_precision"): [36.08, 35.85, 35.79, 35.66, 35.66, 35.63, 35.47, 35.43],
    ("proxy_nca", "map@r"): [25.66, 25.52, 25.37, 25.36, 25.33, 25.26, 25.22, 25.04],
}


def score(name, method, loss, source, metric="recall@1"):
    (found,) = [x for x in PUBLISHED[name][method, loss] if x.source.startswith(source)]
    return found.scores[metric]


def agrees(score, runs):
    assert score.mean == pytest.approx(statistics.mean(runs), abs=0.0051)
    # Some of the deviations are truncated, not rounded.
    assert score.std == pytest.approx(statistics.stdev(runs), abs=0.01)


@pytest.mark.parametrize(("loss", "metric"), RUNS)
def test_the_baselines_are_means_of_eight_runs_and_of_the_best_five(loss, metric):
    runs = RUNS[loss, metric]
    eight = score("cars196", "baseline", loss, "PS README", metric)
    agrees(eight, runs)
    five = list(runs[:5])
    if (loss, metric) == ("norm_softmax", "map@r"):
        five[1] = MISPRINT
    best = score("cars196", "baseline", loss, "MemVir README, best 5", metric)
    agrees(best, five)


def test_every_published_gain_is_positive():
    """Swapped columns in a table would make some gain negative."""
    sets = {"ps": ("PS paper", list(PUBLISHED)), "memvir": ("MemVir paper", list(PUBLISHED)[:3])}
    without = {
        "ps": ("virtual_softmax",),
        "memvir": ("virtual_softmax", "sphereface", "soft_triple"),
    }
    for method, (source, names) in sets.items():
        for name in names:
            for loss in losses.names():
                if loss in without[method]:
                    assert (method, loss) not in PUBLISHED[name]
                    continue
                baseline = [x.scores["recall@1"] for x in PUBLISHED[name]["baseline", loss]]
                gain = score(name, method, loss, source).mean - min(baseline).mean
                assert 0.4 < gain < 5.1, (name, method, loss)
    assert ("memvir", "norm_softmax") not in PUBLISHED["inshop"]


def test_describe_lists_all_sources_of_a_baseline():
    baseline = PUBLISHED["cars196"]["baseline", "proxy_nca"]
    assert describe(baseline, "recall@1") == (
        "83.28 ± 0.36 (PS README, 8 runs); "
        "83.49 ± 0.29 (MemVir README, best 5 of the PS README's 8 runs); "
        "83.7 (PS paper, table 6); 82.0 (MemVir paper, table 4)"
    )
    assert describe(baseline, "map@r").count("(") == 2
    assert describe(PUBLISHED["sop"]["baseline", "proxy_anchor"], "recall@1") == (
        "79.1 (PS paper, table 6 and supplement C.2); "
        "78.9 (MemVir paper, table 4 and supplement C.2.1); 79.2 (Proxy-Anchor README)"
    )
    assert describe(PUBLISHED["sop"]["ps", "softmax"], "map@r") == ""
    assert len(PUBLISHED["cub200"]["baseline", "cosface"]) == 1


@pytest.mark.parametrize("name", MODULES)
def test_the_docstrings_of_the_configs_have_the_published_scores(name):
    words = " ".join(MODULES[name].__doc__.split())
    assert MODULES[name].PUBLISHED is PUBLISHED[name]
    baseline = score(name, "baseline", "norm_softmax", "PS paper")
    assert f"Norm-SoftMax {baseline}, " in words
    for method, title in (("ps", "PS"), ("memvir", "MemVir")):
        if (method, "norm_softmax") in PUBLISHED[name]:
            number = score(name, method, "norm_softmax", f"{title} paper")
            assert f"with {title} {number}" in words


def test_the_docstring_of_cars196_has_the_means_of_the_readmes():
    for loss in ("norm_softmax", "proxy_nca"):
        cells = []
        for method in ("baseline", "ps", "memvir"):
            readme = PUBLISHED["cars196"][method, loss][0].scores
            cells.append(" / ".join(f"{readme[metric].mean:.2f}" for metric in METRICS))
        assert re.search(rf"^{loss} +{'  '.join(cells)}$", cars196.__doc__, re.MULTILINE)
