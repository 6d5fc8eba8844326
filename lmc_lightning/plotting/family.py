"""Pictures of a family of runs: barriers and distances over branch points and steps, and who left whom."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from lmc_lightning.plotting.barriers import DEFINITION
from lmc_lightning.plotting.style import FAINT, FIGURE_SIZE, INK, drawing, legend_beside, shades

if TYPE_CHECKING:
    import pandas as pd

Points = Sequence[tuple[float, float, float]]
"""x, y and the standard error of y, NaN where there is none."""

DISTANCES = {
    "l2": ("Distance of parameters", "‖θ_A − θ_B‖₂"),
    "relative": ("Distance of parameters, relative", "‖θ_A − θ_B‖₂ / ‖θ_A − θ_0‖₂"),
    "cosine": ("Direction from the start", "cosine of θ_A − θ_0 and θ_B − θ_0"),
    "disagreement": ("Disagreement", "share of examples predicted differently"),
    "kl": ("Divergence of predictions", "KL(A ‖ B) [nats]"),
    "jsd": ("Divergence of predictions", "Jensen–Shannon divergence [nats]"),
    "logit_cosine": ("Cosine of logits", "mean cosine of the logits of A and B"),
    "ensemble_accuracy": ("Accuracy of the averaged softmax", "accuracy"),
}
"""What each distance between runs is, and its formula or unit."""

_ROW = 0.32  # [inches]


def plot_lines(
    lines: Mapping[str, Points],
    ax: Axes | None = None,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    caption: str = "",
    legend: str = "",
    threshold: float | None = None,
) -> Axes:
    """Points with error bars, joined in the order given; a line for each label, dark to light.

    Args:
        lines: points by label, e.g. barrier against branch point by later epoch.
        ax: where to draw; by default in a new figure.
        title: of the figure.
        xlabel: with unit.
        ylabel: with unit.
        caption: definition, data, policy.
        legend: what the labels are.
        threshold: a level to be marked.

    Raises:
        ValueError: there is no finite point.
    """
    known = {label: [p for p in points if isfinite(p[0] + p[1])] for label, points in lines.items()}
    known = {label: points for label, points in known.items() if points}
    if not known:
        raise ValueError(f"There is nothing to draw: {len(lines)} lines without a finite point.")
    with drawing(ax, title, caption, x=xlabel, y=ylabel) as ax:
        for (label, points), color in zip(known.items(), shades(len(known)), strict=True):
            _draw_line(ax, label, np.array(points), color)
        if threshold is not None:
            ax.axhline(threshold, color=FAINT, linestyle=":", linewidth=1.2, label=f"{threshold:g}")
        if len(known) > 1 or threshold is not None:
            legend_beside(ax, title=legend)
    return ax


def _draw_line(ax: Axes, label: str, points: NDArray[np.float64], color: Any) -> None:
    x, y, stderr = points.T
    ax.plot(x, y, color=color, marker="o", markersize=4.5, label=label)
    bars = np.isfinite(stderr) & (stderr > 0)
    if bars.any():
        ax.errorbar(x[bars], y[bars], stderr[bars], fmt="none", ecolor=color, elinewidth=1.2, capsize=2.5)


def plot_over_branch_points(means: "pd.DataFrame", ax: Axes | None = None, *, level: str | None = None) -> Axes:
    """The barrier against the branch point, a line for each later epoch.

    Args:
        means: rows of ``seed_means`` for one split, metric and kind of pair, by ascending branch step.
        ax: where to draw; by default in a new figure.
        level: name of what the column ``level`` has of the trunk at the branch point, to draw against that instead.
    """
    first: Any = means.iloc[0]
    apart, x = means[means["step"] > means["branch_step"]], "branch_step" if level is None else "level"
    against = "branch point" if level is None else "pre-training"
    place = "branch point k₁ [optimizer steps]"
    return plot_lines(
        {f"{epoch:.0f}": _points(rows, x) for epoch, rows in apart.groupby("later_epoch")},
        ax,
        title=f"Barrier against {against}",
        xlabel=f"trunk's {first.split} {level} at k₁ (joined in the order of k₁)" if level else place,
        ylabel=f"{first.split} {first.metric} barrier",
        caption=_caption(means, first),
        legend="later epoch",
    )


def _caption(means: "pd.DataFrame", first: Any) -> str:
    over = "seeds" if means["stderr_seed"].notna().any() else "data"
    between = {"trunk": "child against trunk", "siblings": "siblings"}.get(first.pair, first.pair)
    policy = next(iter(means["policy"].dropna().unique()), None)
    statistics = f" · BatchNorm: {policy}" if policy else ""
    examples = f" · {int(means['n'].max()):,} examples" if means["n"].notna().any() else ""
    return f"{DEFINITION}, {between} · bars: standard error over {over}\n{first.split}{examples}{statistics}"


def plot_distances(means: "pd.DataFrame", ax: Axes | None = None) -> Axes:
    """A distance between two runs against the step, a line for each branch point and kind of pair.

    Args:
        means: rows of ``seed_means`` for one definition and split.
        ax: where to draw; by default in a new figure.
    """
    first: Any = means.iloc[0]
    title, ylabel = DISTANCES[first.definition]
    data = f" · {first.split}, {int(means['n'].max()):,} examples" if isinstance(first.split, str) else ""
    lines = {}
    keys: Any
    for keys, rows in means.groupby(["branch_step", "pair"], dropna=False):
        lines[f"{keys[0]:.0f}" + ("" if keys[1] == "trunk" else f", {keys[1]}")] = _points(rows, "step")
    return plot_lines(
        lines,
        ax,
        title=title,
        xlabel="optimizer step",
        ylabel=ylabel,
        caption=f"A: trunk or sibling, B: child · mean over the pairs of a branch point{data}",
        legend="branch step",
    )


def _points(means: "pd.DataFrame", x: str) -> Points:
    """With the error over seeds where there is one, else over data."""
    spread = means["stderr_seed"].fillna(means["stderr_data"])
    return list(zip(means[x], means["value"], spread, strict=True))


def plot_family_tree(
    runs: Sequence[tuple[str, int, int, str]],
    ax: Axes | None = None,
    *,
    marks: Sequence[int] = (),
    caption: str = "",
) -> Axes:
    """The trunk as the lowest line, and above it each child from the step at which it left.

    Args:
        runs: name, first and last step, and what is unusual about it, the trunk first.
        ax: where to draw; by default in a new figure.
        marks: steps at which weights were kept.
        caption: what was the same for all.

    Raises:
        ValueError: there is no run.
    """
    if not runs:
        raise ValueError("Expected at least the trunk, got no runs.")
    starts = sorted({start for _, start, _, _ in runs[1:]})
    palette = dict(zip(starts, shades(len(starts)), strict=True))
    size = (FIGURE_SIZE[0], max(FIGURE_SIZE[1], 1.6 + _ROW * len(runs)))
    with drawing(ax, "Family", caption, x="optimizer step", size=size) as ax:
        for row, (name, start, end, note) in enumerate(runs):
            color = palette[start] if row else INK
            ax.plot([start, end], [row, row], color=color, linestyle="--" if note else "-", label=name)
            kept = [step for step in marks if start <= step <= end]
            ax.plot(kept, [row] * len(kept), color=color, marker="o", markersize=3.5, linestyle="none", label="_kept")
            if row:
                ax.plot([start, start], [0, row], color=color, linewidth=0.8, alpha=0.6, label="_fork")
        ax.set_yticks(range(len(runs)), [f"{name} ({note})" if note else name for name, _, _, note in runs])
        ax.grid(axis="y", visible=False)
    return ax
