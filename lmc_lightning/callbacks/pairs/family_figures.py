"""Figures of the barriers between the runs of a family."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import isnan, nan
from typing import TYPE_CHECKING, Any

import numpy as np

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.callbacks.pairs.family_table import family_table, seed_means
from lmc_lightning.callbacks.pairs.pair import PAIR_KINDS, Pair, pairs_of, variant_of
from lmc_lightning.landscape.paths.barrier import Barrier
from lmc_lightning.plotting.barriers import barrier_caption, plot_barrier_curves, plot_barrier_heatmap, plot_gap_curves
from lmc_lightning.plotting.family import Points, plot_family_tree, plot_lines
from lmc_lightning.plotting.style import figure_of
from lmc_lightning.recording import Record

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Figures = dict[str, Callable[[], "Figure"]]

DEFINITION = "barrier: largest height above the chord"


def family_figures(
    family: Family,
    barriers: Mapping[tuple[str, int], Barrier],
    records: Iterable[Record] | None = None,
    name: str | None = None,
) -> Figures:
    """One figure of curves for each pair, and one map of branch point × later epoch for each metric and kind of pair.

    Args:
        family: whose completed children are drawn.
        barriers: by (key, later step).
        records: what else was found; where given, the further figures are drawn too.
        name: the suffix of an instance's keys.
    """
    figures: Figures = {}
    for kind in PAIR_KINDS:
        completed = [p for p in pairs_of(family, [kind]) if p.second.status == "completed"]
        for key in sorted({key.rsplit("/k1_", 1)[0] for key, _ in barriers}):
            figures |= _of_metric(key, kind, completed, barriers, with_gaps=records is not None)
    if records is not None:
        table = family_table(records)
        table = table[table["run"].isin([child.name for child in family.children])]
        further = _over_branch_points(table) | _of_distances(table) | {"family_tree": partial(_tree, family)}
        suffixes = [part for part in (variant_of(family), name) if part]
        figures |= {"/".join([key, *suffixes]): draw for key, draw in further.items()}
    return figures


def _of_metric(
    key: str, kind: str, pairs: Sequence[Pair], barriers: Mapping[tuple[str, int], Barrier], *, with_gaps: bool
) -> Figures:
    figures: Figures = {}
    cells: dict[tuple[str, int], list[Barrier]] = {}
    for pair in pairs:
        full, steps = f"{key}/{pair.label}", pair.second.epochs
        found = {epoch: barriers[full, step] for epoch, step in steps.items() if (full, step) in barriers}
        for epoch, result in found.items():
            cells.setdefault((pair.second.label, epoch), []).append(result)
        if found:
            figures[full.replace("barrier/", "barrier_curves/", 1)] = partial(_curves, found, pair)
            if with_gaps:
                figures[full.replace("barrier/", "barrier_gaps/", 1)] = partial(_gaps, found, pair)
    if cells:
        parts = [key.replace("barrier/", "barrier_map/", 1), pairs[0].second.variant, kind.replace("trunk", "")]
        figures["/".join(part for part in parts if part)] = partial(_map, cells, key, kind, pairs[0].second.variant)
    return figures


def _title(pair: Pair) -> str:
    child = pair.second
    where = f"after {child.branch_step} steps" if child.k1 is None else f"at epoch {child.k1}"
    return f"Branched {where}" + (f": {child.variant}" if child.variant else "")


def _ends(pair: Pair) -> tuple[str, str]:
    if pair.kind == "trunk":
        return "trunk", "child"
    return f"child {pair.first.child}", f"child {pair.second.child}"


def _curves(found: Mapping[int, Barrier], pair: Pair) -> "Figure":
    """The path between two runs at each later epoch."""
    curves = [(f"epoch {epoch}", result) for epoch, result in found.items()]
    return figure_of(plot_barrier_curves(curves, title=_title(pair), ends=_ends(pair)))


def _gaps(found: Mapping[int, Barrier], pair: Pair) -> "Figure":
    """The gap to the chord alone, in which the barriers of networks at different levels compare."""
    return figure_of(plot_gap_curves(list(found.items()), title=_title(pair), ends=_ends(pair)))


def _map(
    cells: Mapping[tuple[str, int], Sequence[Barrier]], key: str, kind: str, variant: str | None = None
) -> "Figure":
    """Branch point × later epoch, the mean over the pairs of a branch point."""
    points = list(dict.fromkeys(label for label, _ in cells))
    epochs = sorted({epoch for _, epoch in cells})
    values = np.full((len(points), len(epochs)), np.nan)
    for (label, epoch), results in cells.items():
        values[points.index(label), epochs.index(epoch)] = np.mean([result.barrier for result in results])
    first = next(iter(cells.values()))[0]
    most = max(map(len, cells.values()))
    over = f", mean of {most} pairs" if most > 1 else ""
    between = "child against trunk" if kind == "trunk" else "siblings against each other"
    caption = f"{DEFINITION}{over}\n{barrier_caption(first)}"
    names = [_branch_point(label) for label in points]
    title = f"{key}: {between}" + (f", {variant}" if variant else "")
    return figure_of(plot_barrier_heatmap(values, names, epochs, title=title, caption=caption))


def _branch_point(label: str) -> str:
    """``5`` of ``k1_005``, ``step 500`` of ``k1_step_000500``."""
    number = label.rsplit("_", 1)[-1]
    return f"step {int(number)}" if "_step_" in label else str(int(number))


def _over_branch_points(table: "pd.DataFrame") -> Figures:
    """The barrier at each later epoch against the branch point, and against how well the trunk did there."""
    means = seed_means(table[(table["definition"] == "barrier") & table["group"].isna()]).sort_values("branch_step")
    figures: Figures = {}
    for (split, metric, pair), found in _groups(means, ["split", "metric", "pair"]):
        level, levels = _pretraining(table, split)
        name = f"{split}_{metric}" if metric in ("loss", "error") else metric.removeprefix("−")
        suffix = "" if pair == "trunk" else f"/{pair}"
        common = {"ylabel": f"{split} {metric} barrier", "caption": _caption(found, pair), "legend": "later epoch"}
        by_step: dict[str, Points] = {}
        by_level: dict[str, Points] = {}
        for (epoch,), rows in _groups(found[found["step"] > found["branch_step"]], ["later_epoch"]):
            points = [(r.branch_step, r.value, _spread(r)) for r in rows.itertuples()]
            by_step[str(int(epoch))] = points
            by_level[str(int(epoch))] = [(levels.get(step, nan), y, stderr) for step, y, stderr in points]
        if by_step:
            options = {"title": "Barrier against branch point", "xlabel": "branch point k₁ [optimizer steps]", **common}
            figures[f"barrier_branch_points/{name}{suffix}"] = partial(_lines, by_step, options)
        if any(not isnan(x) for points in by_level.values() for x, _, _ in points):
            options = {"title": "Barrier against pre-training", **common}
            options["xlabel"] = f"trunk's {split} {level} at k₁ (joined in the order of k₁)"
            figures[f"barrier_pretraining/{name}{suffix}"] = partial(_lines, by_level, options)
    return figures


def _pretraining(table: "pd.DataFrame", split: str) -> tuple[str, dict[float, float]]:
    """The trunk's own accuracy by branch step, or its loss where there is no accuracy."""
    at_branch: Any = table[
        (table["split"] == split)
        & (table["pair"] == "trunk")
        & (table["definition"] == "barrier")
        & table["group"].isna()
        & (table["step"] == table["branch_step"])
    ]
    errors = {r.step: 1 - r.own_first for r in at_branch.itertuples() if r.metric == "error"}
    losses = {r.step: r.own_first for r in at_branch.itertuples() if r.metric == "loss"}
    return ("accuracy", errors) if errors else ("loss", losses)


