"""What attached callbacks cost on the steps at which they do not measure, as a share of a LeNet-5 step.

python benchmarks/overhead.py
"""

import statistics
import time
from typing import Any

import lightning.pytorch as pl
import torch

from lmc_lightning import HessianSpectrum, InterpolationBarrier, Sharpness
from lmc_lightning.data import build_datamodule
from lmc_lightning.models import ImageClassifier

HOOKS = ("on_train_batch_start", "on_train_batch_end")
NEVER = 10**9


class Stopwatch(pl.Callback):
    """Times whole steps, and within each the hooks of the callbacks that it watches."""

    def __init__(self, watched: list[pl.Callback]) -> None:
        super().__init__()
        self.steps: list[float] = []
        self.hooks: list[float] = []
        self._in_hooks = 0.0
        self._began = 0.0
        for callback in watched:
            for name in HOOKS:
                setattr(callback, name, self._timed(getattr(callback, name)))

    def _timed(self, hook: Any) -> Any:
        def timed(*args: Any) -> None:
            began = time.perf_counter()
            hook(*args)
            self._in_hooks += time.perf_counter() - began

        return timed

    def on_train_batch_start(self, *args: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps.append(time.perf_counter() - self._began)
        self.hooks.append(self._in_hooks)  # since the watch's last turn: their end hooks come after it
        self._in_hooks = 0.0


def main() -> None:
    torch.set_num_threads(2)
    callbacks: list[pl.Callback] = [
        HessianSpectrum(steps=[NEVER]),
        Sharpness(steps=[NEVER]),
        InterpolationBarrier(steps=[NEVER], reference="initial"),
    ]
    watch = Stopwatch(callbacks)
    trainer = pl.Trainer(
        max_epochs=20,
        # Lightning calls hooks in the order of this list: the watch starts first, and a second look ends each step.
        callbacks=[watch, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(ImageClassifier(optimizer="sgd", lr=0.01), build_datamodule("digits", batch_size=64))
    step, hooks = statistics.median(watch.steps), statistics.median(watch.hooks)
    print(f"LeNet-5, batch 64: {1e3 * step:.2f} ms a step, {1e6 * hooks:.0f} µs in 3 callbacks ({hooks / step:.2%})")


if __name__ == "__main__":
    main()
