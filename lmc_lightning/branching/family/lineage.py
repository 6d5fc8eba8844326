"""Who descends from whom, and the weights that were kept on the way."""

import json
import platform
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmc_lightning.branching.family.nodes import Fork, Node, Position
from lmc_lightning.branching.family.storage import DamagedFileError, link_or_copy
from lmc_lightning.core.collective import Collective
from lmc_lightning.core.files import write_atomic
from lmc_lightning.core.structure import digest

VERSION = 2


class Family:
    """A trunk and its children: a folder with ``lineage.json``, snapshots and kept weights.

    ``lineage.json`` is written by the process that trains the trunk. Each child has a file of its own in ``nodes/``,
    written by the process that trains it, and the newer of the two accounts is read.

    Args:
        folder: where it lives; None: in a temporary folder that goes with the object.

    Attributes:
        trunk: the run that the others left.
        children: ordered by branch point, then by child.
        end: where the trunk has come to; ``trunk.status`` says whether that is its end.
        forks: snapshots by the label of their branch point.
        configuration: the arguments of the callback.
        processes: that train together: all have the account of the first one, which alone writes.
        writes: whether this process does.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = _temporary_folder(self) if folder is None else Path(folder)
        self.trunk = Node("trunk")
        self.children: list[Node] = []
        self.end = Position()
        self.forks: dict[str, Fork] = {}
        self.configuration: dict[str, Any] = {}
        self.processes = Collective()
        self.writes = True

    @classmethod
    def load(cls, folder: Path | str) -> "Family":
        """The family that lives in ``folder``.

        Raises:
            FileNotFoundError: there is no ``lineage.json`` in it.
            DamagedFileError: ``lineage.json`` cannot be read.
            ValueError: it was written by another version.
        """
        family = cls(Path(folder))
        path = family.folder / "lineage.json"
        if not path.is_file():
            raise FileNotFoundError(f"Expected a family's folder with lineage.json in it, got {family.folder}.")
        content = _read(path)
        if content["version"] != VERSION:
            raise ValueError(f"{path} has version {content['version']}, this package reads {VERSION}.")
        family._fill(content)
        family.refresh()
        return family

    def _fill(self, content: Mapping[str, Any]) -> None:
        vars(self.trunk).update(vars(Node.from_dict(content["trunk"])))
        self.children = [self._taken_in(Node.from_dict(child)) for child in content["children"]]
        self.end = Position(**content["end"])
        self.forks = {label: Fork.from_dict(fork) for label, fork in content["forks"].items()}
        self.configuration = content["configuration"]

    def _taken_in(self, node: Node) -> Node:
        """The child of that name, which others refer to, as ``node`` has it; or ``node``, if there is none."""
        known = next((child for child in self.children if child.name == node.name), node)
        vars(known).update(vars(node))
        return known

    def refresh(self) -> None:
        """Read what other processes have written of the children."""
        if self.writes:
            for path in sorted((self.folder / "nodes").glob("*.json")):
                node = self._taken_in(Node.from_dict(_read(path)))
                if node not in self.children:
                    self.children.append(node)
        self.share()

    def share(self) -> None:
        """Let all processes that train together have the account of the first one."""
        content = self.processes.first(self._content)
        if not self.writes:
            self._fill(content)

    def _content(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "configuration": self.configuration,
            "versions": versions(),
            "end": asdict(self.end),
            "forks": {label: asdict(fork) for label, fork in sorted(self.forks.items())},
            "trunk": asdict(self.trunk),
            "children": [asdict(child) for child in self.children],
        }

    def save(self) -> None:
        """Write ``lineage.json``, atomically."""
        if self.writes:
            write_json(self.folder / "lineage.json", self._content())

    def save_child(self, child: Node) -> None:
        """Write the file of one child, atomically."""
        if self.writes:
            write_json(self.folder / "nodes" / f"{child.name}.json", asdict(child))

    def save_fork(self, fork: Fork) -> None:
        """Write what a snapshot's folder says about itself, and ``lineage.json``, atomically."""
        if self.writes:
            about = {
                "version": VERSION,
                "versions": versions(),
                "label": Path(fork.folder).name,
                "fork": asdict(fork),
                "configuration": self.configuration,
            }
            write_json(self.folder / fork.folder / "snapshot.json", about)
            self.save()

    def node(self, name: str) -> Node:
        """The trunk or child called ``name``.

        Raises:
            KeyError: there is none; the message lists the names.
        """
        nodes = {node.name: node for node in (self.trunk, *self.children)}
        if name not in nodes:
            raise KeyError(f"Expected one of {', '.join(nodes)}, got {name!r}.")
        return nodes[name]

    def unfinished(self, end: Position | None) -> list[Node]:
        """The children that have a snapshot to start from and are not at ``end``; None: not at an end of their own."""
        ready = [child for child in self.children if child.label in self.forks]
        if end is None:
            return [child for child in ready if child.status != "completed"]
        return [
            child
            for child in ready
            if self.forks[child.label].position.batches < end.batches
            and (child.status != "completed" or (child.reason is None and child.end_step != end.step))
        ]

    def wants(self, epoch: int) -> bool:
        """Whether the plan is to keep weights after ``epoch`` epochs."""
        schedules = self.configuration.get("keep", ())
        return any(epoch in s["points"] or (s["every"] and epoch % s["every"] == 0) for s in schedules)

    def keeps(self, epoch: int) -> bool:
        """Whether a child keeps weights after ``epoch`` epochs: where the trunk did, or will when it comes there."""
        known = self.trunk.status != "missing" and epoch <= self.end.epoch
        return epoch in self.trunk.epochs if known else self.wants(epoch)

    def step_of_epoch(self, epoch: int) -> int:
        """Optimizer steps that the trunk had taken after ``epoch`` epochs, one of those kept.

        Raises:
            KeyError: no weights were kept there.
        """
        return self.trunk.epochs[self._kept(self.trunk, epoch)]

    def state(self, node: Node | str, epoch: int) -> dict[str, Tensor]:
        """The ``state_dict`` of a run after ``epoch`` epochs in all, on CPU, in the dtypes of training.

        Raises:
            KeyError: no weights were kept there; the message lists the epochs.
            DamagedFileError: the file is not what was written.
        """
        node = self.node(node) if isinstance(node, str) else node
        path = self.weights_path(node, self._kept(node, epoch))
        try:
            state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DamagedFileError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if digest(state) != node.state_digests[epoch]:
            raise DamagedFileError(f"{path} is damaged: its weights are not those that {node.name} had.")
        return state

    def weights_path(self, node: Node, epoch: int) -> Path:
        """The file of the weights that ``node`` has after ``epoch`` epochs."""
        return self.folder / "weights" / node.name / f"epoch_{epoch:04d}.pt"

    def curves_path(self, node: Node) -> Path:
        """The file of the losses and metrics of ``node``, step by step."""
        return self.folder / "curves" / f"{node.name}.csv"

    def keep(self, node: Node, epoch: int, step: int, module: nn.Module | Mapping[str, Any]) -> None:
        """Write the parameters and buffers of ``module``, or a state dict, atomically, and note them in the node.

        Of several processes that train together all call this, and those of the first one are written.
        """
        node.state_digests[epoch] = self.processes.first(lambda: self._write(node, epoch, module))
        node.epochs[epoch] = step

    def _write(self, node: Node, epoch: int, module: nn.Module | Mapping[str, Any]) -> str:
        values = module.state_dict() if isinstance(module, nn.Module) else module
        state = {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        found = digest(state)
        if epoch == node.k1 and found == self.trunk.state_digests.get(epoch):
            self.keep_trunks(node, epoch)
        else:
            write_atomic(self.weights_path(node, epoch), lambda file: torch.save(state, file))
        return found

    def keep_trunks(self, node: Node, epoch: int) -> None:
        """Let a child share the weights of the trunk, of which it is a copy at that epoch."""
        if self.writes:
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


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: {error}. Delete it to start anew what it describes.") from error


def write_json(path: Path, content: Any) -> None:
    """Replace the file at ``path``, atomically."""
    text = json.dumps(content, indent=1).encode()
    write_atomic(path, lambda file: file.write(text))


def versions() -> dict[str, str]:
    """Of what a run depends on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("lmc-lightning", "lightning", "pytorch-lightning", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
