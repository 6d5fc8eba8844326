"""The branching study: from which point on does the noise of SGD no longer decide where training ends?

python examples/branching_study.py lenet5_mnist --data-dir data
python examples/branching_study.py reduced_vgg_cifar10 --small  # fewer images, epochs and branch points

A trunk is trained from each of several initialisations. Children leave it at the branch points and train to its end
under fresh noise; each is compared with the trunk after every epoch. The settings are in branching_study.yaml.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lmc_lightning import CheckpointBranching, InterpolationBarrier
from lmc_lightning.data import build_datamodule
from lmc_lightning.models import ImageClassifier
from lmc_lightning.summary import failed, summarize

SETTINGS = Path(__file__).with_suffix(".yaml")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=list(yaml.safe_load(SETTINGS.read_text())))
    parser.add_argument("--data-dir", default="data", help="folder of the data set, as torchvision lays it out")
    parser.add_argument("--dataset", help="another data set than the setting's")
    parser.add_argument("--log-dir", default="lightning_logs")
    parser.add_argument("--small", action="store_true", help="the setting for a small machine")
    parser.add_argument("--num-examples", type=int, default=2048, help="measured in each split")
    parser.add_argument("--replicates", type=int, help="initialisations")
    return parser.parse_args()


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """The setting asked for, with what differs on a small machine and on the command line."""
    found: dict[str, Any] = yaml.safe_load(SETTINGS.read_text())[args.setting]
    small = found.pop("small")
    for key, value in small.items() if args.small else ():
        found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    found["data"]["name"] = args.dataset or found["data"]["name"]
    found["replicates"] = args.replicates or found["replicates"]
    return found


def run(chosen: dict[str, Any], replicate: int, args: argparse.Namespace) -> int:
    """One trunk with its children; the number of failed visits."""
    pl.seed_everything(replicate)
    data = build_datamodule(**{"val_fraction": 0, "data_dir": args.data_dir, "noise_seed": replicate, **chosen["data"]})
    callbacks = [
        CheckpointBranching(seed=replicate, **chosen["branching"]),
        InterpolationBarrier(num_examples=args.num_examples, **chosen.get("barrier", {})),
    ]
    trainer = pl.Trainer(
        max_epochs=chosen["epochs"],
        callbacks=callbacks,
        logger=TensorBoardLogger(args.log_dir, name=args.setting, version=f"replicate_{replicate}"),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(ImageClassifier(init_seed=replicate, **chosen["module"]), data)
    seconds, measuring = time.perf_counter() - started, sum(getattr(c, "seconds", 0) for c in callbacks)
    print(f"\nReplicate {replicate}\n{summarize(callbacks)}\n")
    print(f"Total {seconds:.0f} s, of which measuring {measuring:.0f} s. Data in {trainer.log_dir}")
    return len(failed(callbacks))


def main() -> int:
    args = arguments()
    chosen = setting(args)
    return 1 if sum(run(chosen, replicate, args) for replicate in range(chosen["replicates"])) else 0


if __name__ == "__main__":
    sys.exit(main())
