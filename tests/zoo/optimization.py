"""How modules are trained: by hand, by several optimizers, by closures that are called many times."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from tests.zoo.module import NUM_FEATURES, Expected, ZooModule, mlp

MANUAL = "optimizes manually"


def generator_loss(module: Any, batch: Any) -> Tensor:
    """The loss of a generator, as a user passes it."""
    score = module.discriminator(module.generator(batch[0][:, :2]))
    return F.binary_cross_entropy_with_logits(score, torch.ones_like(score))


class Gan(ZooModule):
    """A generator and a discriminator with an optimizer each, stepped by the step."""

    expected = Expected(refusal=MANUAL, options={"loss_fn": generator_loss, "parameters": ["generator.*"]})

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Identity()
        self.generator, self.discriminator = mlp(inputs=2, outputs=NUM_FEATURES), mlp(outputs=1)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        first, second = self.optimizers()  # type: ignore[misc]
        loss = generator_loss(self, batch)
        self._step(first, loss)
        real, fake = (self.discriminator(t) for t in (batch[0], self.generator(batch[0][:, :2]).detach()))
        adversarial = (F.softplus(-real) + F.softplus(fake)).mean()
        self._step(second, adversarial)
        self.log_dict({"generator_loss": loss, "discriminator_loss": adversarial})
        return {"generator_loss": loss.detach()}

    def _step(self, optimizer: LightningOptimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", generator_loss(self, batch))

    def configure_optimizers(self) -> Any:
        parts = self.generator, self.discriminator
        return [torch.optim.Adam(part.parameters(), lr=0.01, betas=(0.5, 0.9)) for part in parts], []


class TogglesOptimizers(Gan):
    """Two optimizers that switch off each other's parameters while they step."""

    def _step(self, optimizer: LightningOptimizer, loss: Tensor) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss, retain_graph=True)
        optimizer.step()
        self.untoggle_optimizer(optimizer)


class StepsWhenItLikes(ZooModule):
    """Accumulates by hand, clips by hand, steps its scheduler by hand, and returns a dict without a loss."""

    expected = Expected(refusal=MANUAL, options={"loss_fn": lambda module, batch: module.loss(*batch)})

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        loss = self.loss(*batch)
        optimizer = self.optimizers()
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")  # type: ignore[arg-type]
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]
        return {"error": loss.detach()}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Lbfgs(ZooModule):
    """An optimizer that calls the step many times for one update."""

    expected = Expected(unlike_run="the last of several closures")

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class AscendsFirst(ZooModule):
    """Sharpness-aware training: ``optimizer_step`` perturbs the weights between two closures."""

    expected = Expected(unlike_run="the last of several closures")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        before = [p.detach().clone() for p in self.parameters()]
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.05 * p.grad / (p.grad.norm() + 1e-12))

        def closure() -> Any:
            loss = optimizer_closure()
            with torch.no_grad():
                for p, value in zip(self.parameters(), before, strict=True):
                    p.copy_(value)
            return loss

        optimizer.step(closure=closure)


class KeepsAnAverage(ZooModule):
    """A running average of the weights, kept by the module's own hook and used for validation."""

    def __init__(self) -> None:
        super().__init__()
        self.average = torch.optim.swa_utils.AveragedModel(self.net)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.average.update_parameters(self.net)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.average(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)


class ChangesItsBackward(ZooModule):
    """Own backward, own clipping and gradient noise in the module's hooks."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward(*args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            parameter.grad.add_(0.01 * torch.randn_like(parameter))  # type: ignore[union-attr]

    def configure_gradient_clipping(self, optimizer: Any, *limits: Any, **more: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="value")


class AcceleratedByLearningRate(ZooModule):
    """The loss depends on the learning rate that the scheduler sets at every step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        return self.loss(*batch) * (1 + rate)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
