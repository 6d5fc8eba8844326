"""Functions in processes of their own, forked from a server that has imported what they need."""

import multiprocessing
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PATIENCE = 120.0
"""After which a test fails rather than hang [s]."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["lmc_lightning.callbacks.interpolation_barrier", "lmc_lightning.summary", "torch.distributed.tensor"]
)


@dataclass
class Child:
    """A process that runs a function in a folder, and what becomes of it."""

    process: BaseProcess
    answer: Path

    def wait_for(self, sign: Path) -> None:
        """Until the process has made the file ``sign``."""
        end = time.monotonic() + PATIENCE
        while not sign.exists():
            if not self.process.is_alive() or time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"no {sign.name}, exit code {self.process.exitcode}")
            time.sleep(0.01)

    def send(self, signum: signal.Signals) -> float:
        """Send a signal; when that was [s]."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)
        return time.monotonic()

    def exit_code(self) -> int:
        """The exit code when the process has ended; one that does not end is killed, and the test fails."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError("the process hangs")
        assert self.process.exitcode is not None
        return self.process.exitcode

    def result(self) -> Any:
        """What the function returned."""
        assert self.exit_code() == 0
        return pickle.loads(self.answer.read_bytes())


def start(
    function: Callable[..., Any], *arguments: Any, folder: Path, environment: Mapping[str, str] | None = None
) -> Child:
    """``function(*arguments)`` in a process of its own, with ``folder`` as its working directory."""
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder / f"answer_{(environment or {}).get('RANK', 0)}.pickle"
    process = _CONTEXT.Process(target=_run, args=(function, arguments, folder, answer, dict(environment or {})))
    process.start()
    return Child(process, answer)


def _run(
    function: Callable[..., Any], arguments: tuple[Any, ...], folder: Path, answer: Path, environment: dict[str, str]
) -> None:
    import torch

    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # of workers of data loaders
    torch.set_num_threads(1)
    answer.write_bytes(pickle.dumps(function(*arguments)))


def start_pair(function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Child]:
    """``function(rank, *arguments)`` in two processes that Lightning takes for those of an elastic launch."""
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [start(function, rank, *arguments, folder=folder, environment=environments[rank]) for rank in range(2)]


def pair(function: Callable[..., Any], *arguments: Any, folder: Path, returns: bool = True) -> list[Any]:
    """What ``function(rank, *arguments)`` returns in each of two processes; their exit codes, if it does not."""
    children = start_pair(function, *arguments, folder=folder)
    try:
        return [child.result() if returns else child.exit_code() for child in children]
    finally:
        for child in children:
            child.process.kill()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
