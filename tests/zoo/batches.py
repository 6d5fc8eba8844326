"""What loaders yield: objects, dataclasses, named tuples, ragged lists, endless streams; and what becomes of it."""

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


class GraphNetwork(ZooModule):
    """Batches are graph objects that cannot be cut or joined."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(inputs=NUM_FEATURES // 2)

    def training_step(self, batch: Graphs, batch_idx: int) -> Tensor:
        hidden = batch.x.index_add(0, batch.edges[1], batch.x[batch.edges[0]])
        logits = self(hidden)
        pooled = logits.new_zeros(batch.num_graphs, logits.shape[1]).index_add(0, batch.graph, logits)
        loss = F.cross_entropy(pooled, batch.y)
        self.log("train_loss", loss, batch_size=batch.num_graphs)
        return loss

    def validation_step(self, batch: Graphs, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=batch.num_graphs)

    def train_dataloader(self) -> Any:
        return loader_of(Graphs)

    def val_dataloader(self) -> Any:
        return loader_of(Graphs, shuffle=False)


@dataclass
class Pair:
    x: Tensor
    y: Tensor


class DataclassBatch(ZooModule):
    """Batches are dataclasses."""

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        return self.loss(batch.x, batch.y)

    def train_dataloader(self) -> Any:
        return loader_of(Pair)


class Masked(NamedTuple):
    x: Tensor
    y: Tensor
    mask: Tensor | None


class NamedTupleWithNone(ZooModule):
    """Batches are named tuples, one entry of which is None."""

    def training_step(self, batch: Masked, batch_idx: int) -> Tensor:
        assert batch.mask is None
        return self.loss(batch.x, batch.y)

    def train_dataloader(self) -> Any:
        return loader_of(lambda x, y: Masked(x, y, None))


class TableBatch(ZooModule):
    """Batches hold a pandas index, a name and numbers beside the tensors."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        assert list(batch["index"]) == list(range(BATCH_SIZE))
        return self.loss(batch["x"], batch["y"]) * batch["scale"]

    def train_dataloader(self) -> Any:
        return loader_of(lambda x, y: {"index": pd.RangeIndex(len(x)), "x": x, "y": y, "fold": "a", "scale": 2.0})


class RaggedBatch(ZooModule):
    """Batches are lists of sequences of different lengths."""

    def training_step(self, batch: list[tuple[Tensor, Tensor]], batch_idx: int) -> Tensor:
        logits = torch.stack([self(sequence).mean(0) for sequence, _ in batch])
        return F.cross_entropy(logits, torch.stack([y for _, y in batch]))

    def train_dataloader(self) -> Any:
        return loader_of(lambda x, y: [(row.expand(1 + int(t), -1).clone(), t) for row, t in zip(x, y, strict=True)])


class ConsumesItsBatch(ZooModule):
    """The step pops entries from its batch and scales tensors in place."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        y = batch.pop("y")
        return self.loss(batch["x"].mul_(0.5), y)

    def train_dataloader(self) -> Any:
        return loader_of(lambda x, y: {"x": x, "y": y})


class OverwritesTargets(ZooModule):
    """The step replaces the targets by its predictions once the loss is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(outputs=NUM_FEATURES)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        prediction = self(batch[0])
        loss = (prediction - batch[1]).square().mean()
        batch[1] = prediction.detach()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def train_dataloader(self) -> Any:
        return loader_of(lambda x, y: [x, x.flip(1)])


class AddsToItsBatch(ZooModule):
    """The forward adds keys to the batch that carry a graph."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        batch["hidden"] = self.net[:2](batch["x"])  # type: ignore[index]
        batch["logits"] = self.net[2](batch["hidden"])  # type: ignore[index]
        return F.cross_entropy(batch["logits"], batch["y"])

    def train_dataloader(self) -> Any:
        return loader_of(lambda x, y: {"x": x, "y": y})


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
    """Two training loaders of different length at once, and two validation loaders."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.loss(*batch["labelled"]) + 0.1 * self(batch["unlabelled"][0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(*batch), batch_size=BATCH_SIZE)

    def train_dataloader(self) -> Any:
        unlabelled = DataLoader(TensorDataset(examples()[0]), batch_size=5, shuffle=True)
        return {"labelled": super().train_dataloader(), "unlabelled": unlabelled}

    def val_dataloader(self) -> Any:
        return [super().val_dataloader(), super().val_dataloader()]


class PackedSequences(ZooModule):
    """The batch is a packed sequence, whose tensors have no common example axis."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.GRU(NUM_FEATURES // 3, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch)[1].square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def train_dataloader(self) -> Any:
        def pack(x: Tensor, y: Tensor) -> Any:
            rows = x.reshape(len(x), 3, -1).transpose(0, 1)
            return nn.utils.rnn.pack_padded_sequence(rows, y + 1, enforce_sorted=False)

        return loader_of(pack)
