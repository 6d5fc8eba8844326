"""The ways of all networks of a study on one plane with the true loss on it, and where they end.

lmc-lightning sweep examples/studies/many_initialisations.yaml
python examples/studies/draw_initialisations.py studies/many_initialisations  # to studies/many_initialisations/figures
"""

import sys
from pathlib import Path

import yaml

from lmc_lightning import convergence_statistics, pca_plane, read_trajectory
from lmc_lightning.callbacks.bridge import objective_of
from lmc_lightning.callbacks.probes import draw
from lmc_lightning.experiments.collect import collect, runs
from lmc_lightning.experiments.measures import Trained, trained
from lmc_lightning.experiments.tasks import WEIGHTS, cell_folder
from lmc_lightning.landscape.trajectory import plane_losses
from lmc_lightning.plotting.style import figure_of
from lmc_lightning.plotting.trajectory import plot_convergence, plot_trajectories


def networks(folder: Path) -> dict[str, Trained]:
    """The trained networks by the names of their seeds, in order."""
    table = runs(collect(folder)).sort_values("seed")
    homes = {f"seed {row.seed}": cell_folder(folder, row.cell) for row in table.itertuples()}
    configs = {name: yaml.safe_load((home / "config.yaml").read_text()) for name, home in homes.items()}
    return {name: trained(configs[name], home, WEIGHTS) for name, home in homes.items()}


def draw_study(folder: Path, num_points: int = 41) -> dict[str, float]:
    """Write both figures; the numbers that the second one summarises."""
    table = runs(collect(folder)).sort_values("seed")
    ways = [
        read_trajectory(cell_folder(folder, row.cell) / "lmc" / "trajectory", f"seed {row.seed}")
        for row in table.itertuples()
    ]
    ends = networks(folder)
    first = next(iter(ends.values()))
    batches = first.batches("train", None)
    plane = pca_plane(ways)
    losses = plane_losses(objective_of(first.module, draw(batches, None, 0)), plane, num_points=num_points)
    found = convergence_statistics([n.module for n in ends.values()], batches, num_examples=None)
    figures = {
        "ways": plot_trajectories(plane, losses=losses, title=f"Ways of {len(ways)} networks"),
        "ends": plot_convergence(found, title=f"Final training losses of {len(ways)} networks"),
    }
    (folder / "figures").mkdir(exist_ok=True)
    for name, axes in figures.items():
        figure_of(axes).savefig(folder / "figures" / f"{name}.png")
    return found.summary()


if __name__ == "__main__":
    for key, value in draw_study(Path(sys.argv[1])).items():
        print(f"{key:>16} {value:.4g}")
