"""What loaders yield: objects, dataclasses, named tuples, ragged lists, endless streams; and what becomes of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.zoo.module import BATCH_SIZE, NUM_FEATURES, Expected, ZooModule, examples, mlp


def loader_of(collate: Any, *, shuffle: bool = True) -> DataLoader[Any]:
    """The examples, each batch made by ``collate`` from stacked x and y."""

    def join(rows: list[Any]) -> Any:
        return collate(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))

    return DataLoader(TensorDataset(*examples()), batch_size=BATCH_SIZE, shuffle=shuffle, collate_fn=join)


class Collates(ZooModule, ABC):
    """Batches of all splits are what ``collate`` makes of x and y."""

    @abstractmethod
    def collate(self, x: Tensor, y: Tensor) -> Any: ...

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor: ...

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.batch_loss(batch)
        self.log("train_loss", loss, batch_size=BATCH_SIZE)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.batch_loss(batch), batch_size=BATCH_SIZE)

    def train_dataloader(self) -> Any:
        return loader_of(self.collate)

    def val_dataloader(self) -> Any:
        return loader_of(self.collate, shuffle=False)


class Graphs:
    """Several graphs as one: node features, edges, which node is whose. Neither iterable nor sized."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.reshape(2 * len(x), -1), y
        self.edges = torch.stack([torch.arange(len(self.x)), torch.arange(len(self.x)).roll(1)])
        self.graph = torch.arange(len(y)).repeat_interleave(2)
        self.num_graphs = len(y)

    def to(self, device: Any, **options: Any) -> "Graphs":
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


class GraphNetwork(Collates):
    """Batches are graph objects that cannot be cut or joined."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(inputs=NUM_FEATURES // 2)

    def collate(self, x: Tensor, y: Tensor) -> Graphs:
        return Graphs(x, y)

    def batch_loss(self, batch: Graphs) -> Tensor:
        hidden = batch.x.index_add(0, batch.edges[1], batch.x[batch.edges[0]])
        logits = self(hidden)
        pooled = logits.new_zeros(batch.num_graphs, logits.shape[1]).index_add(0, batch.graph, logits)
        return F.cross_entropy(pooled, batch.y)


@dataclass
class Pair:
    x: Tensor
    y: Tensor


class DataclassBatch(Collates):
    """Batches are dataclasses."""

    def collate(self, x: Tensor, y: Tensor) -> Pair:
        return Pair(x, y)

    def batch_loss(self, batch: Pair) -> Tensor:
        return self.loss(batch.x, batch.y)


class Masked(NamedTuple):
    x: Tensor
    y: Tensor
    mask: Tensor | None


class NamedTupleWithNone(Collates):
    """Batches are named tuples, one entry of which is None."""

    def collate(self, x: Tensor, y: Tensor) -> Masked:
        return Masked(x, y, None)

    def batch_loss(self, batch: Masked) -> Tensor:
        assert batch.mask is None
        return self.loss(batch.x, batch.y)


class TableBatch(Collates):
    """Batches hold a pandas index, a name and numbers beside the tensors."""

    def collate(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"index": pd.RangeIndex(len(x)), "x": x, "y": y, "fold": "a", "scale": 2.0}

    def batch_loss(self, batch: dict[str, Any]) -> Tensor:
        assert list(batch["index"]) == list(range(BATCH_SIZE))
        return self.loss(batch["x"], batch["y"]) * batch["scale"]


class RaggedBatch(Collates):
    """Batches are lists of sequences of different lengths."""

    def collate(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(row.expand(1 + int(target), -1).clone(), target) for row, target in zip(x, y, strict=True)]

    def batch_loss(self, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        logits = torch.stack([self(sequence).mean(0) for sequence, _ in batch])
        return F.cross_entropy(logits, torch.stack([y for _, y in batch]))


class ConsumesItsBatch(Collates):
    """The step pops entries from its batch and scales tensors in place."""

    def collate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"x": x, "y": y}

    def batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        y = batch.pop("y")
        return self.loss(batch["x"].mul_(0.5), y)


class OverwritesTargets(Collates):
    """The step replaces the targets by its predictions once the loss is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(outputs=NUM_FEATURES)

    def collate(self, x: Tensor, y: Tensor) -> list[Tensor]:
        return [x, x.flip(1)]

    def batch_loss(self, batch: list[Tensor]) -> Tensor:
        prediction = self(batch[0])
        loss = (prediction - batch[1]).square().mean()
        batch[1] = prediction.detach()
        return loss


class AddsToItsBatch(Collates):
    """The forward adds keys to the batch that carry a graph."""

    def collate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"x": x, "y": y}

    def batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        batch["hidden"] = self.net[:2](batch["x"])  # type: ignore[index]
        batch["logits"] = self.net[2](batch["hidden"])  # type: ignore[index]
        return F.cross_entropy(batch["logits"], batch["y"])


class PackedSequences(Collates):
    """Batches are packed sequences, whose tensors have no common example axis."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.GRU(NUM_FEATURES // 3, 4)

    def collate(self, x: Tensor, y: Tensor) -> Any:
        steps = x.reshape(len(x), 3, -1).transpose(0, 1)
        return nn.utils.rnn.pack_padded_sequence(steps, y + 1, enforce_sorted=False)

    def batch_loss(self, batch: Any) -> Tensor:
        return self.net(batch)[1].square().mean()


class EditsBatches(Callback):
    """An augmentation that lives in a callback."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(1 + 0.1 * torch.rand(()))


class EditedByAnotherCallback(ZooModule):
    """Another callback edits the batch in place before the step."""

    expected = Expected(others=lambda: [EditsBatches()])


class AugmentsOnDevice(ZooModule):
    """Augmentation in the module's own hook after the batch has been moved."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            return [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]]
        return batch


class Stream(IterableDataset[Any]):
    """One endless source: what is read once is gone."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        x, y = examples()
        while True:
            self.position += 1
            yield x[self.position % len(x)] + 0.1 * torch.randn(NUM_FEATURES), y[self.position % len(x)]


class EndlessStream(ZooModule):
    """The training data are one endless stream without epochs."""

    expected = Expected(trainer={"max_steps": 6, "max_epochs": -1, "val_check_interval": 2})

    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=BATCH_SIZE)


class PlainIterable:
    """Batches without length, sampler, data set or generator."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(3):
            rows = torch.randperm(3 * BATCH_SIZE)[:BATCH_SIZE]
            yield tuple(t[rows] for t in examples())


class NoDataLoader(ZooModule):
    """The loader is a plain iterable."""

    def train_dataloader(self) -> Any:
        return PlainIterable()


class SeveralLoaders(ZooModule):
    """Two training loaders of different length at once, and validation batches of another form."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.loss(*batch["labelled"]) + 0.1 * self(batch["unlabelled"][0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(*batch), batch_size=BATCH_SIZE)

    def train_dataloader(self) -> Any:
        unlabelled = DataLoader(TensorDataset(examples()[0]), batch_size=5, shuffle=True)
        return {"labelled": super().train_dataloader(), "unlabelled": unlabelled}

    def val_dataloader(self) -> Any:
        return [super().val_dataloader(), super().val_dataloader()]
