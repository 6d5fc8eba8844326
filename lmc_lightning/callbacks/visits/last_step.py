"""The parameters before the steps that are visited, to know what those steps were."""

from collections.abc import Sequence

from torch import Tensor, nn

from lmc_lightning.callbacks.visits.visit import MAX_PENDING
from lmc_lightning.core.params import parameter_layout


class LastSteps:
    """θ before each of the last few steps that were asked for: one copy of θ for each visit that waits.

    Args:
        parameters: name patterns of the parameters in θ; all trainable ones by default.
    """

    def __init__(self, parameters: Sequence[str] | None) -> None:
        self.parameters = parameters
        self._before: dict[int, Tensor] = {}

    def keep(self, step: int, module: nn.Module) -> None:
        """Copy θ before ``step`` is taken."""
        try:
            layout = parameter_layout(module, self.parameters)
        except ValueError:  # lazy parameters before the first batch
            return
        self._before[step] = layout.flatten(dict(module.named_parameters()))
        for earlier in sorted(self._before)[: -MAX_PENDING - 1]:
            del self._before[earlier]

    def take(self, step: int, theta: Tensor) -> Tensor | None:
        """What θ ``(P,)`` was before ``step``, where it was kept; what is earlier is forgotten."""
        self._before = {k: v for k, v in self._before.items() if k >= step}
        before = self._before.get(step)
        return None if before is None else before.to(theta)
