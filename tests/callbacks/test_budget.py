"""How often, and with how many probes, a callback visits that may take a share of the training time only."""

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lmc_lightning.callbacks.visits.budget import EFFORTS, Budget
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.core.collective import Collective
from lmc_lightning.recording import Measurement, Quantity
from tests.zoo.harness import Setting, train
from tests.zoo.outputs import Plain
from tests.zoo.probe import Probe

ALONE = Collective()


class Clock:
    """Time that passes as it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Trains(Callback):
    """Every step takes a second."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *args: Any) -> None:
        self.clock.now += 1


class Samples(Probe):
    """A mean of random numbers: 0.253 s for what is always done, and 0.05 s a number."""

    min_effort = 0.25

    def __init__(self, clock: Clock, **options: Any) -> None:
        super().__init__(on_error="raise", num_examples=8, **options)
        self.clock = clock  # type: ignore[method-assign]

    def measure(self, visit: Visit) -> Measurement:
        samples = torch.randn(visit.scaled(16), generator=visit.generator)
        self.clock.now += 0.253 + 0.05 * len(samples)  # type: ignore[attr-defined]
        stderr = float(samples.std()) / len(samples) ** 0.5
        quantity = Quantity(self.key("mean"), float(samples.mean()), stderr, evidence={"num_samples": len(samples)})
        return Measurement((quantity,))


WHOLE = 0.253 + 16 * 0.05


def run(*callbacks: Samples, max_epochs: int = 10) -> Any:
    (clock,) = {c.clock for c in callbacks}
    return train(Setting(Plain, others=lambda: [Trains(clock)]), callbacks, max_epochs=max_epochs)


def made(callback: Samples) -> dict[int, float]:
    """The effort of each visit by its step; 0 where it was skipped."""
    return {r.step: r.evidence.get("effort", 0.0) for r in callback.results}


# -- what is decided ---------------------------------------------------------------------------------------------------


def decide(budget: Budget, now: float, least: float = 0.25) -> float:
    return budget.effort(now, 0.0, least, ALONE)


def spent(max_overhead: float | None, *visits: tuple[float, float], skipped: bool = False) -> Budget:
    budget = Budget(max_overhead)
    budget.start(0.0, 0.0)
    for effort, seconds in visits:
        budget.spend(effort, seconds)
    if skipped:
        budget.skip()
    return budget


def test_without_a_limit_every_visit_is_made() -> None:
    assert decide(spent(None, (1.0, 1e9)), 1e-9) == 1.0


def test_the_first_visit_is_made() -> None:
    assert decide(spent(1e-9), 0.0) == 1.0


@pytest.mark.parametrize(("now", "effort"), [(19.9, 0.0), (20.1, 1.0)])
def test_a_visit_is_made_when_all_together_stay_within_the_share(now: float, effort: float) -> None:
    assert decide(spent(0.1, (1.0, 1.0)), now) == effort


@pytest.mark.parametrize(
    ("now", "least", "effort"),
    [(12.4, 0.25, 0.0), (12.6, 0.25, 0.25), (15.1, 0.25, 0.5), (20.1, 0.25, 1.0), (15.1, 1.0, 0.0), (12.6, 0.5, 0.0)],
)
def test_after_a_skipped_visit_fewer_probes_will_do(now: float, least: float, effort: float) -> None:
    assert decide(spent(0.1, (1.0, 1.0), skipped=True), now, least) == effort


def test_what_a_visit_of_an_effort_took_is_what_the_next_one_is_expected_to_take() -> None:
    """Half the probes took all the time: they save nothing."""
    budget = spent(0.1, (1.0, 1.0), (0.5, 1.0), skipped=True)
    assert decide(budget, 25.1) == 0.25
    assert decide(budget, 29.9) == 0.25
    assert decide(budget, 30.1) == 1.0


def test_time_that_callbacks_take_is_no_training_time() -> None:
    budget = Budget(0.1)
    budget.start(100.0, 7.0)
    budget.spend(1.0, 1.0)
    assert budget.effort(123.9, 11.0, 1.0, ALONE) == 0.0
    assert budget.training == pytest.approx(19.9)
    assert budget.effort(124.1, 11.0, 1.0, ALONE) == 1.0


