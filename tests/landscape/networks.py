"""Small networks with every way in which channels are laid out, their inputs, and the groups that they have."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.models import MLP, LeNet5, ResNet20
from tests.problems import generator, normal


@dataclass(frozen=True)
class Case:
    """A network in float64 with random values everywhere, statistics and affine parameters included."""

    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    """Size, and number of blocks with an order of their own, of each group in the order of the forward pass."""
    classes: int = 0
    """Entries of an input that is no number but an index."""

    def module(self, seed: int = 0) -> nn.Module:
        module = self.build().double().eval()
        with torch.no_grad():
            for index, (name, tensor) in enumerate([*module.named_parameters(), *module.named_buffers()]):
                if tensor.is_floating_point() and tensor.isfinite().all():
                    values = normal(*tensor.shape, seed=1000 * seed + index)
                    tensor.copy_(values.exp() if "var" in name else values / max(1, tensor[:1].numel()) ** 0.5)
        return module

    def batch(self, num_examples: int = 3) -> Tensor:
        shape = num_examples, *self.inputs
        if self.classes:
            return torch.randint(self.classes, shape, generator=generator(7))
        return normal(*shape, seed=7)


class Attention(nn.Module):
    """Two residual heads written by hand, batch first, with their widths in separate projections."""

    def __init__(self, packed: bool = False, heads: int = 2, width: int = 3) -> None:
        super().__init__()
        self.heads, inner = heads, heads * width
        self.embed = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.packed = nn.Linear(4, 3 * inner) if packed else None
        self.qkv = nn.ModuleList([] if packed else [nn.Linear(4, inner) for _ in range(3)])
        self.out, self.head = nn.Linear(inner, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, length, _ = x.shape
        y = self.norm(x)
        if self.packed is None:
            q, k, v = (f(y).reshape(n, length, self.heads, -1).transpose(1, 2) for f in self.qkv)
        else:
            q, k, v = self.packed(y).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head((x + self.out(y)).mean(1))


class Transformer(nn.Module):
    """Token embeddings tied to the output, ``nn.TransformerEncoder`` with packed projections."""

    def __init__(self, tokens: int = 7, width: int = 8, heads: int = 2, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.position = nn.Parameter(torch.zeros(5, width))
        layer = nn.TransformerEncoderLayer(width, heads, 12, batch_first=True, norm_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x) + self.position[: x.shape[1]]))


class Branches(nn.Module):
    """Concatenation, a depthwise convolution of what it gives, softmax over channels, flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(7, 7, 3, groups=7, padding=1)
        self.mix, self.head = nn.Conv2d(7, 5, 1), nn.Linear(5 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.one(x).relu(), self.other(x).tanh()], 1)
        x = self.mix(self.depthwise(x).relu()).softmax(1)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Grouped(nn.Module):
    """GroupNorm and grouped convolutions with a channel shuffle in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.depthwise, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.conv(x)).relu()).relu()
        n, c, height, width = x.shape
        x = x.view(n, 2, c // 2, height, width).transpose(1, 2).reshape(n, c, height, width)
        return self.head(self.depthwise(x).relu().mean((2, 3)))


class Shortcut(nn.Module):
    """A shortcut whose new channels are zero padding, as in the first residual networks for CIFAR-10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((self.body(x) + F.pad(x, (0, 0, 0, 0, 0, 3))).relu().amax((2, 3)))


class Recurrent(nn.Module):
    """An LSTM: four gates stacked on one axis, and weights that have the same channels on both."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def small_conv() -> nn.Module:
    """The same block twice, so that its BatchNorm is shared."""
    block = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU())
    stem = nn.Sequential(nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return nn.Sequential(
        stem, block, block, nn.Flatten(), nn.Dropout(0.5), nn.Linear(5 * 4, 6), nn.PReLU(6), nn.Linear(6, 3)
    )


def upsampling() -> nn.Module:
    """A decoder of transposed convolutions, one of them in groups."""
    return nn.Sequential(
        nn.ConvTranspose2d(2, 4, 2, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.ReLU(),
        nn.Conv2d(6, 2, 3),
        nn.Flatten(),
    )


CASES = {
    "mlp": Case(lambda: MLP((6, 5), batch_norm=True, in_features=4, out_features=3), (2, 2), ((6, 1), (5, 1))),
    "lenet": Case(LeNet5, (1, 28, 28), ((6, 1), (16, 1), (120, 1), (84, 1))),
    "conv": Case(small_conv, (2, 6, 6), ((5, 1), (6, 1))),
    "resnet20": Case(lambda: ResNet20(width=3), (3, 8, 8), tuple((n, 1) for n in (3,) * 4 + (6,) * 4 + (12,) * 4)),
    "attention": Case(Attention, (4, 5), ((4, 1), (2, 1), (3, 2), (3, 2))),
    "packed": Case(lambda: Attention(packed=True), (4, 5), ((4, 1), (2, 1), (3, 2), (3, 2))),
    "transformer": Case(Transformer, (5,), ((8, 1), (2, 1), (4, 2), (4, 2), (12, 1)), classes=7),
    "branches": Case(Branches, (2, 6, 6), ((3, 1), (4, 1), (5, 1))),
    "grouped": Case(Grouped, (2, 7, 7), ((2, 1), (4, 1), (4, 1))),
    "group_norm": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.Flatten()),
        (2, 5, 5),
        ((2, 1), (3, 2)),
    ),
    "upsampling": Case(upsampling, (2, 3, 3), ((2, 1), (2, 2), (3, 1))),
    "shortcut": Case(Shortcut, (2, 6, 6), ((3, 1), (3, 1))),
    "recurrent": Case(Recurrent, (4, 4), ((5, 1),)),
}
