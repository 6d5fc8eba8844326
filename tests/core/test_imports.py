import subprocess
import sys

import pytest

IMPORT_ALL = """
import importlib, pkgutil, sys
for blocked in ("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "torchvision", "matplotlib"):
    sys.modules[blocked] = None
package = importlib.import_module("lmc_lightning.{name}")
for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
    print(module.name)
"""


@pytest.mark.parametrize("name", ["core", "linalg", "landscape"])
def test_the_mathematics_imports_without_lightning_and_plotting(name: str) -> None:
    ran = subprocess.run([sys.executable, "-c", IMPORT_ALL.format(name=name)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.split()) > 1
