"""Weight matching: planted permutations come back, exact optima are met, and where no permutation helps none does."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations as orders
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.alignment.aligned import Alignment
from lmc_lightning.landscape.alignment.groups import Groups, permutation_groups
from lmc_lightning.landscape.alignment.matching import weight_matching
from lmc_lightning.landscape.alignment.reordering import Permutations
from lmc_lightning.landscape.paths.line import Endpoint, endpoint_of
from lmc_lightning.models import MLP, VGG16, AlexNet, LeNet5, ResNet18, ResNet20
from tests.landscape.networks import CASES, Attention, Case
from tests.landscape.paths.between import barrier_between
from tests.problems import cross_entropy, generator, normal

of_each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def planted(module: nn.Module, groups: Groups, seed: int) -> dict[str, Tensor]:
    """The state of a module after a random permutation of every group."""
    return groups.apply(state_of(module), groups.random(generator(seed)))


# -- planted permutations ----------------------------------------------------------------------------------------------


@of_each
@pytest.mark.parametrize("seed", SEEDS)
def test_planted_permutations_are_recovered_exactly(case: Case, seed: int) -> None:
    module = case.module(seed)
    groups = permutation_groups(module, case.batch())
    ours, theirs = state_of(module), planted(module, groups, seed)
    matching = weight_matching(groups, ours, theirs, restarts=0, seed=seed)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in matching.apply(theirs).items())
    assert matching.objective == pytest.approx(sum(float(ours[n].square().sum()) for n in groups.parameters), rel=1e-12)
    assert matching.converged
    assert 0 < matching.moved <= 1


LARGE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (MLP, (1, 28, 28)),
    "lenet5": (LeNet5, (1, 28, 28)),
    "resnet20": (ResNet20, (3, 32, 32)),
    "vgg16": (VGG16, (3, 32, 32)),
    "resnet18": (ResNet18, (3, 32, 32)),
    "alexnet": (AlexNet, (3, 224, 224)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_planted_permutations_of_the_networks_of_the_literature_are_recovered(name: str) -> None:
    build, shape = LARGE[name]
    images = torch.randn(2, *shape, generator=generator(0))
    groups: Groups | None = None
    for seed in range(10):
        torch.manual_seed(seed)
        module = build().eval()
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.ndim == 1:  # BatchNorm at its start treats channels alike
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
        groups = groups or permutation_groups(module, images)
        assert groups.dropped == {}
        ours, theirs = state_of(module), planted(module, groups, seed)
        matching = weight_matching(groups, ours, theirs, restarts=0)
        assert all(torch.equal(tensor, ours[n]) for n, tensor in matching.apply(theirs).items()), (seed, str(matching))
        with torch.no_grad():
            before = module(images)
            module.load_state_dict(theirs)
            torch.testing.assert_close(module(images), before, rtol=0, atol=1e-5 * float(before.abs().max()))


def objective_of(case: Case, seed: int = 0) -> Objective:
    images = case.batch(12)
    return Objective(case.module(seed), [(images, torch.arange(12) % 3)], cross_entropy)


@pytest.mark.parametrize("name", ["mlp", "lenet", "conv", "resnet20", "attention"])
def test_the_barrier_to_a_planted_permutation_is_zero_after_alignment(name: str) -> None:
    objective = objective_of(CASES[name])
    alignment = Alignment("weights", objective, restarts=0)
    end_a = endpoint_of(objective)
    groups = alignment.groups
    end_b = endpoint_of(objective, planted(CASES[name].module(), groups, 3))
    aligned, _ = alignment.aligned(end_a, end_b)
    options: dict[str, Any] = {"num_points": 5, "batch_stats": "interpolate"}
    before = barrier_between(objective, end_a, end_b, **options)["loss"]
    after = barrier_between(objective, end_a, aligned, **options)["loss"]
    assert before.values.std() > 0
    assert after.barrier == 0
    assert torch.equal(aligned.theta, end_a.theta)
    assert all(torch.equal(aligned.buffers[n], b) for n, b in end_a.buffers.items())
    assert before.values[-1] == pytest.approx(float(before.values[0]), rel=1e-10)


# -- optima ------------------------------------------------------------------------------------------------------------


@of_each
def test_the_objective_is_at_least_that_of_the_identity_and_what_it_says(case: Case) -> None:
    module, other = case.module(0), case.module(1)
    groups = permutation_groups(module, case.batch())
    ours, theirs = state_of(module), state_of(other)
    matching = weight_matching(groups, ours, theirs)
    moved = matching.apply(theirs)

    def inner(state: dict[str, Tensor]) -> float:
        return sum(float((ours[name] * state[name]).sum()) for name in groups.parameters)

    assert matching.objective == pytest.approx(inner(moved), rel=1e-10)
    assert matching.identity_objective == pytest.approx(inner(theirs), rel=1e-10)
    assert matching.objective == pytest.approx(max(matching.objectives), rel=1e-12)
    assert matching.objective > matching.identity_objective
    with torch.no_grad():
        reference = other(case.batch())
        other.load_state_dict(moved)
        torch.testing.assert_close(other(case.batch()), reference, rtol=0, atol=1e-10)


def all_orders(groups: Groups) -> Iterator[Permutations]:
    """Every permutation of every group."""

    def of(group: Any) -> Iterator[Tensor]:
        single = [torch.tensor(order) for order in orders(range(group.size))]
        if group.within is None:
            yield from single
        else:
            yield from (torch.stack(rows) for rows in product(single, repeat=group.num_orders))

    for chosen in product(*(of(group) for group in groups)):
        yield {g.channels: order for g, order in zip(groups, chosen, strict=True)}


def value(groups: Groups, ours: dict[str, Tensor], theirs: dict[str, Tensor], by: Permutations) -> float:
    moved = groups.apply(theirs, by)
    return sum(float((ours[name] * moved[name]).sum()) for name in groups.parameters)


@pytest.mark.parametrize("seed", range(3))
def test_one_hidden_layer_is_matched_optimally(seed: int) -> None:
    module, other = (CaseNet(s) for s in (seed, seed + 10))
    groups = permutation_groups(module, normal(3, 4, seed=1))
    ours, theirs = state_of(module), state_of(other)
    best = max(value(groups, ours, theirs, by) for by in all_orders(groups))
    assert weight_matching(groups, ours, theirs, restarts=0).objective == pytest.approx(best, rel=1e-12)


class CaseNet(nn.Sequential):
    """One hidden layer of 5 units."""

    def __init__(self, seed: int) -> None:
        super().__init__(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        self.double()
        for index, parameter in enumerate(self.parameters()):
            parameter.data.copy_(normal(*parameter.shape, seed=100 * seed + index))


@pytest.mark.parametrize("seed", range(2))
def test_heads_and_the_orders_inside_them_are_matched_optimally_together(seed: int) -> None:
    """3! head orders times 2³ orders of queries and keys times 2³ of values, with the residual channels held."""
    case = Case(lambda: Attention(heads=3, width=2), (4, 5), ())
    module, other = case.module(seed), case.module(seed + 5)
    module.embed.requires_grad_(False)  # holds the residual channels
    groups = permutation_groups(module, case.batch())
    assert [(g.size, g.num_orders) for g in groups] == [(3, 1), (2, 3), (2, 3)]
    ours, theirs = state_of(module), state_of(other)
    best = max(value(groups, ours, theirs, by) for by in all_orders(groups))
    assert weight_matching(groups, ours, theirs, restarts=0).objective == pytest.approx(best, rel=1e-12)


def test_agreement_is_the_share_of_channels_that_other_starts_put_in_the_same_place() -> None:
    case = CASES["mlp"]
    module = case.module()
    groups = permutation_groups(module, case.batch())
    found = weight_matching(groups, state_of(module), planted(module, groups, 1), restarts=3)
    assert len(found.objectives) == 4
    same = [abs(o - found.objective) < 1e-9 for o in found.objectives]
    assert found.agreement == 1 if all(same) else found.agreement < 1
    none = weight_matching(groups, state_of(module), state_of(module), restarts=0)
    assert none.moved == 0
    assert none.agreement != none.agreement  # nothing to agree with


def test_a_report_says_what_was_found_in_words_and_numbers() -> None:
    case = CASES["mlp"]
    module = case.module()
    groups = permutation_groups(module, case.batch())
    found = weight_matching(groups, state_of(module), planted(module, groups, 1))
    assert str(found).startswith("2 groups of 11 channels, ")
    assert found.report()["align_channels"] == 11
    assert torch.equal(found["fc1.weight[0]"].sort().values, torch.arange(6))


def test_a_network_without_groups_stays_as_it_is() -> None:
    module = nn.Linear(3, 2)
    groups = permutation_groups(module, torch.zeros(2, 3))
    found = weight_matching(groups, state_of(module), state_of(nn.Linear(3, 2)))
    assert (len(groups), found.moved, found.agreement) == (0, 0, 1)


# -- where no permutation helps ----------------------------------------------------------------------------------------


def two_units(first: list[list[float]], out: list[float], bias: float) -> dict[str, Tensor]:
    tensors = {"0.weight": first, "2.weight": [out], "2.bias": [bias]}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in tensors.items()}


def test_the_counterexample_of_git_rebasin_keeps_its_error_barrier_of_a_quarter() -> None:
    """Two units that say "x₁ < 0 or x₂ < 0" in two ways: by the sum of what is negative, or of what is not.

    At ½ both orders of the second network cancel the output weights, and one quadrant of four is wrong
    (arXiv 2209.04836, on the limits of the conjecture).
    """
    points = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    labels = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1)).double()
    negative = two_units([[-1.0, 0.0], [0.0, -1.0]], [1.0, 1.0], -0.5)
    positive = two_units([[1.0, 0.0], [0.0, 1.0]], [-1.0, -1.0], 1.5)
    module.load_state_dict(negative)
    objective = Objective(
        module, [(points, labels)], lambda m, b: F.binary_cross_entropy_with_logits(m(b[0])[:, 0], b[1])
    )
    alignment = Alignment("weights", objective)
    end_a, end_b = endpoint_of(objective), endpoint_of(objective, positive)
    (group,) = alignment.groups
    assert group.size == 2
    for order in ([0, 1], [1, 0]):
        moved = alignment.groups.apply(positive, {group.channels: torch.tensor(order)})
        error = barrier_between(objective, end_a, endpoint_of(objective, moved))["error"]
        assert list(error.values[[0, -1]]) == [0, 0]
        assert error.barrier == pytest.approx(0.25, abs=1e-12)
    for method in ("weights", "activations"):
        aligned, _ = Alignment(method, objective).aligned(end_a, end_b)
        assert barrier_between(objective, end_a, aligned)["error"].barrier == pytest.approx(0.25, abs=1e-12)


# -- what follows the permutation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-2, amsgrad=True),  # gradients of 0 up to rounding stay that
    ],
    ids=["SGD", "Adam"],
)
def test_training_commutes_with_the_permutation_when_the_optimizer_follows(make: Callable[..., Any]) -> None:
    case = CASES["conv"]
    module, data = case.module(), (case.batch(6), torch.arange(6) % 3)
    groups = permutation_groups(module, case.batch())
    other = copy.deepcopy(module)
    optimizer, others = make(module.parameters()), make(other.parameters())

    def train(net: nn.Module, by: Any) -> None:
        by.zero_grad()
        cross_entropy(net, data).backward()
        by.step()

    train(module, optimizer)
    matching = replace(weight_matching(groups, *[state_of(module)] * 2), permutations=groups.random(generator(2)))
    other.load_state_dict(matching.apply(state_of(module)))
    names = [name for name, _ in module.named_parameters()]
    others.load_state_dict(matching.apply_to_optimizer(optimizer.state_dict(), names))
    for _ in range(3):
        train(module, optimizer)
        train(other, others)
    expected = matching.apply(state_of(module))
    for name, tensor in state_of(other).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-9)


def test_an_optimizer_that_cannot_follow_is_refused() -> None:
    case = CASES["mlp"]
    module = case.module()
    groups = permutation_groups(module, case.batch())
    matching = weight_matching(groups, state_of(module), planted(module, groups, 1))
    state = {"state": {0: {"rows": torch.zeros(6)}}, "param_groups": [{"params": [0]}]}
    with pytest.raises(ValueError, match=r"'rows' of 'fc1.weight' is of shape \[6\] in the optimizer's state"):
        matching.apply_to_optimizer(state, ["fc1.weight"])
    with pytest.raises(ValueError, match="The optimizer has 1 parameters, and 2 names were given"):
        matching.apply_to_optimizer(state, ["fc1.weight", "fc1.bias"])


def test_a_state_of_unknown_tensors_is_refused() -> None:
    case = CASES["mlp"]
    groups = permutation_groups(case.module(), case.batch())
    matching = weight_matching(groups, state_of(case.module()), state_of(case.module()))
    with pytest.raises(ValueError, match="The state has no layout"):
        matching.apply_to_endpoint(Endpoint(torch.zeros(3)))
