"""A blueprint as a file, from which children are built in other processes.

The file is a pickle: whoever loads it runs what it holds. Load only what you or those you trust have written.
"""

import pickle
import runpy
import sys
import types
from pathlib import Path
from typing import Any, BinaryIO

from lmc_lightning.branching.children.blueprint import Blueprint
from lmc_lightning.branching.family.storage import DamagedFileError
from lmc_lightning.core.files import write_atomic

BLUEPRINT = "blueprint.pkl"


class _Pickler(pickle.Pickler):
    """Leaves out the trunk's trainer, to which copies lead back, and what data sets can read again."""

    def __init__(self, file: Any, shared: list[Any]) -> None:
        super().__init__(file)
        self._shared = {id(value) for value in shared}

    def persistent_id(self, value: Any) -> str | None:
        return "trainer" if id(value) in self._shared else None


class _Unpickler(pickle.Unpickler):
    """Finds what was defined in the script that was run, by running it under another name, as worker processes do."""

    script: str | None = None

    def persistent_load(self, pid: Any) -> None:
        return None

    def find_class(self, module: str, name: str) -> Any:
        if module != "__main__" or self.script in (None, main_script()):
            return super().find_class(module, name)
        if "__mp_main__" not in sys.modules:
            sys.modules["__mp_main__"] = types.ModuleType("__mp_main__")
            vars(sys.modules["__mp_main__"]).update(runpy.run_path(self.script, run_name="__mp_main__"))
        return super().find_class("__mp_main__", name)


def main_script() -> str | None:
    """The script that this process runs."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    return None if script is None else str(Path(script).resolve())


def save_blueprint(blueprint: Blueprint, path: Path, num_processes: int = 1) -> None:
    """Write what children are built from, so that another process can build them.

    Raises:
        TypeError: a part does not pickle; the message names it. Or several processes train children together.
    """
    if num_processes > 1:
        raise TypeError(f"children of {num_processes} processes are trained by these only")
    for what, part in blueprint.parts().items():
        try:
            _Pickler(_Nowhere(), blueprint.shared).dump(part)
        except Exception as error:
            raise TypeError(
                f"{what} does not pickle ({type(error).__name__}: {error}), so that children can be trained in this "
                "process only. Define classes and functions at the top level of a module, and leave out of "
                "`__getstate__` what refuses."
            ) from error

    def write(file: BinaryIO) -> None:
        pickle.dump(main_script(), file)
        _Pickler(file, blueprint.shared).dump(blueprint)

    write_atomic(path, write)


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


def load_blueprint(path: Path) -> Blueprint:
    """Read what :func:`save_blueprint` wrote. Runs code from the file.

    Raises:
        FileNotFoundError: the trunk's module, data or callbacks did not pickle.
        DamagedFileError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the trunk's module, data or callbacks did not pickle, as was said when it was "
            "trained. Its children can be trained by `CheckpointBranching.run_children` in the trunk's process."
        )
    with open(path, "rb") as file:
        try:
            script = pickle.load(file)
            unpickler = _Unpickler(file)
            unpickler.script = script
            blueprint: Blueprint = unpickler.load()
        except (EOFError, pickle.UnpicklingError) as error:
            raise DamagedFileError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    blueprint.reload_data()
    return blueprint
