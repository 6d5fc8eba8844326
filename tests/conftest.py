"""What no test may leave behind."""

import os
import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _no_leaks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs log into a temporary folder; modes, signal handlers and the environment are as before afterwards."""
    monkeypatch.chdir(tmp_path_factory.mktemp("run"))
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = _globals()
    yield
    after = _globals()
    leaked = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not leaked


def _globals() -> dict[str, object]:
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "sigterm": signal.getsignal(signal.SIGTERM),
        "sigint": signal.getsignal(signal.SIGINT),
        "environment": {k for k in os.environ if k.startswith(("PL_", "MASTER_", "LOCAL_RANK", "RANK", "WORLD"))},
    }
