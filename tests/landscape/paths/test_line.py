from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.evaluation import Evaluation
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.params import ParameterLayout
from lmc_lightning.landscape.paths.barrier import line_profiles
from lmc_lightning.landscape.paths.line import (
    Endpoint,
    Path,
    checked_ts,
    endpoint_of,
    linear_path,
    uniform_ts,
)
from lmc_lightning.landscape.paths.profiles import Profile, profiles_along
from lmc_lightning.landscape.paths.states import StateEvaluator


def classify(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).double()


def data(num_examples: int = 70) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_examples, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (num_examples,), generator=generator)


def objective_of(seed: int) -> Objective:
    module = network(seed)
    with torch.no_grad():
        module.train()(data()[0] * (1 + seed))  # statistics that differ between seeds
    return Objective(module, [data()], classify)


def test_uniform_ts_is_symmetric_and_contains_both_ends_and_the_middle() -> None:
    ts = uniform_ts(25)
    assert ts[0] == 0
    assert ts[-1] == 1
    assert ts[12] == 0.5
    torch.testing.assert_close(ts + ts.flip(0), torch.ones(25, dtype=torch.float64), rtol=0, atol=1e-16)


@pytest.mark.parametrize("num_points", [0, 1])
def test_a_grid_has_two_ends(num_points: int) -> None:
    with pytest.raises(ValueError, match="num_points >= 2"):
        uniform_ts(num_points)


@pytest.mark.parametrize("ts", [[0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.5, 1.0], [0.0], [0.0, 0.7, 0.3, 1.0]])
def test_a_grid_ascends_from_zero_to_one(ts: list[float]) -> None:
    with pytest.raises(ValueError, match="ascending from 0 to 1"):
        checked_ts(ts)


def test_the_line_is_exact_at_both_ends_and_everywhere_between_equal_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    a = Endpoint(torch.randn(1000, generator=generator))
    b = Endpoint(torch.randn(1000, generator=generator))
    path = linear_path(a, b)
    assert torch.equal(path(0.0)[0], a.theta)
    assert torch.equal(path(1.0)[0], b.theta)
    torch.testing.assert_close(path(0.3)[0], 0.7 * a.theta + 0.3 * b.theta)
    assert all(torch.equal(linear_path(a, a)(t)[0], a.theta) for t in uniform_ts(13).tolist())


def test_buffers_move_by_policy() -> None:
    buffers_a = {"mean": torch.tensor([0.0, 1.0]), "count": torch.tensor(3), "mask": torch.tensor([0.0, -torch.inf])}
    buffers_b = {"mean": torch.tensor([4.0, 1.0]), "count": torch.tensor(8), "mask": torch.tensor([0.0, -torch.inf])}
    a, b = Endpoint(torch.zeros(2), buffers_a), Endpoint(torch.ones(2), buffers_b)
    moving, staying = linear_path(a, b), linear_path(a, b, buffers="endpoint")
    for t, mean in ((0.0, 0.0), (0.25, 1.0), (1.0, 4.0)):
        buffers = moving(t)[1]
        assert buffers["mean"].tolist() == [mean, 1.0]
        assert buffers["mask"].tolist() == [0.0, -torch.inf]
        assert buffers["count"].dtype == torch.int64
        assert buffers["count"] == (8 if t == 1 else 3)
        assert staying(t)[1] is (buffers_b if t == 1 else buffers_a)


def test_ends_of_different_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3 parameters"):
        linear_path(Endpoint(torch.zeros(2)), Endpoint(torch.zeros(3)))
    with pytest.raises(ValueError, match="buffers scale"):
        linear_path(Endpoint(torch.zeros(2), {"scale": torch.zeros(1)}), Endpoint(torch.zeros(2)))


def test_an_endpoint_from_a_state_dict_is_that_of_the_module_it_came_from() -> None:
    objective, other = objective_of(0), objective_of(1)
    stored = endpoint_of(objective, {**dict(network(1).named_parameters()), **other.buffers})
    own = endpoint_of(other)
    assert torch.equal(stored.theta, own.theta)
    assert all(torch.equal(stored.buffers[name], own.buffers[name]) for name in own.buffers)
    assert torch.equal(endpoint_of(objective).theta, objective.theta())
    with pytest.raises(ValueError, match=r"no '0.weight' \(6 of 6"):
        endpoint_of(objective, {})


def test_shapes_are_compared_and_not_only_lengths() -> None:
    objective = objective_of(0)
    transposed = {n: t.T if t.ndim == 2 else t for n, t in network(1).state_dict().items()}
    with pytest.raises(ValueError, match=r"'0.weight' is of shape \[5, 7\] in the state dict and of \[7, 5\]"):
        endpoint_of(objective, transposed)
    shrunk = network(1).state_dict() | {"1.running_mean": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"'1.running_mean' is of shape \[1\]"):
        endpoint_of(objective, shrunk)