def test_the_slowest_process_decides() -> None:
    class Pair(Collective):
        def gather(self, compute: Any) -> Any:
            return torch.cat([compute(), torch.tensor([0.5], dtype=torch.float64)])

    assert spent(0.1).effort(0.0, 0.0, 0.25, Pair()) == 0.5


def test_a_resumed_run_goes_on_with_the_times_of_the_first() -> None:
    budget, resumed = spent(0.1, (1.0, 1.0), skipped=True), Budget(0.1)
    decide(budget, 12.0)
    resumed.load_state(json.loads(json.dumps(budget.state())))
    resumed.start(50.0, 0.0)
    assert decide(resumed, 50.4) == 0.0
    assert decide(resumed, 50.6) == 0.25
    Budget(0.1).load_state({})


# -- what a run does ---------------------------------------------------------------------------------------------------


def test_a_callback_without_a_limit_makes_every_visit_in_full() -> None:
    samples = Samples(Clock())
    run(samples)
    assert made(samples) == dict.fromkeys(range(0, 31, 3), 1.0)


@pytest.mark.parametrize("max_overhead", [0.05, 0.1, 0.2])
def test_visits_are_skipped_then_made_with_fewer_probes_and_stay_within_the_share(max_overhead: float) -> None:
    samples = Samples(clock := Clock(), max_overhead=max_overhead)
    run(samples, max_epochs=40)
    efforts = made(samples)
    assert set(efforts) == set(range(0, 121, 3))
    assert {0.0, 1.0} < set(efforts.values()) <= {0.0, *EFFORTS}
    assert samples.seconds == pytest.approx(clock.now - 120)
    assert samples.seconds <= max_overhead * 120
    # What is left would not have been enough for one more visit with all probes, and some.
    assert samples.seconds > max_overhead * 120 - 2 * WHOLE
    steps = sorted(efforts)
    for before, step in pairwise(steps):
        if 0 < efforts[step] < 1:
            assert efforts[before] == 0


def test_fewer_probes_make_a_larger_error_on_the_same_examples_and_the_record_says_so() -> None:
    samples = Samples(Clock(), max_overhead=0.1)
    run(samples, max_epochs=40)
    of = {r.evidence["effort"]: r for r in samples.results if r.is_measured}
    for effort, number in ((1.0, 16), (0.5, 8)):
        assert of[effort].evidence["num_samples"] == number
    assert of[0.5].stderr > of[1.0].stderr  # type: ignore[operator]
    assert len({r.evidence["probe_digest"] for r in samples.results if r.is_measured}) == 1


def test_a_skipped_visit_is_a_record_without_a_number_that_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("lmc_lightning.recording.rank_zero_info", told.append)
    samples = Samples(Clock(), max_overhead=0.1)
    run(samples, max_epochs=6)
    skipped = [r for r in samples.results if r.status == "skipped"]
    assert [r.step for r in skipped] == [3, 6, 9, 12, 18][: len(skipped)]
    assert {(r.name, r.value) for r in skipped} == {("probe", None)}
    reason = "It would have taken this callback beyond max_overhead=0.1 of the training time."
    assert {r.evidence["reason"] for r in skipped} == {reason}
    assert told == [f"probe skips the visit at step 3: {reason}"]
    assert not samples.failures
    wide = samples.to_pandas(wide=True)
    assert sorted(wide.columns) == ["epoch", "probe/mean", "step"]
    assert set(wide["step"]).isdisjoint(r.step for r in skipped)


def test_every_callback_has_a_budget_of_its_own() -> None:
    clock = Clock()
    limited, free = Samples(clock, max_overhead=0.1), Samples(clock, name="free")
    alone = Samples(other := Clock(), max_overhead=0.1)
    run(limited, free, max_epochs=20)
    run(alone, max_epochs=20)
    assert made(limited) == made(alone)
    assert set(made(free).values()) == {1.0}
    assert clock.now == pytest.approx(other.now + free.seconds)


def test_training_is_the_same_whatever_the_limit() -> None:
    runs = [run(Samples(Clock(), max_overhead=share)) for share in (None, 0.05)]
    assert runs[1].differs_from(runs[0]) == ["other callbacks"]  # the clock that one of them holds


@pytest.mark.parametrize("max_overhead", [0, -0.1, float("nan")])
def test_an_impossible_share_is_refused(max_overhead: float) -> None:
    with pytest.raises(ValueError, match="Expected max_overhead to be a positive share or None"):
        Probe(max_overhead=max_overhead)
