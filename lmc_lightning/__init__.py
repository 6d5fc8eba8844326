"""Loss-landscape geometry of neural networks while they train, as PyTorch Lightning callbacks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmc_lightning.branching.lineage import Family
    from lmc_lightning.callbacks.alignment import Aligned, align, align_all
    from lmc_lightning.callbacks.base import MeasurementCallback
    from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
    from lmc_lightning.callbacks.defaults import default_callbacks
    from lmc_lightning.callbacks.edge_of_stability import EdgeOfStability
    from lmc_lightning.callbacks.family_table import family_table, onset_of, seed_means
    from lmc_lightning.callbacks.hessian_spectrum import HessianSpectrum
    from lmc_lightning.callbacks.interpolation_barrier import InterpolationBarrier
    from lmc_lightning.callbacks.offline import interpolation_barrier, measure
    from lmc_lightning.callbacks.sharpness import Sharpness
    from lmc_lightning.landscape.barrier import Barrier
    from lmc_lightning.landscape.onset import bisect_onset
    from lmc_lightning.recording import Record
    from lmc_lightning.summary import summarize

# Imported when first used, so that the mathematics works without Lightning.
_HOMES = {
    "Aligned": "callbacks.alignment",
    "Barrier": "landscape.barrier",
    "CheckpointBranching": "callbacks.checkpoint_branching",
    "EdgeOfStability": "callbacks.edge_of_stability",
    "Family": "branching.lineage",
    "HessianSpectrum": "callbacks.hessian_spectrum",
    "InterpolationBarrier": "callbacks.interpolation_barrier",
    "MeasurementCallback": "callbacks.base",
    "Record": "recording",
    "Sharpness": "callbacks.sharpness",
    "align": "callbacks.alignment",
    "align_all": "callbacks.alignment",
    "bisect_onset": "landscape.onset",
    "default_callbacks": "callbacks.defaults",
    "family_table": "callbacks.family_table",
    "interpolation_barrier": "callbacks.offline",
    "measure": "callbacks.offline",
    "onset_of": "callbacks.family_table",
    "seed_means": "callbacks.family_table",
    "summarize": "summary",
}

__all__ = [
    "Aligned",
    "Barrier",
    "CheckpointBranching",
    "EdgeOfStability",
    "Family",
    "HessianSpectrum",
    "InterpolationBarrier",
    "MeasurementCallback",
    "Record",
    "Sharpness",
    "align",
    "align_all",
    "bisect_onset",
    "default_callbacks",
    "family_table",
    "interpolation_barrier",
    "measure",
    "onset_of",
    "seed_means",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
