"""The callbacks of a run that is only watched."""

import pytest

from lmc_lightning import HessianSpectrum, Sharpness, default_callbacks, measure
from tests.zoo.harness import Setting, train
from tests.zoo.module import examples
from tests.zoo.outputs import Plain

KEYS = {
    "hessian/lambda_max",
    "sharpness/worst_case",
    "sharpness/adaptive",
    "sharpness/average",
    "sharpness/gradient_norm",
}


def test_they_watch_curvature_and_sharpness_at_every_epoch_and_leave_training_alone() -> None:
    ours = default_callbacks(num_examples=16, on_error="raise")
    run = train(Setting(Plain), ours)
    assert run.differs_from(train(Setting(Plain))) == []
    made = [r for c in ours for r in c.results if r.is_measured]
    assert {r.name for r in made} >= KEYS
    assert {r.step for c in ours for r in c.results} == {0, 3, 6}
    assert {r.evidence["num_examples"] for r in made} == {16}


def test_together_they_keep_to_the_limit() -> None:
    assert sum(c._budget.max_overhead for c in default_callbacks()) == pytest.approx(0.1)
    assert sum(c._budget.max_overhead for c in default_callbacks(max_overhead=0.5)) == pytest.approx(0.5)
    assert {c._budget.max_overhead for c in default_callbacks(max_overhead=None)} == {None}


def test_lambda_max_is_below_the_full_one_by_less_than_its_residual() -> None:
    module, loader = Plain(), [examples(24)]
    watched = measure(module, loader, default_callbacks())
    whole = measure(module, loader, [HessianSpectrum(num_probes=0, tolerance=1e-6), Sharpness(num_samples=2)])
    error = whole["hessian/lambda_max"] - watched["hessian/lambda_max"]
    assert 0 <= error <= watched["hessian/lambda_max_residual"] <= 0.3 * watched["hessian/lambda_max"]
    assert {k: v for k, v in watched.items() if k.startswith("sharpness")} == {
        k: v for k, v in whole.items() if k.startswith("sharpness")
    }


def test_common_arguments_reach_both() -> None:
    schedules = {str(c.schedule) for c in default_callbacks(every_n_epochs=5, seed=3)}
    assert len(schedules) == 1
    assert "every=5" in schedules.pop()
    assert {c.seed for c in default_callbacks(seed=3)} == {3}
