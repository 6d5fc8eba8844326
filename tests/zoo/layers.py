"""Layers and functions that are hard to differentiate twice, draw random numbers, or keep statistics."""

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tests.zoo.module import NUM_CLASSES, NUM_FEATURES, RANDOM, Expected, ZooModule, mlp


class BatchNormAndDropout(ZooModule):
    """Convolutions with running statistics and dropout."""

    expected = Expected(unlike_run=RANDOM)

    def __init__(self) -> None:
        super().__init__()
        body = [nn.Conv1d(1, 3, 3, padding=1), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.5), nn.Flatten()]
        self.net = nn.Sequential(*body, nn.Linear(3 * NUM_FEATURES, NUM_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, None])


class OtherNorms(ZooModule):
    """Group, layer, instance and local response normalisation."""

    def __init__(self) -> None:
        super().__init__()
        norms = [nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)]
        body = [nn.Conv1d(1, 4, 3, padding=1), *norms, nn.Tanh(), nn.LocalResponseNorm(2), nn.Flatten()]
        self.net = nn.Sequential(*body, nn.LayerNorm(4 * NUM_FEATURES), nn.Linear(4 * NUM_FEATURES, NUM_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, None])


class StochasticDepth(ZooModule):
    """Blocks are skipped at random, by functional dropout of the module's own flag."""

    expected = Expected(unlike_run=RANDOM)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(len(x), 1) > 0.2 if self.training else 1.0
        return self.net(x + kept * F.dropout(torch.tanh(x), 0.5, self.training))


class Attention(ZooModule):
    """Scaled dot-product attention through torch's fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(NUM_FEATURES // 3, 3 * 4)
        self.net = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x.reshape(len(x), 1, 3, -1)).chunk(3, dim=-1)
        return self.net(F.scaled_dot_product_attention(q, k, v, is_causal=True).mean((1, 2)))


class Transformer(ZooModule):
    """An encoder layer with dropout, whose eval mode takes a fast path."""

    expected = Expected(unlike_run=RANDOM)

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
        self.net = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(len(x), -1, 2)
        return self.net(self.encoder(torch.cat([tokens, -tokens], -1)).mean(1))


class Recurrent(ZooModule):
    """An LSTM of two layers with dropout between them."""

    expected = Expected(unlike_run=RANDOM)

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, 4, num_layers=2, dropout=0.3, batch_first=True)
        self.net = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.rnn(x.reshape(len(x), -1, 2))[0][:, -1])


class CarriesItsState(ZooModule):
    """A recurrent state is carried on self from batch to batch, detached."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(NUM_FEATURES, NUM_FEATURES)
        self.state: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.state is None or len(self.state) != len(batch[0]):
            self.state = torch.zeros_like(batch[0])
        hidden = self.cell(batch[0], self.state.to(batch[0].dtype))
        self.state = hidden.detach()
        return self.loss(hidden, batch[1])


class ReentrantCheckpoint(ZooModule):
    """Activation checkpointing of the reentrant kind."""

    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch_checkpoint.checkpoint(self.net[:2], x.clone().requires_grad_(), use_reentrant=self.reentrant)  # type: ignore[index]
        return self.net[2](hidden)  # type: ignore[index]


class Checkpoint(ReentrantCheckpoint):
    """Activation checkpointing that saves tensors by hooks."""

    reentrant = False


class GridSample(ZooModule):
    """A spatial transformer: bilinear sampling at learnt positions."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((2,), 0.13))

    def forward(self, x: Tensor) -> Tensor:
        images = x.reshape(len(x), 1, 2, -1)
        theta = torch.eye(2, 3, dtype=x.dtype).index_put((torch.tensor([0, 1]), torch.tensor([2, 2])), self.shift)
        grid = F.affine_grid(theta.expand(len(x), 2, 3), list(images.shape), align_corners=False)
        return self.net(F.grid_sample(images, grid, align_corners=False).flatten(1))


class Ctc(ZooModule):
    """Connectionist temporal classification, which torch differentiates once only."""

    expected = Expected(failure="_ctc_loss_backward.* is not implemented", verdict="finite_differences")

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(inputs=1)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        log_p = self(x[..., None]).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((len(x),), NUM_FEATURES), torch.ones(len(x), dtype=torch.long)
        return F.ctc_loss(log_p, y[:, None].clamp(min=1), *lengths)


class SquareOnce(torch.autograd.Function):
    """x ↦ x² with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class OnceDifferentiable(ZooModule):
    """A hand-written function whose backward is once differentiable: torch would leave its term out."""

    expected = Expected(verdict="finite_differences")

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](SquareOnce.apply(self.net[0](x)))  # type: ignore[index, no-untyped-call]


class ReversesGradients(ZooModule):
    """A domain head behind a gradient that is reversed on its way back."""

    expected = Expected(verdict="no_hessian")

    def __init__(self) -> None:
        super().__init__()
        self.domain = nn.Linear(NUM_CLASSES, 1)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        features = self(x)
        reversed_features = 2 * features.detach() - features
        domain = self.domain(reversed_features).squeeze(1)
        return F.cross_entropy(features, y) + F.binary_cross_entropy_with_logits(domain, (x[:, 0] > 0).to(x.dtype))


class PenalisesItsGradient(ZooModule):
    """The loss holds the norm of the gradient with respect to the input."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            loss = F.cross_entropy(self(x), y)
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + 0.1 * slope.square().sum()


class DerivesItsOutput(ZooModule):
    """A force field: the forward is a derivative, with a graph only while it trains."""

    expected = Expected(failure="does not depend on the measured parameters", options={"mode": "train"})

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(outputs=1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=self.training)[0]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self(x), x.roll(1, dims=1))


class DifferentiatesInside(ZooModule):
    """An inner optimisation in the step: one gradient step on a latent, and torch.func for a Jacobian."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        latent = torch.zeros_like(batch[0]).requires_grad_()
        (slope,) = torch.autograd.grad(self.loss(batch[0] + latent, batch[1]), latent, create_graph=True)
        jacobian = torch.func.jacrev(self.net)(batch[0][0])
        return self.loss(batch[0] - 0.1 * slope, batch[1]) + 0.01 * jacobian.square().sum()


class EigenvalueLoss(ZooModule):
    """Linear algebra in the loss: log-determinant and eigenvalues of a covariance."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self(x)
        covariance = torch.cov(logits.T) + 0.1 * torch.eye(NUM_CLASSES, dtype=x.dtype)
        return F.cross_entropy(logits, y) - 0.1 * torch.logdet(covariance) + 0.1 * torch.linalg.eigvalsh(covariance)[-1]


class Scripted(ZooModule):
    """A submodule compiled by torch.jit.script."""

    expected = Expected(ignore=("ignore:`torch.jit.script` is deprecated",))

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.jit.script(mlp())


class CompiledModule(ZooModule):
    """The module is compiled as a whole before it is trained."""

    expected = Expected(
        compiled=True, ignore=("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",)
    )


class CompiledSubmodule(ZooModule):
    """A submodule wrapped by torch.compile."""

    expected = Expected(slow=True)

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(mlp(), backend="aot_eager")


class CompiledInPlace(ZooModule):
    """A submodule compiled in place."""

    expected = Expected(slow=True)

    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="aot_eager")
