"""The data modules inside of Lightning: the epoch reaches the sampler, also after a resume."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F

from lmc_lightning.data import CIFAR10DataModule


class Linear(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, 10)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SeenBatches(Callback):
    """Keeps the training images of every epoch, and a checkpoint of every epoch's end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.epochs: dict[int, list[torch.Tensor]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.epochs.setdefault(trainer.current_epoch, []).append(batch[0].clone())

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"epoch_{trainer.current_epoch}.ckpt")


def fit(cifar_dir, folder, ckpt_path=None, noise_seed=3, **kwargs) -> dict[int, torch.Tensor]:
    torch.manual_seed(0)
    datamodule = CIFAR10DataModule(cifar_dir, batch_size=16, augment=True, noise_seed=noise_seed)
    seen = SeenBatches(folder)
    options = {"max_epochs": 4, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = Trainer(callbacks=[seen], enable_progress_bar=False, enable_model_summary=False, **{**options, **kwargs})
    trainer.fit(Linear(), datamodule=datamodule, ckpt_path=ckpt_path)
    return {epoch: torch.cat(images) for epoch, images in seen.epochs.items()}


@pytest.fixture(scope="module")
def trunk(cifar_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trunk")
    return folder, fit(cifar_dir, folder)


def expected_pass(cifar_dir, epoch: int, noise_seed: int = 3) -> torch.Tensor:
    datamodule = CIFAR10DataModule(cifar_dir, batch_size=16, augment=True, noise_seed=noise_seed)
    loader = datamodule.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in loader])


def test_epochs_are_those_of_the_loader_alone(cifar_dir, trunk):
    assert sorted(trunk[1]) == [0, 1, 2, 3]
    for epoch, images in trunk[1].items():
        assert torch.equal(images, expected_pass(cifar_dir, epoch))


def test_a_resumed_run_sees_the_same_batches_bit_for_bit(cifar_dir, trunk, tmp_path):
    folder, epochs = trunk
    resumed = fit(cifar_dir, tmp_path, ckpt_path=folder / "epoch_1.ckpt")
    assert sorted(resumed) == [2, 3]
    assert all(torch.equal(resumed[epoch], epochs[epoch]) for epoch in resumed)


def test_a_resumed_run_with_another_seed_sees_that_seeds_batches(cifar_dir, trunk, tmp_path):
    resumed = fit(cifar_dir, tmp_path, ckpt_path=trunk[0] / "epoch_1.ckpt", noise_seed=8)
    assert torch.equal(resumed[2], expected_pass(cifar_dir, 2, noise_seed=8))


def test_reloading_the_loader_every_epoch_changes_nothing(cifar_dir, trunk, tmp_path):
    epochs = fit(cifar_dir, tmp_path, reload_dataloaders_every_n_epochs=1)
    assert all(torch.equal(images, trunk[1][epoch]) for epoch, images in epochs.items())


def test_overfitting_on_a_few_batches_repeats_them(cifar_dir, tmp_path):
    with pytest.warns(UserWarning, match="overfit"):
        epochs = fit(cifar_dir, tmp_path, overfit_batches=1, max_epochs=2)
    assert len(epochs[0]) == 16
    assert torch.equal(epochs[0], epochs[1])
