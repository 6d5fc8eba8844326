"""Which process trains which child, so that no two train the same one."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HEARTBEAT = 30.0
"""Seconds between two signs of life."""
PATIENCE = 600.0
"""Seconds without one after which the claim of a process on another machine counts as abandoned."""


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Whether ``name`` is ours inside the block: it is, unless a process that is alive has claimed it.

    A claim is a file that only one process can make. It goes when the block ends, and is taken over from a process that
    has died: one of this machine that is gone, or one of any machine that has shown no sign of life for ten minutes.
    """
    path = folder / "claims" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _made(path) and not (_take_away(path) and _made(path)):
        yield False
        return
    done = threading.Event()
    beat = threading.Thread(target=_show_life, args=(path, done), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        done.set()
        beat.join()
        path.unlink(missing_ok=True)


def is_claimed(folder: Path, name: str) -> bool:
    """Whether a process that is alive trains ``name``."""
    path = folder / "claims" / f"{name}.json"
    return path.is_file() and not _is_abandoned(path)


def _made(path: Path) -> bool:
    owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
    # Complete from the first moment on, and refused if the name is taken.
    mine = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    mine.write_bytes(owner)
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError:  # no links here
        return _made_without_link(path, owner)
    finally:
        mine.unlink()
    return True


def _made_without_link(path: Path, owner: bytes) -> bool:
    try:
        with open(path, "xb") as file:
            file.write(owner)
    except FileExistsError:
        return False
    return True


def _is_abandoned(path: Path) -> bool:
    try:
        owner, age = json.loads(path.read_text()), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return True
    except ValueError:  # being written
        return False
    if owner["host"] == socket.gethostname() and not _is_alive(owner["pid"]):
        return True
    return age > PATIENCE


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _take_away(path: Path) -> bool:
    """Whether it was us who removed an abandoned claim: of several that try, one succeeds."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    if not _is_abandoned(path):
        return False
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if _is_abandoned(aside):
            aside.unlink()
            return True
        os.rename(aside, path)  # another process has meanwhile taken it over
    return False


def _show_life(path: Path, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT):
        with suppress(FileNotFoundError):
            os.utime(path)
