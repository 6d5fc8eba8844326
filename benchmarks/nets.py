"""Networks that the package does not have and the benchmarks need: a small vision transformer, and smooth ones."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm self-attention and a GELU layer pair, ``(N, T, dim) -> (N, T, dim)``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Both residual branches."""
        query, key, value = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(-2))
        hidden: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        return tokens + hidden


class VisionTransformer(nn.Module):
    """Patches of 4 pixels, learned positions, mean over tokens: ``(N, 3, 32, 32) -> (N, num_classes)``.

    62,890 parameters with ``dim=48, depth=3``: no piece of it is piecewise linear.
    """

    def __init__(self, dim: int = 48, depth: int = 3, num_heads: int = 4, num_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, dim))
        self.blocks = nn.Sequential(*[Block(dim, num_heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def smooth(module: nn.Module) -> nn.Module:
    """The same network with tanh in place of each ReLU, changed in place."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Tanh())
    return module