def _spread(row: object) -> float:
    """The error over seeds where there is one, else over data."""
    over_seeds = float(getattr(row, "stderr_seed", nan))
    return float(getattr(row, "stderr_data", nan)) if isnan(over_seeds) else over_seeds


def _caption(means: "pd.DataFrame", pair: str) -> str:
    over = "seeds" if means["stderr_seed"].notna().any() else "data"
    between = {"trunk": "child against trunk", "siblings": "siblings"}.get(pair, pair)
    policy = next(iter(means["policy"].dropna().unique()), None)
    statistics = f" · BatchNorm: {policy}" if policy else ""
    examples = f" · {int(means['n'].max()):,} examples" if means["n"].notna().any() else ""
    return f"{DEFINITION}, {between} · bars: standard error over {over}\n{means['split'].iloc[0]}{examples}{statistics}"


def _of_distances(table: "pd.DataFrame") -> Figures:
    """Each distance against the step, a line for each branch point and kind of pair."""
    means = seed_means(table[table["definition"].isin(list(_DISTANCES))])
    figures: Figures = {}
    for (definition, split), found in _groups(means, ["definition", "split"]):
        lines: dict[str, Points] = {}
        for (branch_step, pair), rows in _groups(found, ["branch_step", "pair"]):
            label = f"{branch_step:.0f}" + ("" if pair == "trunk" else f", {pair}")
            lines[label] = [(r.step, r.value, _spread(r)) for r in rows.itertuples()]
        of_split = f"{split}_" if isinstance(split, str) else ""
        title, ylabel = _DISTANCES[definition]
        data = f" · {split}, {int(found['n'].max()):,} examples" if of_split else ""
        options = {
            "title": title,
            "xlabel": "optimizer step",
            "ylabel": ylabel,
            "caption": f"A: trunk or sibling, B: child · mean over the pairs of a branch point{data}",
            "legend": "branch step",
        }
        figures[f"distance_curves/{of_split}{definition}"] = partial(_lines, lines, options)
    return figures


