"""The code of the README runs as it stands."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lmc_lightning.models import ImageClassifier

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def classifier() -> ImageClassifier:
    return ImageClassifier(
        network="mlp", network_kwargs={"hidden_sizes": [4], "in_features": 16}, optimizer="sgd", lr=0.1, num_classes=3
    )


@pytest.fixture
def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    images = torch.randn(24, 1, 4, 4)
    return DataLoader(TensorDataset(images, torch.arange(24) % 3), batch_size=8, shuffle=True)


def test_the_snippet_for_a_trainer_runs(
    loader: DataLoader[tuple[torch.Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names_off = ("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing")
    quiet = dict.fromkeys(names_off, False)
    trainer = pl.Trainer
    monkeypatch.setattr(pl, "Trainer", lambda **given: trainer(**quiet, accelerator="cpu", **given))
    names: dict[str, object] = {"my_module": classifier(), "my_data": loader}
    exec(BLOCKS[0], names)
    callbacks = names["trainer"].callbacks  # type: ignore[attr-defined]
    found = {r.name for c in callbacks for r in getattr(c, "results", [])}
    assert {"hessian/lambda_max", "sharpness/worst_case", "barrier/train_loss/k1_005"} <= found


def test_the_snippet_without_a_trainer_runs(loader: DataLoader[tuple[torch.Tensor, ...]]) -> None:
    names: dict[str, object] = {
        "module": classifier(),
        "module_a": classifier(),
        "module_b": classifier(),
        "loader": loader,
    }
    exec(BLOCKS[1], names)
