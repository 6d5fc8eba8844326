import math

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.line import Endpoint
from lmc_lightning.landscape.similarity.distances import parameter_distance, prediction_distance
from lmc_lightning.landscape.similarity.predictions import Outputs, outputs_at
from tests import problems
from tests.problems import cross_entropy, generator, normal, split

NAMES = ("disagreement", "kl", "jsd", "logit_cosine", "ensemble_accuracy")


def outputs(logits: Tensor, labels: Tensor | None = None) -> Outputs:
    size = len(logits)
    labels = torch.zeros(size, dtype=torch.int64) if labels is None else labels
    return Outputs(logits.double(), labels, torch.full((size,), 1 / size, dtype=torch.float64))


def end(*theta: float) -> Endpoint:
    return Endpoint(torch.tensor(theta))


def test_distances_of_parameters_are_their_formulas() -> None:
    found = parameter_distance(end(3.0, 0.0), end(0.0, 4.0), end(0.0, 0.0))
    assert (found.l2, found.relative, found.cosine) == (5.0, pytest.approx(5 / 3), 0.0)
    shifted = parameter_distance(end(4.0, 1.0), end(1.0, 5.0), end(1.0, 1.0))
    assert (shifted.l2, shifted.cosine) == (5.0, 0.0)
    parallel = parameter_distance(end(1.0, 1.0), end(3.0, 3.0), end(0.0, 0.0))
    assert (parallel.relative, parallel.cosine) == (pytest.approx(2.0), pytest.approx(1.0))


def test_without_a_start_or_a_way_from_it_there_is_no_relative_distance() -> None:
    for found in (parameter_distance(end(1.0), end(2.0)), parameter_distance(end(1.0), end(2.0), end(1.0))):
        assert found.l2 == 1
        assert math.isnan(found.relative)
        assert math.isnan(found.cosine)


def test_a_classifier_is_at_no_distance_from_itself() -> None:
    logits = normal(40, 5, seed=1)
    found = prediction_distance(outputs(logits), outputs(logits + 2.0))  # the softmax does not see a constant
    assert found.disagreement.value == 0
    assert found.kl.value == pytest.approx(0, abs=1e-15)
    assert found.jsd.value == pytest.approx(0, abs=1e-15)
    assert prediction_distance(outputs(logits), outputs(3 * logits)).logit_cosine.value == pytest.approx(1)


def test_distances_of_predictions_are_those_of_torch_and_scipy() -> None:
    a, b, labels = normal(50, 4, seed=1), normal(50, 4, seed=2), torch.randint(4, (50,), generator=generator(3))
    found = prediction_distance(outputs(a, labels), outputs(b, labels))
    p, q = a.softmax(1), b.softmax(1)
    expected = {
        "disagreement": (a.argmax(1) != b.argmax(1)).double(),
        "kl": F.kl_div(q.log(), p.log(), reduction="none", log_target=True).sum(1),
        "jsd": torch.tensor([jensenshannon(x, y) ** 2 for x, y in zip(p.numpy(), q.numpy(), strict=True)]),
        "logit_cosine": F.cosine_similarity(a, b),
        "ensemble_accuracy": ((p + q).argmax(1) == labels).double(),
    }
    for name in NAMES:
        mean = getattr(found, name)
        assert mean.value == pytest.approx(float(expected[name].mean()), rel=1e-10)
        assert mean.stderr == pytest.approx(float(expected[name].std() / 50**0.5), rel=1e-9)


def test_certain_and_opposite_predictions_are_at_the_largest_divergence() -> None:
    sure = torch.tensor([[400.0, -400.0], [400.0, -400.0]])
    found = prediction_distance(outputs(sure), outputs(-sure))
    assert found.disagreement.value == 1
    assert found.jsd.value == pytest.approx(math.log(2))
    assert found.kl.value == pytest.approx(800)
    impossible = torch.tensor([[0.0, -torch.inf]])
    assert prediction_distance(outputs(impossible), outputs(impossible)).kl.value == 0


def test_outputs_are_read_off_the_loss_in_the_order_of_the_examples() -> None:
    x, y = normal(30, 5, seed=1), torch.randint(3, (30,), generator=generator(2))
    y[4] = -100
    module = nn.Linear(5, 3, dtype=torch.float64)
    objective = Objective(module, split((x, y), (20, 10)), cross_entropy, chunk_size=7)
    theta = objective.theta() * 2
    found = outputs_at(objective, theta)
    assert found is not None
    torch.testing.assert_close(found.logits, (2 * module(x)).detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(found.labels, y)
    assert found.weights[4] == 0
    assert found.weights.sum() == pytest.approx(1)
    torch.testing.assert_close(found.log_probabilities.exp().sum(1), torch.ones(30).double())
    changed = found.logits.clone()
    changed[4] = torch.arange(3)
    other = prediction_distance(found, Outputs(changed, y, found.weights))
    assert (other.jsd.value, other.disagreement.value) == (pytest.approx(0, abs=1e-15), 0)  # the ignored one


def test_a_regression_has_no_classes_and_a_segmentation_several_an_example() -> None:
    objective = problems.linear_regression().objective()
    assert outputs_at(objective, objective.theta()) is None
    pixels = Objective(
        nn.Conv1d(1, 3, 1), [(torch.randn(4, 1, 5), torch.zeros(4, 5, dtype=torch.int64))], cross_entropy
    )
    assert pixels.baseline.confidence is not None
    assert outputs_at(pixels, pixels.theta()) is None
