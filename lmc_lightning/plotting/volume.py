"""Pictures of the volume of low loss: radii in random directions, and their quantiles over a training."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lmc_lightning.landscape.volume.result import QUANTILES, Volume
from lmc_lightning.plotting.style import new_axes, set_heading, style

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
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(volumes)))
    radii = {tau: volumes[tau].radii.numpy() for tau in sorted(volumes)}
    low, high = min(r.min() for r in radii.values()), max(r.max() for r in radii.values())
    edges = np.geomspace(low / 1.02, high * 1.02, _BINS + 1)
    with style():
        ax = ax if ax is not None else new_axes()
        for (tau, values), color in zip(radii.items(), colors, strict=True):
            effective = volumes[tau].effective_sample_size
            label = f"τ = {tau:g}: median {np.median(values):.3g}, carried by {effective:.3g}"
            counts, _, _ = ax.hist(values, edges.tolist(), color=color, alpha=0.3, histtype="stepfilled", label=label)
            ax.hist(values, edges.tolist(), color=color, histtype="step", linewidth=1.3, label="_outline")
            ax.vlines(float(np.median(values)), 0, float(np.max(counts)), color=color, linewidth=2.0, label="_median")
        _log_axis(ax)
        ax.set_xlabel("radius r of the first exit" + (" [filter norms]" if _in_filters(first) else ""))
        ax.set_ylabel("directions")
        ax.legend(loc="upper left")
        ax.set_ylim(top=ax.get_ylim()[1] * (1.1 + 0.1 * len(radii)))
        set_heading(ax, title or "Radii of low loss", volume_caption(first))
    return ax


def _log_axis(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _in_filters(volume: Volume) -> bool:
    return volume.settings.coordinates == "filter"


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


def plot_volume_history(
    volumes: Mapping[int, Volume], ax: Axes | None = None, *, title: str = "", xlabel: str = "optimizer steps"
) -> Axes:
    """Quantiles of the radius over a training: 5–95 % and 25–75 % of the directions, their median and mean log.

    Args:
        volumes: of one threshold by step; those cut off are gaps.
        ax: where to draw; by default in a new figure.
        title: of the figure.
        xlabel: what the keys are.

    Raises:
        ValueError: there is no volume, or all are cut off.
    """
    known = {step: volumes[step] for step in sorted(volumes) if not volumes[step].cutoff}
    if not known:
        raise ValueError("There is nothing to draw: no volume, or all cut off.")
    first, steps = next(iter(known.values())), list(known)
    quantiles = np.array([v.quantiles(QUANTILES).numpy() for v in known.values()])
    means = np.exp([v.mean_log_r for v in known.values()])
    whiskers = means * [2 * v.mean_log_r_stderr for v in known.values()]
    color = mpl.colormaps["viridis"](0.35)
    with style():
        ax = ax if ax is not None else new_axes()
        for (lower, upper), alpha in (((0, 4), 0.18), ((1, 3), 0.3)):
            share = f"{QUANTILES[lower]:.0%} to {QUANTILES[upper]:.0%}"
            ax.fill_between(
                steps, quantiles[:, lower], quantiles[:, upper], color=color, alpha=alpha, linewidth=0, label=share
            )
        ax.plot(steps, quantiles[:, 2], color=color, label="median")
        ax.errorbar(steps, means, whiskers, color="#c8321e", fmt=".", elinewidth=0.9, label="geometric mean ± 2 stderr")
        cut = [step for step in sorted(volumes) if volumes[step].cutoff]
        if cut:
            ax.plot(
                cut,
                [0] * len(cut),
                color="#c8321e",
                marker="x",
                linestyle="none",
                clip_on=False,
                label="cut off, volume 0",
            )
        ax.set_ylim(bottom=0)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(f"radius r, τ = {first.tau:g}" + (" [filter norms]" if _in_filters(first) else ""))
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), alignment="left")
        set_heading(ax, title or "Radii of low loss while training", volume_caption(first).splitlines()[0])
    return ax
