"""The doctor on a healthy module and on hostile ones."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lmc_lightning.data import DigitsDataModule
from lmc_lightning.experiments.doctor import doctor
from lmc_lightning.models import ImageClassifier

MLP = {"network": "mlp", "network_kwargs": {"hidden_sizes": [4], "in_features": 64}}


class Step(LightningModule):
    """A linear classifier with a step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1])


class DrawsFromTheSystem(Step):
    def training_step(self, batch, batch_idx):
        noise = torch.randn(1, generator=torch.Generator().manual_seed(torch.Generator().seed()))
        return super().training_step(batch, batch_idx) * (1 + noise.abs().squeeze())


class Contrastive(Step):
    def training_step(self, batch, batch_idx):
        z = F.normalize(self.layer(batch[0]), dim=1)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))


class StraightThrough(Step):
    def training_step(self, batch, batch_idx):
        soft = self.layer(batch[0])
        return F.cross_entropy(soft + (soft.round() - soft).detach(), batch[1])


class Manual(Step):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TrainOnly(Step):
    def training_step(self, batch, batch_idx):
        if not self.training:
            raise RuntimeError("no loss in eval")
        return super().training_step(batch, batch_idx)


class OwnLoss(Step):
    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]).logsumexp(1) - self.layer(batch[0]).gather(1, batch[1][:, None])[:, 0]).mean()


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(48, 6, generator=generator)
    return DataLoader(TensorDataset(features, torch.randint(3, (48,), generator=generator)), batch_size=20)


def verdicts(module: nn.Module, **options) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in doctor(module, loader(), **options).findings}


def test_a_healthy_module_is_found_healthy():
    data = DigitsDataModule(image_size=8)
    diagnosis = doctor(ImageClassifier(**MLP), data.probe_batches("train", 48), datamodule=data)
    assert diagnosis.is_healthy
    assert {finding.verdict for finding in diagnosis.findings} == {"ok"}
    assert [finding.name for finding in diagnosis.findings] == [
        "step", "data", "determinism", "batching", "loss", "Hessian", "state"
    ]  # fmt: skip
    assert str(diagnosis).count("✓") == 7


def test_randomness_that_cannot_be_seeded_is_a_problem():
    found = verdicts(DrawsFromTheSystem())
    assert found["determinism"] == "problem"
    assert found["Hessian"] == "problem"


def test_a_loss_that_is_no_mean_over_examples_keeps_its_batches():
    diagnosis = doctor(Contrastive(), loader())
    assert diagnosis["batching"].verdict == "note"
    assert "no mean over its examples" in diagnosis["batching"].text
    assert diagnosis.is_healthy


def test_a_gradient_that_is_not_the_losss_has_no_hessian():
    diagnosis = doctor(StraightThrough(), loader())
    assert diagnosis["Hessian"].verdict == "problem"
    assert "straight-through" in diagnosis["Hessian"].text
    assert not diagnosis.is_healthy


def test_manual_optimization_ends_with_the_way_out():
    diagnosis = doctor(Manual(), loader())
    assert [finding.name for finding in diagnosis.findings] == ["step"]
    assert "loss_fn=" in diagnosis["step"].text
    with_loss = verdicts(Manual(), loss_fn=lambda module, batch: F.cross_entropy(module.layer(batch[0]), batch[1]))
    assert with_loss["step"] == with_loss["Hessian"] == "ok"


def test_a_step_that_works_in_train_mode_only_is_told_so():
    diagnosis = doctor(TrainOnly(), loader())
    assert "mode='train'" in diagnosis["step"].text
    assert "no loss in eval" in diagnosis["step"].text
    assert diagnosis.is_healthy


def test_a_loss_of_its_own_is_measured_with_errors_over_chunks():
    diagnosis = doctor(OwnLoss(), loader())
    assert diagnosis["loss"].verdict == "note"
    assert diagnosis.is_healthy


def test_plain_modules_need_a_loss():
    assert "Pass loss_fn" in doctor(nn.Linear(6, 3), loader())["step"].text
