"""The command line: ``lmc-lightning COMMAND``."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmc_lightning.experiments import commands

_MISSING = "The command line needs jsonargparse and PyYAML: pip install 'lmc-lightning[cli]'."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 where all went well."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["fit"]:
        return _told(lambda: commands.fit(given[1:]))
    if given[:1] == ["branch"]:
        from lmc_lightning.branching.__main__ import main as branch

        return branch(given[1:])
    options = vars(_parser().parse_args(given))
    command: Callable[..., int] = options.pop("command")
    return _told(lambda: command(**options))


def _told(command: Callable[[], int]) -> int:
    """What a user can mend is one line on stderr, not a traceback."""
    try:
        return command()
    except ModuleNotFoundError as error:
        if error.name not in ("jsonargparse", "yaml"):
            raise
        sys.stderr.write(f"{_MISSING}\n")
    except BrokenPipeError:
        os._exit(0)
    except (FileNotFoundError, ValueError) as error:
        sys.stderr.write(f"lmc-lightning: {error}\n")
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmc-lightning",
        description="Loss-landscape geometry of networks while they train.",
        epilog="A configuration is one of LightningCLI: model, data, trainer; fit saves it as config.yaml of the run.",
    )
    add = parser.add_subparsers(required=True, metavar="COMMAND").add_parser
    add("fit", help="train any LightningModule with our callbacks, as LightningCLI does: fit --help", add_help=False)
    add("branch", help="train children of a family or a snapshot in this process: branch --help", add_help=False)
    _measure(add)
    _studies(add)
    report = _command(add, "report", commands.report, "a static page of a run or a study: figures, tables, definitions")
    report.add_argument("folder", type=Path, help="of the run, e.g. lightning_logs/version_0, or of the study")
    report.add_argument("--output", type=Path, default=Path("report.html"))
    view = _command(add, "view", commands.view, "TensorBoard on a folder of runs, with settings that show all figures")
    view.add_argument("logdir", nargs="?", default="lightning_logs")
    view.add_argument("--port", type=int, default=6006)
    demo = _command(add, "demo", commands.demo, "the quickstart: two minutes of training and measuring on the digits")
    demo.add_argument("--log-dir", default="lightning_logs")
    demo.add_argument("--small", action="store_true", help="two epochs, few examples")
    return parser


def _measure(add: Any) -> None:
    measure = _command(add, "measure", commands.measure, "what callbacks give for checkpoints, or folders of them")
    _add_run(measure)
    measure.add_argument("checkpoints", nargs="+", type=Path, help="files, or folders that are searched for *.ckpt")
    measure.add_argument(
        "--callback", action="append", default=[], help="name, or name with arguments: 'Sharpness(num_samples=4)'"
    )
    measure.add_argument("--output", type=Path, help="a .csv or .parquet file for the table")
    barrier = _command(add, "barrier", commands.barrier, "the barrier on the line between two checkpoints")
    _add_run(barrier)
    barrier.add_argument("checkpoints", nargs=2, type=Path)
    barrier.add_argument("--split", default="val", choices=["train", "val", "test"])
    barrier.add_argument("--metric", default="loss", choices=["loss", "error"])
    barrier.add_argument("--num-points", type=int, default=25)
    barrier.add_argument("--figure", type=Path, help="a .png file for the curve")
    doctor = _command(add, "doctor", commands.doctor, "what will and will not work with a module and its data")
    _add_run(doctor)


def _studies(add: Any) -> None:
    sweep = _command(add, "sweep", commands.sweep, "do what is left of a study")
    sweep.add_argument("plan", type=Path, help="YAML: base, grid, list, zip, seeds, branches, pairs, variants")
    sweep.add_argument("--variant", action="append", default=[], dest="variants", help="of the plan, e.g. small")
    sweep.add_argument("--folder", type=Path, help="of the results (studies/<name>)")
    sweep.add_argument("--dry-run", action="store_true", help="say what there is to do, how long it takes, and disk")
    sweep.add_argument("--time-one", action="store_true", help="do one cell and one child, and say how long all takes")
    sweep.add_argument("--task", metavar="ID", help="do one task only")
    sweep.add_argument("--cell", metavar="ID", dest="task", help="the same")
    sweep.add_argument("--list", action="store_true", dest="listed", help="the ids of all tasks")
    sweep.add_argument("--executor", default="inline", choices=["inline", "ray"])
    sweep.add_argument("--workers", type=int, help="of a Ray that is started here")
    sweep.add_argument("--address", help="of a running Ray cluster, e.g. auto")
    sweep.add_argument("--gpus", type=float, default=0, help="for each task on Ray, e.g. 0.25")
    sweep.add_argument("--emit", choices=["slurm"], help="write a script of job arrays to standard output")
    collect = _command(add, "collect", commands.collect, "one table of all that studies have found")
    collect.add_argument("folders", nargs="+", type=Path)
    collect.add_argument("--output", type=Path, required=True, help="a .csv or .parquet file")
    collect.add_argument("--runs", action="store_true", help="one row a run, in place of one a number")
    collect.add_argument("--epochs", type=int, nargs="*", help="with --runs: the visits wanted (the last)")


def _command(add: Any, name: str, command: Callable[..., int], about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = add(name, help=about, description=about)
    parser.set_defaults(command=command)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", "-c", type=Path, required=True, help="of the run: its config.yaml")
    parser.add_argument("--num-examples", type=int, default=2048)
