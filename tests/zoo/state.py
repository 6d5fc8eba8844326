"""What modules keep on themselves: metrics, lists, counters, buffers, generators, locks; and whom they ask."""

import copy
import random
import tempfile
import threading
from collections import defaultdict, deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from tests.zoo.module import BATCH_SIZE, NUM_CLASSES, RANDOM, Expected, ZooModule, mlp


class OwnsMetrics(ZooModule):
    """Metric objects, a collection and a concatenating metric, updated in the step and read at the epoch's end."""

    def __init__(self) -> None:
        super().__init__()
        metrics = {"accuracy": MulticlassAccuracy(NUM_CLASSES), "f1": MulticlassF1Score(NUM_CLASSES)}
        self.train_metrics = MetricCollection(metrics, prefix="train_")
        self.mean_loss, self.all_losses = MeanMetric(), CatMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.train_metrics.update(logits, batch[1])
        self.mean_loss(loss)
        self.all_losses(loss)
        self.log("train_loss", self.mean_loss, on_step=True, on_epoch=True)
        self.log_dict(self.train_metrics, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("train_loss_sum", self.all_losses.compute().sum())
        self.all_losses.reset()


class LogsEverywhere(ZooModule):
    """Logs per step and epoch, with reductions of its own, a progress bar and synchronisation."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log("largest", loss, reduce_fx="max", on_step=False, on_epoch=True)
        self.log_dict({"sum": loss, "batch": float(batch_idx)}, reduce_fx=torch.sum, on_epoch=True)
        return loss


class CollectsOutputs(ZooModule):
    """Lists, counters and nested histories on self that every step extends."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.history: dict[str, Any] = {"epochs": [{"losses": []}], "by_name": defaultdict(list)}
        self.recent: deque[int] = deque(maxlen=2)
        self.seen: set[int] = set()
        self.num_steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1]) * (1 + 0.01 * self.num_steps)
        self.num_steps += 1
        self.outputs.append(logits.detach())
        self.history["epochs"][-1]["losses"].append(loss.item())
        self.history["by_name"]["step"].append(batch_idx)
        self.recent.append(batch_idx)
        self.seen.add(self.num_steps)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("spread", torch.cat(self.outputs).std())
        self.outputs.clear()
        self.history["epochs"].append({"losses": []})


class CachesActivations(ZooModule):
    """A tensor that carries a graph stays on self after the step."""

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.net[0](x)  # type: ignore[index]
        self.cache = {"hidden": [torch.tanh(self.features)]}
        return self.net[2](self.cache["hidden"][0])  # type: ignore[index]


