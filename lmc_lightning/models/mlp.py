"""Fully connected networks."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn


def _kaiming(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")


_WEIGHT_INITS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "default": None,
    "xavier": nn.init.xavier_uniform_,
    "kaiming": _kaiming,
}


class MLP(nn.Sequential):
    """Fully connected ReLU network ``(N, …) -> (N, out_features)``; images are flattened first.

    Layers are called ``fc1``, ``bn1``, ``relu1``, ``fc2``, …; the last ``fc`` is the output.

    Args:
        hidden_sizes: Widths of the hidden layers; empty for a linear model.
        batch_norm: BatchNorm between each hidden linear layer and its ReLU.
        in_features: Numbers per example, 784 for 28×28 images.
        out_features: Number of outputs.
        init: ``"default"`` keeps PyTorch's, ``"xavier"`` is Glorot uniform, ``"kaiming"`` is He normal with fan-in
            (arXiv 1502.01852); the latter two set biases to zero.

    Raises:
        ValueError: for an unknown ``init``.

    Example:
        >>> count = lambda module: sum(p.numel() for p in module.parameters())
        >>> count(MLP((4096,), batch_norm=True)), count(MLP((512, 256, 128))), count(MLP((300, 100)))
        (3264522, 567434, 266610)
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (300, 100),
        batch_norm: bool = False,
        in_features: int = 784,
        out_features: int = 10,
        init: Literal["default", "xavier", "kaiming"] = "default",
    ) -> None:
        if init not in _WEIGHT_INITS:
            raise ValueError(f"init must be one of {', '.join(_WEIGHT_INITS)}, got {init!r}")
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        width = in_features
        for i, hidden in enumerate(hidden_sizes, start=1):
            layers[f"fc{i}"] = nn.Linear(width, hidden)
            if batch_norm:
                layers[f"bn{i}"] = nn.BatchNorm1d(hidden)
            layers[f"relu{i}"] = nn.ReLU()
            width = hidden
        layers[f"fc{len(hidden_sizes) + 1}"] = nn.Linear(width, out_features)
        super().__init__(layers)
        self._initialize(_WEIGHT_INITS[init])

    def _initialize(self, fill: Callable[[Tensor], Tensor] | None) -> None:
        if fill is None:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                fill(module.weight)
                nn.init.zeros_(module.bias)
