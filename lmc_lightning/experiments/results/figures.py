"""The figures of a study, each where the study has what it shows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lmc_lightning.branching.children.isolation import isolated
from lmc_lightning.callbacks.bridge.objectives import objective_of
from lmc_lightning.callbacks.bridge.probes import draw
from lmc_lightning.callbacks.trajectory.families import convergence_statistics
from lmc_lightning.callbacks.trajectory.snapshots import read_trajectory
from lmc_lightning.experiments.collect import runs
from lmc_lightning.experiments.phases import COLUMNS, phase_maps
from lmc_lightning.experiments.results.settings import Summary, setting_texts, size_volumes, varied
from lmc_lightning.experiments.work.measures import Trained, trained
from lmc_lightning.experiments.work.tasks import WEIGHTS, cell_folder, pair_file
from lmc_lightning.landscape.surface.slices import load_surface
from lmc_lightning.landscape.trajectory.components import pca_plane, plane_losses
from lmc_lightning.plotting.phases import plot_phases
from lmc_lightning.plotting.studies import plot_correlations, plot_ends, plot_settings, plot_volume_sizes
from lmc_lightning.plotting.style import figure_of
from lmc_lightning.plotting.surfaces import plot_contours, surface_caption
from lmc_lightning.plotting.trajectory import plot_trajectories

NUM_EXAMPLES = 1024
"""Of the training data, for the loss on the plane of trajectories and at the ends of runs."""
_MAX_SETTINGS = 40


def draw_study(folder: Path, summary: Summary | None = None) -> list[Path]:
    """Draw what a study has found as ``figures/*.png`` of its folder; which these are.

    ``phases`` of a grid of two hyper-parameters, the load first; ``settings`` with ``correlations`` of further ones;
    ``volumes``; ``ways`` and ``ends`` of runs with a ``WeightTrajectory`` and one setting; and ``plane`` of the first
    pair with that measure. The loss on the plane of the ways costs a forward pass for each of its points, everything
    else is read from the records, or from the ``summary`` where there is one.

    Raises:
        FileNotFoundError: there are no records in the folder.
    """
    written: list[Path] = []
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in _figures(folder, summary or Summary(folder)):
        written.append(folder / "figures" / f"{name}.png")
        figure.savefig(written[-1])
    return written


def _figures(folder: Path, summary: Summary) -> Iterator[tuple[str, Any]]:
    table, by = summary.table, varied(summary.table)
    if len(by) == 2 and {COLUMNS["lambda_max"], COLUMNS["connectivity"]} <= set(table["name"]):
        yield "phases", plot_phases(phase_maps(table, *by))
    elif not summary.means.empty and summary.means["setting"].nunique() <= _MAX_SETTINGS:
        yield "settings", plot_settings(summary.means)
    if by and not summary.correlations.empty:
        yield "correlations", figure_of(plot_correlations(summary.correlations))
    size, volumes = size_volumes(table)
    if not volumes.empty:
        yield "volumes", plot_volume_sizes(volumes, size.replace("_", " "))
    if not by:
        yield from _ways(folder, runs(table))
    yield from _planes(folder, table)


def _ways(folder: Path, cells: pd.DataFrame) -> Iterator[tuple[str, Any]]:
    """Runs that differ in their seed alone: their ways on one plane over the true loss, and where they end."""
    done = cells[cells["task_status"] == "completed"].sort_values("seed") if "seed" in cells else cells[:0]
    homes = {f"seed {row.seed}": cell_folder(folder, str(row.cell)) for row in done.itertuples()}
    if len(homes) < 2 or not all((home / "lmc" / "trajectory").is_dir() for home in homes.values()):
        return
    ways = [read_trajectory(home / "lmc" / "trajectory", name) for name, home in homes.items()]
    with isolated():
        ends = [network(home) for home in homes.values()]
        examples = [*ends[0].batches("train", NUM_EXAMPLES)]
    plane = pca_plane(ways)
    losses = plane_losses(objective_of(ends[0].module, draw(examples, None, 0)), plane, num_points=31)
    yield "ways", figure_of(plot_trajectories(plane, losses=losses, title=f"Ways of {len(ways)} networks"))
    yield "ends", plot_ends(convergence_statistics([end.module for end in ends], examples, num_examples=None))


def network(home: Path) -> Trained:
    """The trained network of a cell from its folder."""
    return trained(yaml.safe_load((home / "config.yaml").read_text()), home, WEIGHTS)


def _planes(folder: Path, table: pd.DataFrame) -> Iterator[tuple[str, Any]]:
    by = varied(table)
    first = table[(table["kind"] == "pair") & (table["name"] == "plane/loss_max")].drop_duplicates(by)
    texts = setting_texts(table) if by else {(): ""}
    for number, (task, setting) in enumerate(zip(first["task"], first[by].itertuples(index=False), strict=True)):
        surface = load_surface(pair_file(folder, task, "plane"))
        caption = surface_caption(surface).replace(" · BatchNorm", "\nBatchNorm")  # of a wide line on narrow axes
        caption = f"{texts[tuple(setting)]}\n{caption}".strip()
        yield f"plane_{number}", figure_of(plot_contours(surface, title="Two minima", caption=caption))
