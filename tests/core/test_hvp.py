"""Products of single vectors, of blocks and of diagonal blocks are those of the dense matrices, and each is counted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.hvp import CurvatureProduct, FiniteDifferenceProduct, HessianProduct
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature.chunk_forms import ChunkForms
from tests import oracles
from tests.core.test_objective import CASES, Case, copied, plain
from tests.problems import ConvNet, cross_entropy, images, normal, split

OPERATORS: dict[str, Callable[[Objective, Tensor], CurvatureProduct]] = {
    "hessian": lambda o, theta: o.hvp(theta),
    "ggn": lambda o, theta: o.ggn(theta),
    "empirical_fisher": lambda o, theta: o.empirical_fisher(theta),
}


def conv_net(**options: Any) -> Objective:
    return Objective(ConvNet(), split(images(), [64, 6]), cross_entropy, **{"chunk_size": 16, **options})


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(36, 3), nn.Tanh(), nn.Linear(3, 4))
        self.double()


@pytest.mark.parametrize("memory_budget", [0, 2**30])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_block_of_vectors_gives_the_products_of_each(case: Case, memory_budget: int) -> None:
    build, data, loss_fn, sizes, _ = case
    torch.manual_seed(0)
    objective = Objective(build(), split(data, sizes), loss_fn, chunk_size=8, memory_budget=memory_budget)
    theta, vectors = objective.theta(), normal(objective.num_params, 4, seed=1)
    single, blocked = objective.hvp(theta), objective.hvp(theta)
    expected = torch.stack([single(v) for v in vectors.unbind(1)], dim=1)
    torch.testing.assert_close(blocked(vectors), expected, rtol=1e-12, atol=1e-13)
    assert single.num_products == blocked.num_products == 4


@pytest.mark.parametrize("operator", OPERATORS)
def test_forms_of_a_block_are_those_of_its_columns(operator: str) -> None:
    objective = conv_net()
    theta, vectors = objective.theta(), normal(objective.num_params, 4, seed=1)
    with OPERATORS[operator](objective, theta) as product:
        products, forms = product.with_forms(vectors)
        assert forms.shape == (5, 4)
        for column in range(4):
            alone, of_one = product.with_forms(vectors[:, column])
            torch.testing.assert_close(products[:, column], alone, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(forms[:, column], of_one, rtol=1e-12, atol=1e-13)
        whole = (vectors * products).sum(0)
        torch.testing.assert_close(product.weights @ forms, whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("operator", OPERATORS)
def test_forms_of_combinations_follow_from_the_products_that_were_taken(operator: str) -> None:
    objective = conv_net()
    theta = objective.theta()
    vectors, weights = torch.linalg.qr(normal(objective.num_params, 4, seed=1)).Q.T, normal(4, seed=2)
    with OPERATORS[operator](objective, theta) as product:
        forms = ChunkForms(product)
        for vector in vectors:
            torch.testing.assert_close(forms(vector), product(vector), rtol=1e-12, atol=1e-13)
        before = product.num_products
        found = forms.of(weights @ vectors)
        assert product.num_products == before
        torch.testing.assert_close(found, product.quadratic_forms(weights @ vectors), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("memory_budget", [0, 2**30])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("tensors", [[0], [2, 3], [4, 1], [0, 1, 2, 3, 4, 5, 6]])
def test_a_diagonal_block_is_that_of_the_whole_matrix(operator: str, tensors: list[int], memory_budget: int) -> None:
    objective = conv_net(memory_budget=memory_budget)
    theta = objective.theta()
    with OPERATORS[operator](objective, theta) as product:
        dense = product(torch.eye(len(theta), dtype=theta.dtype))
        starts = torch.tensor(objective.layout.sizes).cumsum(0) - torch.tensor(objective.layout.sizes)
        places = torch.cat([torch.arange(objective.layout.sizes[n]) + starts[n] for n in tensors])
        vector = normal(len(places), seed=2)
        before = product.num_products
        found = product.on_tensors(tensors)(vector)
        torch.testing.assert_close(found, dense[places][:, places] @ vector, rtol=1e-11, atol=1e-13)
        assert product.num_products == before + 1


def test_finite_differences_serve_blocks_and_diagonal_blocks_too() -> None:
    module = MLP()
    exact = Objective(module, [images()], cross_entropy, chunk_size=35)
    other = Objective(module, [images()], cross_entropy, chunk_size=35, second_order="finite_differences")
    theta, vectors = exact.theta(), normal(exact.num_params, 3, seed=1)
    product = other.hvp(theta)
    assert isinstance(product, FiniteDifferenceProduct)
    torch.testing.assert_close(product(vectors), exact.hvp(theta)(vectors), rtol=1e-5, atol=1e-6)
    part = normal(3, seed=2)
    torch.testing.assert_close(
        product.on_tensors([1])(part), exact.hvp(theta).on_tensors([1])(part), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(product.gradient(), exact.grad(theta), rtol=1e-12, atol=1e-14)
    assert product.num_products == 3 + 1


class Unbatchable(torch.autograd.Function):
    """x², whose second derivative reads a number out of its tensors: no backward pass of many vectors at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return OneByOne.apply(gradient, 2 * x)


class OneByOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        if float(gradient.abs().sum()) < 0:
            raise AssertionError
        return gradient * b, gradient * a


class WrongInBlocks(OneByOne):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        wrong = 2.0 if torch._C._functorch.is_batchedtensor(gradient) else 1.0
        return wrong * gradient * b, wrong * gradient * a


@pytest.mark.parametrize("function", [OneByOne, WrongInBlocks])
def test_what_cannot_be_vectorised_or_comes_out_wrong_goes_one_by_one(function: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(globals(), "OneByOne", function)

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return Unbatchable.apply(module(batch[0])).mean()

    objective = Objective(MLP(), [images()], loss_fn, chunk_size=35)
    theta, vectors = objective.theta(), normal(objective.num_params, 4, seed=1)
    single, blocked = objective.hvp(theta), objective.hvp(theta)
    expected = torch.stack([single(v) for v in vectors.unbind(1)], dim=1)
    for _ in range(2):
        torch.testing.assert_close(blocked(vectors), expected, rtol=1e-12, atol=1e-13)
    assert blocked.num_products == 8


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", [*CASES, "mlp"])
def test_the_dense_hessian_under_both_reductions_and_ragged_batches(name: str, reduction: str) -> None:
    """A summed loss is no mean over examples: its batches stay as they are, and weigh by their examples."""
    torch.manual_seed(0)
    build, data, _, sizes, smooth = {**CASES, "mlp": (MLP, images(), None, [64, 6], True)}[name]
    loss_fn = losses(name, reduction)
    module, batches = build(), split(data, sizes)
    oracle = oracles.mean_loss(plain(module), batches, copied(loss_fn), [float(n) for n in sizes])
    theta = oracles.flat_parameters(module)
    differentiate = oracles.finite_difference_hessian if smooth else oracles.dense_hessian
    objective = Objective(module, batches, loss_fn, chunk_size=11)
    assert objective.additive is (reduction == "mean")
    with objective.hvp(theta) as product:
        dense = product(torch.eye(len(theta), dtype=theta.dtype))
    expected = differentiate(oracle, theta)
    scale = float(expected.abs().max())
    torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-7 * scale)


def losses(name: str, reduction: str) -> Callable[[nn.Module, Any], Tensor]:
    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return F.cross_entropy(module(batch["tokens"]), batch["targets"], reduction=reduction)
        classes = not batch[1].is_floating_point()
        return (F.cross_entropy if classes else F.mse_loss)(module(batch[0]), batch[1], reduction=reduction)

    return loss_fn


def test_products_are_told_of() -> None:
    told: list[int] = []
    objective = conv_net()
    product = objective.hvp(objective.theta())
    product.on_product = told.append
    product(normal(objective.num_params, seed=1))
    product(normal(objective.num_params, 3, seed=1))
    product.on_tensors([0])(normal(27, seed=1))
    assert told == [1, 4, 5]


def test_the_gradient_of_the_cached_graphs_is_that_of_the_objective() -> None:
    objective = conv_net()
    product = objective.hvp(objective.theta())
    assert isinstance(product, HessianProduct)
    torch.testing.assert_close(product.gradient(), objective.grad(objective.theta()), rtol=1e-12, atol=1e-14)
    assert (product.num_chunks, product.num_cached, product.num_gradients) == (5, 5, 1)


def test_the_budget_of_a_product_takes_the_place_of_that_of_the_objective() -> None:
    objective = conv_net(memory_budget=2**30)
    product = objective.hvp(objective.theta(), memory_budget=0)
    product(normal(objective.num_params, seed=1))
    assert product.num_cached == 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the peer and what it imports
@pytest.mark.parametrize("build", [ConvNet, MLP])
def test_products_agree_with_curvlinops(build: Callable[[], nn.Module]) -> None:
    import curvlinops

    module, batches = build().eval(), split(images(), [64, 6])
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    slopes = torch.autograd.grad(cross_entropy(module, batches[0]), list(named.values()), allow_unused=True)
    used = {
        n: p for (n, p), slope in zip(named.items(), slopes, strict=True) if slope is not None
    }  # it takes no others
    objective = Objective(module, batches, cross_entropy, chunk_size=16, parameters=list(used))
    peer = curvlinops.HessianLinearOperator(module, nn.CrossEntropyLoss(), list(used.values()), batches)
    vector = normal(objective.num_params, seed=3)
    torch.testing.assert_close(objective.hvp(objective.theta())(vector), peer @ vector, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_gauss_newton_products_agree_with_curvlinops() -> None:
    import curvlinops

    module, batches = MLP().eval(), split(images(), [64, 6])
    objective = Objective(module, batches, cross_entropy, chunk_size=16)
    peer = curvlinops.GGNLinearOperator(module, nn.CrossEntropyLoss(), list(module.parameters()), batches)
    vector = normal(objective.num_params, seed=3)
    torch.testing.assert_close(objective.ggn(objective.theta())(vector), peer @ vector, rtol=1e-8, atol=1e-10)
