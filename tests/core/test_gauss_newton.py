from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.gauss_newton import DiagonalCurvature, SoftmaxCurvature, output_hessian
from lmc_lightning.core.hvp import HessianProduct
from lmc_lightning.core.losstap import LossTap
from lmc_lightning.core.objective import Objective
from tests import oracles, problems
from tests.problems import ConvNet, cross_entropy, generator, images, normal, split

N, C = 20, 3
WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
X = normal(N, 4, seed=1)
LABELS = torch.randint(C, (N,), generator=generator(2))
SOFT = normal(N, C, seed=3).softmax(1)
BITS = (normal(N, C, seed=4) > 0).double()
POSITIVE = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)


def ignoring(targets: Tensor) -> Tensor:
    targets = targets.clone()
    targets.view(-1)[::4] = -100
    return targets


@dataclass(frozen=True)
class Case:
    """A loss by the outputs and targets of a chunk, and the same loss by the logits, for the oracle."""

    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    link: Callable[[Tensor], Tensor] = lambda logits: logits
    by_logits: Callable[[Tensor, Tensor], Tensor] | None = None
    sums: Callable[[Tensor, Tensor], Tensor] | None = None
    """Loss of each element; by default that of ``reduction="none"``."""


def weighted_smoothed(f: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(f, y, weight=WEIGHTS, label_smoothing=0.2, **options)


def pixels(f: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(f.view(-1, C, 2, 2), y, weight=WEIGHTS, **options)


def with_positive_weight(f: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, y, pos_weight=POSITIVE, **options)


CASES = {
    "cross entropy": Case(LABELS, F.cross_entropy),
    "ignored, class weights, smoothing": Case(ignoring(LABELS), weighted_smoothed),
    "soft targets, class weights, smoothing": Case(SOFT, weighted_smoothed),
    "pixels": Case(torch.stack([LABELS, ignoring(LABELS)] * 2, 1).view(N, 2, 2), pixels),
    "log-probabilities": Case(
        ignoring(LABELS),
        lambda f, y, **o: F.nll_loss(f, y, weight=WEIGHTS, **o),
        lambda z: z.log_softmax(1),
        lambda f, y, **o: F.cross_entropy(f, y, weight=WEIGHTS, **o),
    ),
    "squared error": Case(BITS, F.mse_loss),
    "bits": Case(BITS, with_positive_weight),
    "probabilities": Case(BITS, F.binary_cross_entropy, torch.sigmoid, F.binary_cross_entropy_with_logits),
}


class Smooth(nn.Module):
    """Two layers with tanh, a frozen and an unused tensor."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.hidden, self.head, self.unused = nn.Linear(4, 3), nn.Linear(3, outputs), nn.Linear(2, 1)
        self.double()
        for index, tensor in enumerate(self.parameters()):
            tensor.data.copy_(0.6 * normal(*tensor.shape, seed=30 + index))
        self.hidden.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))


def module_of(case: Case) -> Smooth:
    return Smooth(4 * C if case.loss is pixels else C)


def objective_of(case: Case, sizes: list[int], **options: Any) -> Objective:
    def step(module: nn.Module, batch: Any) -> Tensor:
        return case.loss(case.link(module(batch[0])), batch[1])

    return Objective(module_of(case), split((X, case.targets), sizes), step, **options)


def dense(product: HessianProduct) -> Tensor:
    with product:
        return torch.stack([product(row) for row in torch.eye(len(product.theta), dtype=torch.float64)], 1)


def logits_at(module: nn.Module) -> Callable[[Tensor], Tensor]:
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def logits(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in named.values()])
        tensors = {n: t.view(p.shape) for (n, p), t in zip(named.items(), parts, strict=True)}
        return torch.func.functional_call(module, tensors, (X,))

    return logits


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("chunk_size", "memory_budget"), [(20, 2**30), (8, 0)])
def test_gauss_newton_against_its_dense_definition(case: Case, chunk_size: int, memory_budget: int) -> None:
    objective = objective_of(case, [13, 7], chunk_size=chunk_size, memory_budget=memory_budget)
    theta, module = objective.theta(), module_of(case)
    logits, by_logits = logits_at(module), case.by_logits or case.loss
    jacobian = torch.func.jacrev(logits)(theta).reshape(-1, len(theta))
    flat, shape = logits(theta).detach().reshape(-1), logits(theta).shape
    curvature = torch.func.jacrev(torch.func.grad(lambda f: by_logits(f.view(shape), case.targets)))(flat)
    matrix = dense(objective.ggn(theta))
    torch.testing.assert_close(matrix, jacobian.T @ curvature @ jacobian, rtol=1e-11, atol=1e-13)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-13


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("chunk_size", "memory_budget"), [(20, 2**30), (8, 0)])
def test_empirical_fisher_is_the_mean_of_outer_products(case: Case, chunk_size: int, memory_budget: int) -> None:
    objective = objective_of(case, [13, 7], chunk_size=chunk_size, memory_budget=memory_budget)
    theta = objective.theta()
    logits, shares = logits_at(module_of(case)), objective.baseline.example_weights

    def losses(point: Tensor) -> Tensor:
        elements = case.loss(case.link(logits(point)), case.targets, reduction="none").reshape(N, -1).sum(1)
        return elements / (shares * total)

    with LossTap() as tap:
        loss = case.loss(case.link(logits(theta)), case.targets)
    total = tap.required(loss).weights.sum()
    assert shares is not None
    gradients = torch.func.jacrev(losses)(theta)[shares > 0]
    expected = gradients.T @ (shares[shares > 0, None] * gradients)
    matrix = dense(objective.empirical_fisher(theta))
    torch.testing.assert_close(matrix, expected, rtol=1e-11, atol=1e-13)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-13


@pytest.mark.parametrize("problem", [problems.linear_regression(), problems.softmax_regression()])
def test_of_a_linear_model_it_is_the_hessian(problem: problems.Problem) -> None:
    objective = problem.objective(chunk_size=16)
    torch.testing.assert_close(dense(objective.ggn(objective.theta())), problem.hessian, rtol=1e-12, atol=1e-13)


def test_it_is_the_covariance_of_gradients_under_the_predicted_classes() -> None:
    """The Fisher information: E over y from the model's own distribution of g gᵀ."""
    case = CASES["cross entropy"]
    objective = objective_of(case, [N])
    theta, logits = objective.theta(), logits_at(module_of(case))
    log_p = torch.func.jacrev(lambda t: logits(t).log_softmax(1))(theta)
    expected = torch.einsum("nc,ncp,ncq->pq", logits(theta).softmax(1).detach(), log_p, log_p) / N
    torch.testing.assert_close(dense(objective.ggn(theta)), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("per_example", [False, True])
def test_the_factors_are_a_square_root_of_every_block(case: Case, per_example: bool) -> None:
    outputs = case.link(normal(N, 4 * C if case.loss is pixels else C, seed=9))
    with LossTap() as tap:
        loss = case.loss(outputs, case.targets)
    tapped = tap.required(loss)
    form = output_hessian(tapped, per_example=per_example)
    factors = torch.stack([form.factor(k) for k in range(form.num_factors)])
    entries = tapped.outputs[0].numel()
    expected = torch.stack([form(unit(index, tapped.outputs)) for index in range(entries)])
    flat = factors.reshape(-1, N, entries)
    torch.testing.assert_close(torch.einsum("kni,knj->inj", flat, flat), expected.reshape(entries, N, entries))


def unit(index: int, outputs: Tensor) -> Tensor:
    column = torch.zeros_like(outputs).reshape(len(outputs), -1)
    column[:, index] = 1
    return column.view_as(outputs)


def test_certain_predictions_have_no_curvature_and_no_nan() -> None:
    certain = torch.tensor([[500.0, 0.0, 0.0], [0.0, 0.0, 500.0]])
    softmax = SoftmaxCurvature(certain.softmax(1), torch.ones(2, 1))
    assert torch.stack([softmax.factor(k) for k in range(2)]).tolist() == torch.zeros(2, 2, 3).tolist()
    with LossTap() as tap:
        loss = F.binary_cross_entropy(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [0.0]]))
    bits = output_hessian(tap.required(loss))
    assert isinstance(bits, DiagonalCurvature)
    assert bool(bits.diagonal.isfinite().all())


def test_it_keeps_graphs_and_counts_like_the_hessian_product() -> None:
    def make(budget: int) -> Objective:
        return Objective(ConvNet(), [images()], cross_entropy, chunk_size=16, memory_budget=budget)

    kept, recomputed = (make(budget).ggn(make(budget).theta()) for budget in (2**30, 0))
    vector = normal(len(kept.theta), seed=6)
    values = [product(vector) for product in (kept, recomputed) for _ in range(3)]
    assert all(torch.equal(v, values[0]) for v in values)
    assert (kept.num_cached, recomputed.num_cached) == (5, 0)
    assert (kept.num_products, recomputed.num_products) == (3, 3)
    assert (kept.num_gradients, recomputed.num_gradients) == (1, 3)
    torch.testing.assert_close(kept.gradient(), make(0).grad(kept.theta), rtol=1e-12, atol=1e-14)
    kept.release()
    assert kept.num_cached == 0
    assert torch.equal(kept(vector), values[0])


def test_forms_are_those_of_the_chunks() -> None:
    batches = split(images(), [16, 16, 16, 16, 6])
    objective = Objective(ConvNet(), batches, cross_entropy, chunk_size=16)
    theta, vector = objective.theta(), normal(objective.num_params, seed=7)
    forms = objective.ggn(theta).quadratic_forms(vector)
    alone = [Objective(ConvNet(), [b], cross_entropy).ggn(theta)(vector) @ vector for b in batches]
    torch.testing.assert_close(forms, torch.stack(alone), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("case", [CASES["cross entropy"], CASES["squared error"]], ids=["softmax", "diagonal"])
def test_blocks_of_vectors_and_blocks_of_tensors_are_those_of_the_matrix(case: Case, name: str) -> None:
    objective = objective_of(case, [13, 7], chunk_size=8)
    theta = objective.theta()
    product = getattr(objective, name)(theta)
    matrix, vectors = dense(product), normal(len(theta), 3, seed=8)
    torch.testing.assert_close(product(vectors), matrix @ vectors, rtol=1e-11, atol=1e-13)
    start, size = objective.layout.sizes[0], objective.layout.sizes[1]
    inside = slice(start, start + size)
    part = vectors[inside, 0]
    torch.testing.assert_close(product.on_tensors([1])(part), matrix[inside, inside] @ part, rtol=1e-11, atol=1e-13)


def test_in_float32_and_elsewhere_than_at_the_start() -> None:
    reference = Objective(ConvNet(), [images()], cross_entropy)
    objective = Objective(ConvNet(torch.float32), [images(dtype=torch.float32)], cross_entropy, chunk_size=32)
    theta = reference.theta() + 0.1 * normal(reference.num_params, seed=5)
    vector = normal(reference.num_params, seed=6)
    for name in ("ggn", "empirical_fisher"):
        product = getattr(objective, name)(theta.float())(vector.float())
        assert product.dtype == torch.float32
        torch.testing.assert_close(product.double(), getattr(reference, name)(theta)(vector), rtol=1e-4, atol=1e-4)


def regularised(module: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(module, batch) + 0.1 * module.head.weight.square().sum()


@pytest.mark.parametrize("name", ["ggn", "empirical_fisher"])
def test_a_loss_whose_outputs_are_unknown_is_refused(name: str) -> None:
    objective = Objective(ConvNet(), [images()], regularised)
    with pytest.raises(ValueError, match="not one mean by cross_entropy, nll_loss, mse_loss"):
        getattr(objective, name)(objective.theta())


def test_scores_that_are_no_log_probabilities_are_refused() -> None:
    objective = Objective(ConvNet(), [images()], lambda m, b: F.nll_loss(m(b[0]), b[1]))
    product = objective.ggn(objective.theta())
    with pytest.raises(ValueError, match="not given log-probabilities"):
        product(objective.theta())


def test_targets_that_move_with_the_parameters_are_refused() -> None:
    objective = Objective(ConvNet(), [images()], lambda m, b: F.mse_loss(m(b[0]), m(b[0]) - 1))
    product = objective.ggn(objective.theta())
    with pytest.raises(ValueError, match="targets of the loss depend on the parameters"):
        product(objective.theta())


def test_a_loss_without_the_parameters_is_refused() -> None:
    objective = Objective(ConvNet(), [images()], lambda m, b: F.cross_entropy(m(b[0]).detach(), b[1]))
    product = objective.ggn(objective.theta())
    with pytest.raises(ValueError, match="does not depend on the measured parameters"):
        product(objective.theta())


def test_an_excerpt_is_the_loss_on_the_first_examples() -> None:
    batches = split(images(dtype=torch.float32), [64, 6])
    objective = Objective(ConvNet(torch.float32), batches, cross_entropy, chunk_size=16, parameters=["head.*"])
    excerpt = objective.excerpt(5, dtype=torch.float64)
    x, y = images()
    module, few = ConvNet().eval(), (x[:5].float().double(), y[:5])
    expected = oracles.mean_loss(ConvNet(torch.float32), [few], cross_entropy, [1.0])
    assert excerpt.theta().dtype == torch.float64
    assert excerpt.num_params == objective.num_params == module.head.weight.numel() + module.head.bias.numel()
    full = oracles.flat_parameters(ConvNet(torch.float32))
    assert float(excerpt.loss(excerpt.theta())) == pytest.approx(float(expected(full)), rel=1e-13)
