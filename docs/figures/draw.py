"""Draws the figures of docs/methods.md and docs/study.md into this folder.

python docs/figures/draw.py
"""

import csv
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from scipy import stats

from dml_jax import proxy_synthesis

FOLDER = Path(__file__).parent
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3b6fb6", "#d9822b", "#2f9e5b", "#8a5bb0", "#b5b5b5"
STYLE = {
    "figure.dpi": 100,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "dml_jax",  # The same file at each run.
}


def draw_proxy_synthesis() -> None:
    """Draws three classes on the unit circle, and two synthetic classes between them."""
    colors, names = (BLUE, ORANGE, PURPLE), ("class 1", "class 2", "class 3")
    proxies = jnp.stack([_point(angle) for angle in (14, 82, 150)])
    embeddings = jnp.stack([_point(angle) for angle in (5, 75, 140, 24, 92, 160)])
    labels, partner = jnp.array([0, 1, 2, 0, 1, 2]), jnp.array([1, 2, 0, 4, 5, 3])
    lam = jnp.asarray(0.6)
    mixed = proxy_synthesis.synthesize(
        embeddings, proxies, labels, lam=lam, partner=partner, ratio=1 / 3
    )

    figure, axes = plt.subplots(figsize=(5.2, 2.9))
    arc = np.radians(np.linspace(-8, 172, 200))
    axes.plot(np.cos(arc), np.sin(arc), color=GREY, lw=1)
    for index, synthetic in enumerate(mixed.embeddings[6:]):
        pair = embeddings[index], embeddings[partner[index]]
        axes.plot(*zip(*pair, strict=True), color=GREY, ls="--", lw=1)
        chord = lam * pair[0] + (1 - lam) * pair[1]
        axes.plot(*chord, "x", color=GREEN, ms=6)
        axes.annotate("", synthetic, chord, arrowprops={"arrowstyle": "->", "color": GREEN})
        axes.plot(*synthetic, "o", color=GREEN, ms=6)
        axes.plot(*mixed.proxies[3 + index], "*", color=GREEN, ms=14, mec="white", mew=0.8)
        if index == 0:
            axes.text(*(chord - 0.05), "λe + (1 − λ)e′", color=GREEN, ha="right", va="top")
            x, y = 1.1 * synthetic
            axes.text(x, y, "synthetic class", color=GREEN)
    for label, (color, name) in enumerate(zip(colors, names, strict=True)):
        axes.plot(*embeddings[labels == label].T, "o", color=color, ms=6)
        axes.plot(*proxies[label], "*", color=color, ms=14, mec="white", mew=0.8)
        x, y = 1.09 * proxies[label]
        axes.text(x, y, name, color=color, ha=("left", "center", "right")[label])
    axes.plot([], [], "o", color="0.3", label="embedding")
    axes.plot([], [], "*", color="0.3", ms=11, label="proxy")
    axes.legend(loc="lower center", frameon=False, ncols=2)
    axes.set(aspect="equal", xlim=(-1.35, 1.6), ylim=(-0.15, 1.22))
    axes.axis("off")
    _save(figure, "proxy_synthesis.svg")


