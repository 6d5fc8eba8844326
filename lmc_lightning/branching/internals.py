"""The private names of Lightning that an exact fork needs, each wrapped once; a test checks that they exist.

Checkpoints hold no random state and no iterator, and the loop of a resumed run differs in small ways from one that was
never interrupted. What has to be read or put right for that lives here and nowhere else.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

PRIVATE_NAMES = {
    "fit_loop": (
        "_data_source",
        "_combined_loader",
        "_data_fetcher",
        "_last_train_dl_reload_epoch",
        "_restarting",
        "_resuming_from_checkpoint",
        "setup_data",
    ),
    "val_loop": ("_data_source", "_combined_loader", "_last_val_dl_reload_epoch"),
    "connector": (
        "_precision_plugin_flag",
        "checkpoint_io",
        "_cluster_environment_flag",
        "_layer_sync",
        "use_distributed_sampler",
    ),
    "logger_connector": ("_callback_metrics",),
    "signal_connector": ("register_signal_handlers",),
    "module": ("_compiler_ctx",),
    "trainer": ("_detect_anomaly", "_val_check_time_interval"),
}
"""Read by the test that compares this list with the installed Lightning."""


def val_loop(trainer: Any) -> Any:
    """The validation loop that runs inside of ``fit``."""
    return trainer.fit_loop.epoch_loop.val_loop


def data_sources(trainer: Any) -> tuple[Any, Any]:
    """What training and validation loaders come from: loaders given to ``fit``, a datamodule, or the module."""
    return trainer.fit_loop._data_source.instance, val_loop(trainer)._data_source.instance


def combined_loader(loop: Any) -> Any:
    """What a fit or validation loop reads from; None before its loaders are made."""
    return loop._combined_loader


def loaders(loop: Any) -> list[Any]:
    """The loaders that a fit or validation loop has made so far."""
    return list(loop._combined_loader.flattened) if loop._combined_loader is not None else []


def metrics(trainer: Any) -> dict[str, Tensor]:
    """``trainer.callback_metrics`` as they stand; the public property would compute pending metrics."""
    values: dict[str, Tensor] = trainer._logger_connector._callback_metrics
    return values


def reload_epochs(trainer: Any) -> list[float]:
    """When the training and validation loaders were made last."""
    return [trainer.fit_loop._last_train_dl_reload_epoch, val_loop(trainer)._last_val_dl_reload_epoch]


def set_reload_epochs(trainer: Any, epochs: list[float]) -> None:
    """Make ``reload_dataloaders_every_n_epochs`` count from the trunk's last reload."""
    trainer.fit_loop._last_train_dl_reload_epoch, val_loop(trainer)._last_val_dl_reload_epoch = epochs


def runs_on_first_iterator(trainer: Any) -> bool:
    """Whether the coming epoch reads the iterator made together with the loaders instead of a new one."""
    loop = trainer.fit_loop
    return bool(trainer.current_epoch == 0 or loop.is_resuming or loop.epoch_loop.restarting)


def continue_as_if_never_interrupted(trainer: Any, *, first_iterator: bool) -> None:
    """Let the coming epoch run as it did in the trunk, called in ``on_train_epoch_start`` of a resumed run.

    A resumed run with ``max_steps`` always counts as restarting, which skips the plateau schedulers of its first epoch,
    and every resumed run reads its first iterator, which was made before the random state could be set.
    """
    loop = trainer.fit_loop
    loop._restarting = False
    loop.epoch_loop.restarting = False
    loop._resuming_from_checkpoint = first_iterator


def renew_iterator(trainer: Any, *, now: bool) -> None:
    """Shut down the training iterator and its workers; the epoch makes a new one unless it is made ``now``."""
    trainer.fit_loop._combined_loader.reset()
    if now:
        iter(trainer.fit_loop._data_fetcher)


def wrap_setup_data(trainer: Any, wrapper: Callable[[Callable[[], None]], None]) -> None:
    """Call ``wrapper(original)`` wherever the fit loop makes its loaders (at the start, and when it reloads them)."""
    original = trainer.fit_loop.setup_data
    trainer.fit_loop.setup_data = lambda: wrapper(original)


def unwrap_setup_data(trainer: Any) -> None:
    """Undo :func:`wrap_setup_data`."""
    vars(trainer.fit_loop).pop("setup_data", None)


def let_teardown_restore_signals(trainer: Any) -> None:
    """Note the signal handlers in force, called before a ``KeyboardInterrupt`` leaves ``on_fit_end``.

    Lightning's answer to it ignores further Ctrl-C and restores the handlers that it noted when the fit began, but by
    ``on_fit_end`` it has restored and forgotten them: the process would stay deaf.
    """
    trainer._signal_connector.register_signal_handlers()


def is_compiled(pl_module: Any) -> bool:
    """Whether Lightning was given ``torch.compile(module)``, whose steps are closures over that very module."""
    return pl_module._compiler_ctx is not None


def plugins(trainer: Any) -> list[Any]:
    """The plugins that were given to the Trainer, which say nothing about how to make them again."""
    connector = trainer._accelerator_connector
    flags = (connector._precision_plugin_flag, connector.checkpoint_io, connector._cluster_environment_flag)
    return [plugin for plugin in flags if plugin is not None]


def sync_batchnorm(trainer: Any) -> bool:
    """The Trainer's argument of that name."""
    return trainer._accelerator_connector._layer_sync is not None


def use_distributed_sampler(trainer: Any) -> bool:
    """The Trainer's argument of that name."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def detect_anomaly(trainer: Any) -> bool:
    """The Trainer's argument of that name."""
    return bool(trainer._detect_anomaly)


def seconds_between_validations(trainer: Any) -> float | None:
    """``val_check_interval`` where it was given as a time."""
    interval: float | None = trainer._val_check_time_interval
    return interval
