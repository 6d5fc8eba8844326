"""How two trained cells are compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmc_lightning.callbacks.offline import interpolation_barrier
from lmc_lightning.experiments.build import build
from lmc_lightning.experiments.study import Config
from lmc_lightning.landscape.barrier import DEFINITIONS


@dataclass(frozen=True)
class Trained:
    """A trained cell: its module with the last weights, and its data."""

    module: nn.Module
    datamodule: Any

    def batches(self, split: str, num_examples: int | None, seed: int = 0) -> Any:
        """Probe examples of a split, or the whole loader of data that do not give any.

        Raises:
            ValueError: no data for that split.
        """
        if hasattr(self.datamodule, "probe_batches"):
            return self.datamodule.probe_batches(split, num_examples, seed)
        loader = getattr(self.datamodule, f"{split}_dataloader", None)
        if loader is None:
            raise ValueError(f"The data of this study have no {split}_dataloader and no probe_batches.")
        self.datamodule.prepare_data()
        self.datamodule.setup("fit" if split != "test" else "test")
        return loader()


def trained(config: Config, folder: Path, weights: str) -> Trained:
    """The module of a configuration with the weights in a file of its folder."""
    objects = build(config, folder, resumable=False, enable_checkpointing=False, logger=False)
    objects.model.load_state_dict(torch.load(folder / weights, map_location="cpu", weights_only=True))
    return Trained(objects.model, objects.datamodule)


def barrier(
    first: Trained,
    second: Trained,
    *,
    splits: tuple[str, ...] = ("train", "test"),
    metrics: tuple[str, ...] = ("loss", "error"),
    num_examples: int | None = 2048,
    **options: Any,
) -> dict[str, float]:
    """Every convention of the barrier on the line between two cells, on the first one's data."""
    train = first.batches("train", num_examples)
    found: dict[str, float] = {}
    for split in splits:
        for metric in metrics:
            data = first.batches(split, num_examples)
            line = interpolation_barrier(
                first.module,
                second.module,
                data,
                train_dataloader=train,
                num_examples=num_examples,
                metric=metric,
                **options,
            )
            key = f"barrier/{split}_{metric}"
            found |= {key if name == "barrier" else f"{key}/{name}": getattr(line, name) for name in DEFINITIONS}
            found[f"{key}_stderr"] = line.stderr_data["barrier"]
    return found


MEASURES: Mapping[str, Callable[..., dict[str, float]]] = {"barrier": barrier}
"""By the names that studies use."""
