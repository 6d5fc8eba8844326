"""A file is the old one or the new one, whatever happens while it is written."""

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from lmc_lightning.core.files import write_atomic


def put(content: bytes) -> Any:
    return lambda file: file.write(content)


def test_the_file_and_its_folders_are_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomic(path, put(b"one"))
    assert path.read_bytes() == b"one"
    write_atomic(path, put(b"2"))
    assert path.read_bytes() == b"2"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError("no luck")])
def test_the_old_content_survives_a_failure_and_nothing_is_left_beside_it(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, put(b"old"))

    def fail(file: BinaryIO) -> None:
        file.write(b"ne")
        raise error

    with pytest.raises(type(error), match=str(error) or None):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_content_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, put(b"old"))
    seen = []

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        seen.append(path.read_bytes())

    write_atomic(path, write)
    assert (seen, path.read_bytes()) == ([b"old"], b"new")


def test_a_failed_replacement_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, put(b"old"))

    def refuse(*args: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="read-only"):
        write_atomic(path, put(b"new"))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_may_read_a_plain_file_there_may_read_this_one(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "ours", put(b""))
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")]
    assert modes[0] == modes[1]


def test_a_file_system_that_cannot_sync_folders_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, calls = os.fsync, []

    def only_files(descriptor: int) -> None:
        calls.append(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError("not supported")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write_atomic(tmp_path / "file.txt", put(b"new"))
    assert (tmp_path / "file.txt").read_bytes() == b"new"
    assert len(calls) == 2
