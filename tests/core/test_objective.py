import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.core.structure import digest
from tests import oracles, problems
from tests.problems import ConvNet, cross_entropy, generator, images, normal, split


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(4, 1)
        self.checkpointed = checkpointed
        self.double()

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return self.head(torch_checkpoint.checkpoint(self.attend, x, use_reentrant=False).mean(1))
        return self.head(self.attend(x).mean(1))


class TiedFrozen(nn.Module):
    """The output layer is the input embedding; what lies between is frozen in part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.hidden = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.hidden.bias.requires_grad_(False)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


def tokens_loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    tokens, targets = batch.pop("tokens"), batch.pop("targets")  # a step that takes its batch apart
    return F.cross_entropy(module(tokens), targets)


def sequence_loss(module: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0]), batch[1])


def tokens(num_examples: int = 40) -> dict[str, Tensor]:
    draw = torch.randint(5, (2, num_examples), generator=generator(1))
    return {"tokens": draw[0], "targets": draw[1]}


def sequences(width: int, num_examples: int = 20) -> tuple[Tensor, Tensor]:
    return normal(num_examples, 3, width, seed=2), normal(num_examples, 1, seed=3)


Case = tuple[Callable[[], nn.Module], Any, Callable[[nn.Module, Any], Tensor], list[int], bool]
CASES: dict[str, Case] = {
    "convolution, batchnorm, dropout, unused": (ConvNet, images(), cross_entropy, [64, 6], False),
    "lstm": (Recurrent, sequences(2), sequence_loss, [13, 7], True),
    "attention": (Attention, sequences(4), sequence_loss, [13, 7], True),
    "checkpointed attention": (lambda: Attention(True), sequences(4), sequence_loss, [13, 7], True),
    "tied, frozen, dict batches": (TiedFrozen, tokens(), tokens_loss, [16, 16, 8], True),
}


def dense(objective: Objective, theta: Tensor) -> Tensor:
    with objective.hvp(theta) as product:
        return torch.stack([product(column) for column in torch.eye(len(theta), dtype=theta.dtype)], 1)


def plain(module: nn.Module) -> nn.Module:
    """Without checkpointing, which would recompute with other parameters than the oracle's."""
    module = copy.deepcopy(module)
    module.checkpointed = False
    return module


