"""Random vectors from an explicit generator, and seeds derived from names.

Every vector is drawn on the generator's own device (in practice the CPU) in one fixed format, to be moved only then, so
that a seed gives the same vector on every device and in every dtype. No global random state is read or advanced.
"""

import hashlib
import json

import torch
from torch import Tensor


def rademacher(num_params: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent fair signs ±1, ``(P,)``: E vvᵀ = I and ‖v‖² = P exactly."""
    bits = torch.randint(0, 2, (num_params,), generator=generator, device=generator.device, dtype=torch.int8)
    return bits.mul_(2).sub_(1).to(dtype)


def gaussian(num_params: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent standard normal entries, ``(P,)``: E vvᵀ = I."""
    draw = torch.randn(num_params, generator=generator, device=generator.device, dtype=torch.float32)
    return draw.to(dtype)


def sphere(num_params: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A point uniform on the unit sphere, ``(P,)``: ‖v‖ = 1 and E vvᵀ = I/P."""
    draw = gaussian(num_params, generator, dtype=dtype)
    return draw.div_(torch.linalg.vector_norm(draw, dtype=torch.float64))


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in ``[0, 2**63)`` for the stream called ``names``, by SHA-256 of ``seed`` and the names.

    Equal arguments give equal seeds in every process and Python version; 1 and ``"1"`` are different names.
    """
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
