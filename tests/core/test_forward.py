"""Many points evaluated together: what one by one would give, whatever a step does to its module and its batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmc_lightning.core import forward
from lmc_lightning.core.collective import Collective, InterruptedMeasurementError
from lmc_lightning.core.evaluation import Evaluation
from lmc_lightning.core.leading import Anchors
from lmc_lightning.core.objective import Objective
from tests.problems import cross_entropy, normal

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A convolution, BatchNorm, in-place ReLU, pooling and a linear layer, float64 unless told otherwise."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
            self.pool, self.head = nn.MaxPool2d(2), nn.Linear(3 * 9, 4)
        self.calls = 0
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(F.relu(self.norm(self.conv(x)), inplace=True)).flatten(1))


def batches(dtype: torch.dtype = torch.float64) -> list[Batch]:
    images = normal(11, 1, 8, 8, seed=1).to(dtype)
    return [(images[:7], torch.arange(7) % 4), (images[7:], torch.arange(4))]


def counting(module: nn.Module, batch: Batch) -> Tensor:
    module.calls += 1
    return module.calls * cross_entropy(module, batch)


def toggling(module: nn.Module, batch: Batch) -> Tensor:
    module.calls = 1 - module.calls
    return (1 + module.calls) * cross_entropy(module, batch)


def overwriting(module: nn.Module, batch: Batch) -> Tensor:
    loss = cross_entropy(module, batch)
    batch[1].copy_(module(batch[0]).argmax(1))
    batch[0].mul_(2)
    return loss


def clamping(module: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data.clamp_(-0.2, 0.2)
    return cross_entropy(module, batch)


def noisy(module: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(module, (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]))


def penalised(module: nn.Module, batch: Batch) -> Tensor:
    inputs = batch[0].clone().requires_grad_()
    loss = cross_entropy(module, (inputs, batch[1]))
    return loss + torch.autograd.grad(loss, inputs, create_graph=True)[0].square().sum()


STEPS = [cross_entropy, counting, toggling, overwriting, clamping, noisy, penalised]


def points(objective: Objective, number: int = 4) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    theta = objective.theta()
    thetas = [theta + 0.3 * normal(objective.num_params, seed=10 + i).to(theta) for i in range(number)]
    buffers = [{n: b + i for n, b in objective.buffers.items()} for i in range(number)]
    return thetas, buffers


def assert_same(found: Evaluation, expected: Evaluation) -> None:
    assert (found.loss, found.error, found.confidence) == (expected.loss, expected.error, expected.confidence)
    for name in ("chunk_losses", "weights", "example_losses", "example_errors", "example_weights"):
        pair = getattr(found, name), getattr(expected, name)
        assert torch.equal(*pair) if pair[1] is not None else pair[0] is None


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("block", "many"), [(1, 2**20), (3, 2**20), (32, 0)])
def test_many_points_are_those_of_fresh_objectives_bit_for_bit(
    step: Callable[..., Tensor], block: int, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "BLOCK", block)
    monkeypatch.setattr(forward, "MANY_PARAMETERS", many)
    module = Net()
    objective = Objective(module, batches(), step, keep_batches=True)
    thetas, buffers = points(objective)
    for given in ([None] * 4, buffers, [buffers[0], None, buffers[2], None]):
        found = objective.evaluate_many(iter(thetas), buffers=given)
        for theta, own, evaluation in zip(thetas, given, found, strict=True):
            fresh = Objective(module, batches(), step, keep_batches=True)
            assert_same(evaluation, fresh.evaluate(theta, buffers=own))
    assert module.calls == 0


@pytest.mark.parametrize("step", STEPS)
def test_the_first_pass_finds_out_what_a_step_does(step: Callable[..., Tensor]) -> None:
    objective = Objective(Net(), batches(), step, keep_batches=True)
    by_hand = []
    for index, batch in enumerate(objective.batches):
        with objective.box(), torch.set_grad_enabled(step is penalised):
            loss = objective.step(objective.module_at(objective.theta()), batch, seed=index)
        assert loss is not None
        by_hand.append(loss.item())
    torch.testing.assert_close(objective.baseline.chunk_losses.tolist(), by_hand, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [[0.0, 0.1, 0.5, 0.9, 1.0], [-0.5, 0.3, 1.5]])
def test_points_on_a_line_agree_with_their_own_evaluation_up_to_rounding(
    dtype: torch.dtype, steps: list[float]
) -> None:
    objective = Objective(Net(dtype), batches(dtype), cross_entropy)
    line = Anchors((objective.theta(), objective.theta() + 0.5 * normal(objective.num_params, seed=3).to(dtype)))
    mixes = [line.at(t) for t in steps]
    found = objective.evaluate_many(mixes)
    for mix, evaluation in zip(mixes, found, strict=True):
        expected = objective.evaluate(mix.theta)
        assert evaluation.loss == pytest.approx(expected.loss, rel=20 * torch.finfo(dtype).eps)
        assert evaluation.error == expected.error


@pytest.mark.parametrize(
    ("many", "budget", "calls"), [(2**20, 2**28, [7, 7, 4, 4]), (0, 2**28, [7, 7, 4, 4]), (0, 1, [7, 7] + 10 * [4])]
)
def test_the_first_layer_is_computed_at_the_anchors_alone(
    many: int, budget: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.extend([len(args[0])] if func is torch.conv2d else [])
            return func(*args, **(kwargs or {}))

    objective = Objective(Net(), batches(), cross_entropy, keep_batches=True)
    _ = objective.baseline
    monkeypatch.setattr(forward, "MANY_PARAMETERS", many)
    line = Anchors((objective.theta(), objective.theta() + 1))
    expected = [objective.evaluate(line.at(t / 10).theta).loss for t in range(10)]
    monkeypatch.setattr(forward, "BLOCK_BYTES", budget)
    monkeypatch.setattr(forward, "BLOCK", 10)
    passes = forward.ForwardPasses(objective, None)
    passes.stateful = False
    with objective.box(), Spy():
        found = passes._together([(line.at(t / 10), None) for t in range(10)])
    assert seen == calls
    assert [part.mean() for part in found] == pytest.approx(expected, rel=1e-13)


class Changing(nn.Module):
    """Its first layer's input is another one at each θ, or another call comes first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.first, self.second = (nn.Linear(3, 3, bias=kind != "no bias", dtype=torch.float64) for _ in range(2))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "input":
            x = x * self.scale
        elif self.kind == "made weight":
            return self.second(F.linear(x, self.first.weight * self.scale).tanh())
        elif self.kind == "order" and self.scale[0] > 1.2:
            return self.first(self.second(x).tanh())
        elif self.kind == "in place":
            return self.second(self.first(x).tanh_())
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("kind", ["plain", "no bias", "input", "made weight", "order", "in place"])
def test_the_short_cut_is_only_taken_where_it_is_one(kind: str) -> None:
    objective = Objective(Changing(kind), [(normal(6, 3, seed=6), torch.arange(6) % 3)], cross_entropy)
    line = Anchors((objective.theta(), objective.theta() + normal(objective.num_params, seed=8)))
    mixes = [line.at(t / 6) for t in range(7)]
    found = [e.loss for e in objective.evaluate_many(mixes)]
    assert found == pytest.approx([objective.evaluate(m.theta).loss for m in mixes], rel=1e-13)


def test_mixes_are_exact_at_their_ends_and_between_equal_points() -> None:
    a, b = normal(50, seed=1), normal(50, seed=2)
    assert torch.equal(Anchors((a, b)).at(0.0).theta, a)
    assert torch.equal(Anchors((a, b)).at(1.0).theta, b)
    assert torch.equal(Anchors((a, a)).at(0.3).theta, a)


def test_an_interruption_ends_a_block() -> None:
    polls, last = 0, 1000

    def interrupted() -> bool:
        nonlocal polls
        polls += 1
        return polls == last

    objective = Objective(Net(), batches(), cross_entropy, keep_batches=True, collective=Collective(interrupted))
    thetas, _ = points(objective)
    _ = objective.baseline
    last = polls + 5
    with pytest.raises(InterruptedMeasurementError):
        objective.evaluate_many(iter(thetas * 20))
    assert polls == last


def test_the_baseline_is_known() -> None:
    objective = Objective(Net(), batches(), cross_entropy)
    theta, buffers = objective.theta(), objective.buffers
    assert objective.known(theta, buffers) is objective.baseline
    assert objective.known(theta + 1, buffers) is None
    assert objective.known(theta, {n: b + 1 for n, b in buffers.items()}) is None
