"""Pictures of the volume of low loss: radii in random directions."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lmc_lightning.landscape.volume.result import Volume
from lmc_lightning.plotting.style import drawing, shades

_BINS = 24


def plot_radii(volumes: Mapping[float, Volume], ax: Axes | None = None, *, title: str = "") -> Axes:
    """The distribution of the radius over directions for each threshold, with its median as an upright line.

    Args:
        volumes: around one network, by threshold; none of them cut off.
        ax: where to draw; by default in a new figure.
        title: of the figure.

    Raises:
        ValueError: there is no volume, or one that is cut off.
    """
    if not volumes or any(volume.cutoff for volume in volumes.values()):
        raise ValueError("Expected at least one volume and none that is cut off: those have no radii.")
    first = next(iter(volumes.values()))
    radii = {tau: volumes[tau].radii.numpy() for tau in sorted(volumes)}
    low, high = min(r.min() for r in radii.values()), max(r.max() for r in radii.values())
    edges = np.geomspace(low / 1.02, high * 1.02, _BINS + 1)
    xlabel = "radius r of the first exit" + (" [filter norms]" if first.settings.coordinates == "filter" else "")
    with drawing(ax, title or "Radii of low loss", volume_caption(first), x=xlabel, y="directions") as ax:
        for (tau, values), color in zip(radii.items(), shades(len(radii)), strict=True):
            effective = volumes[tau].effective_sample_size
            label = f"τ = {tau:g}: median {np.median(values):.3g}, carried by {effective:.3g}"
            counts, _, _ = ax.hist(values, edges.tolist(), color=color, alpha=0.3, histtype="stepfilled", label=label)
            ax.hist(values, edges.tolist(), color=color, histtype="step", linewidth=1.3, label="_outline")
            ax.vlines(float(np.median(values)), 0, float(np.max(counts)), color=color, linewidth=2.0, label="_median")
        _log_axis(ax)
        ax.legend(loc="upper left")
        ax.set_ylim(top=ax.get_ylim()[1] * (1.1 + 0.1 * len(radii)))
    return ax


def _log_axis(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def volume_caption(volume: Volume) -> str:
    """The set, the coordinates and the directions behind a volume."""
    settings, tau = volume.settings, "τ"
    own = {"loss": "L", "accuracy": "acc"}[settings.metric]
    sign, shift = ("≤", f"{own}(θ) + {tau}") if settings.metric == "loss" else ("≥", f"{own}(θ) − {tau}")
    of = f"{{{own} {sign} {tau if settings.threshold == 'absolute' else shift}}}"
    censored = f", {volume.fraction_censored:.0%} censored" if volume.fraction_censored else ""
    return (
        f"{of} along {len(volume.radii)} shared {settings.coordinates} directions{censored} · "
        f"P = {volume.num_params:,}\ncarried by: effective number of directions in E r^P"
    )
