"""What pages tell readers to type exists: commands, options, targets, extras, files."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmc_lightning.branching import __main__ as command_line
from lmc_lightning.experiments import commands
from lmc_lightning.experiments.cli import main
from tests.docs.pages import ROOT, blocks, name_of, pages

SHELL = ("console", "bash", "")
COMMANDS = ("fit", "measure", "barrier", "doctor", "sweep", "collect", "report", "view", "demo")


def lines() -> list[Any]:
    """Every command of every page, continued lines joined and comments taken off."""
    found = []
    for page in pages():
        for block in blocks(page):
            code = block.code.replace("\\\n", " ") if block.language in SHELL else ""
            for line in code.splitlines():
                if shlex.split(line, comments=not line.startswith("#SBATCH")):
                    found.append(pytest.param(line, id=f"{name_of(page)}: {line.split('  ')[0]}"))
    return found


@pytest.fixture(autouse=True)
def _nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMMANDS:
        monkeypatch.setattr(commands, name, lambda *given, **options: 0)
    for name in ("finish_family", "train_from_snapshot"):
        monkeypatch.setattr(command_line, name, lambda *given: (_Nobody(), "trunk"))


class _Nobody:
    """A family of which nothing is left to train."""

    children: tuple[()] = ()
    status = "completed"

    def node(self, name: str) -> "_Nobody":
        return self


@pytest.mark.parametrize("line", lines())
def test_a_command_is_understood(line: str) -> None:
    words = shlex.split(line.split(" > ")[0], comments=not line.startswith("#SBATCH"))
    program = words[0]
    assert program in CHECKS, f"Nobody checks {program!r}: write it as text, or teach this test."
    CHECKS[program](words[1:])


def ours(arguments: list[str]) -> None:
    """Parsed by the command's own parser."""
    assert main(arguments) == 0


def python(arguments: list[str]) -> None:
    """A module or script that exists, with options that it names."""
    if arguments[:2] == ["-m", "pip"]:
        pip(arguments[2:])
    elif arguments[:2] == ["-m", "lmc_lightning.branching"]:
        ours(["branch", *arguments[2:]])
    elif arguments[:3] == ["-m", "pytest", "-m"]:
        assert f'"{arguments[3]}:' in (ROOT / "pyproject.toml").read_text()
    else:
        named = arguments[1] if arguments[0] == "-m" else arguments[0]
        path = ROOT / (named.replace(".", "/") if arguments[0] == "-m" else named)
        sources = [p for p in (path, path.with_suffix(".py"), path / "__main__.py") if p.is_file()]
        assert sources, f"There is no {named}."
        source = "".join(p.read_text() for p in [*sources, *path.parent.glob("data/download.py")])
        assert [flag for flag in arguments if flag.startswith("--") and f'"{flag}"' not in source] == []


def pip(arguments: list[str]) -> None:
    """Extras and files of requirements that exist."""
    assert arguments[0] == "install"
    config = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = re.findall(r"^(\w+) = \[", config.split("\n[")[0], flags=re.MULTILINE)
    for word in arguments[1:]:
        wanted = re.fullmatch(r"(?:lmc-lightning|\.)\[([\w,]+)\]", word)
        assert wanted is None or set(wanted[1].split(",")) <= set(extras)
        assert not word.endswith(".txt") or (ROOT / word).is_file()


def make(arguments: list[str]) -> None:
    """A target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in arguments)


def ray(arguments: list[str]) -> None:
    """A command of Ray that has these options."""
    from ray.scripts.scripts import cli

    options = {name for parameter in cli.commands[arguments[0]].params for name in parameter.opts}
    own = arguments[1 : arguments.index("--")] if "--" in arguments else arguments[1:]
    assert {word.split("=")[0] for word in own if word.startswith("--")} <= options
    if "--" in arguments:
        test_a_command_is_understood(shlex.join(arguments[arguments.index("--") + 1 :]))


def bash(arguments: list[str]) -> None:
    """A script that ``sweep --emit slurm`` makes, with options for sbatch."""
    slurm(arguments[1:])


def slurm(arguments: list[str]) -> None:
    """Options that sbatch is documented to have."""
    known = {"--nodes", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-node", "--partition", "--gpus", "--time"}
    assert {word.split("=")[0] for word in arguments} <= known


def written(arguments: list[str]) -> None:
    """By us, in the form that its own tests check."""


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "lmc-lightning": ours,
    "python": python,
    ".venv/bin/python": python,
    "pip": pip,
    "make": make,
    "ray": ray,
    "bash": bash,
    "#SBATCH": slurm,
    "tensorboard": written,
}


def test_what_is_checked_would_be_seen_if_it_were_wrong() -> None:
    for wrong in ("lmc-lightning sweep", "lmc-lightning measure --depth 3", "lmc-lightning toast"):
        with pytest.raises(SystemExit):
            test_a_command_is_understood(wrong)
    for wrong in ("make tea", "pip install 'lmc-lightning[moon]'", "python -m benchmarks.toast", "ray start --moon"):
        with pytest.raises(AssertionError):
            test_a_command_is_understood(wrong)


LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = [a or b for a, b in LINK.findall(prose)]
    local = [t.split("#")[0] for t in targets if not re.match(r"https?:|mailto:|#", t)]
    assert [t for t in local if not (page.parent / t).exists()] == []
