"""Small hostile LightningModules, each with one peculiarity of real projects, and what measuring it comes to."""

import inspect
from types import ModuleType

from tests.zoo import batches, layers, optimization, outputs, parameters, state
from tests.zoo.module import ZooModule


def _inhabitants(home: ModuleType) -> list[type[ZooModule]]:
    found = [c for c in vars(home).values() if isinstance(c, type) and issubclass(c, ZooModule)]
    return [c for c in found if c.__module__ == home.__name__ and not inspect.isabstract(c)]


ZOO = [cls for home in (outputs, batches, state, parameters, layers, optimization) for cls in _inhabitants(home)]
"""Every module of the zoo."""
