"""Module, data and Trainer of a LightningCLI configuration, in a folder of their own."""

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from lmc_lightning.core.glassbox import RngState, rng_state, set_rng_state
from lmc_lightning.experiments.plans.classes import import_ours
from lmc_lightning.experiments.plans.study import Config

LAST = "last.ckpt"
"""Of an unfinished run, in its folder."""


class ResumableNoise(Callback):
    """Puts the global random states of a checkpoint back where a resumed epoch begins; Lightning leaves them out."""

    def __init__(self) -> None:
        self._resumed: RngState | None = None
        self.metrics: dict[str, float] = {}
        """Of the last epoch: a run that is resumed at its end has no others."""

    def state_dict(self) -> dict[str, Any]:
        """The states as plain values."""
        return {"rng": rng_state(), "metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the epoch begins: building loaders and models draws numbers too."""
        self._resumed, self.metrics = state_dict["rng"], dict(state_dict["metrics"])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the metrics."""
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on where the checkpoint was."""
        if self._resumed is not None:
            set_rng_state(self._resumed)
            self._resumed = None


def build(config: Config, folder: Path, *, resumable: bool = True, **trainer: Any) -> LightningCLI:
    """``model``, ``datamodule`` and ``trainer`` of a configuration, with its seed set; nothing is run.

    Args:
        config: of LightningCLI; classes of this package and of Lightning may be named without their path.
        folder: where the run logs and writes, unless the configuration says otherwise.
        resumable: keep the last checkpoint, and random states in it, so that an interrupted run goes on exactly.
        **trainer: arguments of the Trainer that take precedence; with ``enable_checkpointing=False`` a
            ``ModelCheckpoint`` of the configuration is left out.
    """
    import_ours()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder)}
    chosen = {**quiet, **(config.get("trainer") or {}), **trainer}
    if chosen.get("logger") in (None, True):
        # As a version, a folder's name could be taken for a number: 142222773814, 12e3.
        where = {"save_dir": str(folder), "name": "", "version": "", "default_hp_metric": False}
        chosen["logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": where}
    if chosen.get("enable_checkpointing") is False:
        chosen["callbacks"] = [
            c for c in chosen.get("callbacks") or () if not c["class_path"].endswith("ModelCheckpoint")
        ]
    own: list[Callback] = []
    if resumable and chosen.get("enable_checkpointing") is not False:
        # The last checkpoint alone, replaced at the end of every epoch.
        last = ModelCheckpoint(str(folder), filename=LAST.removesuffix(".ckpt"), enable_version_counter=False)
        own = [ResumableNoise(), last]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # this is "from within Python"
        return _cli(config, chosen, own)


def _cli(config: Config, trainer: dict[str, Any], own: list[Callback]) -> LightningCLI:
    return LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        trainer_defaults={"callbacks": own},
        run=False,
        args=copy.deepcopy({**config, "trainer": trainer}),  # which is filled in place
    )
