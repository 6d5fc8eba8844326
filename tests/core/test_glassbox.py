import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_lightning.core.glassbox import glass_box, preserved_rng, rng_state, seed_everything, set_rng_state


def draws() -> list[float]:
    legacy = [np.random.random(), np.random.normal()]  # noqa: NPY002
    return [random.random(), random.gauss(0, 1), *legacy, torch.randn(()).item()]


def consume() -> None:
    seed_everything(7)
    random.gauss(0, 1)
    np.random.normal()  # noqa: NPY002
    torch.randn(13)


def fail_after(act: Callable[[], None], exception: type[BaseException]) -> None:
    act()
    raise exception


def interrupted(exception: type[BaseException]) -> None:
    with pytest.raises(exception), glass_box():
        fail_after(consume, exception)


@pytest.mark.parametrize(
    "inside",
    [
        lambda: interrupted(RuntimeError),
        lambda: interrupted(KeyboardInterrupt),
        lambda: interrupted(SystemExit),
    ],
    ids=["error", "keyboard interrupt", "exit"],
)
def test_every_random_stream_continues_as_if_nothing_had_happened(inside: Callable[[], None]) -> None:
    seed_everything(0)
    draws()  # leaves a cached second Gaussian in python's and numpy's generators
    state = rng_state()
    expected = draws()
    set_rng_state(state)
    inside()
    assert draws() == expected


def test_streams_continue_after_a_normal_exit() -> None:
    seed_everything(1)
    state = rng_state()
    expected = draws()
    set_rng_state(state)
    with glass_box():
        consume()
    assert draws() == expected


def test_state_survives_a_file_that_may_hold_plain_values_only(tmp_path: object) -> None:
    seed_everything(2)
    draws()
    torch.save(rng_state(), f"{tmp_path}/rng.pt")
    expected = draws()
    set_rng_state(torch.load(f"{tmp_path}/rng.pt", weights_only=True))
    assert draws() == expected


def test_seeding_reaches_all_three_generators_and_takes_large_seeds() -> None:
    seed_everything(2**40 + 3)
    first = draws()
    seed_everything(2**40 + 3)
    assert draws() == first


def test_preserved_rng_nests() -> None:
    seed_everything(3)
    state = rng_state()
    with preserved_rng():
        draws()
        inner = rng_state()
        expected = draws()
        set_rng_state(inner)
        with preserved_rng():
            consume()
        assert draws() == expected
    set_rng_state(state)


@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_gradients_are_on_inside_and_the_mode_is_back_outside(surrounding: Callable[[], object]) -> None:
    with surrounding():  # type: ignore[attr-defined]
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with glass_box():
            leaf = torch.ones(2, requires_grad=True)
            (gradient,) = torch.autograd.grad((leaf**2).sum(), leaf, create_graph=True)
            assert gradient.requires_grad
            assert not torch.zeros(1).is_inference()
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes


FLAGS = {
    "anomaly": torch.is_anomaly_enabled,
    "default dtype": torch.get_default_dtype,
    "matmul precision": torch.get_float32_matmul_precision,
    "cudnn tf32": lambda: torch.backends.cudnn.allow_tf32,
    "math attention": torch.backends.cuda.math_sdp_enabled,
    "flash attention": torch.backends.cuda.flash_sdp_enabled,
    "autocast": torch.is_autocast_enabled,
    "cpu autocast": lambda: torch.is_autocast_enabled("cpu"),
    "gradients": torch.is_grad_enabled,
}


def change_flags() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.autograd.set_detect_anomaly(True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32


def test_flags_are_back_after_a_step_that_changed_them_and_failed() -> None:
    before = {name: read() for name, read in FLAGS.items()}
    with pytest.raises(ZeroDivisionError), glass_box():
        fail_after(change_flags, ZeroDivisionError)
    assert {name: read() for name, read in FLAGS.items()} == before


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_mode_of_the_user_is_off_inside_and_on_again_outside() -> None:
    with torch.autograd.set_detect_anomaly(True):
        with glass_box():
            assert not torch.is_anomaly_enabled()
        assert torch.is_anomaly_enabled()


def test_float32_means_float32_inside_unless_the_callers_precision_is_asked_for() -> None:
    a = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with glass_box():
            assert (a @ a).dtype == torch.float32
        with glass_box(match_precision=True):
            assert (a @ a).dtype == torch.bfloat16
        assert (a @ a).dtype == torch.bfloat16


def test_attention_can_be_differentiated_twice_inside() -> None:
    q = torch.randn(2, 3, 4, requires_grad=True)
    with glass_box():
        loss = F.scaled_dot_product_attention(q, q, q).square().sum()
        (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), q)
    assert second.isfinite().all()


def test_compiled_modules_run_eagerly_inside() -> None:
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        calls.append(1)
        return graph.forward

    module = torch.compile(nn.Linear(2, 2), backend=backend)
    with glass_box():
        module(torch.zeros(1, 2))
    assert calls == []


def test_a_device_that_is_not_in_use_is_not_seeded_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", asked.append)
    for in_use in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda in_use=in_use: in_use)
        seed_everything(4)
    assert asked == [4]
