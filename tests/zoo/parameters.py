"""Parameters that are tied, frozen, unused, complex, lazy, sparse, masked, re-parametrised or of other types."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as old_weight_norm

from tests.zoo.module import BATCH_SIZE, NUM_CLASSES, NUM_FEATURES, Expected, ZooModule, mlp


class TiesItsWeights(ZooModule):
    """Encoder and decoder share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(hidden=NUM_FEATURES, outputs=NUM_FEATURES)
        self.net[2].weight = self.net[0].weight

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self(x), x)


class FreezesItsBackbone(ZooModule):
    """A frozen backbone whose BatchNorm stays in eval mode while the rest trains."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(NUM_FEATURES, NUM_FEATURES), nn.BatchNorm1d(NUM_FEATURES))
        self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> "FreezesItsBackbone":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x))


class UnfreezesLater(ZooModule):
    """The first layer becomes trainable after the first epoch, in a parameter group of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)  # type: ignore[index]

    def on_train_epoch_start(self) -> None:
        first = self.net[0]  # type: ignore[index]
        if self.current_epoch == 1:
            first.requires_grad_(True)
            self.optimizers().add_param_group({"params": list(first.parameters())})  # type: ignore[union-attr]


class LeavesLayersUnused(ZooModule):
    """Some layers are never called, others only for some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.sometimes = nn.Linear(3, 3), nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0]) + (self.sometimes(batch[0]) if batch_idx % 2 else 0)
        return F.cross_entropy(logits, batch[1])


class ComplexWeights(ZooModule):
    """A filter with complex weights in the Fourier domain, after an odd number of real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))
        self.filter = nn.Parameter(torch.randn(NUM_FEATURES // 2 + 1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.fft.irfft(self.filter * torch.fft.rfft(x), n=NUM_FEATURES)) + self.shift


class LazyLayers(ZooModule):
    """Layers learn their shapes from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(NUM_CLASSES))


class ConfiguresItsModel(ZooModule):
    """Layers are made in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = mlp()


class SparseEmbedding(ZooModule):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, NUM_FEATURES, sparse=True)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x + self.embedding((x[:, 0] > 0).long())), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OldWeightNorm(ZooModule):
    """Weight normalisation by hooks."""

    expected = Expected(ignore=("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning",))

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = old_weight_norm(self.net[0])  # type: ignore[index]


class WeightNorm(ZooModule):
    """Weight normalisation by parametrisation."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.net[0])  # type: ignore[index]


class SpectralNorm(ZooModule):
    """Spectral normalisation, whose power iteration moves in every training forward."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.net[0])  # type: ignore[index]


class OrthogonalWeights(ZooModule):
    """A weight that is orthogonal by a matrix exponential."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.orthogonal(self.net[0], orthogonal_map="matrix_exp")  # type: ignore[index]


class PrunedWeights(ZooModule):
    """Masks of torch's pruning on one layer."""

    def __init__(self) -> None:
        super().__init__()
        prune.l1_unstructured(self.net[0], "weight", amount=0.5)  # type: ignore[index]


def pruning() -> list[Callback]:
    return [ModelPruning("l1_unstructured", parameters_to_prune=None, amount=0.3, verbose=0)]


class PrunedByLightning(ZooModule):
    """Lightning's ModelPruning adds masks after each epoch."""

    expected = Expected(others=pruning)


class DoublePrecision(ZooModule):
    """The module is of float64, and so are its examples."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0].double(), batch[1]]


class SixteenBits(ZooModule):
    """The module is of bfloat16."""

    expected = Expected(trainer={"precision": "bf16-true"}, inexact=True)


class MixesTypes(ZooModule):
    """A float64 head on a float32 body."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2].double()  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[:2](x).double())  # type: ignore[index]


class LearnsAScalar(ZooModule):
    """A parameter without dimensions, and one without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x) / self.temperature.exp(), y) + self.empty.sum()


class ParametersInContainers(ZooModule):
    """Parameter lists and dicts, and a module list called by index."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([mlp(), mlp()])
        self.scales = nn.ParameterList([torch.ones(NUM_CLASSES), torch.zeros(NUM_CLASSES)])
        self.shifts = nn.ParameterDict({"a": torch.zeros(NUM_CLASSES)})

    def forward(self, x: Tensor) -> Tensor:
        outputs = [net(x) * scale for net, scale in zip(self.net, self.scales, strict=True)]  # type: ignore[arg-type]
        return torch.stack(outputs).sum(0) + self.shifts["a"]


class ClampsItsParameters(ZooModule):
    """The step projects its parameters before the forward, in place."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(-1, 1)
        return self.loss(*batch)


class WritesThroughData(ZooModule):
    """A codebook learnt by moving averages: the step writes into ``.data``, and gradients pass straight through."""

    expected = Expected(verdict="no_hessian")

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(NUM_FEATURES, NUM_FEATURES)
        self.codebook = nn.Parameter(torch.randn(BATCH_SIZE, NUM_FEATURES), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self.encoder(batch[0])
        nearest = torch.cdist(z, self.codebook).argmin(1)
        code = self.codebook[nearest]
        self.codebook.data[nearest] = 0.9 * code + 0.1 * z.detach()
        loss = self.loss(z + (code - z).detach(), batch[1]) + 0.25 * F.mse_loss(z, code.detach())
        self.log("train_loss", loss)
        return loss


class FakeQuantised(ZooModule):
    """Quantisation-aware training: weights are rounded in the forward, gradients ignore it."""

    expected = Expected(verdict="no_hessian")

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.05))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.99).add_(0.01 * self.net[0].weight.detach().abs().max() / 127)  # type: ignore[index]
        weight = torch.fake_quantize_per_tensor_affine(self.net[0].weight, float(self.scale), 0, -128, 127)  # type: ignore[index]
        return self.net[2](torch.tanh(F.linear(x, weight, self.net[0].bias)))  # type: ignore[index]


class QuantisedBackbone(ZooModule):
    """A dynamically quantised, frozen backbone holds packed weights that are no parameters."""

    expected = Expected(ignore=("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"))

    def __init__(self) -> None:
        super().__init__()
        backbone = nn.Sequential(nn.Linear(NUM_FEATURES, NUM_FEATURES), nn.Tanh())
        self.backbone = torch.ao.quantization.quantize_dynamic(backbone, {nn.Linear}, dtype=torch.qint8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x.float()).to(x.dtype))
