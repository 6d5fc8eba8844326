"""Phases of learning over load and temperature: where a landscape is connected, flat, and its networks alike."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lmc_lightning.plotting.phases import PhaseMaps

Phase: TypeAlias = Literal["I", "II", "III", "IV-A", "IV-B", ""]

COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "test_accuracy": "val_acc",
        "train_loss": "train_loss_epoch",
        "lambda_max": "hessian/lambda_max",
        "trace": "hessian/trace",
        "connectivity": "curve/train_error/signed_deviation",
        "similarity": "similarity/logits",
        "distance": "distance/l2",
    }
)
"""The numbers of a study that the maps show. With ``val_fraction: 0`` validation is the test set."""

LOGARITHMIC = ("lambda_max", "trace")
"""Averaged over seeds and drawn as log₁₀."""


@dataclass(frozen=True)
class Thresholds:
    """What is large, negative and similar.

    Yang et al. (arXiv 2107.11228) draw their boundaries by eye, for the sizes of λ_max and CKA depend on network and
    data; only the connectivity has a zero of its own. So where these are None they lie midway between the least and the
    greatest of the map.

    Args:
        lambda_max: at or above it the landscape is sharp; None: the geometric middle of the map.
        connectivity: below it networks are poorly connected. The default, −.02, is a ridge of two points of error, the
            bound of stability of Frankle et al. (arXiv 1912.05671). A positive connectivity, a curve on which networks
            are better than at its ends, counts as connected.
        similarity: at or above it connected, flat networks are alike; None: the middle of the map.
    """

    lambda_max: float | None = None
    connectivity: float = -0.02
    similarity: float | None = None


def phase_table(table: pd.DataFrame, load: str, temperature: str, columns: Mapping[str, str] = COLUMNS) -> pd.DataFrame:
    """One row for each load and temperature: means over seeds, and over pairs of them, of the numbers of the taxonomy.

    Args:
        table: from :func:`~lmc_lightning.experiments.collect.collect`, of a study whose pairs differ in the seed.
        load: the hyper-parameter that is load-like, e.g. ``"width"``.
        temperature: the one that is temperature-like, e.g. ``"batch_size"``.
        columns: names in the table of the numbers in ``COLUMNS``; those of λ_max and trace become their log₁₀, NaN
            where not positive.

    Returns:
        Columns load, temperature, ``num_runs`` and the keys of ``columns``; NaN where nothing is known.

    Raises:
        ValueError: the study does not vary ``load`` or ``temperature``.
    """
    missing = [name for name in (load, temperature) if name not in table.columns]
    if missing:
        raise ValueError(f"The study varies no {missing[0]!r}. Its columns: {', '.join(map(str, table.columns))}.")
    known = table[table["kind"].isin(["cell", "pair"]) & table["value"].notna()]
    last = known.sort_values("step", kind="stable").drop_duplicates(["task", "name"], keep="last")
    by = [load, temperature]
    found = last[last["kind"] == "cell"].groupby(by)["cell"].nunique().rename("num_runs").to_frame()
    for quantity, name in columns.items():
        own = last[last["name"] == name]
        values = own["value"].astype(float)
        if quantity in LOGARITHMIC:
            values = pd.Series(np.log10(values.where(values > 0)), own.index)
        found[quantity] = own.assign(value=values).groupby(by)["value"].mean()
    return found.reset_index()


def with_phases(points: pd.DataFrame, thresholds: Thresholds | None = None) -> tuple[pd.DataFrame, Thresholds]:
    """A table of :func:`phase_table` with a column ``phase``, and the thresholds, none of them None.

    Yang et al., arXiv 2107.11228: I poorly connected and sharp, II poorly connected and flat, III connected and sharp,
    IV-A connected and flat with networks that differ, IV-B with networks that are alike. Empty where a number that
    decides is not known.
    """
    given = thresholds or Thresholds()
    sharp = _middle(points["lambda_max"]) if given.lambda_max is None else float(np.log10(given.lambda_max))
    alike = _middle(points["similarity"]) if given.similarity is None else given.similarity
    used = replace(given, lambda_max=float(10**sharp), similarity=alike)
    columns = (points[name].astype(float) for name in ("lambda_max", "connectivity", "similarity"))
    phases = [_phase(h, c, s, sharp, used.connectivity, alike) for h, c, s in zip(*columns, strict=True)]
    return points.assign(phase=phases), used


def _middle(values: pd.Series) -> float:
    return float((values.min() + values.max()) / 2)


def _phase(
    lambda_max: float, connectivity: float, similarity: float, sharp: float, connected: float, alike: float
) -> Phase:
    if np.isnan([lambda_max, connectivity]).any():
        return ""
    if connectivity < connected:
        return "I" if lambda_max >= sharp else "II"
    if lambda_max >= sharp:
        return "III"
    return "" if np.isnan(similarity) else "IV-B" if similarity >= alike else "IV-A"


def _order(values: pd.Series) -> pd.Series:
    """What hyper-parameters are sorted by: lists, such as the sizes of hidden layers, are texts in tables."""
    return values.map(lambda v: json.loads(v) if isinstance(v, str) and v.startswith("[") else v)


def phase_maps(
    table: pd.DataFrame,
    load: str,
    temperature: str,
    *,
    thresholds: Thresholds | None = None,
    columns: Mapping[str, str] = COLUMNS,
) -> PhaseMaps:
    """What :func:`~lmc_lightning.plotting.phases.plot_phases` draws; arguments as above."""
    points, used = with_phases(phase_table(table, load, temperature, columns), thresholds)
    loads, temperatures = ([*points.sort_values(n, key=_order)[n].unique()] for n in (load, temperature))

    def grid(name: str) -> NDArray[np.object_]:
        wide = points.pivot(index=temperature, columns=load, values=name)
        return wide.loc[temperatures, loads].to_numpy(object)

    return PhaseMaps(
        loads=loads,
        temperatures=temperatures,
        load=load,
        temperature=temperature,
        values={name: grid(name).astype(float) for name in columns},
        phases=np.where(pd.isna(grid("phase")), "", grid("phase")),
        rule=f"sharp: λ_max ≥ {used.lambda_max:.3g} · poorly connected: connectivity < {used.connectivity:.3g} · "
        f"alike: CKA ≥ {used.similarity:.3g}",
    )
