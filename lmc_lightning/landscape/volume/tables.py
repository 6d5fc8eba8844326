"""Volumes of several networks, in one landscape or in several, as tables: ranks, order and how stable it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd
import torch
from scipy.stats import kendalltau

from lmc_lightning.landscape.volume.result import Volume

RANKED_BY = "mean_log_r"
"""A mean over all directions, where log E r^P is that of the longest few."""


def volume_row(volume: Volume) -> dict[str, Any]:
    """All numbers of one volume."""
    low, median, high = volume.quantiles((0.05, 0.5, 0.95)).tolist()
    return {
        "tau": volume.tau,
        "level": volume.level,
        "cutoff": volume.cutoff,
        "log_volume": volume.log_volume,
        "log_volume_bound": volume.log_volume_bound,
        "log_volume_normalised": volume.log_volume_normalised,
        "log_mean_r_pow": volume.log_mean_r_pow,
        "log_mean_r_pow_stderr": volume.log_mean_r_pow_stderr,
        "mean_log_r": volume.mean_log_r,
        "mean_log_r_stderr": volume.mean_log_r_stderr,
        "radius_q05": low,
        "radius_median": median,
        "radius_q95": high,
        "effective_sample_size": volume.effective_sample_size,
        "fraction_censored": volume.fraction_censored,
        "num_directions": len(volume.radii),
        "num_params": volume.num_params,
        "num_losses": volume.num_losses,
        "num_reentrant": volume.num_reentrant,
        "num_checked": volume.num_checked,
        "converged": volume.converged,
        "threshold": volume.settings.threshold,
        "metric": volume.settings.metric,
        "coordinates": volume.settings.coordinates,
    }


def volume_table(
    volumes: Mapping[tuple[str, str], Mapping[float, Volume]], test_losses: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """One row for each network, landscape and threshold.

    Args:
        volumes: by (network, landscape) and threshold.
        test_losses: of each network, on data of no landscape.
    """
    known = test_losses or {}
    rows = [
        {"model": model, "landscape": landscape, "test_loss": known.get(model), **volume_row(volume)}
        for (model, landscape), by_tau in volumes.items()
        for volume in by_tau.values()
    ]
    return pd.DataFrame(rows).astype({"test_loss": float})


def rank_table(table: pd.DataFrame, by: str = RANKED_BY) -> pd.DataFrame:
    """The rank of each network in each landscape at each threshold, 1 for the largest; NaN for those cut off.

    Args:
        table: from :func:`volume_table`.
        by: the column that is ranked.
    """
    inside = table[~table["cutoff"]]
    ranks = inside.assign(rank=inside.groupby(["landscape", "tau"])[by].rank(ascending=False))
    wide = ranks.pivot_table(index="model", columns=["landscape", "tau"], values="rank", sort=False)
    return wide.reindex(table["model"].unique())


def order_violations(table: pd.DataFrame, by: str = RANKED_BY) -> pd.DataFrame:
    """Pairs of networks of which the larger has the larger test loss: against "flat generalises", by landscape and τ.

    Pairs with a network that is cut off, or equal in either number, do not count. ``share`` is violations over pairs,
    NaN without any: 0 means that volume orders the networks as the test loss does, 1 that it does the reverse.

    Args:
        table: from :func:`volume_table`, with test losses.
        by: the column that orders.
    """
    rows = []
    for (landscape, tau), group in table[~table["cutoff"]].groupby(["landscape", "tau"], sort=False):
        signs = [
            (a[0] - b[0]) * (a[1] - b[1]) for a, b in combinations(group[[by, "test_loss"]].to_numpy(dtype=float), 2)
        ]
        violations, pairs = sum(s > 0 for s in signs), sum(s != 0 for s in signs)
        share = violations / pairs if pairs else float("nan")
        rows.append({"landscape": landscape, "tau": tau, "violations": violations, "pairs": pairs, "share": share})
    return pd.DataFrame(rows, columns=["landscape", "tau", "violations", "pairs", "share"])


@dataclass(frozen=True)
class RankingStability:
    """How the order of networks by volume changes when only some of the directions are used.

    Attributes:
        kendall: mean Kendall τ between the order from some and that from all directions.
        same_order: share of the sub-samples with the very same order.
        same_first: share with the same largest network.
        num_directions: in a sub-sample.
        num_samples: sub-samples.
    """

    kendall: float
    same_order: float
    same_first: float
    num_directions: int
    num_samples: int


def ranking_stability(
    volumes: Mapping[str, Volume],
    *,
    share: float = 0.5,
    num_samples: int = 200,
    seed: int = 0,
    by: str = RANKED_BY,
) -> RankingStability:
    """Rank networks from random halves (``share``) of their common directions, and compare with the rank from all.

    Args:
        volumes: of each network, of one landscape and threshold; those cut off are left out.
        share: of the directions.
        num_samples: sub-samples, each without replacement.
        seed: of these.
        by: a property of :class:`~lmc_lightning.landscape.volume.result.Volume`.

    Raises:
        ValueError: fewer than two networks, or networks with different numbers of directions.
    """
    inside = [volume for volume in volumes.values() if not volume.cutoff]
    sizes = {len(volume.radii) for volume in inside}
    if len(inside) < 2 or len(sizes) != 1:
        raise ValueError(
            f"Expected at least two networks inside, measured along the same directions, got {len(inside)} with "
            f"{sorted(sizes)} directions."
        )
    (size,), generator = sizes, torch.Generator().manual_seed(seed)
    few = max(1, round(share * size))
    whole = [float(getattr(volume, by)) for volume in inside]
    taus, orders, firsts = list[float](), 0, 0
    for _ in range(num_samples):
        drawn = torch.randperm(size, generator=generator)[:few]
        part = [float(getattr(volume.of(drawn), by)) for volume in inside]
        taus.append(float(kendalltau(whole, part).statistic))
        orders += _order(part) == _order(whole)
        firsts += _order(part)[0] == _order(whole)[0]
    return RankingStability(sum(taus) / num_samples, orders / num_samples, firsts / num_samples, few, num_samples)


def _order(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])
