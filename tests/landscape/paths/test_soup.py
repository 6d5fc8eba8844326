import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.line import Endpoint
from lmc_lightning.landscape.paths.soup import average_of, soup_gains
from lmc_lightning.landscape.paths.states import StateEvaluator
from tests import problems
from tests.problems import cross_entropy, generator, normal


def ends_of(*thetas: Tensor) -> list[Endpoint]:
    return [Endpoint(theta) for theta in thetas]


def test_the_average_is_exact_and_keeps_what_all_agree_on() -> None:
    mask = torch.tensor([0.0, -torch.inf])
    buffers = [
        {"mean": torch.tensor([m, 1.0]), "count": torch.tensor(c), "mask": mask} for m, c in ((0.0, 3), (4.0, 8))
    ]
    one, other = (Endpoint(t, b) for t, b in zip((torch.zeros(2), torch.tensor([1.0, 3.0])), buffers, strict=True))
    mean = average_of([one, other])
    assert mean.theta.tolist() == [0.5, 1.5]
    assert mean.buffers["mean"].tolist() == [2.0, 1.0]
    assert mean.buffers["count"] == 3
    assert torch.equal(mean.buffers["mask"], mask)
    theta = normal(100, seed=1).float()
    assert torch.equal(average_of([Endpoint(theta)] * 3).theta, theta)
    assert torch.equal(average_of([one, other, other]).theta, torch.tensor([2 / 3, 2.0]))


def test_of_a_quadratic_the_gain_is_that_of_its_midpoint() -> None:
    hessian = problems.with_spectrum([5.0, 1.0, 0.5], seed=4)
    problem = problems.quadratic(hessian)
    a, b = normal(3, seed=5), normal(3, seed=6)

    def loss(theta: Tensor) -> float:
        return float(0.5 * theta @ hessian @ theta)

    (found,) = soup_gains(StateEvaluator({"train": problem.objective()}), ends_of(a, b))["train"].values()
    assert found.gain == pytest.approx(min(loss(a), loss(b)) - loss((a + b) / 2), rel=1e-12)
    assert found.networks == pytest.approx((loss(a), loss(b)))
    assert found.average == pytest.approx(loss((a + b) / 2))


def test_of_a_convex_loss_the_average_of_equally_good_networks_gains_and_is_better_than_their_mean() -> None:
    problem = problems.softmax_regression()
    objective = problem.objective()
    thetas = [objective.theta() + 0.3 * normal(objective.num_params, seed=s) for s in range(4)]
    found = soup_gains(StateEvaluator({"": objective}), ends_of(*thetas))[""]["loss"]
    assert found.average < sum(found.networks) / 4
    mirrored = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])]
    bowl = StateEvaluator({"": problems.quadratic(torch.eye(2)).objective()})
    assert soup_gains(bowl, ends_of(*mirrored))[""]["loss"].gain == 0.5
    assert soup_gains(bowl, ends_of(mirrored[0], mirrored[0]))[""]["loss"].gain == 0


def test_standard_errors_are_paired_with_the_best_network() -> None:
    x, y = normal(60, 5, seed=1), torch.randint(3, (60,), generator=generator(2))
    module = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    objective = Objective(module, [(x, y)], cross_entropy)
    thetas = [normal(15, seed=s) for s in (3, 4)]

    def losses(theta: Tensor) -> Tensor:
        return F.cross_entropy(x @ theta.view(3, 5).T, y, reduction="none")

    found = soup_gains(StateEvaluator({"val": objective}), ends_of(*thetas))["val"]["loss"]
    best = min(thetas, key=lambda t: float(losses(t).mean()))
    paired = losses(best) - losses((thetas[0] + thetas[1]) / 2)
    assert found.gain == pytest.approx(float(paired.mean()), rel=1e-12)
    assert found.stderr == pytest.approx(float(paired.std() / 60**0.5), rel=1e-12)
    assert soup_gains(StateEvaluator({"val": objective}), ends_of(*thetas))["val"].keys() == {"loss", "error"}


def test_the_average_has_statistics_of_its_own_under_recomputation() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = normal(40, 5, seed=1), torch.randint(3, (40,), generator=generator(2))
    objective = Objective(module, [data], cross_entropy)
    stats = Objective(module, [data], cross_entropy, mode="train")
    states = StateEvaluator({"": objective}, stats_objective=stats)
    theta = objective.theta()
    buffers = [objective.buffers | {"1.running_mean": torch.full((4,), shift).double()} for shift in (5.0, -7.0)]
    ends = [Endpoint(theta, b) for b in buffers]
    assert soup_gains(states, ends)[""]["loss"].gain == 0  # equal θ and new statistics: the same network three times
    kept = StateEvaluator({"": objective}, batch_stats="interpolate")
    assert soup_gains(kept, ends)[""]["loss"].gain != 0