def test_ends_of_as_many_parameters_of_other_names_or_in_another_order_are_refused() -> None:
    def end(names: tuple[str, ...], *shapes: tuple[int, ...]) -> Endpoint:
        layout = ParameterLayout(names, tuple(map(torch.Size, shapes)), (torch.float32,) * len(names))
        return Endpoint(torch.zeros(layout.num_params), layout=layout)

    one = end(("a", "b"), (2, 3), (6,))
    linear_path(one, end(("a", "b"), (2, 3), (6,)))
    with pytest.raises(ValueError, match="differ in their parameters b, c"):
        linear_path(one, end(("a", "c"), (2, 3), (6,)))
    with pytest.raises(ValueError, match="differ in their parameters a"):
        linear_path(one, end(("a", "b"), (3, 2), (6,)))
    with pytest.raises(ValueError, match="in another order"):
        linear_path(one, end(("b", "a"), (6,), (2, 3)))


class Tied(nn.Module):
    """Decodes with the transpose of what it encodes with, under two names."""

    def __init__(self, seed: int, *, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.decoder = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def test_tied_parameters_are_found_under_any_of_their_names() -> None:
    objective, other = Objective(Tied(0), [data()], classify, dtype=torch.float64), Tied(1).state_dict()
    expected = other["encoder.weight"].reshape(-1).double()
    for names in (["encoder.weight", "decoder.weight"], ["encoder.weight"], ["decoder.weight"]):
        assert torch.equal(endpoint_of(objective, {n: other[n] for n in names}).theta, expected)
    with pytest.raises(ValueError, match=r"'encoder.weight' and 'decoder.weight' are one parameter in the module"):
        endpoint_of(objective, Tied(1, tied=False).state_dict())


def loss_profile(objective: Objective, path: Path, ts: Any = None, **statistics: Any) -> Profile:
    states = StateEvaluator({"": objective}, **{"batch_stats": "interpolate", **statistics})
    return profiles_along(states, path, ts)[""]


@pytest.mark.parametrize("policy", ["interpolate", "endpoint"])
def test_endpoints_reproduce_their_own_metrics_bit_for_bit(policy: str) -> None:
    objective, other = objective_of(0), objective_of(1)
    path = linear_path(endpoint_of(objective), endpoint_of(other), buffers=policy)
    profile = loss_profile(objective, path, uniform_ts(5), batch_stats=policy)
    assert profile.losses[0] == objective.baseline.loss
    assert profile.losses[-1] == other.baseline.loss
    assert profile.errors is not None
    assert profile.errors[[0, -1]].tolist() == [objective.baseline.error, other.baseline.error]
    assert profile.curves["loss"].own_ends == (objective.baseline.loss, other.baseline.loss)


def test_samples_are_per_example_and_average_to_the_values() -> None:
    objective = objective_of(0)
    profile = loss_profile(objective, linear_path(endpoint_of(objective), endpoint_of(objective_of(1))), uniform_ts(4))
    for curve in profile.curves.values():
        assert curve.samples is not None
        assert curve.weights is not None
        assert curve.samples.shape == (4, 70)
        assert curve.unit == "example"
        torch.testing.assert_close(curve.samples @ curve.weights, curve.values, rtol=1e-12, atol=1e-15)


def test_without_a_tap_samples_are_per_chunk_and_there_is_no_error() -> None:
    def hidden(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -module(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()

    objective = Objective(network(0), [data()], hidden, chunk_size=20)
    profile = loss_profile(objective, linear_path(endpoint_of(objective), endpoint_of(objective_of(1))), uniform_ts(3))
    curve = profile.curves["loss"]
    assert profile.errors is None
    assert curve.unit == "chunk"
    assert curve.weights is not None
    torch.testing.assert_close(curve.weights, torch.tensor([20, 20, 20, 10], dtype=torch.float64) / 70)
    torch.testing.assert_close(curve.samples @ curve.weights, curve.values, rtol=1e-14, atol=0)


def test_a_users_weights_are_those_of_chunks() -> None:
    objective = Objective(
        network(0), [data(8), data(5)], classify, chunk_size=8, batch_weight=lambda batch: 1.0 + (len(batch[0]) == 5)
    )
    profile = loss_profile(objective, linear_path(endpoint_of(objective), endpoint_of(objective)), uniform_ts(2))
    curve = profile.curves["loss"]
    assert curve.unit == "chunk"
    assert curve.weights is not None
    torch.testing.assert_close(curve.weights, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    torch.testing.assert_close(curve.samples @ curve.weights, curve.values, rtol=1e-14, atol=0)


def test_examples_that_do_not_count_are_no_samples() -> None:
    inputs, targets = data(10)
    targets[:4] = -100
    objective = Objective(network(0), [(inputs, targets)], classify)
    curve = loss_profile(objective, linear_path(endpoint_of(objective), endpoint_of(objective))).curves["loss"]
    assert curve.samples is not None
    assert curve.samples.shape == (25, 6)


def test_splits_share_the_path() -> None:
    module = network(0)
    objectives = {"train": Objective(module, [data(40)], classify), "val": Objective(module, [data(30)], classify)}
    start = endpoint_of(objectives["train"])
    path = linear_path(start, Endpoint(start.theta + 1, start.buffers))
    profiles = profiles_along(StateEvaluator(objectives, batch_stats="interpolate"), path, [0.0, 0.2, 1.0])
    assert [(p.split, len(p.losses)) for p in profiles.values()] == [("train", 3), ("val", 3)]
    for split, objective in objectives.items():
        assert torch.equal(profiles[split].losses, loss_profile(objective, path, [0.0, 0.2, 1.0]).losses)


def test_recomputing_needs_training_batches() -> None:
    objective = objective_of(0)
    path = linear_path(endpoint_of(objective), endpoint_of(objective))
    with pytest.raises(ValueError, match="stats_objective=Objective"):
        loss_profile(objective, path, batch_stats="recompute")


def test_the_module_is_untouched() -> None:
    module = network(0)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    objective = Objective(module, [data()], classify)
    stats = Objective(module, [data()], classify, mode="train")
    start = endpoint_of(objective)
    path = linear_path(start, Endpoint(start.theta * 2, start.buffers))
    rng = torch.get_rng_state()
    loss_profile(objective, path, uniform_ts(3), batch_stats="recompute", stats_objective=stats)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert module.training


def test_a_step_that_differentiates_by_its_inputs_is_measured_in_inference_mode_too() -> None:
    def penalised(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.enable_grad():
            inputs = batch[0].requires_grad_()
            loss = F.cross_entropy(module(inputs), batch[1])
            (gradient,) = torch.autograd.grad(loss, inputs, create_graph=True)
        return loss + gradient.square().sum()

    def measured() -> Tensor:
        objective = Objective(network(0), [data()], penalised)
        stats = Objective(network(0), [data()], penalised, mode="train")
        path = linear_path(endpoint_of(objective), endpoint_of(objective, network(1).state_dict()))
        return loss_profile(objective, path, uniform_ts(3), batch_stats="recompute", stats_objective=stats).losses

    with torch.inference_mode():
        inside = measured()
    assert torch.equal(inside, measured())


class Counting(Objective):
    """Counts the points that it is evaluated at."""

    passes = 0

    def evaluate_many(self, *args: Any, **kwargs: Any) -> list[Evaluation]:
        found = super().evaluate_many(*args, **kwargs)
        self.passes += len(found)
        return found


@pytest.mark.parametrize(("policy", "ends"), [("interpolate", 2), ("recompute", 5)])
def test_paths_share_their_ends(policy: str, ends: int) -> None:
    # The trunk as it came is the module's own state, which is known.
    module = network(0)
    objective = Counting(module, [data()], classify)
    stats = Objective(module, [data()], classify, mode="train")
    states = StateEvaluator({"": objective}, batch_stats=policy, stats_objective=stats)  # type: ignore[arg-type]
    trunk, *children = (endpoint_of(objective, network(seed).state_dict()) for seed in (0, 1, 2))
    for child in children:
        line_profiles(states, trunk, child, num_points=5)
    line_profiles(states, *children, num_points=5)
    assert objective.passes == 3 * 3 + ends
    own = loss_profile(objective, states.line(trunk, children[0]), [0, 0.5, 1], batch_stats="interpolate")
    assert own.curves["loss"].own_ends == tuple(states.own(e)[""].evaluation.loss for e in (trunk, children[0]))


def test_what_was_found_at_an_endpoint_goes_with_it() -> None:
    objective = Counting(network(0), [data()], classify)
    states = StateEvaluator({"": objective}, batch_stats="interpolate")
    for _ in range(3):
        states.end(endpoint_of(objective, network(1).state_dict()))
    assert objective.passes == 3


def test_further_metrics_are_curves_of_their_split() -> None:
    objective = Objective(network(0), [data()], classify)
    sizes = {"b": lambda theta, _: {"size": float(theta.sum())}}
    states = StateEvaluator({"a": objective, "b": objective}, batch_stats="interpolate", further=sizes)
    end_a, end_b = (Endpoint(torch.full_like(objective.theta(), v), objective.buffers) for v in (0.0, 1.0))
    profiles = line_profiles(states, end_a, end_b, num_points=3)
    assert "size" not in profiles["a"].curves
    size = objective.num_params
    assert profiles["b"].curves["size"].values.tolist() == [0, size / 2, size]
    assert profiles["b"].curves["size"].own_ends == (0, size)
