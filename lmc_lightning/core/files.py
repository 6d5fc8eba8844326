"""Files that are either complete or as before."""

import os
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace the file at ``path`` by what ``write`` puts into an open one: it is the old one or the new one.

    Holds for readers meanwhile, for whoever comes after a crash, and on a full disk.

    Raises:
        OSError: the content could not be written; the old file is intact and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by mkstemp, whose files nobody else may read; uuid4 draws from no stream of the run.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def slug(text: str) -> str:
    """``text`` as a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_")


def name_at(key: str, step: int, suffix: str) -> str:
    """The file of a key at a step, ``<key>_<step>.<suffix>``."""
    return f"{slug(key)}_{step:06d}.{suffix}"


def _sync_directory(path: Path) -> None:
    """Let the new name survive a loss of power too, where the file system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_DIRECTORY)
        try:
            with suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
