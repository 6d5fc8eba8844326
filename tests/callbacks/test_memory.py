import pytest
import torch

from lmc_lightning import HessianSpectrum, measure
from lmc_lightning.callbacks.memory import retried_in_small_chunks
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
