"""The layout of the package as rules: who may import whom, and what no module may do."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lmc_lightning"
MODULES = sorted(PACKAGE.rglob("*.py"))

ALLOWED = {
    "types": set(),
    "core": {"types"},
    "linalg": {"types", "core"},  # core for its random vectors only, see below
    "landscape": {"types", "core", "linalg"},
    "branching": {"types", "core"},
    "schedule": set(),
    "loggers": {"core"},
    "media": {"core", "plotting", "loggers"},
    "tables": set(),
    "recording": {"core", "loggers", "media", "tables"},
    "summary": {"recording"},
    "plotting": {"landscape", "linalg"},
    "callbacks": {
        "types",
        "core",
        "linalg",
        "landscape",
        "branching",
        "schedule",
        "recording",
        "loggers",
        "media",
        "plotting",
        "summary",
    },
    "optim": set(),
    "models": {"optim"},
    "data": set(),
    "experiments": {
        "types",
        "core",
        "landscape",
        "branching",
        "recording",
        "tables",
        "loggers",
        "plotting",
        "summary",
        "callbacks",
        "models",
        "data",
    },
}
LIGHTNING_IN = ("callbacks", "branching", "recording", "models/classifier.py", "data", "experiments")
PRIVATE_IN = ("callbacks/bridge", "branching", "core/glassbox.py", "core/repairs.py")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, imported name) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def is_in(path: Path, places: tuple[str, ...]) -> bool:
    return path.relative_to(PACKAGE).as_posix().startswith(places)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    ours = {m.split(".")[1] for m, _ in imports(path) if m.startswith("lmc_lightning.")}
    assert ours <= ALLOWED[part] | {part}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_lightning_and_matplotlib_stay_in_their_places(path: Path) -> None:
    roots = {m.split(".")[0] for m, _ in imports(path)}
    if not is_in(path, LIGHTNING_IN):
        assert not roots & {"lightning", "pytorch_lightning"}
    if part_of(path) not in ("plotting", "media", "recording", "callbacks"):
        assert "matplotlib" not in roots


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_private_name_of_another_module_is_imported(path: Path) -> None:
    if is_in(path, PRIVATE_IN):
        return
    private = [(m, n) for m, n in imports(path) if is_private(n) or any(map(is_private, m.split(".")))]
    assert not [p for p in private if p[0] != "torch.utils._python_dispatch"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_modules_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert (node.end_lineno or 0) - first.lineno < 60, f"{node.name} is too long"


def lines_without_docstrings(text: str) -> int:
    """Lines of a module, blank ones and imports included, but those of its docstrings."""
    strings = [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return len(text.splitlines()) - sum((s.end_lineno or s.lineno) - s.lineno + 1 for s in strings)


def test_docstrings_are_no_lines() -> None:
    text = (
        '"""Of a module,\nin two lines."""\n\nsize = 1\n"""Of it."""\n\n\ndef f():\n    """Of f."""\n    return "no"\n'
    )
    assert lines_without_docstrings(text) == 6


@pytest.mark.parametrize("path", sorted((PACKAGE / "callbacks").glob("*.py")), ids=lambda p: p.name)
def test_callbacks_are_thin(path: Path) -> None:
    length, most = lines_without_docstrings(path.read_text()), 250 if path.name == "base.py" else 150
    assert length <= most, f"callbacks/{path.name} has {length} lines without docstrings, of at most {most}."


def test_every_part_of_the_package_has_its_rule() -> None:
    parts = {part_of(p) for p in MODULES} - {"__init__"}
    assert parts <= set(ALLOWED)


IN_ORDER = {
    "landscape": (
        "statistics",
        "sharpness",
        "curvature",
        "paths",
        "alignment",
        "similarity",
        "volume",
        "surface",
        "trajectory",
    ),
    "branching": ("family", "forks", "traces", "children"),
    "experiments": ("plans", "work", "results"),
    "callbacks": ("bridge", "visits", "spectrum", "surface", "trajectory", "pairs", "offline"),
}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_each_folder_of_a_part_uses_those_before_it(path: Path) -> None:
    part, *place = path.relative_to(PACKAGE).parts
    if part in IN_ORDER and len(place) == 2:
        order = IN_ORDER[part]
        used = {m.split(".")[2] for m, _ in imports(path) if m.startswith(f"lmc_lightning.{part}.")}
        assert all(order.index(group) <= order.index(place[0]) for group in used & {*order})
