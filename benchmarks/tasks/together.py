"""Eigenvalues, trace and density: from one call of ours, from three calls of a peer."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import peers
from benchmarks.harness import Contender, Found, Run, Values
from benchmarks.references import Reference
from benchmarks.tasks.eigenvalues import arpack, peer, products_needed
from benchmarks.tasks.trace import PRODUCTS
from benchmarks.works import Work
from lmc_lightning.landscape.curvature.spectrum import spectrum

PROBES, STEPS = 8, 24
"""Of the density, everywhere."""


def contenders(work: Work) -> list[Contender]:
    """The top five to 1e-3, the trace from ``PRODUCTS`` products, a density of ``PROBES`` × ``STEPS`` products."""
    made = [Contender("lmc_lightning", partial(_ours, work), ours=True)]
    if peers.installed("PyHessian"):
        made.append(peer(work, "PyHessian", lambda m: _pyhessian(peers.pyhessian(m, data=work.probe))))
    if peers.installed("landscaper"):
        made.append(
            peer(
                work, "landscaper, try_cache=True", lambda m: _pyhessian(peers.landscaper(m, work.chunks, cached=True))
            )
        )
    if peers.installed("hessian-eigenthings"):
        made.append(peer(work, "hessian-eigenthings", partial(_eigenthings, work=work)))
    if peers.installed("curvlinops"):
        made.append(peer(work, "curvlinops", partial(_curvlinops, work=work)))
    return made


def errors(work: Work, found: Found) -> Values:
    """Relative errors of the eigenvalues (the largest of five) and of the trace."""
    reference = Reference(work)
    values = np.sort(np.asarray(found["eigenvalues"], dtype=float))[::-1]
    return {
        "eigenvalues": float(np.max(np.abs(values - reference.top[:5]) / np.abs(reference.top[:5]))),
        "trace": abs(found["trace"] - reference.trace) / abs(reference.trace),
    }


def _ours(work: Work, seed: int) -> Run:
    module = work.module()

    def run() -> Found:
        objective = work.objective(module)
        generator = torch.Generator().manual_seed(seed)
        result = spectrum(
            objective, objective.theta(), num_negative=0, num_probes=PROBES, num_steps=STEPS, generator=generator
        )
        return {
            "eigenvalues": result.eigenvalues.numpy(),
            "trace": result.trace,
            "products": result.num_matvecs,
        }

    return run


def _pyhessian(made: tuple[Any, peers.Counted]) -> Found:
    operator, counter = made
    eigenvalues, _ = operator.eigenvalues(top_n=5)
    trace = float(np.mean(operator.trace(maxIter=PRODUCTS, tol=0.0)))
    operator.density(iter=STEPS, n_v=PROBES)
    return {"eigenvalues": eigenvalues, "trace": trace, "products": counter.calls}


def _eigenthings(module: nn.Module, work: Work) -> Found:
    from hessian_eigenthings import lanczos, spectral_density, trace

    operator, counter = peers.eigenthings(module, work.chunks)
    seed = torch.initial_seed()
    pairs = lanczos(operator, k=5, max_iter=products_needed(work, 5), which="LA", seed=seed)
    found = trace(operator, num_matvecs=PRODUCTS, seed=seed).estimate
    spectral_density(operator, num_runs=PROBES, lanczos_steps=STEPS, seed=seed)
    return {"eigenvalues": pairs.eigenvalues.numpy(), "trace": found, "products": counter.calls}


def _curvlinops(module: nn.Module, work: Work) -> Found:
    from curvlinops import lanczos_approximate_spectrum, xtrace

    operator, counter = made = peers.curvlinops(module, work.chunks, check=False)
    eigenvalues = arpack(made, 5, tol=1e-3)["eigenvalues"]
    trace = float(xtrace(operator, num_matvecs=PRODUCTS))
    lanczos_approximate_spectrum(operator, STEPS, num_repeats=PROBES)
    return {"eigenvalues": eigenvalues, "trace": trace, "products": counter.calls}
