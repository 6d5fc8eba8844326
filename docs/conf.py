"""How the documentation is built: `make docs`."""

import inspect
import pkgutil
import re
from importlib import import_module, metadata
from typing import Any

import lmc_lightning

project, author = "lmc_lightning", "the lmc_lightning authors"
release = metadata.version("lmc-lightning")
copyright = author

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"lmc_lightning {release}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # of the pages that say that they are notebooks; the code of all others runs in the tests
nb_execution_raise_on_error = True
nb_execution_timeout = -1  # a busy machine is no error
nb_execution_show_tb = True
nb_execution_in_temp = True
nb_output_stderr = "remove"
autosummary_generate = False

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!lmc_lightning\.).*"),  # other packages: linking to them would need the network
    ("py:.*", r"lmc_lightning\.(callbacks|data)\..*"),  # what is not public there has no page
    ("myst", r"\.\./.*|RESULTS\.md"),  # parts of the repository; a test looks whether they are there
]

_MODULES = re.compile(r"^<!-- modules of (\S+) -->$", re.MULTILINE)


def list_modules(app: Any, docname: str, source: list[str]) -> None:
    """A section for each module of the package that a page names."""
    source[0] = _MODULES.sub(lambda match: "\n".join(_sections(match[1])), source[0])


def _sections(package: str, level: int = 2) -> list[str]:
    sections = []
    for module in pkgutil.iter_modules(import_module(package).__path__):
        name, title = f"{package}.{module.name}", f"{'#' * level} {module.name}"
        if not module.name.startswith("_"):
            sections.append(f"{title}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n")
            sections += _sections(name, level + 1) if module.ispkg else []
    return sections


def prepare(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write abs values as |λ|, which reStructuredText takes for something else."""
    for index, line in enumerate(lines):
        parts = line.split("``")
        lines[index] = "``".join(p if i % 2 else p.replace("|", r"\|") for i, p in enumerate(parts))
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")  # or napoleon takes what is before a colon for a type


def skip_foreign(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Functions of other packages, and functions that are defaults of attributes, are no members."""
    module = getattr(obj, "__module__", None) or "lmc_lightning"
    is_default = what == "class" and inspect.isfunction(obj) and "." not in obj.__qualname__
    return True if is_default or (not module.startswith("lmc_lightning") and inspect.isroutine(obj)) else None


def find_short_name(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Docstrings call public objects by their names alone."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or target.split(".")[0] not in lmc_lightning.__all__:
        return None
    domain, place = env.get_domain("py"), node.get("refdoc")
    return domain.resolve_xref(env, place, app.builder, "obj", f"lmc_lightning.{target}", node, contnode)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", list_modules)
    app.connect("autodoc-process-docstring", prepare, priority=400)
    app.connect("autodoc-skip-member", skip_foreign)
    app.connect("missing-reference", find_short_name)
