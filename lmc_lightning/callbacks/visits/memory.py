"""What a measurement takes of time and memory, and a second try for one that did not fit."""

import gc
import os
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import Any

import torch

from lmc_lightning.recording import Measurement

SMALL_CHUNK = 16
"""Examples a chunk in the second try."""

SAMPLING_INTERVAL = 0.02
"""Between two looks at the memory in use [s]; each takes some microseconds."""


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


class Meter:
    """Wall time and peak memory of what runs in the ``with`` block.

    Memory is what torch has allocated on a GPU, else the resident memory of the process, which does not see what an
    earlier computation has left for reuse. The peak is exact where it is a new one of the process, else the highest of
    looks every 20 ms. No counter of torch or the system is reset, since others may read it.

    Args:
        device: whose memory.
        clock: seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self._clock = device, clock
        self.seconds = 0.0
        self.peak_bytes: int | None = None
        """Above what was in use at the beginning [bytes]; ``None`` where the system does not tell."""
        self._highest = 0

    @property
    def evidence(self) -> dict[str, Any]:
        """Both, as a record keeps them."""
        return {"seconds": self.seconds, "peak_bytes": self.peak_bytes}

    def __enter__(self) -> "Meter":
        self._began, self._ends = self._clock(), Event()
        self._before = bytes_in_use(self.device)
        if self._before is not None:
            self._highest, self._high_water = self._before, high_water(self.device)
            self._thread = Thread(target=self._sample, name="memory of a measurement", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = self._clock() - self._began
        if self._before is not None:
            self._ends.set()
            self._thread.join()
            self.look()
            now = high_water(self.device)
            peak = now if now > self._high_water else self._highest
            self.peak_bytes = max(0, peak - self._before)

    def _sample(self) -> None:
        while not self._ends.wait(SAMPLING_INTERVAL):
            self.look()

    def look(self) -> None:
        """See what is in use now."""
        self._highest = max(self._highest, bytes_in_use(self.device) or 0)


def bytes_in_use(device: torch.device) -> int | None:
    """Memory allocated on a GPU, or the resident memory of this process, if the system tells [bytes]."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with suppress(OSError), open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def high_water(device: torch.device) -> int:
    """The most that was ever in use of what :func:`bytes_in_use` tells [bytes]."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system that does not tell

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
