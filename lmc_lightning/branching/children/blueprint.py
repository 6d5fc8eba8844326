"""Children of a Trainer: another one of the same arguments, with copies of module, datamodule and callbacks."""

import copy
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lmc_lightning.branching import internals
from lmc_lightning.branching.family.plan import Intervention
from lmc_lightning.core.shadow import copy_module
from lmc_lightning.core.structure import walk

MakeTrainer: TypeAlias = Callable[..., Any]
"""``make_trainer(**overrides) -> Trainer``: the trunk's own arguments, with ours taking precedence."""

_LIGHTNING = ("lightning", "pytorch_lightning")
_ACCELERATORS = {"CPUAccelerator": "cpu", "CUDAAccelerator": "cuda", "MPSAccelerator": "mps"}
_NOT_FOR_CHILDREN = {
    "Checkpoint",
    "EarlyStopping",
    "ProgressBar",
    "ModelSummary",
    "Timer",
    "LearningRateFinder",
    "BatchSizeFinder",
}
_NEED_A_LOGGER = {"LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor"}
_SHARED_BYTES = 1 << 20


def trainer_class(trainer: Any) -> type[Any]:
    """The Trainer of the namespace (``lightning.pytorch`` or ``pytorch_lightning``) that ``trainer`` comes from."""
    return next(c for c in type(trainer).__mro__ if c.__name__ == "Trainer" and _is_lightnings(c))


def trainer_arguments(trainer: Any) -> dict[str, Any]:
    """The constructor arguments of a Trainer, read off it before training, but for its strategy.

    Flags that are global (``deterministic``, ``benchmark``) are left out: they hold for children anyway.

    Raises:
        ValueError: it holds something that cannot be read back; the message names it.
    """
    foreign = _unreadable(trainer)
    if foreign:
        raise ValueError(
            f"CheckpointBranching cannot make another Trainer like this one for its children: {', '.join(foreign)} "
            "cannot be read back. Pass make_trainer=f, a function with f(**overrides) -> Trainer(**{your arguments, "
            "overrides})."
        )
    seconds = internals.seconds_between_validations(trainer)
    names = """max_epochs min_epochs max_steps min_steps limit_train_batches limit_val_batches limit_test_batches
        limit_predict_batches overfit_batches check_val_every_n_epoch log_every_n_steps accumulate_grad_batches
        gradient_clip_val reload_dataloaders_every_n_epochs precision barebones"""
    return {name: getattr(trainer, name) for name in names.split()} | {
        "accelerator": _ACCELERATORS[type(trainer.accelerator).__name__],
        "devices": _devices(trainer.strategy),
        "num_nodes": trainer.num_nodes,
        "val_check_interval": trainer.val_check_interval if seconds is None else timedelta(seconds=seconds),
        "gradient_clip_algorithm": getattr(trainer.gradient_clip_algorithm, "value", None),
        "inference_mode": trainer.validate_loop.inference_mode,
        "use_distributed_sampler": internals.use_distributed_sampler(trainer),
        "sync_batchnorm": internals.sync_batchnorm(trainer),
        "detect_anomaly": internals.detect_anomaly(trainer),
        "enable_autolog_hparams": False,
    }


def _devices(strategy: Any) -> Any:
    devices = getattr(strategy, "parallel_devices", None) or [strategy.root_device]
    return len(devices) if devices[0].index is None else [device.index for device in devices]


def _is_ddp(strategy: Any) -> bool:
    return type(strategy).__name__ == "DDPStrategy"


def _unreadable(trainer: Any) -> list[str]:
    parts = {
        "the Trainer subclass": (trainer, "Trainer"),
        "the strategy": (trainer.strategy, "DDPStrategy" if _is_ddp(trainer.strategy) else "SingleDeviceStrategy"),
        "the loop": (trainer.fit_loop, "_FitLoop"),
        "the training epoch loop": (trainer.fit_loop.epoch_loop, "_TrainingEpochLoop"),
        "the validation loop": (internals.val_loop(trainer), "_EvaluationLoop"),
    }
    foreign = [
        f"{what} {type(part).__name__}"
        for what, (part, name) in parts.items()
        if type(part).__name__ != name or not _is_lightnings(type(part))
    ]
    accelerator = type(trainer.accelerator)
    if accelerator.__name__ not in _ACCELERATORS or not _is_lightnings(accelerator):
        foreign.append(f"the accelerator {accelerator.__name__}")
    if _is_ddp(trainer.strategy) and internals.has_communication_hook(trainer.strategy):
        foreign.append("the communication hook of the strategy")
    return foreign + [f"the plugin {type(plugin).__name__}" for plugin in internals.plugins(trainer)]


