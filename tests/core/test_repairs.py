"""Second derivatives that torch gets silently wrong, against central differences of gradients in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn

from lmc_lightning.core.glassbox import glass_box
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.repairs import repaired_double_backward
from tests.problems import mean_squared_error, normal


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return torch.nn.utils.weight_norm(nn.Linear(4, 3, dtype=torch.float64))


def new_weight_norm() -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, dtype=torch.float64))


def convolution() -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(1, 3, 2, dtype=torch.float64), dim=1)


def whole() -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, dtype=torch.float64), dim=None)


class Normed(nn.Module):
    def __init__(self, layer: nn.Module, unsqueeze: bool = False) -> None:
        super().__init__()
        self.layer, self.unsqueeze = layer, unsqueeze
        self.head = nn.Linear(9 if unsqueeze else 3, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x[:, None] if self.unsqueeze else x)
        return self.head(torch.tanh(hidden).flatten(1))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64), nn.Tanh())
        self.head = nn.Linear(3, 1, dtype=torch.float64)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch_checkpoint.checkpoint(self.body, x.requires_grad_(), use_reentrant=self.use_reentrant)
        return self.head(hidden)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "old weight norm": lambda: Normed(old_weight_norm()),
    "weight norm": lambda: Normed(new_weight_norm()),
    "weight norm, dim 1": lambda: Normed(convolution(), unsqueeze=True),
    "weight norm, whole": lambda: Normed(whole()),
    "reentrant checkpoint": lambda: Checkpointed(True),
    "non-reentrant checkpoint": lambda: Checkpointed(False),
}


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES.keys())
@pytest.mark.parametrize("memory_budget", [0, 2**30], ids=["recomputed", "cached"])
def test_hessian_product_is_the_derivative_of_the_gradient(build: Callable[[], nn.Module], memory_budget: int) -> None:
    torch.manual_seed(0)
    batch = normal(8, 4, seed=1), normal(8, 1, seed=2)
    objective = Objective(build(), [batch], mean_squared_error, memory_budget=memory_budget)
    theta, vector = objective.theta(), normal(objective.num_params, seed=3)
    step = 1e-5
    expected = (objective.grad(theta + step * vector) - objective.grad(theta - step * vector)) / (2 * step)
    product = objective.hvp(theta)
    torch.testing.assert_close(product(vector), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(product(vector), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_composite_weight_norm_has_torchs_value(dim: int) -> None:
    v = normal(3, 4, 2, seed=4)
    g = normal(*(n if d == dim else 1 for d, n in enumerate(v.shape)), seed=5) if dim >= 0 else normal(1, seed=5)
    expected = torch._weight_norm(v, g, dim)
    with repaired_double_backward():
        torch.testing.assert_close(torch._weight_norm(v, g, dim), expected, rtol=1e-14, atol=1e-14)


def test_checkpointing_is_torchs_own_again_after_an_exception() -> None:
    own = torch_checkpoint.CheckpointFunction

    def fail() -> None:
        assert torch_checkpoint.CheckpointFunction is not own
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), glass_box():
        fail()
    assert torch_checkpoint.CheckpointFunction is own
