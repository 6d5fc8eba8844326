"""Curvature, sharpness, branching and barriers of a LeNet-5 while it trains, in TensorBoard.

python examples/quickstart.py  # the digits that ship inside scikit-learn, no network
python examples/quickstart.py --dataset mnist --data-dir data  # also fashion_mnist, cifar10
python examples/quickstart.py --small  # one quick pass through everything
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from lmc_lightning import CheckpointBranching, HessianSpectrum, InterpolationBarrier, Sharpness
from lmc_lightning.data import build_datamodule
from lmc_lightning.experiments.view import deep_link, tensorboard_command
from lmc_lightning.models import ImageClassifier
from lmc_lightning.summary import failed, summarize

IMAGES = {"cifar10": {"in_channels": 3, "image_size": 32}}


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", choices=["digits", "mnist", "fashion_mnist", "cifar10"])
    parser.add_argument("--data-dir", default="data", help="folder of the data set, as torchvision lays it out")
    parser.add_argument("--download", action="store_true", help="fetch a missing data set")
    parser.add_argument("--log-dir", default="lightning_logs")
    parser.add_argument("--small", action="store_true", help="two epochs, few probe examples")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Train, measure, and say what was found; 1 if a visit failed."""
    args = arguments(given)
    pl.seed_everything(0)
    where = {} if args.dataset == "digits" else {"data_dir": args.data_dir, "download": args.download}
    data = build_datamodule(args.dataset, batch_size=64, **where)
    model = ImageClassifier(
        network="lenet5",
        network_kwargs=IMAGES.get(args.dataset),
        optimizer="sgd",
        lr=0.05,
        optimizer_kwargs={"momentum": 0.9},
    )

    epochs, examples = (2, 64) if args.small else (8, 512)
    visits = [0, 2] if args.small else [0, 1, 2, 4, 8]
    branch_points = [0, 1] if args.small else [0, 1, 2, 4]
    later = [1, 2] if args.small else sorted({k1 + 1 for k1 in branch_points} | {4, 8})
    callbacks = [
        HessianSpectrum(num_eigenvalues=3, num_probes=2, num_examples=examples, epochs=visits),
        Sharpness(num_examples=examples, epochs=visits),
        CheckpointBranching(epochs=branch_points),
        InterpolationBarrier(num_points=5 if args.small else 25, num_examples=examples, epochs=later),
    ]

    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=TensorBoardLogger(args.log_dir, name=args.dataset, default_hp_metric=False),
        log_every_n_steps=5,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - started

    measuring = sum(getattr(c, "seconds", 0) for c in callbacks)
    command = shlex.join(tensorboard_command(str(trainer.log_dir)))
    sys.stdout.write(
        f"\n{summarize(callbacks)}\n\n"
        f"Total {seconds:.0f} s, of which measuring {measuring:.0f} s.\n"
        f"See it:\n  {command}\n  {deep_link()}\n"
    )
    return 1 if failed(callbacks) else 0


if __name__ == "__main__":
    sys.exit(main())