def _is_lightnings(kind: type) -> bool:
    return kind.__module__.split(".")[0] in _LIGHTNING


def is_one_of_ours(callback: Any) -> bool:
    """Whether a callback is this package's, or derives from one."""
    return any(base.__module__.split(".")[0] == "lmc_lightning" for base in type(callback).__mro__)


def _named(callback: Any, names: set[str]) -> bool:
    return any(base.__name__ in names and _is_lightnings(base) for base in type(callback).__mro__)


class Blueprint:
    """What children are built from: taken in the trunk's ``setup``, before anything has been trained.

    The module is copied here because rebuilding one from hyper-parameters needs them all, and moves the random state.
    Data sets that the module or ``fit`` was given are shared with the trunk, whose training is over when children
    start; a datamodule is copied but for its large arrays, and what it has set up is not set up again.

    Args:
        trainer: the trunk's, with data attached.
        pl_module: its module.
        owner: the callback whose children these are.
        make_trainer: makes children's Trainers where the trunk's arguments cannot be read back.
        copy_loaders: whether loaders given to ``fit`` are copied too, for children that train while the trunk does.

    Attributes:
        shared: what copies lead back to and share.
        left_out: the callbacks that are not passed on.
        intervention: applied at its fork to every child whose entry says so; None: nothing.

    Raises:
        ValueError: the arguments cannot be read back, or the module is compiled as a whole.
        TypeError: the datamodule, a callback or a loader cannot be copied.
    """

    intervention: Intervention | None = None

    def __init__(
        self,
        trainer: Any,
        pl_module: Any,
        owner: Any,
        make_trainer: MakeTrainer | None = None,
        *,
        copy_loaders: bool = False,
    ) -> None:
        if internals.is_compiled(pl_module):
            raise ValueError(
                "CheckpointBranching cannot copy torch.compile(module), whose steps belong to the original. Give "
                "trainer.fit the module itself and compile its parts in `configure_model`."
            )
        self._make: MakeTrainer = make_trainer or trainer_class(trainer)
        self._arguments = {} if make_trainer else trainer_arguments(trainer)
        self._ddp = (
            (type(trainer.strategy), internals.ddp_arguments(trainer.strategy)) if _is_ddp(trainer.strategy) else None
        )
        self._fast_dev_run = trainer.fast_dev_run
        self._loggers = [] if trainer.fast_dev_run else curve_loggers(trainer.loggers)
        owners = (pl_module, trainer.datamodule)
        train, val = internals.data_sources(trainer)
        self._sources = tuple(None if any(s is owner for owner in owners) else s for s in (train, val))
        unwanted = _NOT_FOR_CHILDREN if self._loggers else _NOT_FOR_CHILDREN | _NEED_A_LOGGER
        copied = [c for c in trainer.callbacks if c is owner or not (is_one_of_ours(c) or _named(c, unwanted))]
        self.left_out = [type(c).__name__ for c in trainer.callbacks if c not in copied]
        # The child's callback takes the owner's place: hooks run in the order of the list.
        listed = [None if callback is owner else callback for callback in copied]
        self.shared = [trainer]  # copies lead back to it until their own `fit` puts another in its place
        self._parts = _copied(pl_module, trainer.datamodule, listed, self.shared)
        if copy_loaders:
            self._sources = tuple(_copy("the loader", s, {id(trainer): trainer}) for s in self._sources)

    def build(self, child: Any, folder: Path, extra: Sequence[Any] = ()) -> Callable[[Path], None]:
        """The call that trains a child from a checkpoint.

        Args:
            child: the callback that replays the fork.
            folder: for the child's curves.
            extra: callbacks for this child alone.
        """
        module, datamodule, callbacks = _copied(*self._parts, self.shared)
        overrides = {
            "callbacks": [child if callback is None else callback for callback in callbacks] + list(extra),
            "logger": [make_logger(kind, folder) for kind in self._loggers] or False,
            "default_root_dir": str(folder),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
        if self._ddp is not None:  # in the processes that there are
            kind, arguments = self._ddp
            overrides["strategy"] = kind(**arguments)
        trainer = self._make(**self._arguments | overrides)
        trainer.fast_dev_run = self._fast_dev_run
        if child not in trainer.callbacks:
            raise ValueError("make_trainer(**overrides) must hand its overrides, callbacks included, to the Trainer.")
        module.configure_callbacks = list  # the trunk's list holds them already, less those not for children
        if datamodule is not None:
            datamodule.setup = datamodule.prepare_data = datamodule.teardown = _nothing
        data = {"train_dataloaders": self._sources[0], "val_dataloaders": self._sources[1], "datamodule": datamodule}

        def fit(checkpoint: Path) -> None:
            # Our own file; hyper-parameters in it may be of any type.
            trainer.fit(module, **data, ckpt_path=checkpoint, weights_only=False)

        return fit

    @property
    def sources(self) -> dict[str, Any]:
        """The loaders that children are given."""
        return dict(zip(("train_source", "val_source"), self._sources, strict=True))

    def reload_data(self) -> None:
        """Let a datamodule read again what a file of this does not hold."""
        datamodule = self._parts[1]
        if hasattr(type(datamodule), "without_data"):
            datamodule.prepare_data()
            datamodule.setup("fit")

    def parts(self) -> dict[str, Any]:
        """What a file of this holds, by name."""
        module, datamodule, callbacks = self._parts
        named = {"the module": module, "the datamodule": _light(datamodule), "make_trainer": self._make}
        named["the intervention"] = self.intervention
        named |= {f"the callback {type(callback).__name__}": callback for callback in callbacks}
        return named | {"the training loader": self._sources[0], "the validation loader": self._sources[1]}

    def __getstate__(self) -> dict[str, Any]:
        module, datamodule, callbacks = self._parts
        return {**self.__dict__, "_parts": (module, _light(datamodule), callbacks)}


def _light(datamodule: Any) -> Any:
    """A datamodule without what it can read again, if it knows how."""
    return datamodule.without_data() if hasattr(type(datamodule), "without_data") else datamodule


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of the hooks of a datamodule that the trunk has set up and will tear down."""


def _copied(module: Any, datamodule: Any, callbacks: list[Any], shared: list[Any]) -> tuple[Any, Any, list[Any]]:
    memo: dict[int, Any] = {id(value): value for value in shared}
    new_module = copy_module(module, memo)
    for members in (torch.nn.Module.modules, torch.nn.Module.parameters, torch.nn.Module.buffers):
        memo |= {id(old): new for old, new in zip(members(module), members(new_module), strict=True)}
    new_datamodule = _copy("the datamodule", datamodule, memo)
    memo[id(datamodule)] = new_datamodule
    return new_module, new_datamodule, [_copy("the callback", callback, memo) for callback in callbacks]


def _copy(what: str, value: Any, memo: Mapping[int, Any]) -> Any:
    own = dict(memo)
    for part in walk(value, lambda p: id(p) in memo):
        if isinstance(part, torch.Generator):
            own.setdefault(id(part), part.clone_state())
        elif isinstance(part, Tensor | np.ndarray) and part.nbytes >= _SHARED_BYTES and not _trains(part):
            own[id(part)] = part
    try:
        return copy.deepcopy(value, own)
    except Exception as error:
        raise TypeError(
            f"CheckpointBranching trains its children on copies, and {what} {type(value).__name__} cannot be copied "
            f"({type(error).__name__}: {error}). Give it a `__deepcopy__`, or a `__getstate__` that leaves out what "
            "refuses (open files, locks, processes)."
        ) from error


def _trains(part: Any) -> bool:
    return isinstance(part, Tensor) and part.requires_grad


def curve_loggers(loggers: list[Any]) -> list[type[Any]]:
    """The classes of those of the trunk's loggers that children can have of their own, each once."""
    kinds: list[type[Any]] = []
    for logger in loggers:
        known = [b for b in type(logger).__mro__ if b.__name__ in ("TensorBoardLogger", "CSVLogger")]
        kinds += [kind for kind in known[:1] if _is_lightnings(kind) and kind not in kinds]
    return kinds


def make_logger(kind: type[Any], folder: Path) -> Any:
    """A logger that writes into ``folder`` itself."""
    extra = {"default_hp_metric": False} if kind.__name__ == "TensorBoardLogger" else {}
    return kind(save_dir=str(folder.parent), name="", version=folder.name, **extra)
