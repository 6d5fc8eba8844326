"""How much memory is free, and how much a computation makes."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FREE_MEMORY_SHARE = 0.25
"""Share of the free memory that cached gradient graphs may take by default."""

_FALLBACK = 4 * 2**30
_MEMINFO = Path("/proc/meminfo")


class CountBytes(TorchDispatchMode):
    """Sums the sizes of all tensors made inside: an upper bound on what a graph built there keeps alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            made = result if isinstance(result, tuple | list) else (result,)
            self.total += sum(t.numel() * t.element_size() for t in made if isinstance(t, Tensor))
        return result


def is_out_of_memory(error: Exception) -> bool:
    """Whether an operation of torch failed for want of memory, on any device: most of them say so in words only."""
    return "out of memory" in str(error).lower()


def free_bytes(device: torch.device) -> int:
    """Memory that is free on ``device`` [bytes]; on hosts that do not tell, 4 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _available_bytes()
    if available is not None:
        return available
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return _FALLBACK


def _available_bytes() -> int | None:
    """What Linux would give without swapping: free pages are few on a host that has read files, its cache is not."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None
