"""Groups of channels: found in every layout, none that is not there, and each keeps the function."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.glassbox import rng_state
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.alignment.groups import Groups, groups_of, permutation_groups
from lmc_lightning.landscape.alignment.reordering import Permutations
from tests.branching.runs import sha
from tests.landscape.networks import CASES, Case, Recurrent
from tests.problems import cross_entropy, generator, normal

of_each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def permuted(module: nn.Module, groups: Groups, permutations: Permutations) -> nn.Module:
    other = copy.deepcopy(module)
    other.load_state_dict(groups.apply(module.state_dict(), permutations))
    return other


def outputs(module: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return module(batch)


def sizes(groups: Groups) -> tuple[tuple[int, int], ...]:
    return tuple((g.size, g.num_orders) for g in groups)


@of_each
def test_all_groups_are_found_and_every_permutation_keeps_the_function(case: Case) -> None:
    module, batch = case.module(), case.batch(5)
    groups = permutation_groups(module, case.batch())
    assert sizes(groups) == case.groups
    assert groups.dropped == {}
    reference = outputs(module, batch)
    for seed in range(3):
        permutations = groups.random(generator(seed))
        other = permuted(module, groups, permutations)
        assert any(not torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
        torch.testing.assert_close(outputs(other, batch), reference, rtol=0, atol=1e-10)


@of_each
def test_every_group_moves_tensors_and_keeps_the_function_alone(case: Case) -> None:
    module, batch = case.module(), case.batch(5)
    groups = permutation_groups(module, case.batch())
    state = module.state_dict()
    for group in groups:
        order = group.identity().flip(-1)
        other = groups.apply(state, groups.identity() | {group.channels: order})  # type: ignore[operator]
        moved = {name for name in state if not torch.equal(state[name], other[name])}
        assert moved == {name for name, _ in group.places if name in state}
        torch.testing.assert_close(
            outputs(permuted(module, groups, {group.channels: order}), batch),
            outputs(module, batch),
            rtol=0,
            atol=1e-10,
        )


def test_classes_and_inputs_are_in_no_group() -> None:
    groups = permutation_groups(CASES["mlp"].module(), CASES["mlp"].batch())
    places = {place for group in groups for place in group.places}
    assert places.isdisjoint({("fc1.weight", 1), ("fc3.weight", 0), ("fc3.bias", 0)})
    assert ("bn1.running_var", 0) in places


def test_the_module_and_every_random_stream_are_left_as_they_were() -> None:
    module = CASES["transformer"].module().train()
    before = copy.deepcopy(module.state_dict()), sha(rng_state()), torch.backends.mha.get_fastpath_enabled()
    permutation_groups(module, CASES["transformer"].batch())
    assert all(torch.equal(before[0][k], v) for k, v in module.state_dict().items())
    assert (sha(rng_state()), torch.backends.mha.get_fastpath_enabled()) == before[1:]
    assert all(m.training for m in module.modules())
    assert all(p.grad is None for p in module.parameters())


# -- what depends on the order of channels -----------------------------------------------------------------------------


class Net(nn.Module):
    """Three layers with something between the first two."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.between = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2), between

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.between(self.a(x).relu())).relu())


ORDERED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "cumulative sum": (lambda x: x.cumsum(1), "aten.cumsum"),
    "flip": (lambda x: x.flip(1), "aten.flip"),
    "sort": (lambda x: x.sort(1).values, "aten.sort"),
    "ramp": (lambda x: x * torch.arange(6), "aten.arange"),
    "indices": (lambda x: x[:, [1, 0, 3, 2, 5, 4]], "aten.index"),
    "winner": (lambda x: x + x.argmax(1, keepdim=True), "aten.argmax"),
    "strides": (lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1), "aten.slice"),
    "pooling": (lambda x: F.avg_pool1d(x[:, None], 3, 1, 1)[:, 0], "space"),
    "recurrence": (lambda x: torch.einsum("ni,ij->nj", x, torch.ones(6, 6, dtype=x.dtype).tril()), "aten.tril"),
    "unseen": (lambda x: torch.from_numpy(np.cumsum(x.numpy(), 1)), "a random permutation changes the outputs"),
}


@pytest.mark.parametrize(("between", "reason"), ORDERED.values(), ids=ORDERED)
def test_a_group_that_is_none_is_dropped_and_named(between: Callable[[Tensor], Tensor], reason: str) -> None:
    groups = permutation_groups(Net(between).double(), normal(3, 3, seed=1))
    assert [g.name for g in groups] == ["b.weight[0]"]
    if reason != "space":
        assert reason in groups.dropped["a.weight[0]"]


EQUIVARIANT: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(1),
    "normalised": lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1),
    "largest": lambda x: x / x.amax(1, keepdim=True).clamp(min=1),
    "in place": lambda x: x.clone().mul_(2).add_(x),
    "written into": lambda x: torch.zeros_like(x).copy_(x),
    "masked": lambda x: torch.where(x > 0.1, x, -1.0),
    "halves and back": lambda x: torch.cat(x.chunk(1, dim=1), dim=1),
    "stacked": lambda x: torch.stack([x, 2 * x]).sum(0),
    "there and back": lambda x: x.t().reshape(1, 6, -1).squeeze(0).T,
    "layer norm": lambda x: F.layer_norm(x, (6,)),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
}


