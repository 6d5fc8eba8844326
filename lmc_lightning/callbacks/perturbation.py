"""A child whose parameters are displaced once, at the fork: at random, or along the gradient of one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lmc_lightning.branching.children.overrides import Override, Value
from lmc_lightning.branching.family.plan import Intervention
from lmc_lightning.branching.internals import loaders
from lmc_lightning.callbacks.bridge.guards import check_choice
from lmc_lightning.callbacks.bridge.objectives import objective_of
from lmc_lightning.callbacks.bridge.probes import draw, to_device
from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.core.params import ParameterLayout, parameter_layout
from lmc_lightning.core.random_vectors import derive_seed, gaussian
from lmc_lightning.core.structure import digest


@dataclass(frozen=True)
class Perturbation:
    """θ ← θ + s·v/‖v‖₂, once, at the fork; optimizer state, buffers and all noise stay the trunk's.

    v is a standard Gaussian vector, so that the direction is uniform on the sphere, or the gradient at θ of the loss on
    one batch, with batch statistics and without dropout: that way the loss rises, and with a negative size it falls.
    The batch is drawn by the child's seed, from the datamodule's ``probe_batches`` or the training data in one worker
    process of its own. Seeds follow from the branch point and the child's number; the child's node keeps them, the size
    as it came out in the dtype of the parameters, ‖θ‖₂, and the digest of the batch.

    Args:
        size: s; 0 leaves the child what the trunk is.
        relative: whether s is in units of ‖θ‖₂.
        direction: ``"gaussian"`` or ``"gradient"``.
        parameters: name patterns of what is displaced; all trainable parameters by default.
        num_examples: of the batch; None: as many as a training batch has.

    Raises:
        ValueError: another direction, or a size that is no finite number.
    """

    size: float
    relative: bool = False
    direction: Literal["gaussian", "gradient"] = "gaussian"
    parameters: Sequence[str] | None = None
    num_examples: int | None = None

    def __post_init__(self) -> None:
        check_choice("direction", self.direction, ("gaussian", "gradient"))
        if isinstance(self.size, bool) or not isinstance(self.size, int | float) or not isfinite(self.size):
            raise ValueError(f"Expected the size of a perturbation to be a finite number, got {self.size!r}.")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Perturbation":
        """A perturbation of named arguments.

        Raises:
            ValueError: no size, or an argument that there is not.
        """
        known = [f.name for f in fields(cls)]
        if "size" not in arguments or not set(arguments) <= set(known):
            raise ValueError(
                f"Expected perturb to give a size and of {', '.join(known[1:])} what is needed, got {dict(arguments)}."
            )
        return cls(**arguments)

    @property
    def name(self) -> str:
        """``gaussian_0.1``, or ``gaussian_x0.1`` of a relative size."""
        return f"{self.direction}_{'x' if self.relative else ''}{self.size:g}"

    def record(self) -> dict[str, Any]:
        """The arguments."""
        given = {**asdict(self), "parameters": None if self.parameters is None else list(self.parameters)}
        return {"perturb": given}

    def check_module(self, pl_module: Any) -> None:
        """See to it that there is something to displace, and a loss to differentiate.

        Raises:
            ValueError: no parameter has such a name, or the module's steps return no loss.
        """
        if self.parameters is not None:
            parameter_layout(pl_module, self.parameters)
        if self.direction == "gradient" and not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimizes manually: its training_step returns no loss, along whose "
                'gradient it could be perturbed. Use direction="gaussian".'
            )

    def check(self, trainer: Any) -> None:
        """Nothing of the optimizers is needed."""

    @torch.no_grad()
    def apply(self, trainer: Any, pl_module: Any, seed: int) -> dict[str, Any]:
        """Displace the parameters."""
        layout = parameter_layout(pl_module, self.parameters)
        named = dict(pl_module.named_parameters())
        theta = layout.flatten(named).to("cpu", torch.float64)
        found = {"theta_norm": float(theta.norm()), "norm": 0.0}
        if self.size == 0:
            return found
        vector, about = self._direction(trainer, pl_module, layout, seed)
        length = float(vector.norm())
        if not isfinite(length) or length == 0:
            raise ValueError(f"The {self.direction} along which to perturb has the norm {length}.")
        target = self.size * (found["theta_norm"] if self.relative else 1.0)
        for name, value in layout.unflatten(theta + vector * (target / length)).items():
            named[name].copy_(value)
        moved = layout.flatten(named).to("cpu", torch.float64) - theta
        return found | {"norm": float(moved.norm())} | about

    def _direction(
        self, trainer: Any, pl_module: Any, layout: ParameterLayout, seed: int
    ) -> tuple[Tensor, dict[str, Any]]:
        if self.direction == "gaussian":
            generator = torch.Generator().manual_seed(derive_seed(seed, "gaussian"))
            return gaussian(layout.num_params, generator, dtype=torch.float64), {}
        batches = _one_batch(trainer, pl_module, self.num_examples, derive_seed(seed, "batch"))
        options: dict[str, Any] = {"trainer": trainer, "parameters": self.parameters, "mode": "train"}
        with torch.enable_grad():
            objective = objective_of(pl_module, batches, seed=derive_seed(seed, "step"), keep_batches=True, **options)
            gradient = objective.grad(objective.theta()).to("cpu", torch.float64)
        about = {"batch_digest": digest([b.batch for b in batches]), "loss": objective.baseline.loss}
        return gradient, about | {"gradient_norm": float(gradient.norm())}


def intervention_of(perturb: Mapping[str, Any] | None, override: Mapping[str, Value] | None) -> Intervention | None:
    """What is done to a child by the arguments of a :class:`CheckpointBranching`, if anything.

    Raises:
        ValueError: two things would be, or one that there is not.
    """
    if perturb is not None and override is not None:
        raise ValueError(
            "Expected one intervention, got perturb and override, whose effects could not be told apart. Use two "
            "CheckpointBranching callbacks."
        )
    if override is not None:
        return Override(override)
    return None if perturb is None else Perturbation.of(perturb)


def _one_batch(trainer: Any, pl_module: Any, num_examples: int | None, seed: int) -> list[StepBatch]:
    """Training examples drawn by ``seed`` alone, without touching the loader that trains."""
    found = loaders(trainer.fit_loop)
    loader: Any = found[0] if len(found) == 1 and isinstance(found[0], DataLoader) else None
    of_loader = getattr(loader, "batch_size", None) or getattr(
        getattr(loader, "batch_sampler", None), "batch_size", None
    )
    size = num_examples or of_loader
    if size is None:
        raise ValueError("The size of the training batches is not known: give perturb its num_examples.")
    if hasattr(trainer.datamodule, "probe_batches"):
        batches = trainer.datamodule.probe_batches("train", size, seed)
        device = trainer.strategy.root_device
        moved = [move_data_to_device(trainer.precision_plugin.convert_input(b), device) for b in batches]
        return [StepBatch(b, i) for i, b in enumerate(moved)]
    if loader is None:
        raise ValueError(
            f"A batch is drawn from one DataLoader, and there are {len(found)} loaders. Give the datamodule a method "
            'probe_batches(split, num_examples, seed), or use direction="gaussian".'
        )
    if not isinstance(loader.dataset, IterableDataset) and loader.batch_sampler is not None:
        rows = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(seed))[:size].tolist()
        same = {"collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn}
        loader = DataLoader(loader.dataset, batch_size=size, sampler=rows, **same)
    return to_device(draw(loader, size, seed), pl_module, trainer)
