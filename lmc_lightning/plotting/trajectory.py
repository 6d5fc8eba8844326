"""Pictures of the ways of weights: on their principal plane, how much that explains, and where many runs end."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from numpy.typing import NDArray
from torch import Tensor

from lmc_lightning.landscape.trajectory.components import Components, PlaneLosses, Trajectory, random_walk_shares
from lmc_lightning.landscape.trajectory.convergence import Convergence
from lmc_lightning.plotting.style import BLUE, FAINT, INK, RED, drawing, legend_beside, shades

_COLORS = (BLUE, RED, "#2a8a57", "#8a4fb0", "#d98a1f", "#3aa6b9", "#a8506b", "#6b7a1f")
_GREYS = mpl.colors.ListedColormap(mpl.colormaps["Greys"](np.linspace(0.02, 0.6, 256)))
_MAX_SHARES = 12
_MANY = 20


def plot_trajectories(
    plane: Components,
    ax: Axes | None = None,
    *,
    losses: PlaneLosses | None = None,
    title: str = "Way of the weights",
    caption: str = "",
) -> Axes:
    """The runs on their principal plane, over the true loss where it is given; ○ start, ★ end.

    One run is coloured by its steps, several have a colour each.

    Args:
        plane: see :func:`~lmc_lightning.landscape.trajectory.components.pca_plane`.
        ax: where to draw; by default in a new figure.
        losses: on a grid in the plane.
        title: of the figure.
        caption: data and policy.
    """
    shares = [float(s) for s in plane.shares[:2]]
    farthest = max(float(d.max()) for d in plane.distances)
    walk = f", that of a random walk {random_walk_shares(2).sum():.0%}" if len(plane.trajectories) == 1 else ""
    text = f"the plane holds {sum(shares):.0%}{walk}; snapshots are at most {farthest:.3g} off it · ★ end"
    x, y = f"component 1  ({shares[0]:.0%} of the variance)", f"component 2  ({shares[1]:.0%})"
    with drawing(ax, title, f"{text}\n{caption}", x=x, y=y) as ax:
        if losses is not None:
            _draw_losses(ax, losses)
        _draw_paths(ax, plane.trajectories, [c[:, :2].numpy() for c in plane.coordinates])
        if losses is None:
            ax.set_aspect("equal", adjustable="datalim")
    return ax


def _draw_losses(ax: Axes, losses: PlaneLosses) -> None:
    values = np.ma.masked_invalid(losses.losses.numpy())
    low, high = float(values.min()), float(values.max())
    scale = LogNorm(low, high) if 0 < low < high else Normalize(low, high)
    levels = np.geomspace(low, high, 15) if isinstance(scale, LogNorm) else np.linspace(low, high, 15)
    drawn = ax.contourf(losses.xs.numpy(), losses.ys.numpy(), values, levels, norm=scale, cmap=_GREYS)
    ax.grid(visible=False)
    marks = levels[:: len(levels) // 4]
    bar = ax.figure.colorbar(drawn, ax=ax, label="loss on the plane", ticks=marks, format="%.2g")
    bar.ax.minorticks_off()


def _draw_paths(ax: Axes, runs: Sequence[Trajectory], paths: Sequence[NDArray[np.float64]]) -> None:
    if len(runs) == 1:
        _draw_by_step(ax, np.asarray(runs[0].steps), paths[0])
        return
    few = len(runs) <= len(_COLORS)
    colors = _COLORS if few else shades(len(runs), lightest=0.9)
    for run, path, color in zip(runs, paths, colors, strict=False):
        ax.plot(*path.T, color="white", linewidth=3.2, solid_capstyle="round")
        ax.plot(*path.T, color=color, marker=".", markersize=4, linewidth=1.5, label=run.name if few else None)
        _draw_ends(ax, path, color, 1.0 if len(runs) <= _MANY else 0.55)
    if few and ax.collections:
        ax.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none")  # beside there is the colour bar
    elif few:
        legend_beside(ax)


def _draw_by_step(ax: Axes, steps: NDArray[np.int64], path: NDArray[np.float64]) -> None:
    ax.plot(*path.T, color="white", linewidth=3.2, solid_capstyle="round")
    ax.plot(*path.T, color=FAINT, linewidth=0.9)
    dots = ax.scatter(path[:, 0], path[:, 1], c=steps, cmap="plasma", s=14, zorder=3)
    ax.figure.colorbar(dots, ax=ax, label="optimizer steps")
    _draw_ends(ax, path, INK)


def _draw_ends(ax: Axes, path: NDArray[np.float64], color: object, size: float = 1.0) -> None:
    ax.plot(*path[0], marker="o", markersize=7 * size, markerfacecolor="white", markeredgecolor=color, zorder=4)
    ax.plot(*path[-1], marker="*", markersize=13 * size, color=color, markeredgecolor="white", zorder=4)


def plot_variance_shares(
    plane: Components, ax: Axes | None = None, *, title: str = "Explained variance of the way", caption: str = ""
) -> Axes:
    """Each component's share of the variance, beside that of a random walk.

    Args:
        plane: of one or several runs.
        ax: where to draw; by default in a new figure.
        title: of the figure.
        caption: data and policy.
    """
    known = int((plane.shares > 1e-12).sum())
    shares = plane.shares[: min(_MAX_SHARES, known)].numpy()
    numbers = np.arange(1, len(shares) + 1)
    total, runs = sum(len(t.points) for t in plane.trajectories), len(plane.trajectories)
    text = f"{total:,} snapshots of {runs} run{'s' * (runs > 1)}"
    text = f"{text} · {caption}" if caption else text
    with drawing(ax, title, text, x="component j", y="share of the variance") as ax:
        ax.plot(numbers, shares, color=BLUE, marker="o", markersize=5, label="this way")
        walk, label = random_walk_shares(len(shares)).numpy(), "random walk, 6/(π²j²)"
        ax.plot(numbers, walk, color=INK, linestyle="--", linewidth=1.2, label=label)
        ax.set_yscale("log")
        ax.set_xticks(numbers)
        ax.legend(loc="upper right")
    return ax


def plot_tsne(
    runs: Sequence[Trajectory],
    coordinates: Sequence[Tensor],
    ax: Axes | None = None,
    *,
    title: str = "Neighbourhoods of the weights",
    caption: str = "",
) -> Axes:
    """Snapshots by t-SNE; see :func:`~lmc_lightning.landscape.trajectory.components.tsne`.

    Args:
        runs: whose snapshots.
        coordinates: of each run's ``(T, 2)``.
        ax: where to draw; by default in a new figure.
        title: of the figure.
        caption: data and policy.
    """
    text = "t-SNE · neighbours mean something, distances and axes do not"
    with drawing(ax, title, f"{text}\n{caption}") as ax:
        _draw_paths(ax, runs, [c.numpy() for c in coordinates])
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    return ax


def plot_convergence(found: Convergence, ax: Axes | None = None, *, title: str = "Where the runs end") -> Axes:
    """Final losses, or errors if the threshold is on these, in order, with the share of runs at or below the threshold.

    Args:
        found: of R runs.
        ax: where to draw; by default in a new figure.
        title: of the figure.
    """
    values = found.errors if found.metric == "error" and found.errors is not None else found.losses
    ordered, summary = np.sort(values.numpy()), found.summary()
    text = f"{len(ordered)} runs · mean distance {summary['distance_mean']:.3g}, cosine {summary['cosine_mean']:.2g}"
    if found.threshold is not None:
        text += f" · 95 % of the fraction: {summary['fraction_low']:.0%} to {summary['fraction_high']:.0%}"
    with drawing(ax, title, text, x=f"final {found.metric}", y="share of runs") as ax:
        shares = np.arange(1, len(ordered) + 1) / len(ordered)
        ax.plot(ordered, shares, color=BLUE, drawstyle="steps-post", marker="o", markersize=4)
        if found.threshold is not None:
            label = f"{summary['fraction']:.0%} reach {found.threshold:.3g}"
            ax.axvline(found.threshold, color=RED, linestyle="--", linewidth=1.2, label=label)
            ax.legend(loc="lower right")
        ax.set_ylim(0, 1.05)
    return ax
