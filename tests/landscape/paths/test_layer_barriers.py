import pytest
import torch
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.layer_barriers import LayerBarriers, layer_barriers, mixed, module_groups
from lmc_lightning.landscape.paths.line import Endpoint, endpoint_of
from lmc_lightning.landscape.paths.states import StateEvaluator
from tests.landscape.paths.between import barrier_between
from tests.problems import cross_entropy, generator, normal

POINTS = 7


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        module(normal(50, 5, seed=seed) * (1 + seed))
    return module


@pytest.fixture
def states() -> StateEvaluator:
    data = normal(60, 5, seed=10), torch.randint(3, (60,), generator=generator(11))
    objective = Objective(network(1), [data], cross_entropy)
    return StateEvaluator({"train": objective}, batch_stats="interpolate")


@pytest.fixture
def ends(states: StateEvaluator) -> tuple[Endpoint, Endpoint]:
    return endpoint_of(states.objective), endpoint_of(states.objective, network(2).state_dict())


def found(states: StateEvaluator, ends: tuple[Endpoint, Endpoint], **options: object) -> LayerBarriers:
    return layer_barriers(states, *ends, num_points=POINTS, **options)  # type: ignore[arg-type]


def test_groups_are_the_modules_that_own_parameters_in_the_order_of_theta(states: StateEvaluator) -> None:
    assert module_groups(states.objective.layout) == {
        "0": ("0.weight", "0.bias"),
        "1": ("1.weight", "1.bias"),
        "3": ("3.weight", "3.bias"),
    }


def test_all_groups_together_are_the_full_barrier_and_none_is_zero(
    states: StateEvaluator, ends: tuple[Endpoint, Endpoint]
) -> None:
    full = barrier_between(states.objective, *ends, num_points=POINTS, batch_stats="interpolate")
    whole = {"whole": states.objective.layout.names, "nothing": ()}
    one = found(states, ends, groups=whole)
    for of in (one.at_a, one.at_b, one.cumulative):
        for metric, expected in full.items():
            assert torch.equal(of["whole"]["train"][metric].values, expected.values)
    for of in (one.at_a, one.at_b):
        assert not of["nothing"]["train"]["loss"].gaps.any()
    by_module = found(states, ends)
    assert by_module.order == ("0", "1", "3")
    last = by_module.cumulative["3"]["train"]
    assert {m: b.barrier for m, b in last.items()} == {m: b.barrier for m, b in full.items()}
    assert by_module.cumulative["0"]["train"]["loss"].barrier == by_module.at_a["0"]["train"]["loss"].barrier


def test_the_chord_is_that_of_the_own_path(states: StateEvaluator, ends: tuple[Endpoint, Endpoint]) -> None:
    weight = network(2).state_dict()

    def plain(module: nn.Module, names: list[str], t: float) -> float:
        own = module.state_dict()
        for name in names:
            own[name] = torch.lerp(own[name], weight[name], t) if own[name].is_floating_point() else own[name]
        module.load_state_dict(own)
        x, y = states.objective.batches[0]
        return float(nn.functional.cross_entropy(module.eval()(x), y).detach())

    at_a = found(states, ends).at_a["0"]["train"]["loss"]
    expected = [plain(network(1), ["0.weight", "0.bias"], t) for t in at_a.ts.tolist()]
    assert at_a.values.tolist() == pytest.approx(expected, rel=1e-12)
    statistics = ["1.weight", "1.bias", "1.running_mean", "1.running_var"]
    norm = found(states, ends).at_a["1"]["train"]["loss"]
    assert norm.values.tolist() == pytest.approx(
        [plain(network(1), statistics, t) for t in norm.ts.tolist()], rel=1e-12
    )


def test_of_a_separable_loss_the_gaps_of_the_layers_sum_to_those_of_the_network() -> None:
    class Wells(nn.Module):
        def __init__(self, *thetas: float) -> None:
            super().__init__()
            self.wells = nn.ModuleList(nn.ParameterList([torch.tensor([t]).double()]) for t in thetas)

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        return sum(((w[0] ** 2 - 1) ** 2 * (i + 1)).sum() for i, w in enumerate(module.wells))

    objective = Objective(Wells(-1.0, -1.0), [torch.zeros(1)], loss)
    states = StateEvaluator({"": objective})
    ends = endpoint_of(objective), endpoint_of(objective, Wells(1.0, 0.5).state_dict())
    parts, full = found(states, ends), barrier_between(objective, *ends, num_points=POINTS)["loss"]
    for of in (parts.at_a, parts.at_b):
        torch.testing.assert_close(sum(b[""]["loss"].gaps for b in of.values()), full.gaps, rtol=1e-13, atol=1e-14)
    assert parts.at_a["wells.0"][""]["loss"].barrier == 1


def test_mixing_takes_tensors_bit_for_bit_with_the_buffers_of_their_modules(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    some = mixed(a, b, ["1.weight"])
    assert torch.equal(some.theta[:48], a.theta[:48])
    assert torch.equal(some.theta[48:56], b.theta[48:56])
    assert torch.equal(some.theta[56:], a.theta[56:])
    assert torch.equal(some.buffers["1.running_mean"], b.buffers["1.running_mean"])
    assert torch.equal(mixed(a, b, ["0.bias"]).buffers["1.running_mean"], a.buffers["1.running_mean"])


def test_unknown_parameters_and_nameless_ends_are_refused(ends: tuple[Endpoint, Endpoint]) -> None:
    with pytest.raises(ValueError, match=r"no parameter 'head'\. The first names are: 0.weight"):
        mixed(*ends, ["head"])
    with pytest.raises(ValueError, match="do not name their parameters"):
        mixed(Endpoint(torch.zeros(2)), Endpoint(torch.zeros(2)), [])
