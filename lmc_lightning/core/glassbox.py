"""A glass box around every measurement: whatever global state is touched inside is as before outside.

Lightning's ``isolate_rng`` restores nothing after an exception and ``torch.random.fork_rng`` leaves python's and
numpy's generators moved; here everything is put back in ``finally``, also after a ``KeyboardInterrupt``.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmc_lightning.core.repairs import repaired_double_backward

RngState = dict[str, Any]
"""States of python's, numpy's, torch's and every CUDA device's generator; plain values and tensors only."""


def rng_state() -> RngState:
    """The state of every global random number generator, loadable under ``torch.load(weights_only=True)``."""
    version, internal, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(algorithm), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: RngState) -> None:
    """Put every global generator back to ``state``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:  # of as many devices as there are now
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's global generators, on every device in use, and nothing else (no environment).

    Of CUDA only if it is in use: ``torch.manual_seed`` would keep the seed for when the user's own work starts to use
    it, and takes 2 ms to note who asked.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    accelerator = torch.accelerator.current_accelerator()
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    elif accelerator is not None and accelerator.type != "cuda":
        torch.manual_seed(seed)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Every global random stream continues after the block as if the block had not run."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _float32_without_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn


@contextmanager
def glass_box(
    *, match_precision: bool = False, without_cudnn: bool = False, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Random streams, grad and inference mode, anomaly mode, autocast, kernels and dtypes, all restored afterwards.

    Inside, gradients are on whatever surrounds the block, attention takes the kernel that can be differentiated twice,
    compiled modules run eagerly, and float32 means float32.

    Args:
        match_precision: keep the caller's autocast and TF32.
        without_cudnn: for recurrent layers, whose cuDNN kernels have no double backward.
        dtype: the default dtype inside.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(_default_dtype(dtype or torch.get_default_dtype()))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if without_cudnn:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(repaired_double_backward())
        if not match_precision:
            stack.enter_context(_float32_without_tf32())
            for device_type in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
