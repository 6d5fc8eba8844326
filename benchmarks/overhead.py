"""What attached callbacks cost on a LeNet-5: on the steps at which they do not measure, and by default in an epoch.

python benchmarks/overhead.py                       # at steps without a visit, on sklearn's digits
python benchmarks/overhead.py --data-dir DIRECTORY  # default_callbacks() beside epochs of full MNIST, read from there
"""

import argparse
import statistics
import time
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch

from lmc_lightning import HessianSpectrum, InterpolationBarrier, MeasurementCallback, Sharpness, default_callbacks
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


class Epochs(pl.Callback):
    """Times the epochs from the first step of each to the last, without the visits between them [CPU s]."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_epoch_start(self, *args: Any) -> None:
        self._began = time.process_time()

    def on_train_epoch_end(self, *args: Any) -> None:
        self.seconds.append(time.process_time() - self._began)


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


def between_visits() -> None:
    callbacks: list[pl.Callback] = [
        HessianSpectrum(steps=[NEVER]),
        Sharpness(steps=[NEVER]),
        InterpolationBarrier(steps=[NEVER], reference="initial"),
    ]
    watch = Stopwatch(callbacks)
    # Lightning calls hooks in the order of this list: the watch starts first, and a second look ends each step.
    trainer = pl.Trainer(max_epochs=20, callbacks=[watch, *callbacks], **QUIET)
    trainer.fit(ImageClassifier(optimizer="sgd", lr=0.01), build_datamodule("digits", batch_size=64))
    step, hooks = statistics.median(watch.steps), statistics.median(watch.hooks)
    print(f"LeNet-5, batch 64: {1e3 * step:.2f} ms a step, {1e6 * hooks:.0f} µs in 3 callbacks ({hooks / step:.2%})")


def in_an_epoch(data_dir: str, optimizer: str, batch_size: int, max_epochs: int) -> None:
    MeasurementCallback.clock = staticmethod(time.process_time)  # which other jobs on the machine do not change
    limited, free, epochs = default_callbacks(), default_callbacks(max_overhead=None, name="unlimited"), Epochs()
    data = build_datamodule("mnist", data_dir=data_dir, batch_size=batch_size)
    with TemporaryDirectory() as folder:
        options = {"max_epochs": max_epochs, "limit_val_batches": 0, "default_root_dir": folder, **QUIET}
        trainer = pl.Trainer(callbacks=[epochs, *free, *limited], **options)
        trainer.fit(ImageClassifier(optimizer=optimizer, lr={"sgd": 0.05, "adam": 1e-3}[optimizer]), data)
    epoch = statistics.median(epochs.seconds)
    print(f"LeNet-5 on full MNIST, {optimizer}, batch {batch_size}: {epoch:.1f} CPU s an epoch of training")
    for callback in free:
        visits = {r.step: r.evidence["seconds"] / epoch for r in callback.results}.values()
        print(f"  {type(callback).__name__}: visits of {', '.join(f'{share:.1%}' for share in visits)} of an epoch")
    for name, callbacks in {"without a limit": free, "by default": limited}.items():
        made = {(callback.kind, r.step) for callback in callbacks for r in callback.results if r.is_measured}
        share = sum(callback.seconds for callback in callbacks) / sum(epochs.seconds)
        print(f"  {name}: {len(made)} of {2 * (max_epochs + 1)} visits, {share:.1%} of the training time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of the MNIST files")
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-epochs", type=int, default=2)
    parser.add_argument("--num-threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    if args.data_dir is None:
        between_visits()
    else:
        in_an_epoch(args.data_dir, args.optimizer, args.batch_size, args.max_epochs)


if __name__ == "__main__":
    main()
