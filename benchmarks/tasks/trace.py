"""The trace, and how close everybody comes to it."""

from functools import partial

import numpy as np
import torch

from benchmarks import peers
from benchmarks.harness import Contender, Found, Run, Values
from benchmarks.references import Reference
from benchmarks.tasks.eigenvalues import peer
from benchmarks.works import Work
from lmc_lightning.core.random_vectors import rademacher
from lmc_lightning.linalg.trace import trace_to_precision

PRODUCTS = 60
"""Hessian products that peers may spend where they ask."""


def contenders(work: Work) -> list[Contender]:
    """Ours to one per cent, peers at their defaults and with ``PRODUCTS`` products."""
    made = [Contender("lmc_lightning", partial(_ours, work), ours=True)]
    if peers.installed("PyHessian"):
        made.append(peer(work, "PyHessian, defaults", lambda m: _hutchinson(peers.pyhessian(m, data=work.probe), {})))
    if peers.installed("landscaper"):
        many = {"maxIter": PRODUCTS, "tol": 0.0}
        made += [
            peer(work, "landscaper, defaults", lambda m: _hutchinson(peers.landscaper(m, work.chunks), {})),
            peer(
                work,
                f"landscaper, try_cache=True, {PRODUCTS}",
                lambda m: _hutchinson(peers.landscaper(m, work.chunks, cached=True), many),
            ),
        ]
    if peers.installed("hessian-eigenthings"):
        made.append(peer(work, f"hessian-eigenthings, Hutch++, {PRODUCTS}", lambda m: _eigenthings(m, work)))
    if peers.installed("curvlinops"):
        made += [
            peer(work, f"curvlinops, {name}, {PRODUCTS}", partial(_curvlinops, work=work, function=function))
            for name, function in (("Hutch++", "hutchpp_trace"), ("XTrace", "xtrace"))
        ]
    return made


def errors(work: Work, found: Found) -> Values:
    """Relative error, and the uncertainty of the truth where that is from probes itself."""
    reference = Reference(work)
    uncertainty = {"reference_stderr": reference.trace_stderr / reference.trace} if reference.trace_stderr else {}
    return {"trace": abs(found["trace"] - reference.trace) / abs(reference.trace), **uncertainty}


def _ours(work: Work, seed: int) -> Run:
    return (
        partial(_exact, work, work.module())
        if work.recipe.piecewise_linear
        else partial(_probed, work, work.module(), seed)
    )


def _exact(work: Work, module: torch.nn.Module) -> Found:
    from lmc_lightning.landscape.curvature.exact_trace import exact_trace

    objective = work.objective(module)
    found = exact_trace(objective, objective.theta(), generator=torch.Generator().manual_seed(0))
    assert found.value is not None, found.reason
    return {"trace": found.value, "gradients": found.num_gradients}


def _probed(work: Work, module: torch.nn.Module, seed: int) -> Found:
    objective = work.objective(module)
    generator = torch.Generator().manual_seed(seed)
    with objective.hvp(objective.theta()) as product:
        found = trace_to_precision(product, lambda: rademacher(objective.num_params, generator), tolerance=0.02)
    return {"trace": found.value, "stderr": found.stderr, "products": found.num_matvecs}


def _hutchinson(made: tuple[object, peers.Counted], options: dict[str, float]) -> Found:
    """PyHessian gives the samples, landscaper their mean."""
    operator, counter = made
    return {"trace": float(np.mean(operator.trace(**options))), "products": counter.calls}  # type: ignore[attr-defined]


def _eigenthings(module: torch.nn.Module, work: Work) -> Found:
    from hessian_eigenthings import trace

    operator, counter = peers.eigenthings(module, work.chunks)
    return {
        "trace": trace(operator, num_matvecs=PRODUCTS, seed=torch.initial_seed()).estimate,
        "products": counter.calls,
    }


def _curvlinops(module: torch.nn.Module, work: Work, function: str) -> Found:
    import curvlinops

    operator, counter = peers.curvlinops(module, work.chunks, check=False)
    found = float(getattr(curvlinops, function)(operator, num_matvecs=PRODUCTS))
    return {"trace": found, "products": counter.calls}
