"""What one visit of a run finds out that the next one starts from."""

from typing import Any

from torch import Tensor

from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.landscape.curvature.exact_trace import ExactnessCheck
from lmc_lightning.landscape.curvature.result import SpectrumResult


class LastVisit:
    """Eigenvectors, and whether the trace is exact. Copies know neither: these belong to the run that goes on."""

    def __init__(self) -> None:
        self.vectors: Tensor | None = None
        self.exactness: ExactnessCheck | None = None

    def known(self, visit: Visit, num_params: int) -> dict[str, Any]:
        """Arguments of :func:`spectrum`, where the visit is one of a run, and of as many parameters as the last one."""
        if visit.trainer is None:
            return {}
        fits = self.vectors is not None and self.vectors.shape[1] == num_params
        return {"previous": self.vectors if fits else None, "exactness": self.exactness}

    def keep(self, visit: Visit, result: SpectrumResult) -> None:
        """Note what a visit has found; eigenvectors on the CPU, and not if they take half of the memory budget."""
        self.exactness, pairs = result.exactness, result.eigenpairs
        small = pairs is not None and pairs.eigenvectors.nbytes <= result.cost.memory_budget // 2
        self.vectors = pairs.eigenvectors.cpu() if pairs and small and visit.trainer is not None else None

    def __getstate__(self) -> dict[str, Any]:
        return {"vectors": None, "exactness": None}
