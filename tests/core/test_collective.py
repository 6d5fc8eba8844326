"""One process agrees with itself; what is asked to end ends between two computations, and never halfway."""

from typing import Any

import pytest
import torch

from lmc_lightning.core.collective import Collective, InterruptedMeasurementError, joint_digest
from lmc_lightning.core.structure import digest
from tests.problems import linear_regression


def forbidden() -> Any:
    raise AssertionError("nothing is computed any more")


def test_alone_every_sum_and_every_agreement_is_its_own() -> None:
    alone = Collective()
    rows = torch.arange(6.0).reshape(3, 2)
    assert alone.total(lambda: rows) is rows
    assert torch.equal(alone.gather(lambda: rows), rows)
    assert alone.agree(lambda: "value") == "value"
    assert [alone.everywhere(condition) for condition in (True, False)] == [True, False]


@pytest.mark.parametrize("method", ["agree", "total", "gather"])
def test_an_error_passes_through_as_it_is(method: str) -> None:
    error = ValueError("no luck")

    def fail() -> Any:
        raise error

    with pytest.raises(ValueError, match="no luck") as caught:
        getattr(Collective(), method)(fail)
    assert caught.value is error


@pytest.mark.parametrize("method", ["agree", "total", "gather"])
def test_a_run_that_is_asked_to_end_computes_nothing_more(method: str) -> None:
    asked = Collective(lambda: True)
    with pytest.raises(InterruptedMeasurementError, match="The run was asked to end during the measurement"):
        getattr(asked, method)(forbidden)


def test_conditions_are_compared_even_when_the_run_is_asked_to_end() -> None:
    assert Collective(lambda: True).everywhere(True)


def test_it_is_asked_before_each_computation_and_no_later() -> None:
    answers = iter([False, False, True])
    collective = Collective(lambda: next(answers))
    assert [collective.agree(lambda: 1) for _ in range(2)] == [1, 1]
    with pytest.raises(InterruptedMeasurementError, match="asked to end"):
        collective.agree(forbidden)


@pytest.mark.parametrize("evaluations", [0, 1, 2])
def test_an_objective_ends_between_evaluations(evaluations: int) -> None:
    calls: list[bool] = []

    def interrupted() -> bool:
        calls.append(True)
        return done and len(calls) > after

    done, after = False, 0
    objective = linear_regression().objective(collective=Collective(interrupted))
    expected = float(objective.loss(objective.theta()))
    calls.clear()
    objective.loss(objective.theta())
    each = len(calls)
    assert each > 0
    calls.clear()
    done, after = True, evaluations * each
    assert [float(objective.loss(objective.theta())) for _ in range(evaluations)] == [expected] * evaluations
    with pytest.raises(InterruptedMeasurementError, match="asked to end"):
        objective.loss(objective.theta())


@pytest.mark.parametrize("evaluate", ["loss", "grad", "hvp"])
def test_everything_that_an_objective_computes_can_be_ended(evaluate: str) -> None:
    asked = False
    objective = linear_regression().objective(collective=Collective(lambda: asked))
    theta = objective.theta()
    compute = objective.hvp(theta) if evaluate == "hvp" else getattr(objective, evaluate)
    before = compute(theta)
    asked = True
    with pytest.raises(InterruptedMeasurementError, match="asked to end"):
        compute(theta)
    asked = False
    assert torch.equal(compute(theta), before)


def test_the_digest_of_one_process_is_its_own() -> None:
    own = digest([torch.arange(3)])
    assert joint_digest(own, Collective()) == own
