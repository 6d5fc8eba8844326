"""The private names of Lightning that an exact fork needs, each wrapped once; a test checks that they exist.

Checkpoints hold no random state and no iterator, and the loop of a resumed run differs in small ways from one that was
never interrupted. What has to be read or put right for that lives here and nowhere else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

PRIVATE_NAMES = {
    "fit_loop": (
        "_data_source",
        "_combined_loader",
        "_data_fetcher",
        "min_epochs",
        "_last_train_dl_reload_epoch",
        "_load_combined_loader_states",
        "_restarting",
        "_resuming_from_checkpoint",
        "setup_data",
    ),
    "epoch_loop": (
        "advance",
        "batch_progress",
        "scheduler_progress",
        "automatic_optimization",
        "manual_optimization",
        "min_steps",
    ),
    "val_loop": ("_data_source", "_combined_loader", "_last_val_dl_reload_epoch", "_results"),
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
    "ddp": (
        "_ddp_kwargs",
        "_ddp_comm_state",
        "_ddp_comm_hook",
        "_ddp_comm_wrapper",
        "_model_averaging_period",
        "_process_group_backend",
        "_timeout",
    ),
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


def validation_metrics(trainer: Any) -> dict[str, Tensor]:
    """What the validation that has just ended logged; everything in it is computed."""
    values: dict[str, Tensor] = val_loop(trainer)._results.metrics(False)["callback"]
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


def wrap_setup_data(trainer: Any, wrapper: Callable[[Callable[[], None]], None], ready: Callable[[], object]) -> None:
    """Call ``wrapper(original)`` wherever the fit loop makes its loaders (at the start, and when it reloads them).

    ``ready()`` is called inside of it, when the loaders are made and their first iterator is not.
    """
    loop = trainer.fit_loop
    setup_data, load_states = loop.setup_data, loop._load_combined_loader_states

    def load_states_and_report() -> None:
        load_states()
        ready()

    loop.setup_data = lambda: wrapper(setup_data)
    loop._load_combined_loader_states = load_states_and_report


def unwrap_setup_data(trainer: Any) -> None:
    """Undo :func:`wrap_setup_data`."""
    for name in ("setup_data", "_load_combined_loader_states"):
        vars(trainer.fit_loop).pop(name, None)


def wrap_advance(trainer: Any, before: Callable[[], object]) -> None:
    """Call ``before()`` between two batches: all that follows from the last one is done, the next is not fetched.

    No hook is called there: checkpoints saved in ``on_train_batch_end`` lack the validation that may follow, and the
    step of a plateau scheduler.
    """
    loop = trainer.fit_loop.epoch_loop
    original = loop.advance

    def advance(data_fetcher: Any) -> None:
        before()
        original(data_fetcher)

    loop.advance = advance


def unwrap_advance(trainer: Any) -> None:
    """Undo :func:`wrap_advance`."""
    vars(trainer.fit_loop.epoch_loop).pop("advance", None)


def _counters(trainer: Any) -> dict[str, Any]:
    loop = trainer.fit_loop.epoch_loop
    return {
        "batch": loop.batch_progress,
        "scheduler": loop.scheduler_progress,
        "optimizer": loop.automatic_optimization.optim_progress,
        "manual": loop.manual_optimization.optim_step_progress,
        "validation": loop.val_loop.batch_progress,
    }


def progress(trainer: Any) -> dict[str, Any]:
    """How far the epoch has come: the counters of its loops, and how many batches were fetched for it."""
    counters = {name: counter.state_dict() for name, counter in _counters(trainer).items()}
    return {"fetched": num_fetched(trainer), "counters": counters}


def num_fetched(trainer: Any) -> int:
    """How many batches the iterator of this epoch has given."""
    return int(trainer.fit_loop._data_fetcher.fetched)


def drop_batches(trainer: Any, fetched: int) -> None:
    """Fetch, and not train on, as many batches as were fetched in the trunk."""
    fetcher = trainer.fit_loop._data_fetcher
    # A step that takes the iterator itself fetches by way of a wrapper of it.
    batches = getattr(fetcher, "iterator_wrapper", fetcher)
    try:
        while fetcher.fetched < fetched:
            next(batches)
    except StopIteration:
        raise RuntimeError(f"Expected at least {fetched} batches, as in the trunk, got {fetcher.fetched}.") from None


def loader_states(trainer: Any) -> list[Any]:
    """The states of those training loaders that keep one."""
    return [loader.state_dict() for loader in _stateful(trainer)]


def set_loader_states(trainer: Any, states: list[Any]) -> None:
    """Put the states back that :func:`loader_states` read."""
    for loader, state in zip(_stateful(trainer), states, strict=True):
        loader.load_state_dict(state)


def _stateful(trainer: Any) -> list[Any]:
    return [o for o in loaders(trainer.fit_loop) if hasattr(o, "state_dict") and hasattr(o, "load_state_dict")]


def set_progress(trainer: Any, saved: dict[str, Any]) -> None:
    """Let the loops of the epoch count on from where the trunk's had come."""
    for name, counter in _counters(trainer).items():
        counter.load_state_dict(saved["counters"][name])


def end_now(trainer: Any) -> None:
    """Let a run end after this batch, whatever it was to do at least, without a validation in mid-epoch."""
    trainer.should_stop = True
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
    if not trainer.is_last_batch:
        trainer.limit_val_batches = 0


@contextmanager
def signals_restored_by_teardown(trainer: Any) -> Iterator[None]:
    """Note the signal handlers in force before a ``KeyboardInterrupt`` leaves ``on_fit_end``.

    Lightning's answer to it ignores further Ctrl-C and restores the handlers that it noted when the fit began, but by
    ``on_fit_end`` it has restored and forgotten them: the process would stay deaf.
    """
    try:
        yield
    except KeyboardInterrupt:
        trainer._signal_connector.register_signal_handlers()
        raise


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


def ddp_arguments(strategy: Any) -> dict[str, Any]:
    """The constructor arguments of a ``DDPStrategy`` that its twin in these very processes needs."""
    own = {"process_group_backend": strategy._process_group_backend, "timeout": strategy._timeout}
    return {**strategy._ddp_kwargs, **own}


def has_communication_hook(strategy: Any) -> bool:
    """Whether a ``DDPStrategy`` was given a way of its own to average gradients or weights."""
    names = ("_ddp_comm_state", "_ddp_comm_hook", "_ddp_comm_wrapper", "_model_averaging_period")
    return any(getattr(strategy, name) is not None for name in names)


@contextmanager
def without_barriers(trainer: Any) -> Iterator[None]:
    """``save_checkpoint`` waits for the other processes at its end: for ever, where the first one failed to write."""
    trainer.strategy.barrier = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del trainer.strategy.barrier