def copied(loss_fn: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    return lambda module, batch: loss_fn(module, dict(batch) if isinstance(batch, dict) else batch)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("chunk_size", "memory_budget"), [(None, None), (8, 2**30), (32, 0)])
def test_loss_gradient_and_hessian_against_the_dense_oracle(
    case: Case, chunk_size: int | None, memory_budget: int | None
) -> None:
    build, data, loss_fn, sizes, smooth = case
    torch.manual_seed(0)
    module, batches = build(), split(data, sizes)
    oracle = oracles.mean_loss(plain(module), batches, copied(loss_fn), [float(n) for n in sizes])
    theta = oracles.flat_parameters(module)
    differentiate = oracles.finite_difference_hessian if smooth else oracles.dense_hessian
    expected, tolerance = differentiate(oracle, theta), 1e-7 if smooth else 1e-12

    objective = Objective(module, batches, loss_fn, chunk_size=chunk_size, memory_budget=memory_budget)
    assert objective.additive
    assert torch.equal(objective.theta(), theta)
    assert objective.loss(theta).item() == pytest.approx(oracle(theta).item(), rel=1e-13)
    torch.testing.assert_close(objective.grad(theta), oracles.gradient(oracle, theta), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(dense(objective, theta), expected, rtol=tolerance, atol=tolerance)

    elsewhere = theta + 0.1 * normal(len(theta), seed=5)
    assert objective.loss(elsewhere).item() == pytest.approx(oracle(elsewhere).item(), rel=1e-13)
    torch.testing.assert_close(objective.grad(elsewhere), oracles.gradient(oracle, elsewhere), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "problem", [problems.linear_regression(), problems.softmax_regression(), problems.matrix_factorisation()]
)
def test_closed_forms(problem: problems.Problem) -> None:
    objective = problem.objective(chunk_size=16)
    theta = objective.theta()
    torch.testing.assert_close(objective.grad(theta), problem.gradient, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dense(objective, theta), problem.hessian, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", [[70], [64, 6], [35, 35], [1] * 70])
def test_numbers_do_not_depend_on_the_loaders_batch_size(sizes: list[int]) -> None:
    reference = Objective(ConvNet(), split(images(), [70]), cross_entropy, chunk_size=70)
    objective = Objective(ConvNet(), split(images(), sizes), cross_entropy, chunk_size=32)
    theta, vector = objective.theta(), normal(objective.num_params, seed=6)
    assert objective.num_examples == 70
    assert objective.loss(theta).item() == pytest.approx(reference.loss(theta).item(), rel=1e-13)
    assert objective.baseline.error == pytest.approx(reference.baseline.error, rel=1e-13)
    assert objective.baseline.confidence == pytest.approx(reference.baseline.confidence, rel=1e-13)
    torch.testing.assert_close(objective.grad(theta), reference.grad(theta), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(objective.hvp(theta)(vector), reference.hvp(theta)(vector), rtol=1e-11, atol=1e-12)


def test_the_memory_budget_decides_what_is_kept_not_what_comes_out() -> None:
    objectives = [
        Objective(ConvNet(), [images()], cross_entropy, chunk_size=16, memory_budget=budget)
        for budget in (0, 120_000, 2**30)
    ]
    theta, vector = objectives[0].theta(), normal(objectives[0].num_params, seed=6)
    products = [o.hvp(theta) for o in objectives]
    values = [p(vector) for p in products for _ in range(2)]
    assert [p.num_cached for p in products][::2] == [0, 5]
    assert 0 < products[1].num_cached < 5
    assert all(torch.equal(v, values[0]) for v in values)
    assert [p.num_products for p in products] == [2, 2, 2]
    products[2].release()
    assert products[2].num_cached == 0
    assert torch.equal(products[2](vector), values[0])


def test_quadratic_forms_are_those_of_the_chunks_and_average_to_the_whole() -> None:
    batches = split(images(), [16, 16, 16, 16, 6])
    objective = Objective(ConvNet(), batches, cross_entropy, chunk_size=16)
    theta, vector = objective.theta(), normal(objective.num_params, seed=7)
    product = objective.hvp(theta)
    forms = product.quadratic_forms(vector)
    alone = [Objective(ConvNet(), [b], cross_entropy).hvp(theta)(vector) @ vector for b in batches]
    torch.testing.assert_close(forms, torch.stack(alone), rtol=1e-11, atol=1e-12)
    weights = objective.baseline.weights
    assert float(weights @ forms) == pytest.approx(float(vector @ product(vector)), rel=1e-12)
    both, again = product.with_forms(vector)
    assert torch.equal(both, product(vector))
    assert torch.equal(again, forms)
    assert product.num_products == 4


def test_ignored_targets_weigh_nothing() -> None:
    x, y = images()
    y = y.clone()
    y[:64:2] = -100
    objective = Objective(ConvNet(), split((x, y), [64, 6]), cross_entropy, chunk_size=16)
    kept = y != -100
    clean = Objective(ConvNet(), [(x[kept], y[kept])], cross_entropy, chunk_size=70)
    theta = objective.theta()
    assert objective.weighting == "targets"
    assert objective.additive
    assert objective.loss(theta).item() == pytest.approx(clean.loss(theta).item(), rel=1e-13)
    torch.testing.assert_close(objective.grad(theta), clean.grad(theta), rtol=1e-11, atol=1e-13)


def test_class_weights_do_not_depend_on_the_batch_size() -> None:
    weight = torch.tensor([1.0, 5.0, 0.2, 0.0], dtype=torch.float64)

    def weighted(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], weight=weight)

    one, many = (Objective(ConvNet(), split(images(), s), weighted, chunk_size=16) for s in ([70], [1] * 70))
    assert one.additive
    whole = Objective(ConvNet(), [images()], weighted, chunk_size=70)
    for objective in (one, many):
        assert objective.loss(objective.theta()).item() == pytest.approx(whole.baseline.loss, rel=1e-13)


def test_the_users_weight_counts_and_zero_leaves_a_batch_out() -> None:
    hessians = torch.stack([problems.with_spectrum([1, 2, 3], seed=s) for s in range(3)])
    problem = problems.weighted_quadratics(hessians, [2, 0, 6], normal(3, seed=1))
    objective = problem.objective(batch_weight=lambda batch: batch["weight"])
    assert objective.weighting == "batch_weight"
    assert not objective.additive
    assert objective.baseline.weights.tolist() == [0.25, 0, 0.75]
    torch.testing.assert_close(dense(objective, objective.theta()), problem.hessian)
    torch.testing.assert_close(objective.grad(objective.theta()), problem.gradient)


def test_batches_without_a_loss_are_skipped() -> None:
    def sometimes(module: nn.Module, batch: Any) -> Tensor | None:
        return None if len(batch[0]) == 6 else cross_entropy(module, batch)

    x, y = images()
    objective = Objective(ConvNet(), split((x, y), [64, 6]), sometimes)
    expected = Objective(ConvNet(), [(x[:64], y[:64])], cross_entropy)
    theta, vector = objective.theta(), normal(objective.num_params, seed=1)
    assert objective.baseline.loss == expected.baseline.loss
    assert objective.baseline.error == expected.baseline.error
    assert torch.equal(objective.grad(theta), expected.grad(theta))
    assert torch.equal(objective.hvp(theta)(vector), expected.hvp(theta)(vector))


def test_a_step_that_never_gives_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no loss for any of 1 batches in mode='eval'"):
        Objective(ConvNet(), [images()], lambda module, batch: None).baseline  # noqa: B018


def test_no_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one probe batch, got none"):
        Objective(ConvNet(), [], cross_entropy)


def test_batch_statistics_make_batches_atomic() -> None:
    module, batches = ConvNet(), split(images(), [40, 30])
    objective = Objective(module, batches, cross_entropy, mode="train", chunk_size=8)
    assert not objective.additive
    assert len(objective.batches) == 2
    in_train_mode = ConvNet().train()
    in_train_mode.body[-1].eval()
    expected = sum(n / 70 * cross_entropy(in_train_mode, b).item() for n, b in zip([40, 30], batches, strict=True))
    assert objective.baseline.loss == pytest.approx(expected, rel=1e-13)
    assert module.body[1].num_batches_tracked.item() == 0


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_two_evaluations_are_the_same_bits(mode: Any) -> None:
    objective = Objective(ConvNet(torch.float32), [images(dtype=torch.float32)], noisy, mode=mode, chunk_size=16)
    theta, vector = objective.theta(), normal(objective.num_params, seed=1).float()
    for evaluate in (objective.loss, objective.grad, lambda t: objective.hvp(t)(vector)):
        first = evaluate(theta)
        torch.randn(3)
        assert torch.equal(evaluate(theta), first)


def noisy(module: nn.Module, batch: Any) -> Tensor:
    """Input noise and functional dropout of the step's own."""
    x = F.dropout(batch[0] + 0.1 * torch.randn_like(batch[0]), 0.2, training=True)
    return F.cross_entropy(module(x), batch[1])


def test_the_steps_random_numbers_follow_the_seed_and_leave_the_global_stream_alone() -> None:
    module, data = ConvNet(), images()
    state = torch.get_rng_state()
    losses = [Objective(module, [data], noisy, seed=s).baseline.loss for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_and_product_see_the_random_numbers_of_the_loss() -> None:
    objective = Objective(ConvNet(), split(images(), [40, 30]), noisy)
    theta, vector, step = objective.theta(), normal(objective.num_params, seed=1), 1e-6
    slope = (objective.loss(theta + step * vector) - objective.loss(theta - step * vector)) / (2 * step)
    assert float(objective.grad(theta) @ vector) == pytest.approx(slope.item(), rel=1e-6)


def gradient_penalty(module: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_()
    (inner,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    return F.mse_loss(module(x), batch[1]) + inner.square().mean()


def parameter_penalty(module: nn.Module, batch: Any) -> Tensor:
    loss = F.mse_loss(module(batch[0]), batch[1])
    gradients = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
    return loss + sum(g.square().sum() for g in gradients)


@pytest.mark.parametrize("loss_fn", [gradient_penalty, parameter_penalty])
def test_a_step_may_differentiate_inside_itself(loss_fn: Callable[[nn.Module, Any], Tensor]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    batch = normal(10, 3, seed=1), normal(10, 1, seed=2)
    objective = Objective(module, [batch], loss_fn)
    theta = objective.theta()
    leaf = theta.clone().requires_grad_()
    names = [n for n, _ in module.named_parameters()]
    sizes = [p.numel() for p in module.parameters()]

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self) -> Tensor:
            return loss_fn(self.inner, batch)

    def oracle(flat: Tensor) -> Tensor:
        parts = [t.view(p.shape) for t, p in zip(flat.split(sizes), module.parameters(), strict=True)]
        tensors = {f"inner.{n}": t for n, t in zip(names, parts, strict=True)}
        return torch.func.functional_call(Step(), tensors, ())

    assert objective.loss(theta).item() == pytest.approx(oracle(leaf).item(), rel=1e-13)
    torch.testing.assert_close(objective.grad(theta), oracles.gradient(oracle, theta), rtol=1e-11, atol=1e-12)
    expected = oracles.finite_difference_hessian(oracle, theta)
    torch.testing.assert_close(dense(objective, theta), expected, rtol=1e-6, atol=1e-6)


def clamping(module: nn.Module, batch: Any) -> Tensor:
    for parameter in module.parameters():
        parameter.data.clamp_(-0.1, 0.1)
    batch[0].mul_(2)
    return cross_entropy(module, batch)


def test_a_step_that_edits_parameters_and_batch_in_place_edits_neither_theta_nor_the_probe_set() -> None:
    module, batch = ConvNet(), images()
    before = digest([batch, module.state_dict()])
    objective = Objective(module, [batch], clamping, chunk_size=16)
    theta = objective.theta()
    kept = theta.clone()
    first = objective.loss(theta)
    objective.grad(theta)
    objective.hvp(theta)(theta)
    assert torch.equal(objective.loss(theta), first)
    assert torch.equal(theta, kept)
    assert torch.equal(objective.theta(), kept)
    assert digest([batch, module.state_dict()]) == before


def test_theta_is_as_it_was_when_the_objective_was_made() -> None:
    module = ConvNet()
    objective = Objective(module, [images()], cross_entropy)
    theta, loss = objective.theta(), objective.baseline.loss
    theta.zero_()
    with torch.no_grad():
        module.head.weight.zero_()
    assert objective.loss(objective.theta()).item() == loss


def test_the_objective_can_be_evaluated_without_gradients_or_in_inference_mode() -> None:
    expected = Objective(ConvNet(), [images()], cross_entropy)
    gradient = expected.grad(expected.theta())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            objective = Objective(ConvNet(), [images()], cross_entropy)
            theta = objective.theta()
            assert torch.equal(objective.grad(theta), gradient)
            product = objective.hvp(theta)
            assert torch.equal(product(gradient), product(gradient))
        assert torch.equal(product(gradient), expected.hvp(theta)(gradient))


def test_frozen_parameters_and_patterns_give_the_block_of_the_hessian() -> None:
    whole = Objective(ConvNet(), [images()], cross_entropy)
    hessian, names = dense(whole, whole.theta()), whole.layout.names
    sizes = whole.layout.sizes
    start = sum(sizes[: names.index("head.weight")])
    block = hessian[start : start + 52, start : start + 52]
    selected = Objective(ConvNet(), [images()], cross_entropy, parameters=["head.*"])
    torch.testing.assert_close(dense(selected, selected.theta()), block, rtol=1e-11, atol=1e-13)
    module = ConvNet()
    module.body.requires_grad_(False)
    module.unused.requires_grad_(False)
    frozen = Objective(module, [images()], cross_entropy)
    assert torch.equal(dense(frozen, frozen.theta()), dense(selected, selected.theta()))


def test_unused_parameters_have_no_slope_and_no_curvature() -> None:
    objective = Objective(ConvNet(), [images()], cross_entropy)
    theta = objective.theta()
    names = objective.layout.unflatten(torch.arange(objective.num_params))
    unused = torch.cat([index.flatten() for name, index in names.items() if name.startswith("unused.")]).long()
    within = torch.zeros_like(theta).index_fill(0, unused, 1.0)
    assert objective.grad(theta)[unused].abs().max() == 0
    assert objective.hvp(theta)(theta)[unused].abs().max() == 0
    assert objective.hvp(theta)(within).abs().max() == 0
    assert objective.hvp(theta).quadratic_forms(within).abs().max() == 0


def test_a_linear_loss_has_no_curvature() -> None:
    objective = problems.quadratic(torch.zeros(3, 3, dtype=torch.float64), slope=normal(3, seed=1)).objective()
    assert objective.hvp(objective.theta())(objective.grad(objective.theta())).tolist() == [0, 0, 0]


def test_curvature_scales_with_the_loss() -> None:
    def scaled(module: nn.Module, batch: Any) -> Tensor:
        return 1e-8 * cross_entropy(module, batch)

    plain, small = (
        Objective(ConvNet(torch.float32), [images(dtype=torch.float32)], f) for f in (cross_entropy, scaled)
    )
    vector = normal(plain.num_params, seed=1).float()
    assert small.additive
    torch.testing.assert_close(
        small.hvp(small.theta())(vector), 1e-8 * plain.hvp(plain.theta())(vector), rtol=1e-4, atol=1e-13
    )


def test_float64_modules_stay_float64() -> None:
    objective = Objective(ConvNet(), [images()], cross_entropy)
    theta = objective.theta()
    assert theta.dtype == objective.grad(theta).dtype == objective.hvp(theta)(theta).dtype == torch.float64


def test_sixteen_bit_modules_are_computed_in_float32() -> None:
    module = ConvNet(torch.bfloat16)
    objective = Objective(module, [images(dtype=torch.bfloat16)], cross_entropy)
    reference = ConvNet(torch.bfloat16).float()
    expected = Objective(reference, [images(dtype=torch.bfloat16)], cross_entropy_in_float32)
    assert objective.theta().dtype == torch.float32
    assert objective.baseline.loss == expected.baseline.loss
    assert module.head.weight.dtype == torch.bfloat16


def cross_entropy_in_float32(module: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(module, (batch[0].float(), batch[1]))


def test_a_float32_module_can_be_measured_in_float64() -> None:
    module, data = ConvNet(torch.float32), images(dtype=torch.float32)
    wide = Objective(module, [data], cross_entropy, dtype=torch.float64)
    expected = Objective(ConvNet(torch.float32).double(), [(data[0].double(), data[1])], cross_entropy)
    assert torch.equal(wide.grad(wide.theta()), expected.grad(expected.theta()))
    assert module.head.weight.dtype == torch.float32


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.complex(normal(4, seed=1), normal(4, seed=2)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6)


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    batch = normal(5, 6, seed=3), normal(5, 6, seed=4)
    objective = Objective(Spectral(), [batch], problems.mean_squared_error)
    theta = objective.theta()

    def oracle(flat: Tensor) -> Tensor:
        kernel = torch.complex(flat[::2], flat[1::2])
        return F.mse_loss(torch.fft.irfft(torch.fft.rfft(batch[0]) * kernel, n=6), batch[1])

    torch.testing.assert_close(objective.grad(theta), oracles.gradient(oracle, theta))
    expected = oracles.finite_difference_hessian(oracle, theta)
    torch.testing.assert_close(dense(objective, theta), expected, rtol=1e-8, atol=1e-9)


def test_values_per_example_average_to_the_loss_and_error() -> None:
    evaluation = Objective(ConvNet(), split(images(), [64, 6]), cross_entropy, chunk_size=16).baseline
    assert evaluation.example_losses is not None
    assert evaluation.example_errors is not None
    assert evaluation.example_weights is not None
    logits = ConvNet().eval()(images()[0])
    torch.testing.assert_close(evaluation.example_losses, F.cross_entropy(logits, images()[1], reduction="none"))
    assert float(evaluation.example_weights @ evaluation.example_losses) == pytest.approx(evaluation.loss, rel=1e-13)
    assert evaluation.error == pytest.approx((logits.argmax(1) != images()[1]).double().mean().item())
    assert evaluation.confidence == pytest.approx(logits.softmax(1).amax(1).mean().item())
    assert float(evaluation.weights.sum()) == pytest.approx(1)


def test_losses_are_summed_in_float64() -> None:
    """Small rises of a float32 module are not lost in the rounding of a float32 mean."""
    module, data = ConvNet(torch.float32), images(2000, dtype=torch.float32)
    objective = Objective(module, [data], cross_entropy, chunk_size=2000)
    with torch.no_grad():
        elements = F.cross_entropy(module.eval()(data[0]), data[1], reduction="none")
    assert objective.baseline.loss == pytest.approx(elements.double().mean().item(), rel=1e-14)
    assert objective.baseline.loss != elements.mean().item()


def test_other_losses_have_no_error() -> None:
    evaluation = problems.matrix_factorisation().objective().baseline
    assert (evaluation.error, evaluation.confidence, evaluation.example_losses) == (None, None, None)


def test_buffers_can_be_replaced_for_an_evaluation() -> None:
    module, batch = ConvNet(), images()
    objective = Objective(module, [batch], cross_entropy)
    buffers = objective.buffers
    buffers["body.1.running_mean"] += 1
    other = ConvNet()
    other.body[1].running_mean += 1
    expected = Objective(other, [batch], cross_entropy).baseline.loss
    assert objective.evaluate(objective.theta(), buffers=buffers).loss == expected
    assert torch.equal(objective.buffers["body.1.running_mean"], module.body[1].running_mean)


def test_objects_without_an_example_axis_count_as_one() -> None:
    batches = [SimpleNamespace(scale=2.0), SimpleNamespace(scale=4.0)]

    def loss_fn(module: nn.Module, batch: SimpleNamespace) -> Tensor:
        return batch.scale * module.theta.square().sum()

    objective = Objective(problems.Vector(torch.ones(2)), batches, loss_fn)
    assert objective.weighting == "batches"
    assert objective.num_examples is None
    assert objective.baseline.loss == pytest.approx(6)


def test_shapes_of_one_element_are_losses() -> None:
    def vector_loss(module: nn.Module, batch: Any) -> Tensor:
        return module.theta.square().sum()[None]

    assert Objective(problems.Vector(torch.ones(2)), [torch.zeros(3)], vector_loss).baseline.loss == 2
