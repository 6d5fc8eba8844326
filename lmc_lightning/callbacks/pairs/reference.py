"""The one state that a run is compared with, where it has no children."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmc_lightning.branching.traces.averaging import average_of
from lmc_lightning.core.files import slug
from lmc_lightning.core.params import ParameterLayout, parameter_layout
from lmc_lightning.schedule import Schedule

_OF_THE_RUN = ("initial", "previous", "average")


def check_reference(
    reference: str | None, schedule: Schedule, branching: bool, averaging: Sequence[Any], name: str
) -> None:
    """Refuse what gives nothing to compare with, or two things.

    Raises:
        ValueError: no reference without branching, or one beside it; steps for later epochs beside it; the average of a
            run that has none.
    """
    if reference == "average" and not averaging:
        raise ValueError(
            "reference='average' needs a run that averages its weights. Add EMAWeightAveraging, WeightAveraging or "
            "StochasticWeightAveraging to the callbacks."
        )
    if branching and schedule.axis == "step":
        raise ValueError(
            "Beside CheckpointBranching, children are compared with the trunk after later epochs; got a schedule of "
            "steps. Pass epochs= or every_n_epochs=."
        )
    if reference is None and not branching:
        raise ValueError(
            f"{name} has nothing to compare with. Add CheckpointBranching to the callbacks, or pass "
            "reference='initial', 'previous', 'average' or the path of a checkpoint."
        )
    if reference is not None and branching:
        raise ValueError(
            f"Beside CheckpointBranching, {name} compares children with the trunk; got reference="
            f"{reference!r} too. Leave it out, and compare with it in another run."
        )
    if reference not in (None, *_OF_THE_RUN) and not Path(str(reference)).is_file():
        raise ValueError(
            f"Expected reference to be 'initial', 'previous', 'average' or a checkpoint file, got {reference!r}."
        )


@dataclass
class Reference:
    """A state of the run itself or of a checkpoint, and its step where that is known.

    Of the run: ``"initial"``, ``"previous"`` (the last visit), or the ``"average"`` of its weights.
    """

    name: str | None
    state: dict[str, Tensor] | None = None
    step: int | None = None
    count: int | None = None
    """Of the states that are averaged."""

    @property
    def label(self) -> str:
        """The last part of its keys."""
        return slug(Path(self.name or "").stem)

    def begin(self, module: nn.Module, step: int, parameters: Sequence[str] | None) -> None:
        """Take the start of a run, or read the checkpoint.

        Raises:
            ValueError: the checkpoint is of another architecture.
        """
        if step == 0:
            self.state = self.step = None
        if self.name == "initial" and self.state is None:
            self.take(state_of_module(module), step)
        elif self.name not in (None, *_OF_THE_RUN):
            self.state = read_state(str(self.name), parameter_layout(module, parameters))

    def take(self, state: dict[str, Tensor], step: int) -> None:
        """Compare with this state from now on."""
        self.state, self.step = state, step

    def take_average(self, step: int, now: int, trainer: Any, module: Any) -> None:
        """Compare the state after ``step`` steps with the average at that moment; with nothing, if there is none yet.

        Raises:
            RuntimeError: by ``now`` the average has moved on.
        """
        if step != now:
            raise RuntimeError(
                f"The average after {step} steps is no longer known; the probe set was complete too late."
            )
        average = average_of(trainer, module)
        self.state, self.step, self.count = (average.state, step, average.count) if average else (None, None, None)

    def saved(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        kept = self.state if self.name in ("initial", "previous") else None
        return {"reference": dict(kept) if kept else None, "reference_step": self.step}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on with what an earlier run has saved."""
        self.state, self.step = saved.get("reference"), saved.get("reference_step")


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those that are shared once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def state_of_module(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors_of(module).items()}


def read_state(path: str, layout: ParameterLayout) -> dict[str, Tensor]:
    """The tensors of a checkpoint.

    Raises:
        ValueError: it lacks a parameter of ``layout``, or has it in another shape.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in state or state[name].shape != shape:
            found = list(state[name].shape) if name in state else "missing"
            raise ValueError(
                f"{path} is no checkpoint of this module: {name!r} of shape {list(shape)} is {found} there. Only "
                f"networks of one architecture can be interpolated."
            )
    return dict(state)
