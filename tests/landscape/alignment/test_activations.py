"""Activation matching: by correlations that do not depend on scale or batches, over training examples."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.alignment.activations import activation_matching
from lmc_lightning.landscape.alignment.groups import groups_of
from lmc_lightning.landscape.alignment.matching import Matching
from lmc_lightning.landscape.paths.line import endpoint_of
from tests.landscape.networks import CASES, Case
from tests.problems import cross_entropy, generator, normal

RECOVERED = ["mlp", "conv", "resnet20", "attention", "packed", "transformer", "branches", "group_norm", "recurrent"]
WITH_DEAD_UNITS = ["resnet20", "transformer"]
"""ReLUs that no example passes: they are all alike."""

NUM_EXAMPLES = 48


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return module(batch[0]).square().mean()  # in which classes could change places, but not in the outputs


def objective_for(case: Case, seed: int = 0, chunk_size: int = 16, scale: float = 3.0) -> Objective:
    inputs = case.batch(NUM_EXAMPLES)
    inputs = inputs if case.classes else scale * inputs
    return Objective(case.module(seed), [(inputs, torch.zeros(NUM_EXAMPLES))], loss, chunk_size=chunk_size)


@pytest.mark.parametrize("name", RECOVERED)
def test_planted_permutations_are_recovered_exactly(name: str) -> None:
    objective = objective_for(CASES[name])
    groups = groups_of(objective)
    end_a = endpoint_of(objective)
    ours = objective.layout.unflatten(end_a.theta) | objective.buffers
    end_b = endpoint_of(objective, groups.apply(ours, groups.random(generator(4))))
    matching = activation_matching(groups, objective, end_a, end_b, restarts=0)
    own = activation_matching(groups, objective, end_a, end_a, restarts=0)
    assert matching.objective == pytest.approx(own.objective, rel=1e-9)
    if name not in WITH_DEAD_UNITS:
        assert torch.equal(matching.apply_to_endpoint(end_b).theta, end_a.theta)
    assert matching.method == "activations"


def hidden_layer(seed: int, scale: float = 1.0) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    for index, parameter in enumerate(net.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=10 * seed + index))
    net[0].weight.data.mul_(scale)
    net[0].bias.data.mul_(scale)
    return net


def matched(net: nn.Module, other: nn.Module, x: Tensor, chunk_size: int = 64) -> Matching:
    objective = Objective(net, [(x, x)], loss, chunk_size=chunk_size)
    ends = endpoint_of(objective), endpoint_of(objective, dict(other.named_parameters()))
    return activation_matching(groups_of(objective), objective, *ends, restarts=0)


def test_the_objective_is_the_sum_of_the_correlations_and_the_best_of_all_orders() -> None:
    net, other, x = hidden_layer(0), hidden_layer(1), normal(40, 3, seed=3)
    with torch.no_grad():
        ours, theirs = (n[1](n[0](x)).numpy() for n in (net, other))
    correlations = np.corrcoef(ours.T, theirs.T)[:5, 5:]
    best = max(sum(correlations[i, p] for i, p in enumerate(order)) for order in permutations(range(5)))
    found = matched(net, other, x)
    assert found.objective == pytest.approx(best, rel=1e-10)
    assert found.identity_objective == pytest.approx(np.trace(correlations), rel=1e-10)


def test_neither_batches_nor_the_scale_of_a_layer_matter() -> None:
    net, other, x = hidden_layer(0), hidden_layer(1), normal(40, 3, seed=3)
    one = matched(net, other, x)
    for found in (matched(net, other, x, chunk_size=7), matched(net, hidden_layer(1, scale=50.0), x)):
        assert found.objective == pytest.approx(one.objective, rel=1e-9)
        assert torch.equal(found["0.weight[0]"], one["0.weight[0]"])


def test_channels_that_never_vary_correlate_with_nothing() -> None:
    net, other, x = hidden_layer(0), hidden_layer(1), normal(40, 3, seed=3)
    other[0].bias.data[2] = -100.0
    with torch.no_grad():
        ours, theirs = (n[1](n[0](x)).numpy() for n in (net, other))
    alive = [0, 1, 3, 4]
    correlations = np.zeros((5, 5))
    correlations[:, alive] = np.corrcoef(ours.T, theirs[:, alive].T)[:5, 5:]
    best = max(sum(correlations[i, p] for i, p in enumerate(order)) for order in permutations(range(5)))
    assert matched(net, other, x).objective == pytest.approx(best, rel=1e-10)


class Fickle(nn.Module):
    """Takes another way where an input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.further = hidden_layer(0), nn.Linear(5, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.net[1](self.net[0](x))
        return self.net[2](y if x.max() > 1e3 else self.further(y).relu())


def test_another_forward_pass_than_that_of_the_groups_is_refused() -> None:
    x = normal(40, 3, seed=3)
    x[-1] = 1e4
    objective = Objective(Fickle(), [(x, x)], loss, chunk_size=20)
    with pytest.raises(ValueError, match="runs other operations on these examples than on those that the permutations"):
        activation_matching(groups_of(objective), objective, *[endpoint_of(objective)] * 2)


def test_a_network_is_matched_to_itself_by_the_identity() -> None:
    case = CASES["lenet"]
    objective = Objective(case.module(), [(case.batch(12), torch.arange(12) % 3)], cross_entropy)
    found = activation_matching(groups_of(objective), objective, *[endpoint_of(objective)] * 2)
    assert found.moved == 0
    assert found.objective == found.identity_objective
