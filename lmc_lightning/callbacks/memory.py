"""A second try for a measurement that did not fit into memory."""

import gc
from collections.abc import Callable

import torch

from lmc_lightning.recording import Measurement

SMALL_CHUNK = 16
"""Examples a chunk in the second try."""


def retried_in_small_chunks(measured: Callable[..., Measurement], *, retry: bool) -> Measurement:
    """``measured()``; where memory runs out, once more in small chunks and without cached graphs.

    The second try passes ``chunk_size`` and ``memory_budget`` on; its own failure is raised.

    Args:
        measured: the measurement.
        retry: whether there is a second try; not with several processes, of which one alone would start over.
    """
    try:
        return measured()
    except (RuntimeError, MemoryError) as error:
        if not retry or not (isinstance(error, MemoryError) or "out of memory" in str(error).lower()):
            raise
    # Outside the handler, whose traceback keeps the tensors of the first try alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return measured(chunk_size=SMALL_CHUNK, memory_budget=0)
