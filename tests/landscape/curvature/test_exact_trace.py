from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature.exact_trace import ExactTrace, exact_trace, exactness
from tests import oracles, problems
from tests.problems import ConvNet, cross_entropy, generator, images, normal, split

N, C = 7, 3
LABELS = torch.randint(C, (N,), generator=generator(1))
FEATURES = normal(N, 5, seed=2)
PICTURES = normal(N, 2, 6, 6, seed=3)
SERIES = normal(N, 4, 5, seed=4)
TOKENS = torch.randint(6, (N, 4), generator=generator(5))
BITS = (normal(N, C, seed=6) > 0).double()


class Function(nn.Module):
    """Modules and a way to call them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.LeakyReLU(), nn.Linear(4, C))


def tail(channels: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(channels, C)]


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, FEATURES),
    "in-place, max-pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 2, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(2, 3, 2),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
            *tail(3),
        ),
        PICTURES,
    ),
    "groups, strides, dilation, batchnorm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=2, dilation=2, groups=2, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            *tail(4),
        ),
        PICTURES,
    ),
    "one axis, batchnorm": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 2, 3, padding=1), nn.BatchNorm1d(2), nn.ReLU(), nn.Conv1d(2, 2, 3, 2), nn.ReLU(), *tail(4)
        ),
        SERIES,
    ),
    "positions": (
        lambda: nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, C)),
        SERIES,
    ),
    "rows of several positions": (
        lambda: Function(
            lambda m, x: m.head(m.inner(x.flatten(0, 1)).relu().view(len(x), -1)),
            inner=nn.Linear(5, 2),
            head=nn.Linear(8, C),
        ),
        SERIES,
    ),
    "rows in another order": (
        lambda: Function(
            lambda m, x: m.head(m.inner(x.transpose(0, 1).flatten(0, 1)).relu().view(4, -1, 2).sum(0)),
            inner=nn.Linear(5, 2),
            head=nn.Linear(2, C),
        ),
        SERIES,
    ),
    "normalised inputs": (
        lambda: Function(
            lambda m, x: m.head((m.layer(x) + m.groups(x)).relu().flatten(1)),
            layer=nn.LayerNorm((4, 5)),
            groups=nn.GroupNorm(2, 4),
            head=nn.Linear(20, C),
        ),
        SERIES,
    ),
    "embedding": (
        lambda: Function(
            lambda m, x: m.head(m.hidden(m.embedding(x)).relu().sum(1)),
            embedding=nn.Embedding(6, 3, padding_idx=2),
            hidden=nn.Linear(3, 3),
            head=nn.Linear(3, C),
        ),
        TOKENS,
    ),
    "residual": (
        lambda: Function(
            lambda m, x: m.head((x + m.inner(x).relu()).relu()), inner=nn.Linear(5, 5), head=nn.Linear(5, C)
        ),
        FEATURES,
    ),
    "a layer beside itself": (
        lambda: Function(
            lambda m, x: m.head(m.inner(x).relu() - m.inner(x.flip(1))), inner=nn.Linear(5, 4), head=nn.Linear(4, C)
        ),
        FEATURES,
    ),
    "bare parameters, slopes, used as a function": (
        lambda: Function(
            lambda m, x: F.linear(m.slopes((x * m.scale + m.shift) @ m.matrix), m.head.weight, m.head.bias),
            scale=parameter(5),
            shift=parameter(5),
            matrix=parameter(5, 4),
            slopes=nn.PReLU(4),
            head=nn.Linear(4, C),
        ),
        FEATURES,
    ),
    "bilinear": (
        lambda: Function(
            lambda m, x: m.head(m.left(x) * m.right(x)),
            left=nn.Linear(5, 3),
            right=nn.Linear(5, 3),
            head=nn.Linear(3, C),
        ),
        FEATURES,
    ),
    "unused": (
        lambda: Function(lambda m, x: m.head(x), head=nn.Linear(5, C), unused=nn.Linear(2, 2), bare=parameter(3)),
        FEATURES,
    ),
}


def randomised(module: nn.Module) -> nn.Module:
    """In float64, every tensor and running statistic its own random numbers."""
    module = module.double()
    with torch.no_grad():
        for index, tensor in enumerate(module.parameters()):
            tensor.copy_(0.6 * normal(*tensor.shape, seed=40 + index))
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(normal(*buffer.shape, seed=90).abs() + 0.5 * ("var" in name))
    return module


@dataclass(frozen=True)
class Dense:
    """Traces of the blocks of the Hessian, coordinate by coordinate."""

    by_tensor: Tensor
    by_example: Tensor


def blocks(loss: Callable[[Tensor], Tensor], theta: Tensor, sizes: list[int]) -> Tensor:
    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    if not gradient.requires_grad:
        return torch.zeros(len(sizes), dtype=torch.float64)
    rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in gradient]
    return torch.stack([part.sum() for part in torch.stack(rows).diagonal().split(sizes)])


def dense(module: nn.Module, data: Any, loss_fn: Callable[[nn.Module, Any], Tensor]) -> Dense:
    theta, sizes = oracles.flat_parameters(module), [p.numel() for p in module.parameters()]
    whole = oracles.mean_loss(module, [data], loss_fn, [1.0])
    singles = [tuple(t[n : n + 1] for t in data) for n in range(len(data[0]))]
    alone = [blocks(oracles.mean_loss(module, [one], loss_fn, [1.0]), theta, sizes).sum() for one in singles]
    return Dense(blocks(whole, theta, sizes), torch.stack(alone))


def measure(objective: Objective, **options: Any) -> ExactTrace:
    return exact_trace(objective, objective.theta(), **{"generator": generator(0), **options})


@pytest.mark.parametrize(("build", "x"), NETS.values(), ids=NETS.keys())
def test_trace_of_tensors_and_of_examples_are_those_of_the_dense_hessian(
    build: Callable[[], nn.Module], x: Tensor
) -> None:
    module, data = randomised(build()).eval(), (x, LABELS)
    expected = dense(module, data, cross_entropy)
    result = measure(Objective(module, split(data, [4, 3]), cross_entropy, chunk_size=3))
    assert result.reason == ""
    assert result.check.error < 1e-12
    assert result.num_gradients == C - 1
    torch.testing.assert_close(result.tensors, expected.by_tensor, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(result.example_traces, expected.by_example, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(result.example_weights, torch.full((N,), 1 / N, dtype=torch.float64))
    assert result.value == pytest.approx(float(expected.by_tensor.sum()), rel=1e-12)
    assert torch.equal(result.example_labels, LABELS)


ONE_BY_ONE = {
    "rows in another order": {"inner.weight", "inner.bias"},
    "bare parameters, slopes, used as a function": {
        "scale",
        "shift",
        "matrix",
        "slopes.weight",
        "head.weight",
        "head.bias",
    },
}


@pytest.mark.parametrize("name", NETS)
def test_only_tensors_of_no_known_layer_take_single_examples(name: str) -> None:
    build, x = NETS[name]
    check = measure(Objective(randomised(build()).eval(), [(x, LABELS)], cross_entropy)).check
    assert set(check.one_by_one) == ONE_BY_ONE.get(name, set())


def ignoring(labels: Tensor) -> Tensor:
    labels = labels.clone()
    labels.view(-1)[::4] = -100
    return labels


WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, int]] = {
    "ignored, class weights, smoothing": (
        lambda f, y: F.cross_entropy(f, y, weight=WEIGHTS, label_smoothing=0.1),
        ignoring(LABELS),
        C - 1,
    ),
    "soft targets": (F.cross_entropy, BITS.softmax(1), C - 1),
    "log-probabilities": (lambda f, y: F.nll_loss(f.log_softmax(1), y), LABELS, C - 1),
    "squared error": (F.mse_loss, BITS, C),
    "bits": (F.binary_cross_entropy_with_logits, BITS, C),
    "probabilities": (lambda f, y: F.binary_cross_entropy(f.sigmoid(), y), BITS, C),
    "pixels": (lambda f, y: F.cross_entropy(f[:, :2, None], y), ignoring(LABELS % 2)[:, None], 1),
}


@pytest.mark.parametrize(("loss", "targets", "passes"), LOSSES.values(), ids=LOSSES.keys())
def test_losses(loss: Callable[[Tensor, Tensor], Tensor], targets: Tensor, passes: int) -> None:
    module, data = randomised(mlp()), (FEATURES, targets)

    def step(module: nn.Module, batch: Any) -> Tensor:
        return loss(module(batch[0]), batch[1])

    theta, sizes = oracles.flat_parameters(module), [p.numel() for p in module.parameters()]
    expected = blocks(oracles.mean_loss(module, [data], step, [1.0]), theta, sizes)
    result = measure(Objective(module, split(data, [4, 3]), step, chunk_size=3))
    assert result.reason == ""
    assert result.num_gradients == passes
    torch.testing.assert_close(result.tensors, expected, rtol=1e-10, atol=1e-12)
    assert result.value == pytest.approx(float(expected.sum()), rel=1e-10)
    assert result.example_weights.sum() == pytest.approx(1)


def test_certain_predictions_are_no_sign_of_curvature() -> None:
    module = randomised(mlp())
    module[-1].weight.data.mul_(60)
    data = FEATURES, module(FEATURES).argmax(1)
    expected = dense(module, data, cross_entropy)
    result = measure(Objective(module, [data], cross_entropy))
    assert result.reason == ""
    torch.testing.assert_close(result.tensors, expected.by_tensor, rtol=1e-6, atol=1e-12)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def tied() -> nn.Module:
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(5, C))


CURVED: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str]]] = {
    "gelu": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, C)),
        FEATURES,
        {"0.weight", "0.bias"},
    ),
    "sigmoid": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, C)),
        FEATURES,
        {"0.weight", "0.bias"},
    ),
    "tied": (tied, FEATURES, {"0.weight"}),
    "reused": (
        lambda: Function(
            lambda m, x: m.head(m.inner(m.inner(x).relu()).relu()), inner=nn.Linear(5, 5), head=nn.Linear(5, C)
        ),
        FEATURES,
        {"inner.weight"},
    ),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, C)),
        FEATURES,
        {"0.parametrizations.weight.original1"},
    ),
    "gate": (
        lambda: Function(
            lambda m, x: m.head(F.silu(m.gate(x)) * m.value(x)),
            gate=nn.Linear(5, 4),
            value=nn.Linear(5, 4),
            head=nn.Linear(4, C),
        ),
        FEATURES,
        {"gate.weight", "gate.bias"},
    ),
    "attention": (Attention, SERIES, {"attention.in_proj_weight", "attention.in_proj_bias"}),
    "layer norm in between": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, C)),
        FEATURES,
        {"0.weight", "0.bias"},
    ),
}


@pytest.mark.parametrize(("build", "x", "curved"), CURVED.values(), ids=CURVED.keys())
def test_networks_that_are_curved_in_a_tensor_are_refused_and_the_tensor_named(
    build: Callable[[], nn.Module], x: Tensor, curved: set[str]
) -> None:
    result = measure(Objective(randomised(build()), [(x, LABELS)], cross_entropy))
    assert result.value is None
    assert result.stderr_data is None
    assert result.num_gradients == 0
    assert set(result.check.curved) == curved
    assert result.reason.startswith("the outputs are not piecewise linear in ")
    assert next(iter(curved)).split(".")[0] in result.reason


def test_a_penalty_on_the_weights_is_refused() -> None:
    def penalised(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module, batch) + module[0].weight.square().sum()

    assert "outputs and the losses of single examples are unknown" in reason_of(penalised)


def test_examples_that_are_not_on_their_own_are_refused() -> None:
    def centred(module: nn.Module, batch: Any) -> Tensor:
        logits = module(batch[0])
        return F.cross_entropy(logits - logits.mean(0), batch[1])

    assert reason_of(centred) == "the outputs of an example depend on the others in its batch"


def test_a_step_that_does_not_run_in_float64_is_refused() -> None:
    def in_float32(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module, (batch[0].float(), batch[1]))

    reason = reason_of(in_float32, torch.float32)
    assert reason.startswith("RuntimeError: ")


def reason_of(step: Callable[[nn.Module, Any], Tensor], dtype: torch.dtype = torch.float64) -> str:
    module = randomised(mlp()).to(dtype)
    result = measure(Objective(module, [(FEATURES.to(dtype), LABELS)], step))
    assert result.value is None
    return result.reason


def test_too_many_outputs_are_refused() -> None:
    result = measure(Objective(randomised(mlp()), [(FEATURES, LABELS)], cross_entropy), max_passes=1)
    assert result.reason == "it takes 2 backward passes, more than max_passes=1"


def test_one_check_serves_later_visits() -> None:
    objective = Objective(randomised(mlp()), [(FEATURES, LABELS)], cross_entropy)
    first = measure(objective)
    later = objective.theta() + 0.1
    objective.excerpt = None  # type: ignore[method-assign, assignment]  # what a check would need
    again = exact_trace(objective, later, generator=generator(1), check=first.check)
    assert again.check is first.check
    assert again.value is not None
    assert again.value != first.value


def test_memory_decides_how_many_examples_go_at_a_time_and_nothing_else() -> None:
    build, x = NETS["in-place, max-pooling"]
    objective = Objective(randomised(build()), [(x, LABELS)], cross_entropy)
    check = exactness(objective, objective.theta(), generator(0))
    whole, cut = measure(objective, check=check), measure(objective, check=replace(check, bytes_per_example=2**62))
    assert check.bytes_per_example > 0
    torch.testing.assert_close(cut.tensors, whole.tensors, rtol=1e-12, atol=0)
    torch.testing.assert_close(cut.example_traces, whole.example_traces, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sizes", [[70], [64, 6], [1] * 70])
def test_numbers_do_not_depend_on_the_loaders_batch_size_nor_on_the_dtype(sizes: list[int]) -> None:
    loss = oracles.mean_loss(ConvNet(), [images()], cross_entropy, [1.0])
    expected = float(oracles.dense_hessian(loss, oracles.flat_parameters(ConvNet())).trace())
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        batches = split(images(dtype=dtype), sizes)
        result = measure(Objective(ConvNet(dtype), batches, cross_entropy, chunk_size=32))
        assert result.value == pytest.approx(expected, rel=tolerance)


def test_the_error_over_data_is_that_of_the_mean_over_examples() -> None:
    result = measure(Objective(ConvNet(), split(images(), [64, 6]), cross_entropy))
    assert result.stderr_data == pytest.approx(float(result.example_traces.std()) / 70**0.5, rel=1e-12)


def test_a_part_of_the_parameters_has_its_own_trace() -> None:
    whole = measure(Objective(ConvNet(), [images()], cross_entropy))
    part = measure(Objective(ConvNet(), [images()], cross_entropy, parameters=["body.0.*", "head.bias"]))
    torch.testing.assert_close(part.tensors, whole.tensors[[0, 4]], rtol=1e-12, atol=0)


def test_the_users_weight_of_a_batch_counts() -> None:
    batches = split((FEATURES, LABELS), [2, 2, 3])
    weights = {float(b[0][0, 0]): w for b, w in zip(batches, (1.0, 0.0, 3.0), strict=True)}
    objective = Objective(
        randomised(mlp()),
        batches,
        cross_entropy,
        batch_weight=lambda batch: weights[float(batch[0][0, 0])],
        keep_batches=True,
    )
    alone = [measure(Objective(randomised(mlp()), [b], cross_entropy)).value for b in batches]
    result = measure(objective)
    assert alone[0] is not None
    assert alone[2] is not None
    assert result.value == pytest.approx(0.25 * alone[0] + 0.75 * alone[2], rel=1e-12)


@pytest.mark.parametrize("problem", [problems.linear_regression(), problems.softmax_regression()])
def test_closed_forms(problem: problems.Problem) -> None:
    assert measure(problem.objective(chunk_size=16)).value == pytest.approx(float(problem.hessian.trace()), rel=1e-12)
