import logging
import os
import random
import signal
import threading
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from lmc_lightning.branching.children.isolation import isolated
from lmc_lightning.core.glassbox import rng_state


def meddle() -> None:
    os.environ["MEDDLED"] = "1"
    os.environ["CHANGED"] = "after"
    del os.environ["DELETED"]
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = True
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002


def process_state() -> tuple[object, ...]:
    return (
        dict(os.environ),
        {number: signal.getsignal(number) for number in signal.valid_signals()},
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        str(rng_state()),
        logging.getLogger("lightning.pytorch").level,
        list(warnings.filters),
    )


@pytest.mark.parametrize("error", [None, RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1)])
def test_the_process_is_as_before(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    monkeypatch.setenv("CHANGED", "before")
    monkeypatch.setenv("DELETED", "before")
    before = process_state()

    def run() -> None:
        with isolated():
            meddle()
            if error is not None:
                raise error

    with pytest.raises(type(error)) if error is not None else nullcontext():
        run()
    assert process_state() == before


def test_the_console_stays_calm_but_for_errors(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with isolated():
        warnings.warn("the trunk has said so already", stacklevel=1)
        log.info("GPU available")
        log.error("broken")
    assert [record.message for record in caplog.records] == ["broken"]


def test_other_threads_leave_signals_alone() -> None:
    done = []

    def run() -> None:
        with isolated():
            done.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [True]
