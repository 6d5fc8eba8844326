"""Curvature, sharpness, branching and barriers of a LeNet-5 while it trains, in TensorBoard.

python examples/quickstart.py  # the digits that ship inside scikit-learn, no network
python examples/quickstart.py --dataset mnist --data-dir data  # also fashion_mnist, cifar10
python examples/quickstart.py --small  # one quick pass through everything
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from urllib.parse import quote

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from lmc_lightning import CheckpointBranching, HessianSpectrum, InterpolationBarrier, Sharpness
from lmc_lightning.data import build_datamodule
from lmc_lightning.models import ImageClassifier
from lmc_lightning.summary import failed, summarize

PINNED = (
    "hessian/lambda_max",
    "hessian/trace",
    "hessian/stability",
    "sharpness/worst_case",
    "barrier/val_error/k1_000",
    "barrier/val_error/k1_002",
)
IMAGES = {"cifar10": {"in_channels": 3, "image_size": 32}}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", choices=["digits", "mnist", "fashion_mnist", "cifar10"])
    parser.add_argument("--data-dir", default="data", help="folder of the data set, as torchvision lays it out")
    parser.add_argument("--download", action="store_true", help="fetch a missing data set")
    parser.add_argument("--log-dir", default="lightning_logs")
    parser.add_argument("--small", action="store_true", help="two epochs, few probe examples")
    return parser.parse_args()


def main() -> int:
    args = arguments()
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

    print(f"\n{summarize(callbacks)}\n")
    print(f"Total {seconds:.0f} s, of which measuring {sum(getattr(c, 'seconds', 0) for c in callbacks):.0f} s.")
    print(
        f"See it:\n  {shlex.join([str(Path(sys.executable).parent / 'tensorboard'), '--logdir', str(trainer.log_dir)])}"
    )
    pins = json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED])
    print(f"  http://localhost:6006/?smoothing=0&pinnedCards={quote(pins)}#timeseries")
    return 1 if failed(callbacks) else 0


if __name__ == "__main__":
    sys.exit(main())
