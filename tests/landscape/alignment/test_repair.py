"""REPAIR: between the ends, activations have the moments that lie between those of the ends."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.alignment.groups import groups_of
from lmc_lightning.landscape.alignment.repair import repair_path
from lmc_lightning.landscape.paths.line import endpoint_of
from tests.problems import cross_entropy, generator, normal


def network(seed: int) -> nn.Sequential:
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
    ).double()
    for index, parameter in enumerate(net.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=50 * seed + index) / parameter[:1].numel() ** 0.5)
    return net


def objective_of(net: nn.Module, chunk_size: int = 40) -> Objective:
    labels = torch.randint(3, (40,), generator=generator(5))
    return Objective(net, [(normal(40, 1, 6, 6, seed=4), labels)], cross_entropy, chunk_size=chunk_size)


def moments(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Mean and deviation of the outputs of every layer with weights, ``(2, C)``."""
    found: dict[str, Tensor] = {}
    for name, layer in net.named_children():
        images = layer(images)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            rows = images.transpose(0, 1).flatten(1)
            found[name] = torch.stack([rows.mean(1), rows.std(1, correction=0)]).detach()
    return found


def test_moments_lie_between_those_of_the_ends_in_every_hidden_layer() -> None:
    net, other = network(0), network(1)
    objective = objective_of(net)
    end_a, end_b = endpoint_of(objective), endpoint_of(objective, dict(other.named_parameters()))
    path = repair_path(objective, groups_of(objective), end_a, end_b)
    images = objective.batches[0][0]
    ours, theirs = moments(net, images), moments(other, images)
    for t in (0.25, 0.5):
        between = objective.module_at(path(t)[0])
        found = moments(between, images)
        for name in ("0", "3", "5"):
            torch.testing.assert_close(found[name], torch.lerp(ours[name], theirs[name], t), rtol=1e-9, atol=1e-12)
        plain = torch.lerp(end_a.theta, end_b.theta, t)
        assert not torch.allclose(moments(objective.module_at(plain), images)["3"], found["3"], rtol=1e-2)
        last = objective.layout.unflatten(path(t)[0])["7.weight"]
        torch.testing.assert_close(last, torch.lerp(net[7].weight, other[7].weight, t).detach())


def test_the_ends_stay_as_they_are_and_so_does_a_path_that_leads_nowhere() -> None:
    net, other = network(0), network(1)
    objective = objective_of(net, chunk_size=16)
    end_a, end_b = endpoint_of(objective), endpoint_of(objective, dict(other.named_parameters()))
    groups = groups_of(objective)
    path = repair_path(objective, groups, end_a, end_b)
    assert torch.equal(path(0.0)[0], end_a.theta)
    assert torch.equal(path(1.0)[0], end_b.theta)
    one_batch = objective_of(net)
    nowhere = repair_path(one_batch, groups, end_a, end_a)
    torch.testing.assert_close(nowhere(0.5)[0], end_a.theta, rtol=1e-9, atol=1e-12)


def test_nothing_to_rescale_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)).double()
    data = normal(8, 4, seed=1), torch.zeros(8, dtype=torch.long)
    objective = Objective(net, [data], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    end = endpoint_of(objective)
    with pytest.raises(ValueError, match="No hidden linear or convolutional layer has a bias"):
        repair_path(objective, groups_of(objective), end, end)