def draw_memvir(num_steps: int = 3, step_gap: int = 2) -> None:
    """Draws the steps that step t reads, and the blocks of logits that it computes."""
    stride = step_gap + 1
    figure, (line, blocks) = plt.subplots(
        1, 2, figsize=(7.6, 2.9), gridspec_kw={"width_ratios": (1.35, 1)}
    )
    for age in range(num_steps * stride + 1):
        used = age % stride == 0
        color = BLUE if age == 0 else GREEN if used else "white"
        line.add_patch(Rectangle((-age, 0), 0.8, 0.8, facecolor=color, edgecolor="0.5"))
        if used:
            text = "t" if age == 0 else f"t−{age}"
            line.text(0.4 - age, -0.35, text, ha="center", va="top")
    line.text(0.4, -1.35, "current step", color=BLUE, ha="center", va="top")
    text = f"virtual classes: N = {num_steps} earlier steps"
    line.text(-num_steps * stride, -1.35, text, color=GREEN, va="top")
    line.annotate("", (-stride + 0.8, 1.05), (0, 1.05), arrowprops={"arrowstyle": "<->"})
    line.text(-stride / 2 + 0.4, 1.15, f"M = {step_gap}", ha="center", va="bottom")
    line.set(aspect="equal", xlim=(-num_steps * stride - 0.3, 2.2), ylim=(-2.4, 2.2))

    names = ["t", *(f"t−{stride * k}" for k in range(1, num_steps + 1))]
    for row in range(num_steps + 1):
        for column in range(num_steps + 1):
            computed = row == 0 or column == 0
            color = BLUE if computed else "#e4e4e4"
            origin = (column, num_steps - row)
            blocks.add_patch(Rectangle(origin, 0.94, 0.94, facecolor=color))
            x, y = column + 0.47, num_steps - row + 0.47
            text, ink = ("now", "white") if computed else ("cached", "0.35")
            blocks.text(x, y, text, color=ink, ha="center", va="center", fontsize=7.5)
        blocks.text(-0.15, num_steps - row + 0.47, names[row], ha="right", va="center")
        blocks.text(row + 0.47, num_steps + 1.1, names[row], ha="center", va="bottom")
    blocks.text((num_steps + 1) / 2, num_steps + 1.75, "proxies of step", ha="center")
    blocks.text(-1.35, (num_steps + 1) / 2, "rows of step", rotation=90, va="center")
    blocks.set(aspect="equal", xlim=(-1.7, num_steps + 1), ylim=(-0.1, num_steps + 2.3))
    for axes in (line, blocks):
        axes.axis("off")
    _save(figure, "memvir.svg")


def draw_study() -> None:
    """Draws each method's gain over the bare loss on photographs, with 95 % intervals."""
    files = {
        "groceries, 348 pixels": "grocery_runs.csv",
        "groceries, 144 pixels": "grocery144_runs.csv",
        "cars": "cars_runs.csv",
    }
    methods = {"ps": ("Proxy Synthesis", GREEN), "memvir": ("MemVir", BLUE)}
    figure, panels = plt.subplots(1, len(files), figsize=(7.6, 2.7), width_ratios=(4, 4, 2))
    for axes, (title, file) in zip(panels, files.items(), strict=True):
        scores: dict[str, list[float]] = {}
        with (FOLDER.parent / file).open() as rows:
            for row in csv.DictReader(rows):
                if row["phase"] == "final" and row["fold"] == "all":
                    scores.setdefault(row["variant"], []).append(100 * float(row["map@r"]))
        losses = [x.removeprefix("baseline_") for x in scores if x.startswith("baseline_")]
        for number, (method, (name, color)) in enumerate(methods.items()):
            tests = [
                stats.ttest_ind(scores[f"{method}_{x}"], scores[f"baseline_{x}"], equal_var=False)
                for x in losses
            ]
            low, high = np.array([test.confidence_interval() for test in tests]).T
            middle = (low + high) / 2
            at = np.arange(len(losses)) + 0.3 * number - 0.15
            axes.errorbar(at, middle, middle - low, fmt="o", ms=5, color=color, label=name)
        axes.axhline(0, color=GREY, lw=1)
        axes.set_xticks(range(len(losses)), [x.replace("_", "\n") for x in losses])
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("MAP@R minus bare loss, points")
    panels[0].legend(frameon=False, loc="lower left")
    _save(figure, "study.svg")


def _point(degrees: float) -> np.ndarray:
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], np.float32)


def _save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(FOLDER / name, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    plt.switch_backend("agg")
    with plt.rc_context(STYLE):
        draw_proxy_synthesis()
        draw_memvir()
        draw_study()
