"""The weights that a run has passed through: the last ones in memory, the others in files that a digest names."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lmc_lightning.core.files import write_atomic
from lmc_lightning.core.memory import FREE_MEMORY_SHARE, free_bytes
from lmc_lightning.core.params import ParameterLayout, parameter_layout
from lmc_lightning.core.shadow import LOW_PRECISION
from lmc_lightning.core.structure import digest
from lmc_lightning.landscape.trajectory.components import Trajectory
from lmc_lightning.landscape.trajectory.sketch import count_sketch
from lmc_lightning.landscape.trajectory.walk import Stride, Walk

BUFFER_BYTES = 64 * 2**20
"""Of weights that wait in memory to be written as one file."""

MANIFEST = "trajectory.json"

Block: TypeAlias = tuple[str, str, int]
"""Path of a file, the digest of its tensors, and the number of its states."""


class Snapshots:
    """States of one run, or sketches of them, added one after the other.

    Args:
        parameters: name patterns of the parameters in θ; all trainable ones by default.
        dimension: of sketches; ``None``: the weights themselves.
        seed: of sketches.
    """

    def __init__(self, parameters: Sequence[str] | None, dimension: int | None, seed: int) -> None:
        self.parameters, self.dimension, self.seed = parameters, dimension, seed
        self.errors: list[str] = []
        """Why states could not be kept."""
        self.begin(None)

    def begin(self, directory: Path | None, *, keeps: bool = True) -> None:
        """Start anew.

        Args:
            directory: where files go; ``None``: all stay in memory.
            keeps: whether states are kept at all, or only the walk.
        """
        self.directory = None if directory is None else directory.absolute()
        self.keeps, self.walk = keeps, Walk()
        self.files: list[Block] = []
        self._waiting: list[Tensor] = []
        self._layout: ParameterLayout | None = None

    def __len__(self) -> int:
        return sum(block[2] for block in self.files) + len(self._waiting)

    @property
    def step(self) -> int | None:
        """Of the last state."""
        return self.walk.strides[-1].step if self.walk.strides else None

    def sketched(self, theta: Tensor) -> Tensor:
        """What is kept of a state ``(P,)``: itself, or its sketch ``(D,)``."""
        return theta if self.dimension is None else count_sketch(theta, self.dimension, self.seed)

    def add(self, step: int, module: nn.Module) -> None:
        """Add the state of a module after ``step`` optimizer steps."""
        if self._layout is None:
            self._layout = parameter_layout(module, self.parameters)
        theta = self._layout.flatten(dict(module.named_parameters())).cpu()
        point = self.sketched(theta.float() if theta.dtype in LOW_PRECISION else theta)
        self.walk.advance(step, point)
        if self.keeps:
            self._waiting.append(point)
            if self.directory and len(self._waiting) * point.numel() * point.element_size() >= BUFFER_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write what waits; on a full disk nothing more is kept, and the reason is."""
        if self.directory is None or not self._waiting:
            return
        strides = torch.tensor([astuple(s) for s in self.walk.strides[-len(self._waiting) :]], dtype=torch.float64)
        content = {"points": torch.stack(self._waiting), "strides": strides}
        named = digest(content)
        path = self.directory / f"weights_{int(strides[0, 0]):08d}_{named[:8]}.pt"
        files: list[Block] = [*self.files, (str(path), named, len(self._waiting))]
        try:
            write_atomic(path, lambda file: torch.save(content, file))
            manifest = json.dumps({"version": 1, "files": [(_within(f, self.directory), *more) for f, *more in files]})
            write_atomic(self.directory / MANIFEST, lambda file: file.write(manifest.encode()))
        except Exception as error:  # torch.save has other errors for a full disk
            self.errors.append(f"The weights of the trajectory cannot be kept: {type(error).__name__}: {error}")
            self.keeps = False
        else:
            self.files = files
        self._waiting = []

    def up_to(self, step: int) -> tuple[int, Stride]:
        """The number of states up to ``step``, and the stride to it.

        Raises:
            RuntimeError: that state was not added.
        """
        found = self.walk.at(step)
        if found is None:
            raise RuntimeError(f"The weights of step {step} were not recorded. Only a run has a way of its weights.")
        return found

    def trajectory(self, name: str = "") -> Trajectory:
        """All states, or, where these do not fit into a quarter of the free memory, equally many between those kept."""
        return _collected(self.files, self._waiting, [s.step for s in self.walk.strides], name)

    def state(self) -> list[list[Any]]:
        """The files, with all states written."""
        self.flush()
        return [list(block) for block in self.files]

    def resume(self, state: Iterable[Any]) -> None:
        """Go on from the files of the run that is resumed.

        Raises:
            OSError: a file is missing.
            ValueError: a file is not what was written.
        """
        files: list[Block] = [(str(file), str(named), int(count)) for file, named, count in state]
        strides: list[Stride] = []
        first: Tensor | None = None
        last: list[Tensor] = []
        for block in files:
            content = _read(block)
            strides += [Stride(int(row[0]), *row[1:]) for row in content["strides"].tolist()]
            first = content["points"][0].clone() if first is None else first
            last = [*last, *content["points"][-2:].clone()][-2:]
        if first is not None:
            self.walk.go_on(strides, first, last[0] if len(last) > 1 else None, last[-1])
        self.files = files


def read_trajectory(folder: str | Path, name: str = "") -> Trajectory:
    """The states that a :class:`WeightTrajectory` has kept of a run, as far as memory allows.

    Args:
        folder: ``<log_dir>/lmc/trajectory``, with ``trajectory.json`` in it.
        name: of the run, for legends.

    Raises:
        FileNotFoundError: there is no trajectory.
        ValueError: a file is not what was written.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"Expected a folder with {MANIFEST} in it, as <log_dir>/lmc/trajectory, got {folder}.")
    files: list[Block] = [
        (str(path.parent / f), named, count) for f, named, count in json.loads(path.read_text())["files"]
    ]
    steps = [int(step) for block in files for step in _read(block)["strides"][:, 0]]
    return _collected(files, [], steps, name)


def _within(file: str, directory: Path) -> str:
    return Path(file).name if Path(file).parent == directory else file


def _read(block: Block) -> Mapping[str, Tensor]:
    content: Mapping[str, Tensor] = torch.load(block[0], map_location="cpu", weights_only=True)
    if digest(content) != block[1]:
        raise ValueError(f"{block[0]} is damaged: it does not hold the weights that were written.")
    return content


def _collected(files: Iterable[Block], waiting: list[Tensor], steps: list[int], name: str) -> Trajectory:
    total, kept, taken = len(steps), list[Tensor](), list[int]()
    every = 1
    for index, part in _parts(files, waiting):
        if not kept:
            size = total * part.shape[1] * part.element_size()
            every = max(1, -(-size // int(FREE_MEMORY_SHARE * free_bytes(torch.device("cpu")))))
        chosen = [i for i in range(len(part)) if (index + i) % every == 0 or index + i == total - 1]
        kept.append(part[chosen])
        taken += [steps[index + i] for i in chosen]
    return Trajectory(torch.cat(kept), taken, name)


def _parts(files: Iterable[Block], waiting: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """States ``(some, D)`` with the place of the first."""
    index = 0
    for block in files:
        yield index, _read(block)["points"]
        index += block[2]
    if waiting:
        yield index, torch.stack(waiting)
