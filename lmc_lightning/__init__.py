"""Loss-landscape geometry of neural networks while they train, as PyTorch Lightning callbacks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmc_lightning.branching.family.lineage import Family
    from lmc_lightning.callbacks.base import MeasurementCallback
    from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
    from lmc_lightning.callbacks.defaults import default_callbacks
    from lmc_lightning.callbacks.edge_of_stability import EdgeOfStability
    from lmc_lightning.callbacks.hessian_spectrum import HessianSpectrum
    from lmc_lightning.callbacks.interpolation_barrier import InterpolationBarrier
    from lmc_lightning.callbacks.local_learning_coefficient import LocalLearningCoefficient
    from lmc_lightning.callbacks.loss_surface import LossSurface
    from lmc_lightning.callbacks.minima_volume import MinimaVolume
    from lmc_lightning.callbacks.mode_connectivity import ModeConnectivity
    from lmc_lightning.callbacks.offline.alignment import Aligned, align, align_all
    from lmc_lightning.callbacks.offline.landscape import connect, local_learning_coefficient, minima_volumes
    from lmc_lightning.callbacks.offline.measure import interpolation_barrier, measure
    from lmc_lightning.callbacks.offline.similarity import representation_similarity
    from lmc_lightning.callbacks.offline.surface import loss_surface
    from lmc_lightning.callbacks.offline.zoom import replay
    from lmc_lightning.callbacks.pairs.differences import paired_differences
    from lmc_lightning.callbacks.pairs.family_table import family_table, onset_of, seed_means
    from lmc_lightning.callbacks.representation_similarity import RepresentationSimilarity
    from lmc_lightning.callbacks.sharpness import Sharpness
    from lmc_lightning.callbacks.trajectory.families import convergence_statistics, family_trajectories
    from lmc_lightning.callbacks.trajectory.snapshots import read_trajectory
    from lmc_lightning.callbacks.weight_trajectory import WeightTrajectory
    from lmc_lightning.landscape.paths.barrier import Barrier
    from lmc_lightning.landscape.paths.curves import CurveTraining
    from lmc_lightning.landscape.paths.onset import bisect_onset
    from lmc_lightning.landscape.surface.slices import Surface, load_surface
    from lmc_lightning.landscape.trajectory.components import Trajectory, pca_plane
    from lmc_lightning.landscape.volume.llc import Langevin
    from lmc_lightning.landscape.volume.result import VolumeSettings
    from lmc_lightning.landscape.volume.tables import order_violations, rank_table, ranking_stability, volume_table
    from lmc_lightning.plotting.animation import animate
    from lmc_lightning.recording import Record
    from lmc_lightning.summary import summarize

# Imported when first used, so that the mathematics works without Lightning.
_HOMES = {
    "Aligned": "callbacks.offline.alignment",
    "Barrier": "landscape.paths.barrier",
    "CheckpointBranching": "callbacks.checkpoint_branching",
    "CurveTraining": "landscape.paths.curves",
    "EdgeOfStability": "callbacks.edge_of_stability",
    "Family": "branching.family.lineage",
    "HessianSpectrum": "callbacks.hessian_spectrum",
    "InterpolationBarrier": "callbacks.interpolation_barrier",
    "Langevin": "landscape.volume.llc",
    "LocalLearningCoefficient": "callbacks.local_learning_coefficient",
    "LossSurface": "callbacks.loss_surface",
    "MeasurementCallback": "callbacks.base",
    "MinimaVolume": "callbacks.minima_volume",
    "ModeConnectivity": "callbacks.mode_connectivity",
    "Record": "recording",
    "RepresentationSimilarity": "callbacks.representation_similarity",
    "Sharpness": "callbacks.sharpness",
    "Surface": "landscape.surface.slices",
    "Trajectory": "landscape.trajectory.components",
    "VolumeSettings": "landscape.volume.result",
    "WeightTrajectory": "callbacks.weight_trajectory",
    "align": "callbacks.offline.alignment",
    "align_all": "callbacks.offline.alignment",
    "animate": "plotting.animation",
    "bisect_onset": "landscape.paths.onset",
    "connect": "callbacks.offline.landscape",
    "convergence_statistics": "callbacks.trajectory.families",
    "default_callbacks": "callbacks.defaults",
    "family_table": "callbacks.pairs.family_table",
    "family_trajectories": "callbacks.trajectory.families",
    "interpolation_barrier": "callbacks.offline.measure",
    "load_surface": "landscape.surface.slices",
    "local_learning_coefficient": "callbacks.offline.landscape",
    "loss_surface": "callbacks.offline.surface",
    "measure": "callbacks.offline.measure",
    "minima_volumes": "callbacks.offline.landscape",
    "onset_of": "callbacks.pairs.family_table",
    "order_violations": "landscape.volume.tables",
    "paired_differences": "callbacks.pairs.differences",
    "pca_plane": "landscape.trajectory.components",
    "rank_table": "landscape.volume.tables",
    "ranking_stability": "landscape.volume.tables",
    "read_trajectory": "callbacks.trajectory.snapshots",
    "replay": "callbacks.offline.zoom",
    "representation_similarity": "callbacks.offline.similarity",
    "seed_means": "callbacks.pairs.family_table",
    "summarize": "summary",
    "volume_table": "landscape.volume.tables",
}

__all__ = [
    "Aligned",
    "Barrier",
    "CheckpointBranching",
    "CurveTraining",
    "EdgeOfStability",
    "Family",
    "HessianSpectrum",
    "InterpolationBarrier",
    "Langevin",
    "LocalLearningCoefficient",
    "LossSurface",
    "MeasurementCallback",
    "MinimaVolume",
    "ModeConnectivity",
    "Record",
    "RepresentationSimilarity",
    "Sharpness",
    "Surface",
    "Trajectory",
    "VolumeSettings",
    "WeightTrajectory",
    "align",
    "align_all",
    "animate",
    "bisect_onset",
    "connect",
    "convergence_statistics",
    "default_callbacks",
    "family_table",
    "family_trajectories",
    "interpolation_barrier",
    "load_surface",
    "local_learning_coefficient",
    "loss_surface",
    "measure",
    "minima_volumes",
    "onset_of",
    "order_violations",
    "paired_differences",
    "pca_plane",
    "rank_table",
    "ranking_stability",
    "read_trajectory",
    "replay",
    "representation_similarity",
    "seed_means",
    "summarize",
    "volume_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
