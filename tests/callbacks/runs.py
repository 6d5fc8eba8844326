"""A small smooth classifier, short quiet runs of it, and what a callback's docstring says that it logs."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lmc_lightning.loggers import Scalars, log_histogram, log_picture, log_scalars
from tests.problems import generator, normal

NUM_EXAMPLES, NUM_CLASSES, BATCH_SIZE = 24, 4, 8
STEPS_PER_EPOCH = NUM_EXAMPLES // BATCH_SIZE


def conv_net(batch_norm: bool = False) -> nn.Sequential:
    """37 parameters, or 41 with BatchNorm; smooth, so that a dense Hessian is the truth."""
    norm = [nn.BatchNorm2d(2)] if batch_norm else []
    body = [nn.Conv2d(1, 2, 2, stride=2), *norm, nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(2, NUM_CLASSES), nn.Tanh(), nn.Linear(NUM_CLASSES, 3, bias=False))


class Classifier(pl.LightningModule):
    """Cross-entropy of a small network, by SGD with momentum."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.net = conv_net(batch_norm)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(0.8 * normal(*parameter.shape, seed=200 + index))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).double().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def examples(num_examples: int = NUM_EXAMPLES, seed: int = 30, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Images whose labels are balanced and can be learnt."""
    labels = torch.arange(num_examples) % 3
    images = normal(num_examples, 1, 4, 4, seed=seed) + 0.7 * (labels - 1.0)[:, None, None, None]
    return TensorDataset(images.to(dtype), labels)


def loader(num_examples: int = NUM_EXAMPLES, seed: int = 30, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    return DataLoader(examples(num_examples, seed, dtype), batch_size=BATCH_SIZE)


def batches(num_examples: int = NUM_EXAMPLES, *, double: bool = False) -> list[Any]:
    """The same without the worker process in which a DataLoader is read."""
    return list(loader(num_examples, dtype=torch.float64 if double else torch.float32))


def train_loader() -> DataLoader[Any]:
    return DataLoader(examples(), batch_size=BATCH_SIZE, shuffle=True, generator=generator(31))


class Rows(Logger):
    """Keeps every row that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, {name: float(value) for name, value in metrics.items()}))

    def by_step(self, family: str) -> dict[int, set[str]]:
        """The keys of one family that were logged at each step; a key logged twice at a step is an error."""
        found: dict[int, set[str]] = {}
        for step, row in self.rows:
            keys = {key for key in row if key.startswith(f"{family}/")}
            assert keys.isdisjoint(found.get(step, set()))
            if keys:
                found.setdefault(step, set()).update(keys)
        return found


class TensorBoardLogger(Rows):
    """Notes which pictures it is shown; numbers come with their errors, as to all but the real one."""

    def __init__(self) -> None:
        super().__init__()
        self.histograms: list[tuple[int, str]] = []
        self.figures: list[tuple[int, str]] = []
        self.layouts: list[dict[str, Any]] = []
        self.texts: list[tuple[int, str]] = []

    @property
    def experiment(self) -> "TensorBoardLogger":
        return self

    def add_custom_scalars(self, layout: dict[str, Any]) -> None:
        self.layouts.append(layout)

    def add_text(self, key: str, text: str, global_step: int) -> None:
        assert text
        self.texts.append((global_step, key))


@log_scalars.register
def _(logger: TensorBoardLogger, scalars: Scalars, step: int) -> None:
    logger.log_metrics({**scalars.values, **scalars.errors}, step)


@log_histogram.register
def _(logger: TensorBoardLogger, key: str, values: Any, step: int) -> None:
    assert len(values)
    logger.histograms.append((step, key))


@log_picture.register
def _(logger: TensorBoardLogger, key: str, picture: Any, step: int) -> None:
    assert picture.shape[2] == 3
    assert picture.std() > 0
    logger.figures.append((step, key))


def fit(module: pl.LightningModule, *callbacks: Any, val: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    """Train for two epochs of three steps; returns the trainer."""
    arguments = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    trainer = pl.Trainer(**arguments | options, callbacks=list(callbacks))
    trainer.fit(module, train_loader(), val, ckpt_path=ckpt_path)
    return trainer


def documented(callback: type) -> dict[str, str]:
    """The table of a callback's docstring: logged key -> what it says of it."""
    table = re.search(r"^ *=+ +=+$\n(.*?)^ *=+ +=+$", callback.__doc__ or "", flags=re.DOTALL | re.MULTILINE)
    assert table, f"{callback.__name__} has no table of keys in its docstring"
    rows: dict[str, str] = {}
    for line in table[1].splitlines():
        key, text = re.fullmatch(r" *(?:``(\S+)``)? +(\S.*)", line).groups()  # type: ignore[union-attr]
        key = key or list(rows)[-1]
        rows[key] = f"{rows.get(key, '')} {text}".strip()
    return rows


def is_picture(description: str) -> bool:
    return description.startswith(("histogram", "figure"))


def is_unlogged(description: str) -> bool:
    return description.startswith("table only")


def with_errors(rows: Mapping[str, str]) -> Iterator[str]:
    """The scalar keys that are logged, with those of the errors that their descriptions name."""
    for key, text in rows.items():
        if not is_picture(text) and not is_unlogged(text):
            yield key
            yield from (f"{key}{suffix}" for suffix in re.findall(r"``(_stderr\w*)``", text))
