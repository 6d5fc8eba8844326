"""Who descends from whom, and the weights that were kept on the way."""

import json
import os
import platform
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lmc_lightning.core.files import write_atomic
from lmc_lightning.core.structure import digest

Status: TypeAlias = Literal["pending", "running", "completed", "interrupted", "failed", "missing"]
VERSION = 1


@dataclass
class Node:
    """One training run of a family: the trunk, or a child that left it after ``k1`` epochs.

    Args:
        name: ``"trunk"`` or ``"k1_{k1:03d}_child_{j}"``; its folder among the kept weights.
        k1: completed epochs at which it left the trunk; None for the trunk.
        child: j, counted from 0 among the children of one ``k1``; None for the trunk.
        branch_step: optimizer steps taken at ``k1``; None until the trunk has been there.
        end_step: optimizer steps taken at its end; None until it has come there.
        noise_seed: the seed that its noise follows from; None: the trunk's own noise.
        status: ``"completed"`` children have weights at every later epoch that the trunk kept, or a ``reason`` why not;
            ``"missing"`` ones have no snapshot to start from.
        reason: why it is not completed, or what is unusual about it.
        exact_replay: under ``noise="same"``, whether all kept weights equal the trunk's bit for bit; else None.
        seconds: wall time of the training [s].
        epochs: completed epochs -> optimizer steps taken, for every epoch whose weights were kept, in order.
        batch_digests: epoch -> sha256 of the tensors of the first two batches of the epoch that starts there.
        state_digests: epoch -> sha256 of the kept weights.
    """

    name: str
    k1: int | None = None
    child: int | None = None
    branch_step: int | None = None
    end_step: int | None = None
    noise_seed: int | None = None
    status: Status = "pending"
    reason: str | None = None
    exact_replay: bool | None = None
    seconds: float | None = None
    epochs: dict[int, int] = field(default_factory=dict)
    batch_digests: dict[int, str] = field(default_factory=dict)
    state_digests: dict[int, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Node":
        """The node that ``dataclasses.asdict`` and JSON (whose keys are strings) made ``values`` of."""
        known: dict[str, Any] = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name, value in known.items():
            if isinstance(value, dict):
                known[name] = {int(epoch): kept for epoch, kept in value.items()}
        return cls(**known)

    def forget_after(self, epoch: int) -> None:
        """Drop what was kept later than ``epoch``: training was resumed there and comes by again."""
        for kept in (self.epochs, self.batch_digests, self.state_digests):
            for later in [e for e in kept if e > epoch]:
                del kept[later]


@dataclass
class Position:
    """How far a run has come: completed epochs, optimizer steps, training batches."""

    epoch: int = 0
    step: int = 0
    batches: int = 0


@dataclass
class Fork:
    """A snapshot from which children start: where in training, and its two files relative to the family's folder."""

    position: Position
    checkpoint: str
    noise: str


class Family:
    """A trunk and its children: a folder with ``lineage.json``, snapshots and kept weights.

    Args:
        folder: where it lives; None: in a temporary folder that goes with the object.

    Attributes:
        trunk: the run that the others left.
        children: ordered by ``k1``, then by child.
        end: where the trunk has come to; ``trunk.status`` says whether that is its end.
        forks: snapshots by epoch.
        configuration: the arguments of the callback.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = _temporary_folder(self) if folder is None else Path(folder)
        self.trunk = Node("trunk")
        self.children: list[Node] = []
        self.end = Position()
        self.forks: dict[int, Fork] = {}
        self.configuration: dict[str, Any] = {}

    @classmethod
    def load(cls, folder: Path | str) -> "Family":
        """The family that lives in ``folder``.

        Raises:
            FileNotFoundError: there is no ``lineage.json`` in it.
            ValueError: it was written by a newer version.
        """
        family = cls(Path(folder))
        path = family.folder / "lineage.json"
        if not path.is_file():
            raise FileNotFoundError(f"Expected a family's folder with lineage.json in it, got {family.folder}.")
        content = json.loads(path.read_text())
        if content["version"] > VERSION:
            raise ValueError(f"{path} has version {content['version']}, this package reads {VERSION}: upgrade it.")
        family.trunk = Node.from_dict(content["trunk"])
        family.children = [Node.from_dict(child) for child in content["children"]]
        family.end = Position(**content["end"])
        family.forks = {
            int(epoch): Fork(Position(**fork["position"]), fork["checkpoint"], fork["noise"])
            for epoch, fork in content["forks"].items()
        }
        family.configuration = content["configuration"]
        return family

    def save(self) -> None:
        """Write ``lineage.json``, atomically."""
        content = {
            "version": VERSION,
            "configuration": self.configuration,
            "versions": _versions(),
            "end": asdict(self.end),
            "forks": {epoch: asdict(fork) for epoch, fork in sorted(self.forks.items())},
            "trunk": asdict(self.trunk),
            "children": [asdict(child) for child in self.children],
        }
        text = json.dumps(content, indent=1).encode()
        write_atomic(self.folder / "lineage.json", lambda file: file.write(text))

    def node(self, name: str) -> Node:
        """The trunk or child called ``name``.

        Raises:
            KeyError: there is none; the message lists the names.
        """
        nodes = {node.name: node for node in (self.trunk, *self.children)}
        if name not in nodes:
            raise KeyError(f"Expected one of {', '.join(nodes)}, got {name!r}.")
        return nodes[name]

    def step_of_epoch(self, epoch: int) -> int:
        """Optimizer steps that the trunk had taken after ``epoch`` epochs, one of those kept.

        Raises:
            KeyError: no weights were kept there.
        """
        return self.trunk.epochs[self._kept(self.trunk, epoch)]

    def common_epochs(self, child: Node) -> list[int]:
        """The epochs, from ``child.k1`` on, at which weights of both the child and the trunk were kept."""
        return sorted(set(child.epochs) & set(self.trunk.epochs))

    def state(self, node: Node | str, epoch: int) -> dict[str, Tensor]:
        """The ``state_dict`` of a run after ``epoch`` epochs in all, on CPU, in the dtypes of training.

        Raises:
            KeyError: no weights were kept there; the message lists the epochs.
        """
        node = self.node(node) if isinstance(node, str) else node
        path = self.weights_path(node, self._kept(node, epoch))
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def weights_path(self, node: Node, epoch: int) -> Path:
        """The file of the weights that ``node`` has after ``epoch`` epochs."""
        return self.folder / "weights" / node.name / f"epoch_{epoch:04d}.pt"

    def keep(self, node: Node, epoch: int, step: int, module: nn.Module) -> None:
        """Write the parameters and buffers of ``module``, atomically, and note them in the node."""
        state = {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in module.state_dict().items()
            if isinstance(value, Tensor)
        }
        node.epochs[epoch] = step
        node.state_digests[epoch] = digest(state)
        path = self.weights_path(node, epoch)
        if epoch == node.k1 and node.state_digests[epoch] == self.trunk.state_digests.get(epoch):
            self.keep_trunks(node, epoch)
        else:
            write_atomic(path, lambda file: torch.save(state, file))

    def keep_trunks(self, node: Node, epoch: int) -> None:
        """Let a child share the weights of the trunk, of which it is a copy at that epoch."""
        path = self.weights_path(node, epoch)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        link_or_copy(self.weights_path(self.trunk, epoch), path)
        node.epochs[epoch] = self.trunk.epochs[epoch]
        node.state_digests[epoch] = self.trunk.state_digests[epoch]

    def _kept(self, node: Node, epoch: int) -> int:
        if epoch not in node.epochs:
            kept = ", ".join(map(str, sorted(node.epochs))) or "none"
            raise KeyError(f"Weights of {node.name} were kept after epochs {kept}, not after epoch {epoch}.")
        return epoch

    def __repr__(self) -> str:
        end = f"after {self.end.epoch} epochs, {self.end.step} steps"
        lines = [f"Family in {self.folder}", f"  trunk: {self.trunk.status} {end}"]
        for child in self.children:
            exact = {True: ", equals the trunk", False: ", not an exact replay", None: ""}[child.exact_replay]
            lines.append(f"  {child.name}: {child.status}{exact}{f' ({child.reason})' if child.reason else ''}")
        return "\n".join(lines)


def _temporary_folder(owner: object) -> Path:
    folder = tempfile.mkdtemp(prefix="lmc_family_")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """A second name for a file that is never written again; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("lmc-lightning", "lightning", "pytorch-lightning"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
