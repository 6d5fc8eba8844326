"""The fingerprint of a run: a digest of each thing that it leaves behind, equal only if every bit is."""

import hashlib
import random
import types
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Path, type(None))
_CODE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, type, types.ModuleType)
_WAYS_BACK = ("trainer", "_trainer", "_fabric", "_iterator")


def fingerprint(run: Any) -> dict[str, str]:
    """The sha256 of everything that a :class:`~tests.zoo.harness.Run` leaves behind, by what it is."""
    module, trainer = run.module, run.trainer
    loader = trainer.fit_loop._combined_loader
    parts = {
        "weights": dict(module.named_parameters()),
        "gradients": [p.grad for p in module.parameters()],
        "buffers": dict(module.named_buffers()),
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "random streams": global_random_state(),
        "callback metrics": dict(trainer.callback_metrics),
        "logged": run.logger.rows_without(run.ours),
        "attributes": [attributes(m) for m in module.modules()],
        "data": [attributes(part) for part in ([] if loader is None else loader.flattened)],
        "other callbacks": [attributes(c) for c in run.others],
        "progress": [trainer.fit_loop.state_dict(), trainer.global_step, trainer.current_epoch, trainer.should_stop],
        "every hook": run.witness.seen,
        "files": files(Path(trainer.default_root_dir)),
    }
    return {name: sha256(value) for name, value in parts.items()}


def global_random_state() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1:], torch.get_rng_state()]  # noqa: NPY002


def files(root: Path) -> list[str]:
    """All files but those that our callbacks write, in the folders of the run and of a CSVLogger."""
    found = [p.relative_to(root) for p in root.rglob("*") if p.is_file()]
    return sorted(p.as_posix() for p in found if not {"lmc", "branches", "media"} & set(p.parts))


def attributes(value: object) -> dict[str, Any]:
    """The Python state of an object, without its ways back to the trainer, its tensors by name and its clocks."""
    skipped = (*_WAYS_BACK, "_modules", "_parameters", "_buffers", "_torchdynamo_wrapper_id")
    return {n: v for n, v in vars(value).items() if n not in skipped and "time" not in n}


def sha256(value: Any) -> str:
    """A digest of nested data that depends on its contents and never on identities."""
    sha = hashlib.sha256()
    for token in _tokens(value, {}):
        sha.update(token)
        sha.update(b"\0")
    return sha.hexdigest()


def _tokens(value: Any, seen: dict[int, int]) -> Iterator[bytes]:
    yield type(value).__qualname__.encode()
    if isinstance(value, _VALUES):
        yield repr(value).encode()
    elif isinstance(value, _CODE):
        yield getattr(value, "__qualname__", value.__name__).encode()
    elif id(value) in seen:
        yield str(seen[id(value)]).encode()
    else:
        seen[id(value)] = len(seen)
        state = _state(value)
        yield from _contents(value, seen) if state is None else [state]


def _state(value: Any) -> bytes | None:
    """The bytes of what has no contents to be entered."""
    if isinstance(value, Tensor):
        return _tensor_bytes(value)
    if isinstance(value, np.ndarray | np.generic):
        return repr(value.tolist()).encode()
    if isinstance(value, torch.Generator):
        return _tensor_bytes(value.get_state())
    if type(value).__module__.startswith("torch._dynamo"):
        return b""  # compiled code
    if isinstance(value, pd.Index):
        return repr(value).encode()  # its attributes are caches
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state).encode()
    if isinstance(value, random.Random):
        return repr(value.getstate()).encode()
    return None


def _contents(value: Any, seen: dict[int, int]) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield b"" if isinstance(key, int) else repr(key).encode()  # hooks are keyed by a counter of the process
            yield from _tokens(item, seen)
    elif isinstance(value, set | frozenset):
        yield from sorted(sha256(item).encode() for item in value)
    elif isinstance(value, list | tuple | deque):  # nothing else is iterated: a sampler would draw
        for item in value:
            yield from _tokens(item, seen)
    for name, item in attributes(value).items() if hasattr(value, "__dict__") else ():
        yield name.encode()
        yield from _tokens(item, seen)


def _tensor_bytes(tensor: Tensor) -> bytes:
    tensor = tensor.detach()
    header = f"{tensor.dtype}{tuple(tensor.shape)}{tensor.is_sparse}".encode()
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    tensor = tensor.int_repr() if tensor.is_quantized else tensor
    return header + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else header