_DISTANCES = {
    "l2": ("Distance of parameters", "‖θ_A − θ_B‖₂"),
    "relative": ("Distance of parameters, relative", "‖θ_A − θ_B‖₂ / ‖θ_A − θ_0‖₂"),
    "cosine": ("Direction from the start", "cosine of θ_A − θ_0 and θ_B − θ_0"),
    "disagreement": ("Disagreement", "share of examples predicted differently"),
    "kl": ("Divergence of predictions", "KL(A ‖ B) [nats]"),
    "jsd": ("Divergence of predictions", "Jensen–Shannon divergence [nats]"),
    "logit_cosine": ("Cosine of logits", "mean cosine of the logits of A and B"),
    "ensemble_accuracy": ("Accuracy of the averaged softmax", "accuracy"),
}


def _groups(table: "pd.DataFrame", columns: list[str]) -> Iterator[tuple[Any, Any]]:
    """The rows of each combination of values."""
    return iter(table.groupby(columns, dropna=False))


def _lines(lines: Mapping[str, Points], options: Mapping[str, Any]) -> "Figure":
    return figure_of(plot_lines(lines, **options))


def _tree(family: Family) -> "Figure":
    """Which run left the trunk when, and where weights were kept."""
    runs = [("trunk", 0, family.end.step, "" if family.trunk.status == "completed" else family.trunk.status)]
    for child in sorted(family.children, key=lambda c: (c.branch_step or 0, c.child or 0)):
        note = "" if child.status == "completed" else child.status
        runs.append((child.name, child.branch_step or 0, child.end_step or child.branch_step or 0, note))
    noise = family.configuration.get("noise", "")
    caption = f"{len(family.children)} children · noise {noise} · dots: weights kept for the trunk's epochs"
    return figure_of(plot_family_tree(runs, marks=list(family.trunk.epochs.values()), caption=caption))
