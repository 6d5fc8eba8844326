import pytest
import torch

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.attribution import attribution
from lmc_lightning.landscape.paths.barrier import barrier, line_profiles
from lmc_lightning.landscape.paths.line import Endpoint, uniform_ts
from lmc_lightning.landscape.paths.profiles import Curve, Profile
from lmc_lightning.landscape.paths.states import StateEvaluator
from lmc_lightning.landscape.similarity.predictions import outputs_at
from tests.landscape.paths.test_barrier import labelled, network, pair
from tests.problems import cross_entropy


def test_shares_of_examples_and_of_classes_sum_to_the_barrier() -> None:
    objective, end_b = pair(batch_norm=False)
    states = StateEvaluator({"": objective})
    end_a = Endpoint(objective.theta())
    (profile,) = line_profiles(states, end_a, Endpoint(end_b.theta)).values()
    outputs = outputs_at(objective, end_a.theta)
    assert outputs is not None
    labels = outputs.labels
    for metric in ("loss", "error"):
        result = barrier(profile, metric)
        found = attribution(result, profile, labels)
        assert float(found.shares.sum()) == pytest.approx(result.barrier, rel=1e-12)
        assert sum(found.by_class.values()) == pytest.approx(result.barrier, rel=1e-12)
        assert set(found.by_class) == {0, 1, 2}
        curve = profile.curves[metric].samples
        peak, t = int(result.gaps.argmax()), result.peak_t
        alone = (curve[peak] - (1 - t) * curve[0] - t * curve[-1]) / 70
        torch.testing.assert_close(found.shares, alone, rtol=1e-9, atol=1e-15)
        for label, share in found.by_class.items():
            assert share == pytest.approx(float(alone[labelled()[1] == label].sum()), rel=1e-9, abs=1e-15)


def test_ignored_examples_have_no_share() -> None:
    inputs, targets = labelled(20)
    targets[:5] = -100
    objective = Objective(network(1, batch_norm=False), [(inputs, targets)], cross_entropy)
    end_a, end_b = Endpoint(objective.theta()), Endpoint(-objective.theta())
    (profile,) = line_profiles(StateEvaluator({"": objective}), end_a, end_b, num_points=5).values()
    outputs = outputs_at(objective, end_a.theta)
    assert outputs is not None
    found = attribution(barrier(profile), profile, outputs.labels[outputs.weights > 0])
    assert len(found.shares) == 15
    assert -100 not in found.by_class
    with pytest.raises(ValueError, match="a label for each of 15 examples, got 20"):
        attribution(barrier(profile), profile, outputs.labels)


def test_chunks_have_shares_and_no_classes_and_a_mean_has_none() -> None:
    samples, weights = torch.tensor([[0.0, 0.0], [1.0, 3.0], [0.0, 0.0]]).double(), torch.tensor([0.25, 0.75]).double()
    curve = Curve(samples @ weights, (0.0, 0.0), samples, weights, "chunk")
    profile = Profile(uniform_ts(3), {"loss": curve})
    found = attribution(barrier(profile), profile, torch.tensor([0, 1]))
    assert found.shares.tolist() == [0.25, 2.25]
    assert found.by_class == {}
    bare = Profile(uniform_ts(3), {"f1": Curve(torch.zeros(3).double(), (0.0, 0.0))})
    with pytest.raises(ValueError, match="'f1' is known as a mean only"):
        attribution(barrier(bare, "f1"), bare)
