"""Curves between two networks: their geometry, their training, and what is reported along them."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.connections import LEVELS, Connection, connection, levels
from lmc_lightning.landscape.paths.curves import CurvedPath, CurveKind, CurveTraining, bend_weights, flat_then_linear
from lmc_lightning.landscape.paths.curves import train_curve as train
from lmc_lightning.landscape.paths.line import Endpoint, linear_path, uniform_ts
from lmc_lightning.landscape.paths.profiles import Curve, profiles_along
from lmc_lightning.landscape.paths.states import StateEvaluator
from tests.problems import ConvNet, Vector, cross_entropy, generator, images, normal, quadratic, split

KINDS: tuple[CurveKind, ...] = ("bezier", "polychain")


def between(a: Tensor, b: Tensor, offsets: Tensor, kind: CurveKind = "bezier") -> CurvedPath:
    return CurvedPath(linear_path(Endpoint(a), Endpoint(b)), offsets, kind)


def flat(size: int, num_bends: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return normal(size, seed=1), normal(size, seed=2), scale * normal(num_bends, size, seed=3)


# -- geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_bends", [1, 2, 3])
def test_a_curve_without_offsets_is_the_line_bit_for_bit(kind: CurveKind, num_bends: int) -> None:
    a, b, _ = flat(7, num_bends)
    curve, line = between(a, b, torch.zeros(num_bends, 7).double(), kind), linear_path(Endpoint(a), Endpoint(b))
    assert all(torch.equal(curve(t)[0], line(t)[0]) for t in uniform_ts(13).tolist())
    assert curve.length == pytest.approx(float((b - a).norm()), rel=1e-12)


@pytest.mark.parametrize("num_bends", [1, 2, 4])
def test_bezier_is_the_bernstein_sum_of_its_control_points(num_bends: int) -> None:
    a, b, offsets = flat(5, num_bends)
    degree = num_bends + 1
    inner = [torch.lerp(a, b, j / degree) + offsets[j - 1] for j in range(1, degree)]
    points = [a, *inner, b]
    curve = between(a, b, offsets)
    for t in (0.0, 0.1, 0.37, 0.5, 0.99, 1.0):
        weights = [math.comb(degree, j) * t**j * (1 - t) ** (degree - j) for j in range(degree + 1)]
        expected = sum(w * p for w, p in zip(weights, points, strict=True))
        torch.testing.assert_close(curve(t)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_bends", [1, 2, 4])
def test_a_chain_goes_through_its_points_and_straight_between_them(num_bends: int) -> None:
    a, b, offsets = flat(5, num_bends)
    degree = num_bends + 1
    points = [a, *(torch.lerp(a, b, j / degree) + offsets[j - 1] for j in range(1, degree)), b]
    curve = between(a, b, offsets, "polychain")
    for j in range(degree):
        for share in (0.0, 0.3, 1.0):
            expected = torch.lerp(points[j], points[j + 1], share)
            torch.testing.assert_close(curve((j + share) / degree)[0], expected, rtol=1e-12, atol=1e-12)
    segments = [float((q - p).norm()) for p, q in pairwise(points)]
    assert curve.length == pytest.approx(sum(segments), rel=1e-12)
    expected = torch.tensor([0.0, *segments], dtype=torch.float64).cumsum(0)
    torch.testing.assert_close(curve.arc_length(torch.arange(degree + 1) / degree), expected, rtol=1e-6, atol=1e-6)


def test_the_ends_of_a_curve_are_the_networks_themselves() -> None:
    a, b, offsets = (x.float() for x in flat(50, 2, scale=1e4))
    for kind in KINDS:
        curve = between(a, b, offsets, kind)
        assert torch.equal(curve(0.0)[0], a)
        assert torch.equal(curve(1.0)[0], b)


def test_the_length_of_a_parabola_is_its_closed_form() -> None:
    """Control (0, h) above the ends (∓1, 0): y = h(1 − x²)/2, of length √(1+h²) + asinh(h)/h."""
    a, b = torch.tensor([-1.0, 0.0]).double(), torch.tensor([1.0, 0.0]).double()
    for h in (0.1, 1.0, 20.0):
        curve = between(a, b, torch.tensor([[0.0, h]], dtype=torch.float64))
        assert curve.length == pytest.approx(math.sqrt(1 + h * h) + math.asinh(h) / h, rel=1e-9)


def test_arc_length_counts_from_the_start_and_adds_up() -> None:
    a, b, offsets = flat(6, 3)
    for kind in KINDS:
        curve = between(a, b, offsets, kind)
        arc = curve.arc_length(uniform_ts(9))
        assert float(arc[0]) == 0
        assert bool((arc.diff() > 0).all())
        assert float(arc[-1]) == pytest.approx(curve.length, rel=1e-9)
        chords = torch.stack([curve(t)[0] for t in uniform_ts(2001).tolist()]).diff(dim=0).norm(dim=1).sum()
        assert curve.length == pytest.approx(float(chords), rel=1e-5)


# -- what is reported along a path -------------------------------------------------------------------------------------


def test_levels_are_the_maximum_and_the_two_means() -> None:
    ts = torch.tensor([0.0, 0.5, 1.0]).double()
    values = torch.tensor([1.0, 3.0, 2.0]).double()
    found = levels(Curve(values, (1.0, 2.0)), ts, torch.tensor([0.0, 3.0, 4.0]).double())
    assert (found.max, found.mean) == (3.0, 0.25 * 1 + 0.5 * 3 + 0.25 * 2)
    assert found.arc_mean == pytest.approx((3 * 2.0 + 1 * 2.5) / 4)
    assert all(math.isnan(v) for v in found.stderr_data.values())


def test_levels_on_a_curve_of_constant_speed_are_equal_and_their_errors_those_of_means() -> None:
    ts, samples = uniform_ts(5), normal(5, 40, seed=4)
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    found = levels(Curve(samples @ weights, (0.0, 0.0), samples, weights, "example"), ts, 7 * ts)
    assert found.mean == pytest.approx(found.arc_mean, rel=1e-12)
    averaged = torch.tensor([0.125, 0.25, 0.25, 0.25, 0.125]).double() @ samples
    assert found.stderr_data["mean"] == pytest.approx(float(averaged.std() / math.sqrt(40)), rel=1e-9)
    assert set(found.stderr_data) == set(LEVELS)


def test_levels_of_a_path_without_length_are_those_of_its_one_network() -> None:
    found = levels(Curve(torch.full((3,), 2.0).double(), (2.0, 2.0)), uniform_ts(3), torch.zeros(3).double())
    assert (found.max, found.mean, found.arc_mean) == (2.0, 2.0, 2.0)


# -- training ----------------------------------------------------------------------------------------------------------


def ring() -> Objective:
    """(x² + y² − 1)²: two minima of a circle of them, whose mean-loss optimal quadratic Bezier curve is known."""
    theta = torch.tensor([-1.0, 0.0], dtype=torch.float64)
    return Objective(Vector(theta), [torch.zeros(1)], lambda m, b: (m.theta.square().sum() - 1) ** 2)


def across_the_ring(height: float) -> CurvedPath:
    a, b = torch.tensor([-1.0, 0.0]).double(), torch.tensor([1.0, 0.0]).double()
    return between(a, b, torch.tensor([[0.0, height]], dtype=torch.float64))


OPTIMUM = 3 / math.sqrt(2)  # E u³(uy² − 1) = 0 with u = t(1 − t): y² = B(4, 4)/B(5, 5) = 9/2


def test_the_mean_loss_on_the_ring_is_stationary_at_the_known_control_point() -> None:
    objective, nodes = ring(), torch.linspace(0, 1, 2001).double()

    def slope(height: float) -> float:
        curve = across_the_ring(height)
        pulls = [2 * t * (1 - t) * objective.grad(curve(t)[0])[1] for t in nodes[::20].tolist()]
        return float(torch.trapezoid(torch.stack(pulls), nodes[::20]))

    assert slope(OPTIMUM) == pytest.approx(0, abs=1e-3)
    assert slope(OPTIMUM - 0.1) < -0.01
    assert slope(OPTIMUM + 0.1) > 0.01


def test_a_curve_across_the_ring_finds_the_known_control_point() -> None:
    start = across_the_ring(1.0)  # on the line itself the loss is symmetric and has no slope sideways
    training = CurveTraining(num_epochs=1200, lr=0.06, weight_decay=0.0, schedule=lambda done: (1 - done) ** 3)
    curve = train(ring(), start.line, training, generator=generator(0), start=start)
    x, y = curve.offsets[0].tolist()
    assert y == pytest.approx(OPTIMUM, abs=0.03)
    assert x == pytest.approx(0, abs=0.08)  # along the line the mean loss has a sixth of the curvature
    assert not curve.diverged
    profile = profiles_along(StateEvaluator({"": ring()}), curve, uniform_ts(201))[""]
    assert float(profile.losses.max()) == pytest.approx(4 / 81, rel=0.05)


def test_the_maximum_on_the_known_curve_is_4_over_81() -> None:
    curve = across_the_ring(OPTIMUM)
    t = 0.5 - math.sqrt(0.25 - 1 / 9)  # where t(1 − t) = 1/9
    assert ring().evaluate(curve(t)[0]).loss == pytest.approx(4 / 81, rel=1e-12)
    profile = profiles_along(StateEvaluator({"": ring()}), curve, uniform_ts(201))[""]
    assert float(profile.losses.max()) == pytest.approx(4 / 81, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_the_training_is_the_chain_rule(kind: CurveKind) -> None:
    """One step of plain SGD moves δ_j by −lr · c_j(t) (∇L(γ(t)) + λ γ(t)), t the one that was drawn."""
    hessian = torch.diag(torch.tensor([3.0, 1.0, 0.5]).double())
    a, b, offsets = flat(3, 2)
    start = between(a, b, offsets, kind)
    drawn = generator(5)
    torch.randperm(1, generator=drawn)
    t = float(torch.rand(1, generator=drawn, dtype=torch.float64))
    training = CurveTraining(kind, 2, num_epochs=1, lr=0.1, momentum=0.0, weight_decay=0.3)
    found = train(quadratic(hessian).objective(), start.line, training, generator=generator(5), start=start)
    theta = start(t)[0]
    pull = hessian @ theta + 0.3 * theta
    expected = offsets - 0.1 * torch.outer(torch.tensor(bend_weights(kind, 2, t), dtype=torch.float64), pull)
    torch.testing.assert_close(found.offsets, expected, rtol=1e-12, atol=1e-12)
    assert float(found.losses[0]) == pytest.approx(0.5 * float(theta @ hessian @ theta), rel=1e-12)
    assert torch.equal(start.offsets, offsets)


def test_training_depends_on_the_generator_alone() -> None:
    objective = Objective(ConvNet(), split(images(), [64, 6]), cross_entropy, mode="train", chunk_size=32)
    a = objective.theta()
    line = linear_path(Endpoint(a), Endpoint(a + 0.1 * normal(len(a), seed=3)))
    training = CurveTraining(num_epochs=2)
    torch.manual_seed(1)
    first = train(objective, line, training, generator=generator(0))
    state = torch.get_rng_state()
    again = train(objective, line, training, generator=generator(0))
    assert torch.equal(first.offsets, again.offsets)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.offsets, train(objective, line, training, generator=generator(1)).offsets)


def test_progress_tells_every_epoch_and_the_optimizer_can_be_chosen() -> None:
    told: list[tuple[int, int, str]] = []
    objective = ring()
    training = CurveTraining(num_epochs=3, optimizer=lambda points: torch.optim.Adam(points, lr=0.01))
    start = across_the_ring(1.0)
    curve = train(
        objective, start.line, training, generator=generator(0), start=start, progress=lambda *a: told.append(a)
    )
    assert told == [(i, 3, "epochs of a curve") for i in (1, 2, 3)]
    assert float((curve.offsets - start.offsets).abs().max()) == pytest.approx(0.03, rel=0.5)


def test_the_schedule_is_flat_then_linear_then_flat() -> None:
    assert [flat_then_linear(x) for x in (0.0, 0.5)] == [1, 1]
    assert flat_then_linear(0.7) == pytest.approx(0.505)
    assert [flat_then_linear(x) for x in (0.9, 1.0)] == pytest.approx([0.01, 0.01])


def test_a_training_that_diverges_is_flagged_and_ends() -> None:
    training = CurveTraining(num_epochs=50, lr=1e6, momentum=0.0)
    start = across_the_ring(1.0)
    curve = train(ring(), start.line, training, generator=generator(0), start=start)
    assert curve.diverged
    assert len(curve.losses) < 50


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected kind to be one of 'bezier', 'polychain', got 'spline'"):
        CurveTraining(kind="spline")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_bends must be positive"):
        CurveTraining(num_bends=0)
    objective = Objective(ConvNet(), split(images(), [64, 6]), cross_entropy)
    line = linear_path(Endpoint(objective.theta()), Endpoint(objective.theta()))
    with pytest.raises(ValueError, match="Make the Objective with mode='train'"):
        train(objective, line, generator=generator(0))
    start = across_the_ring(1.0)
    with pytest.raises(ValueError, match="Expected a start with kind='polychain' and 1 bends, got 'bezier' with 1"):
        train(ring(), start.line, CurveTraining("polychain"), generator=generator(0), start=start)


# -- networks ----------------------------------------------------------------------------------------------------------


class TinyNet(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 24).double(), nn.Linear(24, 2).double()
        with torch.no_grad():
            for index, tensor in enumerate(self.parameters()):
                tensor.copy_(normal(*tensor.shape, seed=10 * seed + index))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def two_seeds() -> tuple[Objective, Endpoint, Endpoint]:
    """Two nets that have learned the same four quadrants from different starts."""
    x = normal(64, 2, seed=1)
    batch = x, (x[:, 0] * x[:, 1] > 0).long()
    objectives = []
    for net in (TinyNet(1), TinyNet(2)):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            optimizer.step()
        objectives.append(Objective(net, [batch], cross_entropy, mode="train", chunk_size=32))
    return objectives[0], *(Endpoint(o.theta()) for o in objectives)


@pytest.fixture(scope="module")
def joined() -> Connection:
    objective, a, b = two_seeds()
    training = CurveTraining(num_epochs=150, lr=0.05, weight_decay=0.0)
    return connection(StateEvaluator({"train": objective}), objective, a, b, training, generator=generator(0))


def test_a_curve_goes_around_the_barrier_of_the_line(joined: Connection) -> None:
    line, curve = joined.on_line["train"]["loss"], joined.on_curve["train"]["loss"]
    assert line.barrier > 0.3
    assert curve.barrier < 0.5 * line.barrier
    assert joined.curve.length > joined.line_length
    assert float(joined.curve.losses[-30:].mean()) < float(joined.curve.losses[:30].mean())


def test_line_and_curve_share_their_ends_and_levels_fit_the_barrier(joined: Connection) -> None:
    for metric in ("loss", "error"):
        line, curve = joined.on_line["train"][metric], joined.on_curve["train"][metric]
        assert line.values[[0, -1]].tolist() == curve.values[[0, -1]].tolist()
        along = joined.levels["train"][metric]
        assert along.max == float(curve.values.max())
        assert float(curve.values.min()) <= along.mean <= along.max
        assert float(curve.values.min()) <= along.arc_mean <= along.max
        assert along.stderr_data["max"] > 0


def test_batch_norm_is_recomputed_at_every_point_of_a_curve() -> None:
    options: dict[str, Any] = {"chunk_size": 35}
    train_mode = Objective(ConvNet(), split(images(), [64, 6]), cross_entropy, mode="train", **options)
    evaluated = Objective(ConvNet(), split(images(), [64, 6]), cross_entropy, **options)
    states = StateEvaluator({"train": evaluated}, stats_objective=train_mode)
    a = Endpoint(evaluated.theta(), evaluated.buffers)
    b = Endpoint(a.theta + 0.3 * normal(len(a.theta), seed=3), evaluated.buffers)
    found = connection(states, train_mode, a, b, CurveTraining(num_epochs=1), generator=generator(0), num_points=5)
    barrier = found.on_curve["train"]["loss"]
    assert barrier.batch_stats == "recompute"
    theta, buffers = found.curve(0.25)
    assert float(barrier.values[1]) == states.at(theta, buffers)["train"].evaluation.loss
    assert float(barrier.values[1]) != evaluated.evaluate(theta, buffers=buffers).loss
