"""Which figures are drawn of the barriers between the runs of a family, and under which keys."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.callbacks.pairs.family_table import family_table, seed_means
from lmc_lightning.callbacks.pairs.pair import PAIR_KINDS, Pair, pairs_of, variant_of
from lmc_lightning.landscape.paths.barrier import Barrier
from lmc_lightning.plotting.barriers import plot_barrier_curves, plot_barrier_map, plot_gap_curves
from lmc_lightning.plotting.family import DISTANCES, plot_distances, plot_family_tree, plot_over_branch_points
from lmc_lightning.plotting.style import deferred
from lmc_lightning.recording import Record

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Figures = dict[str, Callable[[], "Figure"]]


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
        further = _over_branch_points(table) | _of_distances(table) | {"family_tree": _tree(family)}
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
            common: dict[str, Any] = {"title": _title(pair), "ends": pair.ends}
            curves = [(f"epoch {epoch}", result) for epoch, result in found.items()]
            figures[full.replace("barrier/", "barrier_curves/", 1)] = deferred(plot_barrier_curves, curves, **common)
            if with_gaps:
                gaps = list(found.items())
                figures[full.replace("barrier/", "barrier_gaps/", 1)] = deferred(plot_gap_curves, gaps, **common)
    if cells:
        variant = pairs[0].second.variant
        parts = [key.replace("barrier/", "barrier_map/", 1), variant, kind.replace("trunk", "")]
        between = "child against trunk" if kind == "trunk" else "siblings against each other"
        title = f"{key}: {between}" + (f", {variant}" if variant else "")
        figures["/".join(part for part in parts if part)] = deferred(plot_barrier_map, cells, title=title)
    return figures


def _title(pair: Pair) -> str:
    child = pair.second
    where = f"after {child.branch_step} steps" if child.k1 is None else f"at epoch {child.k1}"
    return f"Branched {where}" + (f": {child.variant}" if child.variant else "")


def _over_branch_points(table: "pd.DataFrame") -> Figures:
    """The barrier at each later epoch against the branch point, and against how well the trunk did there."""
    means = seed_means(table[(table["definition"] == "barrier") & table["group"].isna()]).sort_values("branch_step")
    figures: Figures = {}
    keys: Any
    for keys, found in means.groupby(["split", "metric", "pair"], dropna=False):
        split, metric, pair = keys
        if not (found["step"] > found["branch_step"]).any():
            continue
        name = f"{split}_{metric}" if metric in ("loss", "error") else metric.removeprefix("−")
        name += "" if pair == "trunk" else f"/{pair}"
        figures[f"barrier_branch_points/{name}"] = deferred(plot_over_branch_points, found)
        level, levels = _pretraining(table, split)
        levelled = found.assign(level=found["branch_step"].map(levels))
        if levelled.loc[found["step"] > found["branch_step"], "level"].notna().any():
            figures[f"barrier_pretraining/{name}"] = deferred(plot_over_branch_points, levelled, level=level)
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


def _of_distances(table: "pd.DataFrame") -> Figures:
    """Each distance against the step, a line for each branch point and kind of pair."""
    means = seed_means(table[table["definition"].isin(list(DISTANCES))])
    figures: Figures = {}
    keys: Any
    for keys, found in means.groupby(["definition", "split"], dropna=False):
        definition, split = keys
        of_split = f"{split}_" if isinstance(split, str) else ""
        figures[f"distance_curves/{of_split}{definition}"] = deferred(plot_distances, found)
    return figures


def _tree(family: Family) -> Callable[[], "Figure"]:
    """Which run left the trunk when, and where weights were kept."""
    runs = [("trunk", 0, family.end.step, "" if family.trunk.status == "completed" else family.trunk.status)]
    for child in sorted(family.children, key=lambda c: (c.branch_step or 0, c.child or 0)):
        note = "" if child.status == "completed" else child.status
        runs.append((child.name, child.branch_step or 0, child.end_step or child.branch_step or 0, note))
    noise = family.configuration.get("noise", "")
    caption = f"{len(family.children)} children · noise {noise} · dots: weights kept for the trunk's epochs"
    return deferred(plot_family_tree, runs, marks=list(family.trunk.epochs.values()), caption=caption)
