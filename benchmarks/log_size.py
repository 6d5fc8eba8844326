"""What a run of LeNet-5 on MNIST with every measuring callback at every epoch writes, by callback and kind of file.

python -m benchmarks.log_size --data-dir DIRECTORY   # of MNIST; on sklearn's digits, enlarged to its size, without

Batches, probe examples, products and samples are few, for the time: bytes hardly depend on them. The chains of the
local learning coefficient are random walks of the default length, unless --sample is given. The rest is as by default.
"""

import argparse
import cProfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch import Tensor

from lmc_lightning import (
    CurveTraining,
    EdgeOfStability,
    HessianSpectrum,
    InterpolationBarrier,
    Langevin,
    LocalLearningCoefficient,
    LossSurface,
    MeasurementCallback,
    MinimaVolume,
    ModeConnectivity,
    RepresentationSimilarity,
    Sharpness,
    WeightTrajectory,
)
from lmc_lightning.data import build_datamodule
from lmc_lightning.landscape.sharpness.family import MEASURES
from lmc_lightning.landscape.volume import llc
from lmc_lightning.models import ImageClassifier

KINDS = ("events", "jsonl", "png", "npz", "other", "weights")
Sizes = Counter[tuple[str, str]]
"""Bytes by callback and kind of file."""


def every_callback() -> list[MeasurementCallback]:
    """All of the package, with the options under which the most is logged."""
    few = {"num_examples": 64}
    return [
        HessianSpectrum(blocks="module", num_probes=2, num_steps=16, max_products=24, tolerance=0.1, **few),
        EdgeOfStability(max_products=8, tolerance=0.1, **few),
        Sharpness(MEASURES, num_samples=2, num_draws=2, **few),
        LossSurface(num_examples=16),
        MinimaVolume(num_directions=20, rtol=0.1, **few),
        LocalLearningCoefficient(**few),
        InterpolationBarrier(reference="initial", **few),
        ModeConnectivity(CurveTraining(num_epochs=1), reference="initial", curve_examples=64, batch_size=64, **few),
        RepresentationSimilarity(reference="initial", **few),
        WeightTrajectory(**few),
    ]


def random_walk(excess: Any, start: Tensor, n_beta: float, settings: Langevin, *_: Any) -> Tensor:
    """What a chain looks like, in no time."""
    steps = torch.randn(settings.num_burn_in + settings.num_draws, dtype=torch.float64).tolist()
    return torch.tensor([*accumulate(steps, lambda last, step: 0.95 * last + 0.3 * step)], dtype=torch.float64) / n_beta


def train(folder: Path, epochs: int, data_dir: str | None) -> tuple[Path, list[MeasurementCallback]]:
    """The run, and where its files are."""
    pl.seed_everything(0)
    logger = TensorBoardLogger(folder, name=None, version="run", default_hp_metric=False)
    callbacks = every_callback()
    options = {"batch_size": 64, **({} if data_dir is None else {"data_dir": data_dir})}
    trainer = pl.Trainer(
        max_epochs=epochs,
        limit_train_batches=20,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        logger=logger,
        callbacks=callbacks,
    )
    data = build_datamodule("digits" if data_dir is None else "mnist", **options)
    trainer.fit(ImageClassifier(optimizer="sgd", lr=0.02), data)
    return Path(logger.log_dir), callbacks


def sizes(folder: Path, kinds: list[str]) -> Sizes:
    """Bytes in all files of a run."""
    found: Sizes = Counter()
    for path in (p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        if path.name.startswith("events."):
            parts = Counter(_in_events(path, kinds))
            found.update({(family, "events"): bytes_ for family, bytes_ in parts.items()})
            found["the run", "events"] += size - sum(parts.values())  # what frames the records
        else:
            is_weights = path.suffix == ".pt" and path.name != "probes.pt"
            kind = "weights" if is_weights else path.suffix[1:]
            name = "trajectory" if "trajectory" in path.parts or path.parent.name == "trajectory" else path.name
            found[_family(name, kinds), kind if kind in KINDS else "other"] += size
    return found


def _in_events(path: Path, kinds: list[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            found[_family(value.tag, kinds)] += value.ByteSize()
    return found


def _family(name: str, kinds: list[str]) -> str:
    return next((kind for kind in kinds if name.startswith(kind)), "the run")


def table(found: Sizes) -> Iterator[str]:
    """Kilobytes: a row for each callback, a column for each kind of file."""
    yield f"| kB | {' | '.join(KINDS)} | without weights |"
    yield "| --- |" + " ---: |" * (len(KINDS) + 1)
    families = sorted({family for family, _ in found}, key=lambda f: -_total(found, f))
    for family in (*families, "all"):
        cells = [sum(size for (f, k), size in found.items() if k == kind and family in (f, "all")) for kind in KINDS]
        yield f"| {family} | " + " | ".join(f"{size / 1e3:,.0f}" for size in (*cells, _total(found, family))) + " |"


def _total(found: Sizes, family: str) -> int:
    return sum(size for (f, kind), size in found.items() if family in (f, "all") and kind != "weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of the MNIST files")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="keep the run there")
    parser.add_argument("--sample", action="store_true", help="sample the chains: half a minute a visit")
    parser.add_argument("--profile", type=Path, help="write a profile there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        began, profile = time.process_time(), cProfile.Profile()
        if args.profile:
            profile.enable()
        with nullcontext() if args.sample else patch.object(llc, "langevin_trace", random_walk):
            home, callbacks = train(args.folder or Path(temporary), args.epochs, args.data_dir)
        if args.profile:
            profile.disable()
            profile.dump_stats(args.profile)
        print(f"{args.epochs} epochs: {time.process_time() - began:.0f} CPU s\n")
        for callback in callbacks:
            print(f"{callback!r}: {callback.seconds:.1f} s, {len(callback.failures)} failures")
        print("\n" + "\n".join(table(sizes(home, [callback.kind for callback in callbacks]))))


if __name__ == "__main__":
    main()
