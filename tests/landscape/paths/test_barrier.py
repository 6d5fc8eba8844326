import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.barrier import (
    DEFINITIONS,
    Barrier,
    barrier,
    barriers_on,
    line_profiles,
    on_fewer_points,
)
from lmc_lightning.landscape.paths.line import Endpoint, endpoint_of, uniform_ts
from lmc_lightning.landscape.paths.profiles import Curve, Profile
from lmc_lightning.landscape.paths.states import StateEvaluator
from tests import problems
from tests.landscape.paths.between import barrier_between
from tests.problems import cross_entropy, double_well, generator, normal, split


def profile_of(values: list[float] | Tensor, ts: list[float] | Tensor, samples: Tensor | None = None) -> Profile:
    values = torch.as_tensor(values, dtype=torch.float64)
    weights = None if samples is None else torch.full((samples.shape[1],), 1 / samples.shape[1]).double()
    curve = Curve(
        values, (float(values[0]), float(values[-1])), samples, weights, None if weights is None else "example"
    )
    return Profile(torch.as_tensor(ts, dtype=torch.float64), {"loss": curve}, eps=2.0**-52)


def ends(*thetas: Tensor | float) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(torch.as_tensor(theta, dtype=torch.float64).reshape(-1)) for theta in thetas)


def network(seed: int, *, batch_norm: bool) -> nn.Module:
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
    module = nn.Sequential(nn.Linear(5, 8), norm, nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        module(normal(50, 5, seed=seed) * (1 + seed))
    return module


def labelled(num_examples: int = 70) -> tuple[Tensor, Tensor]:
    return normal(num_examples, 5, seed=10), torch.randint(3, (num_examples,), generator=generator(11))


def pair(sizes: tuple[int, ...] = (70,), chunk_size: int = 128, *, batch_norm: bool) -> tuple[Objective, Endpoint]:
    """An objective on the module of seed 1 and the state of the module of seed 2."""
    batches = split(labelled(sum(sizes)), sizes)
    objective = Objective(network(1, batch_norm=batch_norm), batches, cross_entropy, chunk_size=chunk_size)
    other = network(2, batch_norm=batch_norm)
    return objective, endpoint_of(objective, other.state_dict())


# --- conventions


def test_each_convention_is_its_formula() -> None:
    result = barrier(profile_of([1, 4, -1, 3], [0, 0.25, 0.5, 1]))
    assert result.chord.tolist() == [1, 1.5, 2, 3]
    assert result.gaps.tolist() == [0, 2.5, -3, 0]
    assert {name: getattr(result, name) for name in DEFINITIONS} == {
        "barrier": 2.5,
        "instability": 2,
        "signed_deviation": 3,
        "barrier_over_min": 3,
        "barrier_over_max": 1,
        "dip": -3,
        "interior_max": 2.5,
        "midpoint": -3,
    }
    assert result.peak_t == 0.25
    assert result.num_points == 4
    assert torch.equal(result.losses, result.values)


def test_a_ridge_has_a_negative_signed_deviation_and_a_valley_no_barrier() -> None:
    ridge, valley = barrier(profile_of([1, 3, 2], [0, 0.5, 1])), barrier(profile_of([1, 0.5, 2], [0, 0.5, 1]))
    assert ridge.signed_deviation == -1.5
    assert (valley.signed_deviation, valley.barrier, valley.interior_max, valley.dip) == (1, 0, -1, -1)
    assert (valley.instability, valley.barrier_over_max, valley.barrier_over_min) == (0.5, 0, 1)


def test_points_that_the_grid_lacks_are_not_numbers() -> None:
    even = barrier(profile_of([0, 1, 1, 0], uniform_ts(4)))
    assert math.isnan(even.midpoint)
    assert even.barrier == even.interior_max == 1
    bare = barrier(profile_of([0, 1], uniform_ts(2)))
    assert math.isnan(bare.interior_max)
    assert bare.barrier == bare.dip == 0


def test_a_coarser_grid_gives_what_it_would_have_given_alone() -> None:
    values = normal(25, seed=1)
    fine = barrier(profile_of(values, uniform_ts(25)))
    coarse = barrier(profile_of(values[::6], uniform_ts(5)))
    found = on_fewer_points(fine, 5)
    assert found == {name: getattr(coarse, name) for name in DEFINITIONS}
    assert found != {name: getattr(fine, name) for name in DEFINITIONS}
    for lacking in (1, 6, 49):
        with pytest.raises(ValueError, match=f"{lacking} equally spaced points are not among 25"):
            on_fewer_points(fine, lacking)


def test_swapping_the_ends_mirrors_the_curve() -> None:
    objective, end_b = pair(batch_norm=False)
    end_a = endpoint_of(objective)
    there = barrier_between(objective, end_a, end_b)
    back = barrier_between(objective, end_b, end_a)
    for metric, one in there.items():
        torch.testing.assert_close(one.values, back[metric].values.flip(0), rtol=1e-12, atol=0)
        for name in DEFINITIONS:
            assert getattr(one, name) == pytest.approx(getattr(back[metric], name), rel=1e-10, abs=1e-14)
    well = double_well(-1.0).objective()
    there_t, back_t = (barrier_between(well, *ends(*two))["loss"].peak_t for two in ((-1.0, 0.4), (0.4, -1.0)))
    assert there_t > 0.6
    assert there_t == pytest.approx(1 - back_t, abs=1e-15)


def test_adding_a_constant_leaves_the_barrier_and_a_factor_scales_it() -> None:
    problem = double_well(-1.0)

    def at(scale: float, shift: float) -> Barrier:
        objective = Objective(problem.module, problem.batches, lambda m, b: scale * problem.loss_fn(m, b) + shift)
        return barrier_between(objective, *ends(-1.0, 0.4))["loss"]

    plain = at(1, 0)
    assert at(1, 7).barrier == pytest.approx(plain.barrier, rel=1e-14)
    assert at(1e-8, 0).barrier == pytest.approx(1e-8 * plain.barrier, rel=1e-14)
    assert at(1, 7).peak_t == at(1e-8, 0).peak_t == plain.peak_t


# --- known answers


def test_the_double_well_has_barrier_one_at_the_middle() -> None:
    result = barrier_between(double_well(-1.0).objective(), *ends(-1.0, 1.0))["loss"]
    assert (result.barrier, result.peak_t, result.midpoint, result.instability) == (1, 0.5, 1, 1)
    assert result.num_points == 25


def test_the_scalar_net_has_the_second_moment_of_its_input() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w[1] * self.w[0] * x

    x = normal(200, 1, seed=3)
    objective = Objective(Product(), [x], lambda module, batch: F.mse_loss(module(batch), batch))
    result = barrier_between(objective, *ends(torch.ones(2), -torch.ones(2)))["loss"]
    assert result.barrier == pytest.approx(float(x.square().mean()), rel=1e-14)
    assert result.stderr_data["barrier"] == pytest.approx(float(x.square().std() / 200**0.5), rel=1e-12)
    assert result.distinguishable_from_zero
    assert 0 < result.barrier_lower < result.barrier


def test_a_quadratic_has_a_parabola() -> None:
    hessian = problems.with_spectrum([5.0, 1.0, -2.0, -9.0], seed=4)
    a, b = normal(4, seed=5), normal(4, seed=6)
    result = barrier_between(problems.quadratic(hessian, slope=normal(4, seed=7)).objective(), *ends(a, b))["loss"]
    curvature = float((b - a) @ hessian @ (b - a))
    torch.testing.assert_close(result.gaps, -0.5 * result.ts * (1 - result.ts) * curvature, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("problem", [problems.linear_regression(), problems.softmax_regression()])
def test_a_convex_loss_has_no_barrier(problem: problems.Problem) -> None:
    objective = problem.objective()
    start = objective.theta()
    result = barrier_between(objective, *ends(start, start + normal(len(start), seed=8)))["loss"]
    assert result.barrier == 0
    assert result.dip < -0.01
    assert not result.distinguishable_from_zero


def test_a_convex_model_can_have_an_error_barrier() -> None:
    # Margins of the two examples: −9 → 1 and 1 → −9; at the middle both are wrong.
    module = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    objective = Objective(module, [(torch.eye(2).double(), torch.zeros(2, dtype=torch.int64))], cross_entropy)
    result = barrier_between(objective, *ends(torch.tensor([-9.0, 1, 0, 0]), torch.tensor([1.0, -9, 0, 0])))
    assert result["error"].barrier == 0.5
    assert result["error"].own_ends == (0.5, 0.5)
    assert result["loss"].barrier == 0


@pytest.mark.parametrize("policy", ["recompute", "interpolate", "endpoint"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_network_and_itself_have_exactly_zero(policy: str, batch_norm: bool) -> None:
    objective, _ = pair(batch_norm=batch_norm)
    stats = Objective(network(1, batch_norm=batch_norm), split(labelled(), (35, 35)), cross_entropy, mode="train")
    end = endpoint_of(objective)
    for result in barrier_between(objective, end, end, batch_stats=policy, stats_objective=stats).values():
        assert not result.gaps.any()
        assert [getattr(result, name) for name in DEFINITIONS] == [0] * len(DEFINITIONS)
        assert list(result.stderr_data.values()) == [0] * len(DEFINITIONS)
        assert result.barrier_lower == 0
        assert not result.distinguishable_from_zero


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("sizes", "chunk_size"), [((64, 6), 64), ((35, 35), 35), ((64, 6), 7), ((35, 35), 128)])
def test_cutting_the_data_differently_changes_nothing(
    sizes: tuple[int, ...], chunk_size: int, batch_norm: bool
) -> None:
    whole_objective, end_b = pair(batch_norm=batch_norm)
    cut_objective, _ = pair(sizes, chunk_size, batch_norm=batch_norm)
    end_a = endpoint_of(whole_objective)
    whole = barrier_between(whole_objective, end_a, end_b, batch_stats="interpolate", num_points=9)
    for metric, result in barrier_between(cut_objective, end_a, end_b, batch_stats="interpolate", num_points=9).items():
        torch.testing.assert_close(result.values, whole[metric].values, rtol=1e-12, atol=0)
        torch.testing.assert_close(result.gap_stderr, whole[metric].gap_stderr, rtol=1e-9, atol=1e-15)
        assert result.barrier_lower == pytest.approx(whole[metric].barrier_lower, rel=1e-9, abs=1e-14)


# --- BatchNorm


def full_batch_loss(theta: Tensor, inputs: Tensor, train: Tensor, targets: Tensor) -> float:
    """The plain way: write θ into a copy, let torch accumulate one batch's statistics, evaluate."""
    module = copy.deepcopy(network(1, batch_norm=True))
    nn.utils.vector_to_parameters(theta, module.parameters())
    module[1].reset_running_stats()
    module[1].momentum = None
    with torch.no_grad():
        module.train()(train)
        return float(F.cross_entropy(module.eval()(inputs), targets))


def test_recomputed_statistics_are_those_of_a_plain_loop_at_every_t() -> None:
    objective, end_b = pair(batch_norm=True)
    end_a, (inputs, targets), train = endpoint_of(objective), labelled(), normal(90, 5, seed=20)
    batches = [(train, torch.zeros(90, dtype=torch.int64))]
    stats = Objective(network(1, batch_norm=True), batches, cross_entropy, mode="train")
    result = barrier_between(objective, end_a, end_b, stats_objective=stats, num_points=5)["loss"]
    thetas = [torch.lerp(end_a.theta, end_b.theta, t) for t in result.ts.tolist()]
    losses = [full_batch_loss(theta, inputs, train, targets) for theta in thetas]
    expected = torch.tensor(losses, dtype=torch.float64)
    torch.testing.assert_close(result.values, expected, rtol=1e-12, atol=0)
    assert result.batch_stats == "recompute"
    assert result.own_ends[0] == objective.baseline.loss
    assert result.own_ends[0] != result.values[0]


def test_the_policy_is_recorded_where_there_is_batch_norm() -> None:
    objective, end_b = pair(batch_norm=True)
    end_a = endpoint_of(objective)
    values = {}
    for policy in ("interpolate", "endpoint"):
        result = barrier_between(objective, end_a, end_b, batch_stats=policy, num_points=3)["loss"]
        assert result.batch_stats == policy
        assert result.own_ends == (result.values[0], result.values[-1])
        values[policy] = float(result.values[1])
    assert values["interpolate"] != values["endpoint"]
    with pytest.raises(ValueError, match="batch_stats='recompute' needs training batches"):
        barrier_between(objective, end_a, end_b)
    plain, end_b = pair(batch_norm=False)
    assert barrier_between(plain, endpoint_of(plain), end_b)["loss"].batch_stats is None


def test_batch_statistics_of_the_evaluation_itself_need_no_policy() -> None:
    objective = Objective(network(1, batch_norm=True), [labelled()], cross_entropy, mode="train")
    end = endpoint_of(objective)
    assert barrier_between(objective, end, end, num_points=3)["loss"].batch_stats is None


# --- evidence


def test_standard_errors_are_paired_along_the_path() -> None:
    objective, end_b = pair(batch_norm=False)
    end_a = endpoint_of(objective)
    inputs, targets = labelled()

    def losses(t: float) -> Tensor:
        module = network(1, batch_norm=False)
        nn.utils.vector_to_parameters(torch.lerp(end_a.theta, end_b.theta, t), module.parameters())
        return F.cross_entropy(module(inputs), targets, reduction="none").detach()

    result = barrier_between(objective, end_a, end_b)["loss"]
    at_peak = losses(result.peak_t) - ((1 - result.peak_t) * losses(0) + result.peak_t * losses(1))
    assert result.stderr_data["barrier"] == pytest.approx(float(at_peak.std() / 70**0.5), rel=1e-10)
    top = float(result.ts[result.values.argmax()])
    over_mean = losses(top) - (losses(0) + losses(1)) / 2
    assert result.stderr_data["instability"] == pytest.approx(float(over_mean.std() / 70**0.5), rel=1e-10)
    assert (result.num_samples, result.unit) == (70, "example")


def test_intervals_are_students() -> None:
    samples = torch.zeros(3, 10, dtype=torch.float64)
    samples[1] = torch.arange(10)
    result = barrier(profile_of(samples.mean(1), uniform_ts(3), samples))
    low, high = result.interval()
    assert result.barrier == 4.5
    assert (low + high) / 2 == pytest.approx(4.5)
    assert high - 4.5 == pytest.approx(2.262157 * float(samples[1].std()) / 10**0.5, rel=1e-6)
    few = barrier(profile_of(samples[:, :5].mean(1), uniform_ts(3), samples[:, :5]))
    assert few.stderr_data["barrier"] > 0
    assert all(map(math.isnan, (*few.interval(), few.barrier_lower)))
    assert not few.distinguishable_from_zero


def test_a_metric_without_parts_has_no_error_bars() -> None:
    result = barrier(profile_of([0, 1, 0], uniform_ts(3)))
    assert result.barrier == 1
    assert result.num_samples == 0
    assert all(map(math.isnan, result.stderr_data.values()))
    assert result.gap_stderr.isnan().all()
    assert not result.distinguishable_from_zero


def test_null_curves_are_rarely_told_from_zero() -> None:
    ts, size = uniform_ts(25), 100
    waves = torch.stack([torch.sin(k * math.pi * ts) / k for k in range(1, 9)], 1)
    waves[[0, -1]] = 0
    draws = torch.randn(200, 8, size, generator=generator(0), dtype=torch.float64)
    common = torch.randn(200, 1, size, generator=generator(1), dtype=torch.float64) ** 2
    results = [
        barrier(profile_of(samples.mean(1), ts, samples), num_bootstrap=400) for samples in waves @ draws + common
    ]
    assert min(r.barrier for r in results) >= 0
    assert sum(r.distinguishable_from_zero for r in results) / 200 <= 0.05
    raised = waves @ draws[0] + 3 * waves[:, :1]
    shifted = profile_of(raised.mean(1), ts, raised)
    assert barrier(shifted).distinguishable_from_zero


def test_rounding_is_no_barrier() -> None:
    # Linear in θ: every gap is rounding, and the same for all examples.
    values = torch.full((5, 20), 1.0, dtype=torch.float64)
    values[2] += 2.0**-52
    result = barrier(profile_of(values.mean(1), uniform_ts(5), values))
    assert result.barrier_lower > 0
    assert not result.distinguishable_from_zero


def test_a_loss_that_overflows_is_flagged_and_raises_nothing() -> None:
    samples = torch.ones(5, 10, dtype=torch.float64)
    samples[2, 0] = torch.inf
    infinite = barrier(profile_of(samples.mean(1), uniform_ts(5), samples))
    assert infinite.barrier == torch.inf
    assert not infinite.finite
    assert infinite.barrier_lower == 0
    undefined = barrier(profile_of([0, torch.nan, 0], uniform_ts(3)))
    assert math.isnan(undefined.barrier)
    assert undefined.peak_t == 0.5
    assert not undefined.distinguishable_from_zero


# --- interface


def test_splits_and_metrics_are_those_asked_for() -> None:
    objective, end_b = pair(batch_norm=False)
    end_a = endpoint_of(objective)
    states = StateEvaluator({"train": objective, "val": objective})
    by_split = barriers_on(line_profiles(states, end_a, end_b, num_points=3), ["error"])
    assert [(s, m, r.split, r.metric) for s, rs in by_split.items() for m, r in rs.items()] == [
        ("train", "error", "train", "error"),
        ("val", "error", "val", "error"),
    ]
    assert list(barrier_between(objective, end_a, end_b, num_points=3)) == ["loss", "error"]


def test_the_losses_of_an_error_barrier_are_asked_in_vain() -> None:
    objective, end_b = pair(batch_norm=False)
    result = barrier_between(objective, endpoint_of(objective), end_b, num_points=3)["error"]
    with pytest.raises(AttributeError, match=r"barrier of 'error'; its curve is .values"):
        _ = result.losses


def test_an_error_that_cannot_be_known_is_refused() -> None:
    objective = double_well(-1.0).objective()
    assert list(barrier_between(objective, *ends(-1.0, 1.0))) == ["loss"]
    with pytest.raises(ValueError, match="has 'loss', not 'error'"):
        barrier_between(objective, *ends(-1.0, 1.0), metrics=["loss", "error"])
