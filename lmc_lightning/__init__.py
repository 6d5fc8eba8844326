"""Loss-landscape geometry of neural networks while they train, as PyTorch Lightning callbacks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmc_lightning.branching.lineage import Family
    from lmc_lightning.callbacks.base import MeasurementCallback
    from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
    from lmc_lightning.callbacks.hessian_spectrum import HessianSpectrum
    from lmc_lightning.callbacks.interpolation_barrier import InterpolationBarrier
    from lmc_lightning.callbacks.offline import interpolation_barrier, measure
    from lmc_lightning.callbacks.sharpness import Sharpness
    from lmc_lightning.landscape.barrier import Barrier
    from lmc_lightning.recording import Record
    from lmc_lightning.summary import summarize

# Imported when first used, so that the mathematics works without Lightning.
_HOMES = {
    "Barrier": "landscape.barrier",
    "CheckpointBranching": "callbacks.checkpoint_branching",
    "Family": "branching.lineage",
    "HessianSpectrum": "callbacks.hessian_spectrum",
    "InterpolationBarrier": "callbacks.interpolation_barrier",
    "MeasurementCallback": "callbacks.base",
    "Record": "recording",
    "Sharpness": "callbacks.sharpness",
    "interpolation_barrier": "callbacks.offline",
    "measure": "callbacks.offline",
    "summarize": "summary",
}

__all__ = [
    "Barrier",
    "CheckpointBranching",
    "Family",
    "HessianSpectrum",
    "InterpolationBarrier",
    "MeasurementCallback",
    "Record",
    "Sharpness",
    "interpolation_barrier",
    "measure",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
