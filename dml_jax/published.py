"""Scores that the authors published for the four public benchmarks, with their sources.

All are in percent, with BN-Inception, 512 dimensions and the conventional evaluation. The papers
report R@1 alone, without standard deviations. The READMEs report each metric at its best epoch on
the test classes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dml_jax import retrieval


class Score(NamedTuple):
    """A published number, in percent."""

    mean: float
    std: float | None = None
    """Standard deviation over the runs, or None if the source does not report it."""

    def __str__(self) -> str:
        """Returns the score with as many decimals as its source."""
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


class Reference(NamedTuple):
    """The scores that one source reports of a variant."""

    source: str
    scores: Mapping[str, Score]
    """The scores by metric, with the names of `retrieval.SCORES`; some metrics may be missing."""


def describe(references: Sequence[Reference], metric: str) -> str:
    """Returns one metric of all references that report it, with their sources, as text.

    >>> paper = Reference("paper", {"recall@1": Score(84.7)})
    >>> readme = Reference("README", {"recall@1": Score(84.25, 0.31), "map@r": Score(26.51, 0.18)})
    >>> describe([readme, paper], "recall@1"), describe([readme, paper], "map@r")
    ('84.25 ± 0.31 (README); 84.7 (paper)', '26.51 ± 0.18 (README)')
    """
    return "; ".join(f"{x.scores[metric]} ({x.source})" for x in references if metric in x.scores)


_SETS = ("cub200", "cars196", "sop", "inshop")

# Table 6 of the Proxy Synthesis paper: R@1 without and with PS for each of _SETS.
_PS_PAPER = {
    "softmax": ((64.2, 64.9), (81.5, 84.3), (76.3, 77.6), (90.4, 90.9)),
    "norm_softmax": ((64.9, 66.0), (83.3, 84.7), (78.6, 79.6), (90.4, 91.5)),
    "sphereface": ((65.4, 66.6), (83.6, 85.1), (78.9, 79.4), (90.3, 91.6)),
    "cosface": ((65.7, 66.6), (83.6, 84.6), (78.6, 79.3), (90.7, 91.4)),
    "arcface": ((66.1, 66.8), (83.7, 84.7), (78.8, 79.7), (91.0, 91.7)),
    "proxy_nca": ((65.1, 66.4), (83.7, 84.5), (78.1, 79.1), (90.0, 91.4)),
    "soft_triple": ((65.4, 66.6), (84.5, 85.3), (78.3, 79.5), (91.1, 91.8)),
    "proxy_anchor": ((68.4, 69.2), (86.1, 86.9), (79.1, 79.8), (91.5, 91.9)),
}
# Table 4 of the MemVir paper: R@1 without and with MemVir for each of _SETS but In-Shop.
_MEMVIR_PAPER = {
    "softmax": ((64.2, 66.8), (81.5, 86.5), (76.3, 77.8)),
    "norm_softmax": ((64.9, 67.3), (83.3, 86.8), (78.6, 79.6)),
    "cosface": ((65.7, 67.7), (83.6, 86.6), (78.6, 79.7)),
    "arcface": ((66.1, 67.4), (83.7, 86.5), (78.8, 80.0)),
    "proxy_nca": ((64.3, 68.3), (82.0, 86.5), (78.1, 79.2)),
    "proxy_anchor": ((67.7, 69.0), (84.9, 86.7), (78.9, 79.7)),
}
# The rows of the READMEs: mean and standard deviation of R@1, RP and MAP@R.
_PS_README = {
    ("baseline", "norm_softmax"): ((83.08, 0.21), (35.23, 0.34), (24.92, 0.35)),
    ("ps", "norm_softmax"): ((84.25, 0.31), (36.76, 0.20), (26.51, 0.18)),
    ("baseline", "proxy_nca"): ((83.28, 0.36), (35.70, 0.21), (25.35, 0.18)),
    ("ps", "proxy_nca"): ((84.21, 0.21), (36.66, 0.18), (26.42, 0.20)),
}
_MEMVIR_README = {
    ("memvir", "norm_softmax"): ((86.11, 0.19), (38.29, 0.21), (28.46, 0.22)),
    ("memvir", "proxy_nca"): ((86.19, 0.39), (37.97, 0.13), (28.17, 0.14)),
}
# The PS README sorts its eight runs by each metric separately. The MemVir README takes the first
# five of each row as baselines. In the row of Norm-SoftMax's MAP@R the second number is a misprint,
# 25.56 for 25.26, as the PS README's mean of the eight runs shows. The MemVir README's mean, 25.19,
# includes the misprint; the correct mean is 25.13.
_MEMVIR_BASELINES = {
    ("baseline", "norm_softmax"): ((83.22, 0.12), (35.43, 0.26), (25.19, 0.34)),
    ("baseline", "proxy_nca"): ((83.49, 0.29), (35.81, 0.17), (25.45, 0.14)),
}
# R@1 from the README of Proxy-Anchor's authors, for each of _SETS.
_PROXY_ANCHOR_README = (69.1, 86.4, 79.2, 91.9)

Variant = tuple[str, str]
"""Method and loss, as returned by `variants.parse_variant`."""


def _readme(source: str, rows: Mapping[Variant, tuple]) -> list[tuple[Variant, Reference]]:
    metrics = retrieval.SCORES.values()
    return [
        (variant, Reference(source, dict(zip(metrics, (Score(*x) for x in row), strict=True))))
        for variant, row in rows.items()
    ]


def _recall(source: str, method: str, loss: str, percent: float) -> tuple[Variant, Reference]:
    return (method, loss), Reference(source, {"recall@1": Score(percent)})


def _paper(table: str, supplement: str, loss: str) -> str:
    """Returns the source of a score; settings of Proxy-Anchor are in the papers' supplements."""
    return f"{table} and supplement {supplement}" if loss == "proxy_anchor" else table


