import statistics
import threading
import time

import pytest
import torch

from lmc_lightning import HessianSpectrum, measure
from lmc_lightning.callbacks.visits import memory
from lmc_lightning.callbacks.visits.memory import Meter, retried_in_small_chunks
from lmc_lightning.models import ImageClassifier
from lmc_lightning.recording import Measurement


def test_the_second_try_is_in_small_chunks_without_cached_graphs() -> None:
    tries: list[dict[str, object]] = []

    def measured(**options: object) -> Measurement:
        tries.append(options)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return Measurement(())

    assert retried_in_small_chunks(measured, retry=True) == Measurement(())
    assert tries == [{}, {"chunk_size": 16, "memory_budget": 0}]


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (RuntimeError("shapes differ"), True),
        (RuntimeError("out of memory"), False),
        (ValueError("out of memory"), True),
    ],
)
def test_other_failures_are_not_tried_again(error: Exception, retry: bool) -> None:
    tries: list[None] = []

    def measured(**options: object) -> Measurement:
        tries.append(None)
        raise error

    with pytest.raises(type(error), match=str(error)):
        retried_in_small_chunks(measured, retry=retry)
    assert len(tries) == 1


def test_numbers_of_the_second_try_are_those_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ImageClassifier(network="mlp", network_kwargs={"hidden_sizes": [5], "in_features": 4}, num_classes=3)
    loader = [(torch.randn(40, 1, 2, 2), torch.arange(40) % 3)]
    callback = HessianSpectrum(num_eigenvalues=2, num_probes=2, num_steps=4)
    expected = measure(module, loader, [callback])
    first = HessianSpectrum.measure
    failures: list[None] = []

    def fails_once(self: HessianSpectrum, visit: object) -> Measurement:
        if not failures:
            failures.append(None)
            raise RuntimeError("DefaultCPUAllocator: not enough memory: out of memory")
        return first(self, visit)  # type: ignore[arg-type]

    monkeypatch.setattr(HessianSpectrum, "measure", fails_once)
    found = measure(module, loader, [callback])
    assert found["hessian/lambda_max"] == pytest.approx(expected["hessian/lambda_max"], rel=1e-4)
    assert found["hessian/trace"] == pytest.approx(expected["hessian/trace"], rel=1e-4)


# -- what a visit takes ------------------------------------------------------------------------------------------------


def test_the_peak_is_what_was_held_at_once_above_the_start() -> None:
    held, block = torch.zeros(1), 64 * 2**20
    with Meter(held.device) as outer:
        first = torch.ones(block // 4)
        with Meter(held.device) as inner:
            second = torch.ones(2 * block // 4)
            del second
        del first
    with Meter(held.device) as nothing:
        pass
    assert outer.peak_bytes == pytest.approx(3 * block, rel=0.1)
    assert inner.peak_bytes == pytest.approx(2 * block, rel=0.1)
    assert nothing.peak_bytes is not None
    assert nothing.peak_bytes < 0.1 * block


def test_time_is_told_by_the_clock_also_after_an_exception() -> None:
    times = iter([3.0, 5.5])
    meter = Meter(torch.device("cpu"), lambda: next(times))
    with pytest.raises(KeyboardInterrupt), meter:
        raise KeyboardInterrupt
    assert meter.seconds == 2.5
    assert meter.evidence == {"seconds": 2.5, "peak_bytes": meter.peak_bytes}
    assert "memory of a measurement" not in {t.name for t in threading.enumerate()}


def test_where_the_system_does_not_tell_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "bytes_in_use", lambda device: None)
    with Meter(torch.device("cpu")) as meter:
        pass
    assert meter.peak_bytes is None


@pytest.mark.parametrize(
    ("before", "looks", "highest", "peak"),
    [(100, [300, 200], 250, 200), (100, [120, 100], 900, 800), (100, [50, 40], 100, 0)],
    ids=["seen", "between two looks", "less than before"],
)
def test_a_new_peak_of_the_device_counts_more_than_what_was_seen(
    before: int, looks: list[int], highest: int, peak: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: torch counts its own peak, which is not reset."""
    in_use, marks = iter([before, *looks]), iter([250, highest])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(in_use))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(marks))
    monkeypatch.setattr(memory, "SAMPLING_INTERVAL", 1e9)
    with Meter(torch.device("cuda", 0)) as meter:
        meter.look()
    assert meter.peak_bytes == peak


def test_metering_takes_less_than_a_millisecond() -> None:
    def once() -> float:
        began = time.process_time()  # of all threads, whatever else the machine does
        with Meter(torch.device("cpu")):
            pass
        return time.process_time() - began

    assert statistics.median(once() for _ in range(50)) < 1e-3
