"""Pictures of the chains behind a local learning coefficient."""

import numpy as np
from matplotlib.axes import Axes

from lmc_lightning.landscape.volume.llc import LearningCoefficient
from lmc_lightning.plotting.style import BLANK, INK, drawing, running_mean, shades

_WINDOW, _EVERY = 20, 5
"""Of the running mean [steps], and where its line has corners."""


def plot_chains(found: LearningCoefficient, ax: Axes | None = None, *, title: str = "") -> Axes:
    """Nβ (L(w) − L(w*)) along each chain, its running mean, and λ̂, the mean of all draws after the burn-in.

    Args:
        found: a local learning coefficient.
        ax: where to draw; by default in a new figure.
        title: of the figure.
    """
    traces = found.n_beta * found.traces.numpy()
    settings, burn_in = found.settings, found.settings.num_burn_in
    window = min(_WINDOW, traces.shape[1])
    flags = f" · {', '.join(found.flags)}" if found.flags else ""
    caption = (
        f"{len(traces)} chains, lines: mean of {window} steps · R̂ {found.r_hat:.3f}, effective draws "
        f"{found.effective_sample_size:.0f}{flags}\nnβ = {found.n_beta:.4g}, γ = {settings.gamma:g}, "
        f"ε = {settings.step_size:g}"
    )
    heading = title or "Local learning coefficient", caption
    with drawing(ax, *heading, x="step of the chain", y="nβ (L(w) − L(w*))") as ax:
        for trace, color in zip(traces, shades(len(traces)), strict=True):
            ax.plot(trace, ",", color=color, antialiased=False, label="_draws")  # lines would double the picture's size
            smooth = running_mean(trace, window)[::_EVERY]
            ax.plot(window - 1 + _EVERY * np.arange(len(smooth)), smooth, color=color, linewidth=1.3, label="_mean")
        ax.axvspan(0, burn_in, color=BLANK, alpha=0.6, linewidth=0, label="burn-in")
        label = f"λ̂ = {found.value:.3g} ± {found.stderr:.1g}"
        ax.hlines(found.value, burn_in, traces.shape[1], color=INK, linestyle="--", linewidth=1.4, label=label)
        ax.set_xlim(0, traces.shape[1])
        known = traces[np.isfinite(traces)]
        if known.size:
            low, high = min(0.0, np.quantile(known, 0.001)), np.quantile(known, 0.999)
            ax.set_ylim(low, high + 0.18 * (high - low))  # under the legend
        ax.legend(loc="upper right", ncols=2)
    return ax
