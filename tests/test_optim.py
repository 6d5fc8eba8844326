"""SAM against a hand-written loop, alone and under Lightning's automatic optimization."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lmc_lightning.models import ImageClassifier
from lmc_lightning.optim import SAM
from tests.models.test_classifier import SMALL, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def quadratic(rho: float = 0.1, adaptive: bool = False, **kwargs) -> tuple[nn.Parameter, SAM, torch.Tensor]:
    theta = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    curvatures = torch.tensor([3.0, 0.5], dtype=torch.float64)
    return theta, SAM([theta], lr=0.1, rho=rho, adaptive=adaptive, **kwargs), curvatures


def closure_of(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_descends_along_the_gradient_at_the_ascended_point(adaptive):
    theta, sam, h = quadratic(adaptive=adaptive)
    start = theta.detach().clone()
    loss = sam.step(closure_of(sam, lambda: 0.5 * (h * theta**2).sum()))
    gradient, scale = h * start, start.abs() + 0.01 if adaptive else torch.ones_like(start)
    ascent = 0.1 * scale**2 * gradient / (scale * gradient).norm()
    torch.testing.assert_close(theta.detach(), start - 0.1 * h * (start + ascent), rtol=1e-14, atol=0)
    assert loss.item() == pytest.approx(0.5 * (h * start**2).sum().item(), rel=1e-15)


def test_asam_leaves_biases_unscaled():
    bias = nn.Parameter(torch.tensor([5.0, -7.0], dtype=torch.float64))
    sam = SAM([bias], lr=1.0, rho=0.5, adaptive=True)
    start = bias.detach().clone()
    sam.step(closure_of(sam, lambda: 0.5 * (bias**2).sum()))
    torch.testing.assert_close(bias.detach(), -0.5 * start / start.norm(), rtol=1e-13, atol=0)


def test_radius_zero_is_the_base_optimizer():
    theta, sam, h = quadratic(rho=0.0, base=torch.optim.Adam)
    twin = nn.Parameter(theta.detach().clone())
    adam = torch.optim.Adam([twin], lr=0.1)
    for _ in range(5):
        sam.step(closure_of(sam, lambda: 0.5 * (h * theta**2).sum()))
        adam.step(closure_of(adam, lambda: 0.5 * (h * twin**2).sum()))
    assert torch.equal(theta, twin)


def by_hand(module: nn.Module, batches, rho: float, adaptive: bool, momentum: float, lr: float) -> None:
    """SAM written out: two gradients, one step of SGD with momentum, statistics of the first pass alone."""
    velocity = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for images, targets in batches:
        first = torch.autograd.grad(F.cross_entropy(module(images), targets), list(module.parameters()))
        buffers = copy.deepcopy(dict(module.named_buffers()))
        scales = [
            p.detach().abs() + 0.01 if adaptive and p.ndim > 1 else torch.ones_like(p) for p in module.parameters()
        ]
        norm = torch.cat([(s * g).flatten() for s, g in zip(scales, first, strict=True)]).norm()
        start = [p.detach().clone() for p in module.parameters()]
        with torch.no_grad():
            for p, s, g in zip(module.parameters(), scales, first, strict=True):
                p += rho * s**2 * g / norm
        second = torch.autograd.grad(F.cross_entropy(module(images), targets), list(module.parameters()))
        with torch.no_grad():
            for (name, p), old, g in zip(module.named_parameters(), start, second, strict=True):
                velocity[name].mul_(momentum).add_(g)
                p.copy_(old - lr * velocity[name])
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])


@pytest.mark.parametrize("adaptive", [False, True])
def test_lightning_trains_as_the_loop_by_hand(tmp_path, adaptive):
    small = {**SMALL, "network_kwargs": {"hidden_sizes": [4], "in_features": 6, "batch_norm": True}}
    module = ImageClassifier(
        **small, optimizer="sgd", lr=0.05, optimizer_kwargs={"momentum": 0.9}, sam_rho=0.5, sam_adaptive=adaptive
    ).double()
    twin = copy.deepcopy(module.network)
    double = [(images.double(), targets) for images, targets in loader()]
    data = TensorDataset(*(torch.cat(part) for part in zip(*double, strict=True)))
    run = trainer(tmp_path, max_epochs=3, precision="64-true")
    run.fit(module, DataLoader(data, batch_size=8))
    twin.train()
    by_hand(twin, double * 3, rho=0.5, adaptive=adaptive, momentum=0.9, lr=0.05)
    assert run.global_step == 9
    for (name, p), q in zip(module.network.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)


class LossHistory(pl.Callback):
    def __init__(self):
        self.logged, self.expected = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            self.expected.append(F.cross_entropy(pl_module(batch[0]), batch[1]).item())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append(trainer.callback_metrics["train_loss"].item())


def test_the_logged_loss_is_that_of_the_unperturbed_parameters(tmp_path):
    history = LossHistory()
    module = ImageClassifier(**SMALL, optimizer="sgd", lr=0.1, sam_rho=1.0)
    trainer(tmp_path, max_epochs=1, callbacks=[history]).fit(module, loader())
    assert history.logged == pytest.approx(history.expected, rel=1e-6)


def test_schedules_reach_the_base_optimizer(tmp_path):
    module = ImageClassifier(**SMALL, optimizer="sgd", lr=0.1, sam_rho=0.1, scheduler="step")
    run = trainer(tmp_path, max_epochs=4)
    run.fit(module, loader())
    assert run.optimizers[0].base.param_groups[0]["lr"] == pytest.approx(0.001)


def test_accumulation_is_refused(tmp_path):
    module = ImageClassifier(**SMALL, optimizer="sgd", sam_rho=0.1)
    with pytest.raises(RuntimeError, match="accumulate_grad_batches=1"):
        trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(module, loader())


def test_a_step_without_closure_says_what_to_do():
    _, sam, _ = quadratic()
    with pytest.raises(RuntimeError, match="step\\(closure\\)"):
        sam.step()


def test_a_negative_radius_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        quadratic(rho=-1.0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_and_checkpoints_carry_the_base_state_on(copied):
    theta, sam, h = quadratic(momentum=0.9)
    sam.step(closure_of(sam, lambda: 0.5 * (h * theta**2).sum()))
    twin = copied(sam)
    (copied_theta,) = twin.param_groups[0]["params"]
    other, restored, _ = quadratic(momentum=0.9)
    other.data.copy_(theta)
    restored.load_state_dict(copy.deepcopy(sam.state_dict()))
    for optimizer, parameter in ((sam, theta), (twin, copied_theta), (restored, other)):
        optimizer.step(closure_of(optimizer, lambda p=parameter: 0.5 * (h * p**2).sum()))
    assert torch.equal(theta, copied_theta)
    assert torch.equal(theta, other)
    assert "momentum_buffer" in restored.base.state[other]
