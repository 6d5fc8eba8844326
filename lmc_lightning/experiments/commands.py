"""What each command of the command line does."""

import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from lmc_lightning.experiments.view import deep_link, tensorboard_command


def tell(text: object) -> None:
    """A line for the user."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def fit(arguments: Sequence[str]) -> int:
    """LightningCLI with this package's classes known by name; the configuration is saved with the run."""
    import lightning.pytorch as pl
    from lightning.pytorch.cli import LightningCLI

    from lmc_lightning.experiments.plans.classes import import_ours

    import_ours()
    LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        args=["fit", *arguments],
    )
    return 0


def _run(config: Path) -> Any:
    """Module and data of a saved configuration."""
    import yaml

    from lmc_lightning.experiments.plans.build import build
    from lmc_lightning.experiments.work.measures import Trained

    content = yaml.safe_load(config.read_text())
    content = content.get("fit", content)
    wanted = {key: content[key] for key in ("seed_everything", "model", "data") if key in content}
    with TemporaryDirectory() as folder:
        off = {"logger": False, "enable_checkpointing": False, "callbacks": []}
        objects = build({"seed_everything": 0, **wanted, "trainer": off}, Path(folder), resumable=False)
    return Trained(objects.model, objects.datamodule)


def measure(
    config: Path, checkpoints: Sequence[Path], callback: Sequence[str], num_examples: int, output: Path | None
) -> int:
    """A row for each checkpoint, with a column for each number."""
    import lmc_lightning

    run, rows = _run(config), []
    batches = run.batches("train", num_examples)
    for path in [file for given in checkpoints for file in _checkpoints(given)]:
        callbacks = [_callback(text, num_examples) for text in callback or ("HessianSpectrum", "Sharpness")]
        found = lmc_lightning.measure(run.module, batches, callbacks, checkpoint=path)
        rows.append({"checkpoint": str(path), **found})
    return _give(pd.DataFrame(rows), output)