class CountsInBuffers(ZooModule):
    """Integer and boolean buffers, re-assigned and changed in place by the step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("flags", torch.zeros(4, dtype=torch.bool))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        self.flags = ~self.flags
        self.unsaved.add_(0.1)
        return self.loss(*batch) * (1 + self.unsaved.mean())


class OwnsGenerators(ZooModule):
    """Noise from torch, numpy and python generators of the module's own."""

    expected = Expected(unlike_run=RANDOM)

    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(1)
        self.numpy_noise = np.random.default_rng(2)
        self.python_noise = random.Random(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = 0.1 * torch.randn(batch[0].shape, generator=self.noise)
        scale = self.numpy_noise.normal() * 0.1 + self.python_noise.random()
        return self.loss(batch[0] + noise, batch[1]) * (1 + scale)


class DrawsInItsStep(ZooModule):
    """A reparametrised latent, a random window and a random scale from all three global generators."""

    expected = Expected(unlike_run=RANDOM)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        start = int(np.random.randint(len(batch[0]) - 1))  # noqa: NPY002
        mean = self(batch[0][start:])
        latent = mean + 0.1 * torch.randn_like(mean)
        return F.cross_entropy(latent, batch[1][start:]) * (1 + random.random())


NOISE = np.random.default_rng(4), torch.Generator().manual_seed(4), random.Random(4)
LEGACY_NOISE = np.random.RandomState(4)


class DrawsFromGlobalGenerators(ZooModule):
    """Noise from generator objects of the file."""

    expected = Expected(unlike_run=RANDOM)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scale = 1 + 0.1 * (NOISE[0].normal() + NOISE[2].random() + LEGACY_NOISE.normal())
        return self.loss(scale * batch[0] + 0.1 * torch.randn(len(batch[0]), 1, generator=NOISE[1]), batch[1])

    def on_fit_start(self) -> None:
        NOISE[0].bit_generator.state = np.random.PCG64(4).state
        NOISE[1].manual_seed(4)
        NOISE[2].seed(4)
        LEGACY_NOISE.seed(4)


class KeepsStateOnItsClass(ZooModule):
    """A counter and a cache of masks that all instances share."""

    expected = Expected(unlike_run="what the class has counted by the time that the visit is made")

    num_calls = 0
    masks: ClassVar[dict[int, Tensor]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        KeepsStateOnItsClass.num_calls += 1
        if len(x) not in self.masks:
            self.masks[len(x)] = (torch.arange(len(x), dtype=x.dtype) + 1)[:, None] / len(x)
        return self.loss(x * self.masks[len(x)], y) * (1 + 0.01 * self.num_calls)

    def on_fit_start(self) -> None:
        KeepsStateOnItsClass.num_calls = 0
        self.masks.clear()


class ForwardsAttributes(nn.Module):
    """A wrapper that looks up at its network what it does not have."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class WrapsItsLayers(ZooModule):
    """A layer is wrapped by one that forwards attributes, and read through it."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = ForwardsAttributes(self.net[0])  # type: ignore[index]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y) + 0.01 * self.net[0].weight.square().sum()  # type: ignore[index]


def inverse(epoch: int) -> float:
    return 1 / (1 + epoch)


class SavesHyperparameters(ZooModule):
    """Hyper-parameters of any kind, which the step reads: functions, a nested namespace, a path."""

    def __init__(self, activation: Any = torch.tanh, schedule: Any = inverse) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.save_hyperparameters({"nested": SimpleNamespace(scale=2.0, path=Path("data"))})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = self.hparams.schedule(self.current_epoch) * self.hparams.nested.scale
        return self.loss(self.hparams.activation(batch[0]), batch[1]) * weight


class HoldsResources(ZooModule):
    """A lock, an open file, a generator object and a lambda: nothing of it can be copied or pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.stream = (i for i in range(100))
        self.transform = lambda x: 2 * x
        self.nested = {"locks": [threading.RLock()], "count": 0}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.lock:
            self.nested["count"] += 1
            return self.loss(self.transform(batch[0]), batch[1])

    def teardown(self, stage: str) -> None:
        self.file.close()


class HooksWithClosures(ZooModule):
    """Forward hooks that append to lists of the module which they close over, and outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.activations: list[Tensor] = []
        self.calls = {"forward": 0}
        outside = [0]

        def keep(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            self.activations.append(output.detach())
            self.calls["forward"] += 1
            outside[0] += 1

        self.net[0].register_forward_hook(keep)  # type: ignore[index]
        self.net[2].register_forward_pre_hook(partial(_count, self.calls))  # type: ignore[index]
        self.read_outside = lambda: outside[0]

    def on_train_epoch_end(self) -> None:
        self.log("forwards", float(self.read_outside()))


def _count(calls: dict[str, int], layer: nn.Module, inputs: Any) -> None:
    calls["forward"] += 1


class ReadsWhatHooksKeep(ZooModule):
    """A feature extractor: the loss uses activations that a hook has put on the module it closes over."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda layer, inputs, output: self.features.update({name: output})

        self.net[0].register_forward_hook(keep("hidden"))  # type: ignore[index]
        self.net[1].register_forward_hook(self.keep_activation)  # type: ignore[index]

    def keep_activation(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.features["activation"] = output

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(self(x), y)
        return loss + 0.1 * self.features["hidden"].square().mean() + 0.1 * self.features["activation"].mean()


class HooksOnGradients(ZooModule):
    """Tensor hooks that halve gradients, backward hooks that double them, post-accumulation hooks that keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []
        first, last = self.net[0], self.net[2]  # type: ignore[index]
        first.weight.register_hook(lambda gradient: 0.5 * gradient)
        last.weight.register_post_accumulate_grad_hook(lambda p: self.norms.append(float(p.grad.norm())))
        last.register_full_backward_hook(lambda m, gi, go: (2 * gi[0],))
        last.register_full_backward_pre_hook(lambda m, go: self.norms.append(float(go[0].norm())))

    def on_after_backward(self) -> None:
        self.log("gradient_norm", torch.cat([p.grad.reshape(-1) for p in self.parameters()]).norm())


class AliasesItsParameters(ZooModule):
    """A list of parameters and a dict of layers that are registered elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [p for n, p in self.net.named_parameters() if "weight" in n]
        self.layers = {"last": self.net[2]}  # type: ignore[index]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.layers["last"](torch.tanh(x @ self.weights[0].T))
        return F.cross_entropy(logits, y) + 0.01 * self.weights[1].square().sum()


class Inner(LightningModule):
    """A module that logs by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class NestsAnotherModule(ZooModule):
    """A LightningModule inside a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Inner()

    def on_fit_start(self) -> None:
        self.net._trainer = self._trainer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        self.log("train_loss", loss)
        self.net.print("")
        return loss * (1 + self.net.current_epoch)


class AsksItsTrainer(ZooModule):
    """The step reads learning rates, epochs and metrics, logs through the logger and prints."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        rate = optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        self.logger.log_metrics({"rate": rate}, step=self.global_step)  # type: ignore[union-attr]
        assert scheduler.get_last_lr() == [rate]  # type: ignore[union-attr]
        progress = self.current_epoch / self.trainer.max_epochs + self.trainer.global_step / 100  # type: ignore[operator]
        self.trainer.strategy.barrier()
        self.log("progress", progress, on_step=True)
        return self.loss(*batch) * (1 + progress + rate)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class TellsItsTrainer(ZooModule):
    """The step sets attributes of the trainer and reads them again."""

    expected = Expected(unlike_run="what the run has set on its trainer by the time that the visit is made")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trainer.last_batch = batch_idx  # type: ignore[attr-defined]
        self.trainer.seen = getattr(self.trainer, "seen", 0) + 1  # type: ignore[attr-defined]
        return self.loss(*batch) * (1 + 0.1 * self.trainer.seen)  # type: ignore[attr-defined]

    def on_train_end(self) -> None:
        self.logger.log_metrics({"steps_seen": self.trainer.seen})  # type: ignore[union-attr, attr-defined]


class SetsItsLearningRate(ZooModule):
    """Warm-up by hand: the step writes into the groups of the optimizer, and reads what it wrote."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.1 * (1 + self.trainer.global_step) / 6
        group = self.optimizers().param_groups[0]  # type: ignore[union-attr]
        group["momentum"] = 0.5 + 0.05 * self.current_epoch
        self.log("rate", group["lr"])
        return self.loss(*batch)


class GathersAcrossRanks(ZooModule):
    """The step gathers its outputs from all ranks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.all_gather(self(batch[0]), sync_grads=True)
        loss = F.cross_entropy(logits.reshape(-1, NUM_CLASSES), batch[1])
        self.log("train_loss", loss, sync_dist=True)
        return loss


class MixesExamples(ZooModule):
    """Mixup whose weight and permutation are set on self before each step; before the first step there are none."""

    expected = Expected(
        failure="object has no attribute 'share'",
        failures=1,
        options={"loss_fn": lambda module, batch: module.loss(*batch)},
    )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.share = float(np.random.beta(0.4, 0.4))  # noqa: NPY002
        self.order = torch.randperm(len(batch[0]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(self.share * x + (1 - self.share) * x[self.order])
        return self.share * F.cross_entropy(logits, y) + (1 - self.share) * F.cross_entropy(logits, y[self.order])


class KeepsATeacher(ZooModule):
    """A frozen teacher follows the weights inside the step, and no gradient flows through it."""

    expected = Expected(verdict="no_hessian")

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                ours.lerp_(theirs, 0.1)
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.mse_loss(logits, self.teacher(batch[0]).detach())


class CollectsActivations(Callback):
    """A callback that hooks into layers, keeps what passes, and holds the trainer."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.trainer, self.norms, outside = trainer, [], []
        pl_module.net[0].register_forward_hook(self.keep)
        pl_module.net[2].register_forward_hook(lambda layer, inputs, output: outside.append(output.norm().item()))
        self.outside = outside

    def keep(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.norms.append((self.trainer.global_step, output.norm().item()))


class BesideACallbackWithHooks(ZooModule):
    """Another callback has registered hooks on the layers."""

    expected = Expected(others=lambda: [CollectsActivations()])


class DrawsRandomNumbers(Callback):
    """A callback that draws from every global stream at every hook."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        self.drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.on_train_batch_start(trainer, pl_module)


class BesideACallbackThatDraws(ZooModule):
    """Another callback draws random numbers."""

    expected = Expected(others=lambda: [DrawsRandomNumbers()], unlike_run=RANDOM)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch[0] + 0.1 * torch.randn(BATCH_SIZE, 1), batch[1])
