"""Seconds and memory of a gradient, a Hessian product and a λ_max visit, against parameters and against examples.

python -m benchmarks.scaling --json data/benchmarks/scaling.json --figure docs/images/scaling.png

Each point runs in a process of its own, so that the peak of its resident memory is its own too.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature.spectrum import spectrum

WIDTHS = {79_510: 100, 238_510: 300, 795_010: 1_000, 2_385_010: 3_000, 7_950_010: 10_000, 59_625_010: 75_000}
"""Parameters of a network 784–width–10, measured on 256 examples."""
EXAMPLES = (256, 1_024, 4_096, 16_384)
"""Measured on LeNet-5's 61,706 parameters."""


def measured(axis: str, value: int) -> dict[str, float]:
    """One point of the figure; times are CPU seconds on one thread, memory is what the work added [MiB]."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, batch = _work(axis, value)
    before = _resident()
    gradient = _timed(lambda: _gradient(module, batch))
    objective = Objective(module, [batch], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    theta = objective.theta()
    vector = torch.randn_like(theta)
    with objective.hvp(theta) as product:
        product(vector)
        found = {"gradient": gradient, "product": _timed(lambda: product(vector)), "cached": product.num_cached}
    found["product_mib"] = _resident() - before
    began = time.process_time()
    result = spectrum(
        objective, theta, num_eigenvalues=1, num_negative=0, num_probes=0, generator=torch.Generator().manual_seed(0)
    )
    visit = {"visit": time.process_time() - began, "visit_products": result.num_matvecs}
    return found | visit | {"visit_mib": _resident() - before, "params": theta.numel(), "examples": len(batch[1])}


def _work(axis: str, value: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    from lmc_lightning.models.lenet import LeNet5
    from lmc_lightning.models.mlp import MLP

    module, examples = (MLP((WIDTHS[value],)), 256) if axis == "params" else (LeNet5(), value)
    return module, (torch.randn(examples, 1, 28, 28), torch.randint(10, (examples,)))


def _gradient(module: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    for images, labels in zip(batch[0].split(128), batch[1].split(128), strict=True):
        torch.autograd.grad(F.cross_entropy(module(images), labels), list(module.parameters()))


def _timed(work: Any, repeats: int = 3) -> float:
    work()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return sorted(times)[repeats // 2]


def _resident() -> float:
    """Largest resident memory of this process so far [MiB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Two rows (seconds, MiB) by two columns (parameters, examples), all axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8, 6), sharex="col", constrained_layout=True)
    for column, (axis, label) in enumerate((("params", "parameters P"), ("examples", "examples"))):
        chosen = sorted((p for p in points if p["axis"] == axis), key=lambda p: p[axis])
        x = [p[axis] for p in chosen]
        for key, text in (("visit", "λ_max visit"), ("product", "one product Hv"), ("gradient", "one gradient")):
            axes[0, column].loglog(x, [p[key] for p in chosen], "o-", label=text)
        for key, text in (("visit_mib", "λ_max visit"), ("product_mib", "one product Hv, graphs kept")):
            axes[1, column].loglog(x, [max(p[key], 1) for p in chosen], "o-", label=text)
        if axis == "params":
            axes[1, column].loglog(x, [4 * p / 2**20 for p in x], "k:", label="one vector (P,)")
        axes[1, column].set_xlabel(label)
        axes[0, column].set_title("784–width–10, 256 examples" if axis == "params" else "LeNet-5")
    axes[0, 0].set_ylabel("CPU seconds, one thread")
    axes[1, 0].set_ylabel("peak memory added [MiB]")
    for panel in axes.flat:
        panel.grid(which="both", alpha=0.2)
        panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure what the file does not hold yet, then draw all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("data/benchmarks/scaling.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/images/scaling.png"))
    parser.add_argument("--point", nargs=2, metavar=("AXIS", "VALUE"), help="measure one point and print it")
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measured(options.point[0], int(options.point[1]))))
        return
    points = json.loads(options.json.read_text()) if options.json.is_file() else []
    for axis, values in (("params", WIDTHS), ("examples", EXAMPLES)):
        for value in values:
            if not any(p["axis"] == axis and p[axis] == value for p in points):
                command = [sys.executable, "-m", "benchmarks.scaling", "--point", axis, str(value)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                points.append({"axis": axis, **json.loads(output.splitlines()[-1])})
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(points, indent=1))
                print(points[-1], flush=True)
    draw(points, options.figure)


if __name__ == "__main__":
    main()
