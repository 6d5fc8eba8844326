"""Names for the shapes of functions that travel through the whole package."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn

Batch: TypeAlias = Any
"""Whatever a data loader yields: a tensor, a tuple, a dict, a graph."""

LossFn: TypeAlias = Callable[[nn.Module, Batch], Tensor]
"""``(module, batch) -> ()``: the mean loss over the examples of the batch."""

BatchWeight: TypeAlias = Callable[[Batch], float]
"""How much a batch counts in a mean over the probe set."""

Progress: TypeAlias = Callable[[int, int, str], None]
"""``(done, total, text)``: told by a long computation how far it is, e.g. ``(12, 64, "products")``."""

Matvec: TypeAlias = Callable[[Tensor], Tensor]
"""A symmetric linear map, ``(P,) -> (P,)``."""
