"""Largest eigenvalues: λ_max at everybody's defaults, λ_max with as many products as we need, and the top five."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import peers
from benchmarks.harness import Contender, Found, Run, Values
from benchmarks.references import Reference
from benchmarks.works import Work, mean_loss
from lmc_lightning import HessianSpectrum, measure
from lmc_lightning.landscape.curvature.spectrum import spectrum

Task = Callable[[nn.Module], Found]


def defaults(work: Work) -> list[Contender]:
    """λ_max, everybody called as the documentation calls it."""
    made = [
        Contender("lmc_lightning", partial(ours, work, 1), ours=True),
        Contender("lmc_lightning, tolerance=0.03", partial(ours, work, 1, tolerance=0.03)),
        Contender("lmc_lightning, as a callback", partial(_callback, work)),
    ]
    if peers.installed("PyHessian"):
        made.append(peer(work, "PyHessian", lambda m: _power(peers.pyhessian(m, data=work.probe), {})))
    if peers.installed("landscaper"):
        made.append(peer(work, "landscaper", lambda m: _power(peers.landscaper(m, work.chunks), {})))
    if peers.installed("hessian-eigenthings"):
        made.append(peer(work, "hessian-eigenthings", lambda m: _lanczos(peers.eigenthings(m, work.chunks), {})))
    if peers.installed("curvlinops"):
        made.append(peer(work, "curvlinops", lambda m: arpack(peers.curvlinops(m, work.chunks), 1)))
    return made


def tuned(work: Work) -> list[Contender]:
    """λ_max, everybody stopped after the number of products that we need, each in its fastest way."""
    budget = products_needed(work, 1)
    power = {"maxIter": budget, "tol": 0.0}
    made = [Contender("lmc_lightning", partial(ours, work, 1), ours=True)]
    if peers.installed("PyHessian"):
        made.append(peer(work, "PyHessian", lambda m: _power(peers.pyhessian(m, data=work.probe), power)))
    if peers.installed("landscaper"):
        cached = partial(peers.landscaper, loader=work.chunks, cached=True)
        made.append(peer(work, "landscaper, try_cache=True", lambda m: _power(cached(m), power)))
    if peers.installed("hessian-eigenthings"):
        lanczos = {"k": 1, "max_iter": budget, "which": "LA"}
        made.append(peer(work, "hessian-eigenthings", lambda m: _lanczos(peers.eigenthings(m, work.chunks), lanczos)))
    if peers.installed("curvlinops"):
        unchecked = partial(peers.curvlinops, loader=work.chunks, check=False)
        limits = {"ncv": budget, "maxiter": 1, "tol": 1e-3}
        made.append(peer(work, "curvlinops, eigsh", lambda m: arpack(unchecked(m), 1, **limits)))
    return made


def top_five(work: Work) -> list[Contender]:
    """The five largest to 1e-3, peers told to reach that."""
    budget = products_needed(work, 5)
    made = [Contender("lmc_lightning", partial(ours, work, 5), ours=True)]
    if peers.installed("PyHessian"):
        made.append(peer(work, "PyHessian", lambda m: _power(peers.pyhessian(m, data=work.probe), {"top_n": 5})))
    if peers.installed("landscaper"):
        cached = partial(peers.landscaper, loader=work.chunks, cached=True)
        made.append(peer(work, "landscaper, try_cache=True", lambda m: _power(cached(m), {"top_n": 5})))
    if peers.installed("hessian-eigenthings"):
        lanczos = {"k": 5, "max_iter": budget, "which": "LA"}
        made.append(peer(work, "hessian-eigenthings", lambda m: _lanczos(peers.eigenthings(m, work.chunks), lanczos)))
    if peers.installed("curvlinops"):
        unchecked = partial(peers.curvlinops, loader=work.chunks, check=False)
        made.append(peer(work, "curvlinops, eigsh", lambda m: arpack(unchecked(m), 5, tol=1e-3)))
    return made


def errors(work: Work, found: Found) -> Values:
    """Largest relative error of the eigenvalues."""
    values = np.sort(np.asarray(found["eigenvalues"], dtype=float))[::-1]
    truth = Reference(work).top[: len(values)]
    return {"eigenvalues": float(np.max(np.abs(values - truth) / np.abs(truth)))}


def ours(work: Work, num_eigenvalues: int, seed: int, *, tolerance: float = 1e-3) -> Run:
    """The pairs at the top alone, by default at the default tolerance of their residuals."""
    module = work.module()

    def run() -> Found:
        objective = work.objective(module)
        result = spectrum(
            objective,
            objective.theta(),
            num_eigenvalues=num_eigenvalues,
            num_negative=0,
            num_probes=0,
            tolerance=tolerance,
            generator=torch.Generator().manual_seed(seed),
        )
        return {
            "eigenvalues": result.eigenvalues.numpy(),
            "products": result.num_matvecs,
            "residual": float(result.residuals.max()),
            "converged": float(result.converged),
        }

    return run


@lru_cache(maxsize=4)
def products_needed(work: Work, num_eigenvalues: int) -> int:
    """How many products we spend."""
    return int(ours(work, num_eigenvalues, 0)()["products"])


def _callback(work: Work, seed: int) -> Run:
    module = work.module()

    def run() -> Found:
        callback = HessianSpectrum(num_eigenvalues=1, num_negative=0, num_probes=0, num_examples=None, seed=seed)
        found = measure(module, work.chunks, [callback], loss_fn=mean_loss)
        return {"eigenvalues": [found["hessian/lambda_max"]]}

    return run


def peer(work: Work, name: str, task: Task) -> Contender:
    """A peer's whole work on a fresh network, from the making of its operator on."""

    def prepare(seed: int) -> Run:
        module = work.module()

        def run() -> Found:
            with peers.differentiable_attention():
                return task(module)

        return run

    return Contender(name, prepare)


def _power(made: tuple[Any, peers.Counted], options: dict[str, Any]) -> Found:
    """Power iteration with deflation, of PyHessian and landscaper."""
    operator, counter = made
    eigenvalues, _ = operator.eigenvalues(**options)
    return {"eigenvalues": eigenvalues, "products": counter.calls}


def _lanczos(made: tuple[Any, peers.Counted], options: dict[str, Any]) -> Found:
    """hessian-eigenthings; at its defaults ten pairs of largest size, of which λ_max is the largest."""
    from hessian_eigenthings import lanczos

    operator, counter = made
    found = lanczos(operator, seed=torch.initial_seed(), **options).eigenvalues.sort(descending=True).values
    wanted = options.get("k", 1)
    return {"eigenvalues": found[:wanted].numpy(), "products": counter.calls}


def arpack(made: tuple[Any, peers.Counted], k: int, **options: Any) -> Found:
    """curvlinops as its documentation has it: SciPy's ``eigsh``."""
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    operator, counter = made
    try:
        found = eigsh(operator.to_scipy(), k=k, which="LA", return_eigenvectors=False, **options)
    except ArpackNoConvergence as error:
        found = error.eigenvalues
    return {"eigenvalues": found if len(found) else [np.nan] * k, "products": counter.calls}