_PS_TABLE_6, _MEMVIR_TABLE_4, _README = "ps-table6", "memvir-table4", "readme"


def _papers(data_set: str) -> dict[str, list[tuple[Variant, Reference]]]:
    """Returns the rows of the published tables for a data set, by table."""
    number = _SETS.index(data_set)
    tables: dict[str, list] = {_PS_TABLE_6: [], _MEMVIR_TABLE_4: [], _README: []}
    for loss, pairs in _PS_PAPER.items():
        source = _paper("PS paper, table 6", "C.2", loss)
        for method, percent in zip(("baseline", "ps"), pairs[number], strict=True):
            tables[_PS_TABLE_6].append(_recall(source, method, loss, percent))
    # The MemVir paper has no In-Shop.
    for loss, rows in _MEMVIR_PAPER.items() if number < 3 else ():
        source = _paper("MemVir paper, table 4", "C.2.1", loss)
        for method, percent in zip(("baseline", "memvir"), rows[number], strict=True):
            tables[_MEMVIR_TABLE_4].append(_recall(source, method, loss, percent))
    if data_set == "cars196":
        tables[_README] += _readme("PS README, 8 runs", _PS_README)
        tables[_README] += _readme("MemVir README, 5 runs", _MEMVIR_README)
        five = "MemVir README, best 5 of the PS README's 8 runs"
        tables[_README] += _readme(five, _MEMVIR_BASELINES)
    return tables


def _of(data_set: str) -> dict[Variant, list[Reference]]:
    """Returns all references of a data set; the baselines that both papers report occur once."""
    tables = _papers(data_set)
    found = tables[_README] + tables[_PS_TABLE_6]
    for (method, loss), reference in tables[_MEMVIR_TABLE_4]:
        repeated = reference.scores["recall@1"].mean == _PS_PAPER[loss][_SETS.index(data_set)][0]
        if method != "baseline" or not repeated:
            found.append(((method, loss), reference))
    of_proxy_anchor = _PROXY_ANCHOR_README[_SETS.index(data_set)]
    found.append(_recall("Proxy-Anchor README", "baseline", "proxy_anchor", of_proxy_anchor))
    return _by_variant(found)


def _by_variant(found: Sequence[tuple[Variant, Reference]]) -> dict[Variant, list[Reference]]:
    by_variant: dict[Variant, list[Reference]] = {}
    for variant, reference in found:
        by_variant.setdefault(variant, []).append(reference)
    return by_variant


PUBLISHED = {data_set: _of(data_set) for data_set in _SETS}
"""The published scores of each variant, by the name of the benchmark's config."""

TABLES = {
    table: {data_set: _by_variant(rows) for data_set in _SETS if (rows := _papers(data_set)[table])}
    for table in (_README, _PS_TABLE_6, _MEMVIR_TABLE_4)
}
"""The published tables: `readme` of both READMEs, `ps-table6` and `memvir-table4` of the papers.
By table and data set: the scores of each variant, in the order of the table."""
