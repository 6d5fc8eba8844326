"""The IDX format of MNIST and its relatives."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> Tensor:
    """The uint8 array of an IDX file, gzipped (by its ``.gz``) or raw.

    Raises:
        ValueError: the file is not IDX, holds another type than unsigned bytes, or is cut short.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path} is no IDX file of unsigned bytes: it starts with {raw[:4].hex()}, not 000008NN.")
    num_dims = raw[3]
    shape = np.frombuffer(raw, ">u4", count=num_dims, offset=4).tolist() if len(raw) >= 4 + 4 * num_dims else []
    values = np.frombuffer(raw, np.uint8, offset=min(len(raw), 4 + 4 * num_dims))
    if not shape or values.size != np.prod(shape):
        raise ValueError(f"{path} is cut short or damaged: its header says {shape}, {values.size} bytes follow.")
    return torch.from_numpy(values.reshape(shape).copy())


def idx_file(folder: Path, stem: str) -> Path | None:
    """``folder/stem``, raw or else with ``.gz``; None where neither exists."""
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)
