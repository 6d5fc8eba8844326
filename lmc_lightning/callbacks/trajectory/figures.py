"""What is shown of the ways of one or several runs: figures, arrays, and points for TensorBoard's projector."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lmc_lightning.landscape.trajectory.components import (
    Components,
    PlaneLosses,
    Trajectory,
    principal_components,
    tsne,
)
from lmc_lightning.loggers import Embedding
from lmc_lightning.plotting.style import deferred, figure_of
from lmc_lightning.plotting.trajectory import plot_trajectories, plot_tsne, plot_variance_shares
from lmc_lightning.recording import Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECTED = 50
"""Dimensions of the points that the projector gets: it reads text, and finds its own three."""


def trajectory_pictures(
    plane: Components,
    *,
    suffix: str = "",
    losses: PlaneLosses | None = None,
    with_tsne: bool = False,
    columns: Mapping[str, Sequence[Any]] | None = None,
    caption: str = "",
) -> Measurement:
    """All that is drawn and kept of the runs of a plane.

    Args:
        plane: of the runs.
        suffix: of the keys.
        losses: the true loss on the plane.
        with_tsne: draw t-SNE too.
        columns: further metadata of the projector's points, an entry for each snapshot of all runs.
        caption: data and policy.
    """
    runs = plane.trajectories
    figures: dict[str, Callable[[], Figure]] = {
        f"trajectory_plane{suffix}": deferred(plot_trajectories, plane, losses=losses, caption=caption),
        f"trajectory_variance{suffix}": deferred(plot_variance_shares, plane, caption=caption),
    }
    if with_tsne:
        figures[f"trajectory_tsne{suffix}"] = partial(_neighbours, runs, caption)
    arrays = {
        "run": np.repeat(np.arange(len(runs)), [len(r.points) for r in runs]),
        "names": np.array([r.name for r in runs], dtype=str),
        "steps": np.concatenate([np.array(r.steps) for r in runs]),
        "coordinates": torch.cat([*plane.coordinates]).numpy(),
        "plane_distance": torch.cat([*plane.distances]).numpy(),
        "explained_variance": plane.shares.numpy(),
    }
    if losses is not None:
        arrays |= {"xs": losses.xs.numpy(), "ys": losses.ys.numpy(), "losses": losses.losses.numpy()}
    return Measurement(
        (),
        figures=figures,
        arrays={f"trajectory_plane{suffix}": arrays},
        embeddings={f"trajectory{suffix}": embedding_of(runs, columns)},
    )


def embedding_of(runs: Sequence[Trajectory], columns: Mapping[str, Sequence[Any]] | None = None) -> Embedding:
    """Every snapshot as a point, at most 50-dimensional, with lines from each to the next of its run."""
    points = torch.cat([*principal_components(runs, PROJECTED).coordinates]).float().numpy()
    rows, further = list[list[Any]](), dict(columns or {})
    for run in runs:
        for place, step in enumerate(run.steps):
            following = len(rows) + 1 if place + 1 < len(run.steps) else ""
            rows.append(
                [f"{run.name} {step}".strip(), run.name, step, following, *(c[len(rows)] for c in further.values())]
            )
    return Embedding(points, ["label", "run", "step", "__next__", *further], rows)


def _neighbours(runs: Sequence[Trajectory], caption: str) -> "Figure":
    return figure_of(plot_tsne(runs, tsne(runs), caption=caption))