def _checkpoints(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*.ckpt"))
    if not found:
        raise FileNotFoundError(f"There is neither a file nor a folder with *.ckpt files at {path}.")
    return found


def _callback(text: str, num_examples: int) -> Any:
    """A callback of this package from its name, with arguments or without."""
    import lmc_lightning

    try:
        node = ast.parse(text, mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name = ast.unparse(call.func)
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"Expected a callback like Sharpness or 'Sharpness(num_samples=4)', got {text!r}.") from error
    if name not in lmc_lightning.__all__:
        raise ValueError(f"This package has no {name!r}. It has {', '.join(lmc_lightning.__all__)}.")
    return getattr(lmc_lightning, name)(**{"num_examples": num_examples, **options})


def barrier(
    config: Path,
    checkpoints: Sequence[Path],
    split: str,
    metric: str,
    num_points: int,
    num_examples: int,
    figure: Path | None,
) -> int:
    """Every convention of the barrier, with its standard error."""
    from lmc_lightning import interpolation_barrier
    from lmc_lightning.callbacks.offline.measure import with_checkpoint
    from lmc_lightning.landscape.paths.barrier import DEFINITIONS
    from lmc_lightning.plotting.barriers import plot_barrier_curves
    from lmc_lightning.plotting.style import figure_of

    run = _run(config)
    first, second = (with_checkpoint(run.module, path) for path in checkpoints)
    found = interpolation_barrier(
        first,
        second,
        run.batches(split, num_examples),
        train_dataloader=run.batches("train", num_examples),
        num_points=num_points,
        num_examples=num_examples,
        metric=metric,
    )
    rows = [{"definition": n, "value": getattr(found, n), "stderr": found.stderr_data[n]} for n in DEFINITIONS]
    if figure is not None:
        figure_of(plot_barrier_curves([(metric, found)])).savefig(figure)
    return _give(pd.DataFrame(rows), None)


def doctor(config: Path, num_examples: int) -> int:
    """What was found out, a line each; 1 where something cannot be measured."""
    from lmc_lightning.experiments.doctor import doctor as examine

    run = _run(config)
    diagnosis = examine(run.module, run.batches("train", min(num_examples, 64)), datamodule=run.datamodule)
    tell(diagnosis)
    return 0 if diagnosis.is_healthy else 1


def sweep(
    plan: Path,
    variants: Sequence[str],
    folder: Path | None,
    dry_run: bool,
    time_one: bool,
    task: str | None,
    listed: bool,
    executor: str,
    workers: int | None,
    address: str | None,
    gpus: float,
    emit: str | None,
) -> int:
    """The number of tasks that are not completed afterwards, at most 1."""
    from lmc_lightning.experiments.plans.study import Study
    from lmc_lightning.experiments.results.hparams import write_hparams
    from lmc_lightning.experiments.work import executors
    from lmc_lightning.experiments.work.forecast import describe, forecast, sample
    from lmc_lightning.experiments.work.slurm import slurm_script
    from lmc_lightning.experiments.work.tasks import Outcome, tasks_of

    study = Study.load(plan, variants)
    tasks, folder = tasks_of(study), folder or Path("studies") / study.name
    if emit is not None:
        tell(slurm_script(plan, tasks, folder, name=study.name, variants=variants, python=sys.executable))
        return 0
    if listed:
        for each in tasks:
            tell(each.id)
        return 0
    chosen = tasks if task is None else [t for t in tasks if t.id == task]
    if not chosen:
        raise ValueError(f"The study {study.name} has no task {task!r}. `sweep {plan} --list` names them.")
    chosen = [] if dry_run else sample(tasks) if time_one else chosen
    ended = []

    def told(outcome: Outcome) -> None:
        ended.append(outcome)
        tell(describe(outcome))

    if executor == "ray" and chosen:
        options: dict[str, Any] = {"workers": workers, "address": address, "gpus_per_task": gpus}
        executors.run_on_ray(study, chosen, folder, told, **options)
    else:
        executors.run_inline(study, chosen, folder, told)
    tell(forecast(tasks, folder))
    if ended and task is None:
        write_hparams(folder)
    return 1 if any(outcome.status != "completed" for outcome in ended) else 0


def collect(folders: Sequence[Path], output: Path, runs: bool, epochs: Sequence[int] | None) -> int:
    """The table of one study or of several, under one another; TensorBoard hears of their hyper-parameters."""
    from lmc_lightning.experiments.collect import collect as of_study
    from lmc_lightning.experiments.collect import runs as by_run
    from lmc_lightning.experiments.results.hparams import write_hparams

    tables = [of_study(folder) for folder in folders]
    for folder, table in zip(folders, tables, strict=True):
        write_hparams(folder, table=table)
    tables = [by_run(table, epochs) if runs else table for table in tables]
    named = [t.assign(study=f.name) for t, f in zip(tables, folders, strict=True)] if len(tables) > 1 else tables
    return _give(pd.concat(named, ignore_index=True), output)


def _give(table: pd.DataFrame, output: Path | None) -> int:
    from lmc_lightning.experiments.collect import write_table

    if output is None:
        tell(table.to_string(index=False))
    else:
        write_table(table, output)
        tell(f"{len(table)} rows in {output}")
    return 0


def report(folder: Path, output: Path) -> int:
    """A page that needs no server."""
    from lmc_lightning.experiments.results.report import report as write_report

    tell(write_report(folder, output))
    return 0


def view(logdir: str, port: int) -> int:
    """TensorBoard in place of this process."""
    command = tensorboard_command(logdir, "--port", str(port))
    tell(deep_link(port))
    os.execv(command[0], command)


def demo(log_dir: str, small: bool) -> int:
    """The quickstart on the digits."""
    from lmc_lightning.experiments.quickstart import main

    return main(["--log-dir", log_dir, *(["--small"] if small else [])])