@pytest.mark.parametrize("between", EQUIVARIANT.values(), ids=EQUIVARIANT)
def test_what_treats_channels_alike_keeps_a_group(between: Callable[[Tensor], Tensor]) -> None:
    groups = permutation_groups(Net(between).double(), normal(3, 3, seed=1))
    assert sizes(groups) == ((6, 1), (5, 1))


def test_halves_that_are_treated_differently_are_two_groups() -> None:
    groups = permutation_groups(Net(lambda x: torch.cat([x[:, :2].sin(), x[:, 2:]], 1)).double(), normal(3, 3, seed=1))
    assert sizes(groups) == ((2, 1), (4, 1), (5, 1))


def test_initial_values_hide_nothing() -> None:
    """With affine parameters of 1 and 0, statistics of 0 and 1 and a last layer of zeros everything looks invariant."""
    module = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    nn.init.zeros_(module[2].weight)
    module[0].register_forward_hook(lambda layer, inputs, output: torch.from_numpy(np.cumsum(output.numpy(), 1)))
    groups = permutation_groups(module.double(), normal(3, 3, seed=1))
    assert sizes(groups) == ()
    assert groups.dropped["0.weight[0]"] == "a random permutation changes the outputs"
    assert groups.dropped["1.weight[0]"] == "a constant"


def test_a_constant_that_channels_meet_is_named() -> None:
    ramp = torch.linspace(0, 1, 6, dtype=torch.float64)
    groups = permutation_groups(Net(lambda x: x + ramp).double(), normal(3, 3, seed=1))
    assert groups.dropped["a.weight[0]"] == groups.dropped["b.weight[1]"] == "a constant"


# -- what may move -----------------------------------------------------------------------------------------------------


def test_channels_of_frozen_and_of_unselected_parameters_stay() -> None:
    case = CASES["mlp"]
    module, images = case.module(), case.batch()
    data = images, torch.zeros(len(images), dtype=torch.long)
    module.fc1.weight.requires_grad_(False)
    groups = groups_of(Objective(module, [data], cross_entropy))
    assert sizes(groups) == ((5, 1),)
    assert "fc1.weight" in groups.dropped["bn1.bias[0]"]
    some = groups_of(Objective(case.module(), [data], cross_entropy, parameters=["fc1.*", "bn1.*", "fc2.*"]))
    assert sizes(some) == ((6, 1),)


@pytest.mark.parametrize("loss", [cross_entropy, lambda m, b: F.mse_loss(m(b[0]), F.one_hot(b[1], 3).double())])
def test_the_classes_stay_by_the_loss_too(loss: Callable[..., Tensor]) -> None:
    case = CASES["mlp"]
    data = case.batch(6), torch.arange(6) % 3
    assert sizes(groups_of(Objective(case.module(), [data], loss))) == case.groups


def test_a_step_that_differentiates_its_network_is_watched_too() -> None:
    case = CASES["mlp"]

    def penalised(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(module(images).sum(), images, create_graph=True)
        return cross_entropy(module, batch) + slope.square().mean()

    data = case.batch(6), torch.arange(6) % 3
    with torch.inference_mode():
        assert sizes(groups_of(Objective(case.module(), [data], penalised))) == case.groups


def test_a_tied_parameter_is_known_by_all_its_names() -> None:
    case = CASES["transformer"]
    groups = permutation_groups(case.module(), case.batch())
    assert groups.axes["head.weight"] == groups.axes["embed.weight"]
    state = case.module().state_dict()
    moved = groups.apply(state, groups.random(generator(0)))
    assert torch.equal(moved["head.weight"], moved["embed.weight"])
    assert not torch.equal(moved["head.weight"], state["head.weight"])


def test_both_axes_of_a_recurrent_weight_move_together() -> None:
    groups = permutation_groups(Recurrent(), torch.zeros(2, 4, 4))
    (group,) = groups
    order = torch.tensor([4, 0, 1, 2, 3])
    weight = torch.arange(100.0).reshape(20, 5)
    expected = weight.reshape(4, 5, 5)[:, order][:, :, order].reshape(20, 5)
    assert torch.equal(groups.reorder("cell.weight_hh_l0", weight, {group.channels: order}), expected)


def test_flattened_channels_move_as_blocks() -> None:
    groups = permutation_groups(
        nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(12, 2)), torch.ones(2, 1, 3, 3)
    )
    weight = torch.arange(24.0).reshape(2, 12)
    moved = groups.reorder("2.weight", weight, {groups.groups[0].channels: torch.tensor([2, 0, 1])})
    assert torch.equal(moved, weight.reshape(2, 3, 4)[:, [2, 0, 1]].reshape(2, 12))


def test_channels_that_become_space_move_only_with_all_of_a_pixel() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 12, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten())
    module, batch = module.double(), normal(4, 2, 3, 3, seed=1)
    groups = permutation_groups(module, batch)
    assert sizes(groups) == ((3, 1),)
    assert groups.dropped == dict.fromkeys(("0.weight[0]", "0.bias[0]"), "aten.pixel_shuffle")
    other = permuted(module, groups, groups.random(generator(1)))
    assert not torch.equal(other[0].weight, module[0].weight)
    torch.testing.assert_close(outputs(other, batch), outputs(module, batch), rtol=0, atol=1e-10)
