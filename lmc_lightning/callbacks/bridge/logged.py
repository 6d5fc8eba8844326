"""What a module logs while it is measured: kept, and reduced as Lightning would."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.core.collective import Collective
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.structure import leading_size


@dataclass
class LogRecorder:
    """Stands in for ``self.log``: keeps what a pass logs, and reduces it as Lightning would."""

    values: dict[str, list[tuple[Any, float, Any]]] = field(default_factory=dict)
    batch_size: float = 1.0

    def __deepcopy__(self, memo: object) -> "LogRecorder":
        return self

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keep one logged value; a metric object is read when the pass is over."""
        size = kwargs.get("batch_size") or self.batch_size
        kept = value.detach().clone() if isinstance(value, Tensor) else value
        self.values.setdefault(name, []).append((kept, float(size), kwargs.get("reduce_fx", "mean")))

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Keep several values."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def reduced(self, collective: Collective | None = None) -> dict[str, float]:
        """One number for each name, over all processes."""
        return {name: _reduce(entries, collective or Collective()) for name, entries in self.values.items()}


def _reduce(entries: list[tuple[Any, float, Any]], collective: Collective) -> float:
    last, _, reduce_fx = entries[-1]
    if isinstance(last, Metric):
        return float(last.compute())  # over all processes, by itself
    rows = collective.gather(lambda: torch.tensor([[float(v), w] for v, w, _ in entries], dtype=torch.float64))
    values, weights = rows.T
    if reduce_fx == "mean" or reduce_fx is torch.mean:
        return float(values @ weights / weights.sum())
    reduce = {"sum": torch.sum, "min": torch.min, "max": torch.max}.get(reduce_fx, reduce_fx)
    return float(reduce(values))


def logged_metrics(
    objective: Objective,
    theta: Tensor,
    batches: Sequence[StepBatch],
    recorder: LogRecorder,
    buffers: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """What the module's own validation logs over ``batches`` at θ, with every metric reset before the pass.

    Args:
        objective: made with :func:`replacements` that hold ``recorder``.
        theta: parameters ``(P,)``.
        batches: the validation split.
        recorder: the stand-in for ``self.log``.
        buffers: statistics to use in place of the module's own.
    """
    with objective.box(), torch.no_grad():
        module: Any = objective.module_at(theta, buffers=buffers, mode="eval")
        for submodule in module.modules():
            if isinstance(submodule, Metric):
                submodule.reset()
        takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
        recorder.values.clear()

        def validate() -> None:
            module.on_validation_epoch_start()
            for step_batch in batches:
                recorder.batch_size = float(leading_size(step_batch.batch) or 1)
                placed = objective.placed(step_batch)
                module.validation_step(*(placed if takes_index else placed[:1]))
            module.on_validation_epoch_end()

        objective.collective.agree(validate)
        return recorder.reduced(objective.collective)
