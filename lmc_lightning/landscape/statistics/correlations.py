"""Correlations between quantities over the runs of a study, with what seeds and hyper-parameter cells allow to say."""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

Method: TypeAlias = Literal["pearson", "spearman", "kendall"]
Scope: TypeAlias = Literal["all", "between_cells", "within_cells", "partial"]
ErrorBar: TypeAlias = Literal["std", "stderr", "ci95"]
Values: TypeAlias = NDArray[np.float64]
Coefficient: TypeAlias = Callable[[Values, Values], float]

MIN_RUNS = 5
"""Fewer runs, or cells, give a coefficient but neither an interval nor a p-value."""


def correlations(
    table: pd.DataFrame,
    metrics: Sequence[str],
    targets: Sequence[str],
    *,
    cells: Sequence[str] = (),
    nodes: Sequence[str] = (),
    given: Sequence[str] = (),
    methods: Sequence[Method] = ("pearson", "spearman", "kendall"),
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How metrics go along with targets over runs, one row for each metric, target, method and scope.

    Scopes: ``"all"`` runs together; with ``cells``, ``"between_cells"`` of the cells' means and ``"within_cells"`` of
    the deviations from them, which hyper-parameters cannot explain; with ``given``, ``"partial"``: of what a linear fit
    on those columns leaves (of the ranks, for Spearman's and Kendall's).

    Intervals are percentiles of a bootstrap that resamples the nodes (seeds) of each cell and keeps the cells. p-values
    are of permutations: of runs within their cells for ``"within_cells"`` and, where there are cells, for
    ``"partial"``; of the cells' means; and of all runs where there are no cells. Runs of different cells are not
    exchangeable, so that ``"all"`` has no p-value beside cells. Below 5 runs, or cells, there is neither. ``p_holm`` is
    Holm's correction over the metric × target pairs of one method and scope.

    Args:
        table: a row for each run, or for each pair of runs.
        metrics: columns.
        targets: columns.
        cells: columns of hyper-parameters, whose combinations are the cells.
        nodes: columns that name the network, or the two networks, of a row; by default every row is one of its own.
        given: columns whose influence is taken out, e.g. the width.
        methods: of ``"pearson"``, ``"spearman"``, ``"kendall"``.
        num_resamples: of bootstrap and permutations.
        confidence: of the intervals.
        seed: of both.

    Returns:
        Columns metric, target, method, scope, r, low, high, p, p_holm, n, num_cells. Rows with a missing value in
        either column are left out of their pair.

    Raises:
        ValueError: a column is missing.
    """
    missing = {*metrics, *targets, *cells, *nodes, *given} - set(table.columns)
    if missing:
        raise ValueError(f"The table has no column {sorted(missing)}. Columns: {', '.join(map(str, table.columns))}.")
    asked: dict[Scope, bool] = {"all": True, "between_cells": bool(cells), "within_cells": bool(cells)}
    scopes = [scope for scope, wanted in {**asked, "partial": bool(given)}.items() if wanted]
    rows = []
    for metric, target in product(metrics, targets):
        runs = _Runs.of(table.dropna(subset=[metric, target, *given]), metric, target, cells, nodes, given)
        for scope, method in product(scopes, methods):
            found = runs.correlation(scope, method, num_resamples, confidence, np.random.default_rng(seed))
            rows.append({"metric": metric, "target": target, "method": method, "scope": scope, **found})
    columns = ["metric", "target", "method", "scope", "r", "low", "high", "p", "p_holm", "n", "num_cells"]
    result = pd.DataFrame(rows, columns=columns)
    result["p_holm"] = result.groupby(["method", "scope"])["p"].transform(lambda p: holm(p.to_numpy()))
    return result


class _Runs:
    """Two columns of numbers over runs, with the cell and the nodes of each."""

    def __init__(self, x: Values, y: Values, cell: NDArray[np.int64], nodes: NDArray[np.int64], given: Values) -> None:
        self.x, self.y, self.cell, self.nodes, self.given = x, y, cell, nodes, given

    @classmethod
    def of(
        cls,
        table: pd.DataFrame,
        metric: str,
        target: str,
        cells: Sequence[str],
        nodes: Sequence[str],
        given: Sequence[str],
    ) -> "_Runs":
        cell = np.zeros(len(table), np.int64)
        if cells:
            cell = table.groupby(list(cells), dropna=False).ngroup().to_numpy().astype(np.int64)
        names = [pd.factorize(pd.concat([table[c] for c in nodes]))[0].reshape(len(nodes), -1)] if nodes else []
        members = names[0].T if names else np.arange(len(table))[:, None]
        columns = [table[c].to_numpy(float) for c in (metric, target, *given)]
        return cls(columns[0], columns[1], cell, members, np.stack([np.ones(len(table)), *columns[2:]], 1))

    def correlation(
        self, scope: Scope, method: Method, num_resamples: int, confidence: float, rng: np.random.Generator
    ) -> dict[str, float]:
        x, y, cell = self._seen(scope, method)
        found = {"r": _safe(METHODS[method], x, y), "low": np.nan, "high": np.nan, "p": np.nan}
        found |= {"n": len(x), "num_cells": len(np.unique(self.cell))}
        if len(x) < MIN_RUNS or np.isnan(found["r"]):
            return found
        resampled = [self._resampled(rng)._seen(scope, method)[:2] for _ in range(num_resamples)]
        drawn = [r for r in (_safe(METHODS[method], *pair) for pair in resampled) if not np.isnan(r)]
        tail = (1 - confidence) / 2
        found["low"], found["high"] = np.quantile(drawn, [tail, 1 - tail]) if drawn else (np.nan, np.nan)
        if scope != "all" or found["num_cells"] == 1:
            more = sum(
                abs(_safe(METHODS[method], x[_permuted(cell, rng)], y)) >= abs(found["r"]) - 1e-12
                for _ in range(num_resamples)
            )
            found["p"] = (more + 1) / (num_resamples + 1)
        return found

    def _seen(self, scope: Scope, method: Method) -> tuple[Values, Values, NDArray[np.int64]]:
        """The numbers that a scope correlates, and the blocks within which they are exchangeable."""
        x, y, cell = self.x, self.y, self.cell
        if scope == "between_cells":
            x, y = (np.array([v[cell == c].mean() for c in np.unique(cell)]) for v in (x, y))
            return x, y, np.zeros(len(x), np.int64)
        if scope == "within_cells":
            return _centered(x, cell), _centered(y, cell), cell
        if scope == "partial":
            given = self.given
            if method != "pearson":
                x, y = stats.rankdata(x), stats.rankdata(y)
                given = np.column_stack([given[:, 0], *(stats.rankdata(g) for g in given[:, 1:].T)])
            x, y = (v - given @ np.linalg.lstsq(given, v, rcond=None)[0] for v in (x, y))
        return x, y, cell

    def _resampled(self, rng: np.random.Generator) -> "_Runs":
        """The rows of nodes drawn with replacement in each cell; a pair comes as often as both its nodes do."""
        times = np.ones(len(self.x), np.int64)
        for c in np.unique(self.cell):
            inside = self.cell == c
            own = np.unique(self.nodes[inside])
            counts = np.bincount(rng.integers(len(own), size=len(own)), minlength=len(own))
            times[inside] = np.prod(counts[np.searchsorted(own, self.nodes[inside])], axis=1)
        rows = np.repeat(np.arange(len(self.x)), times)
        return _Runs(self.x[rows], self.y[rows], self.cell[rows], self.nodes[rows], self.given[rows])


def _pearson(x: Values, y: Values) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def _spearman(x: Values, y: Values) -> float:
    return _pearson(stats.rankdata(x), stats.rankdata(y))


def _kendall(x: Values, y: Values) -> float:
    """τ-b; of few runs by all pairs at once, which is much faster than scipy's sorting."""
    if len(x) > 200:
        return float(stats.kendalltau(x, y).statistic)
    signs = [np.sign(v[:, None] - v[None, :]).ravel() for v in (x, y)]
    return float(signs[0] @ signs[1] / np.sqrt((signs[0] @ signs[0]) * (signs[1] @ signs[1])))


METHODS: dict[Method, Coefficient] = {"pearson": _pearson, "spearman": _spearman, "kendall": _kendall}


def _safe(coefficient: Coefficient, x: Values, y: Values) -> float:
    """The coefficient, NaN where one side does not vary beyond rounding."""
    varied = (len(v) > 1 and np.ptp(v) > 1e-12 * max(1e-300, float(np.abs(v).max())) for v in (x, y))
    return coefficient(x, y) if all(varied) else float("nan")


def _centered(values: Values, cell: NDArray[np.int64]) -> Values:
    centered = values.copy()
    for c in np.unique(cell):
        centered[cell == c] -= values[cell == c].mean()
    # Differences of equal numbers leave their rounding, which ranks would take for an order.
    centered[np.abs(centered) < 1e-12 * np.abs(values).max()] = 0.0
    return centered


def _permuted(cell: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of the rows that keeps every row in its cell."""
    order = np.arange(len(cell))
    for c in np.unique(cell):
        order[cell == c] = rng.permutation(order[cell == c])
    return order


def holm(p: Iterable[float]) -> Values:
    """Holm's step-down p-values, NaN staying NaN: max over smaller ones of (m − i)·p_(i), at most 1."""
    raw = np.asarray(list(p), dtype=float)
    known = np.flatnonzero(~np.isnan(raw))
    adjusted = np.full_like(raw, np.nan)
    order = known[np.argsort(raw[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * raw[order]))
    return adjusted


def group_means(
    table: pd.DataFrame, values: Sequence[str], by: Sequence[str], *, error: ErrorBar = "stderr"
) -> pd.DataFrame:
    """Means over the runs of each group with error bars of a named kind: columns value, mean, low, high, error, n.

    ``"std"`` is the spread of single runs, ``"stderr"`` that of the mean, ``"ci95"`` its Student interval; NaN below 2
    runs, ``"ci95"`` below 5.

    Raises:
        ValueError: another kind of error bar.
    """
    if error not in ("std", "stderr", "ci95"):
        raise ValueError(f"`error` is 'std', 'stderr' or 'ci95', got {error!r}.")
    rows = []
    for group, members in table.groupby(list(by), dropna=False):
        for value in values:
            numbers = members[value].dropna().to_numpy(float)
            n = len(numbers)
            spread = float(numbers.std(ddof=1)) if n > 1 else np.nan
            half = {"std": spread, "stderr": spread / np.sqrt(max(n, 1))}.get(error)
            if half is None:
                half = float(stats.t.ppf(0.975, n - 1)) * spread / np.sqrt(n) if n >= MIN_RUNS else np.nan
            mean = float(numbers.mean()) if n else np.nan
            found = {"value": value, "mean": mean, "low": mean - half, "high": mean + half, "error": error, "n": n}
            rows.append(dict(zip(by, group, strict=True)) | found)
    return pd.DataFrame(rows, columns=[*by, "value", "mean", "low", "high", "error", "n"])
