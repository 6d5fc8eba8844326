"""One Hessian-vector product at a fixed point, after the first one, beside one gradient of the same loss."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.harness import Contender, Found, Run, Values
from benchmarks.references import Reference
from benchmarks.works import Batch, Work


def contenders(work: Work) -> list[Contender]:
    """Ours, gradients as the unit, and every peer in the ways in which it may be called."""
    vector = direction(work)

    def peer(name: str, make: Callable[[nn.Module], Callable[[], Tensor]]) -> Contender:
        def prepare(seed: int) -> Run:
            with peers.differentiable_attention():
                product = make(work.module())
                product()

            def run() -> Found:
                with peers.differentiable_attention():
                    for _ in range(work.recipe.products):
                        found = product()
                return {"product": found}

            return run

        return Contender(name, prepare)

    whole = [work.probe]
    made = [
        Contender("lmc_lightning", lambda seed: _ours(work, vector), ours=True),
        Contender("one gradient", lambda seed: _gradients(work, work.chunks)),
        Contender("one gradient, one batch", lambda seed: _gradients(work, whole)),
    ]
    if peers.installed("PyHessian"):
        made += [
            peer("PyHessian, one batch (graph kept)", lambda m: _pyhessian_batch(m, work.probe, vector)),
            peer("PyHessian, loader", lambda m: _listed(peers.pyhessian(m, loader=work.chunks)[1], m, vector)),
        ]
    if peers.installed("landscaper"):
        made += [
            peer("landscaper", lambda m: _listed(peers.landscaper(m, work.chunks)[1], m, vector)),
            peer(
                "landscaper, try_cache=True",
                lambda m: _listed(peers.landscaper(m, work.chunks, cached=True)[1], m, vector),
            ),
        ]
    if peers.installed("hessian-eigenthings"):
        made.append(peer("hessian-eigenthings", lambda m: _flat(peers.eigenthings(m, work.chunks)[0].matvec, vector)))
    if peers.installed("curvlinops"):
        made += [
            peer("curvlinops", lambda m: _flat(peers.curvlinops(m, work.chunks, check=False)[0].__matmul__, vector)),
            peer(
                "curvlinops, one batch", lambda m: _flat(peers.curvlinops(m, whole, check=False)[0].__matmul__, vector)
            ),
        ]
    return made


def errors(work: Work, found: Found) -> Values:
    """‖found − Hv‖/‖Hv‖ against float64."""
    product = found.get("product")
    if product is None:
        return {}
    truth = _truth(work)
    return {"product": float((product.detach().double() - truth).norm() / truth.norm())}


def direction(work: Work) -> Tensor:
    """The vector that everybody multiplies."""
    return torch.randn(work.trained[1], generator=torch.Generator().manual_seed(0))


@lru_cache(maxsize=1)
def _truth(work: Work) -> Tensor:
    return Reference(work).product(direction(work))


def _ours(work: Work, vector: Tensor) -> Run:
    objective = work.objective()
    product = objective.hvp(objective.theta())
    product(vector)

    def run() -> Found:
        for _ in range(work.recipe.products):
            found = product(vector)
        return {"product": found, "cached_chunks": product.num_cached}

    return run


def _gradients(work: Work, batches: list[Batch]) -> Run:
    module = work.module()
    peers.gradient(module, batches)

    def run() -> Found:
        for _ in range(work.recipe.products):
            peers.gradient(module, batches)
        return {}

    return run


def _flat(product: Callable[[Tensor], Tensor], vector: Tensor) -> Callable[[], Tensor]:
    return lambda: product(vector)


def _listed(
    product: Callable[..., tuple[float, list[Tensor]]], module: nn.Module, vector: Tensor
) -> Callable[[], Tensor]:
    directions = peers.as_list(vector, module)
    return lambda: peers.as_vector(product(directions)[1])


def _pyhessian_batch(module: nn.Module, batch: Batch, vector: Tensor) -> Callable[[], Tensor]:
    operator, product = peers.pyhessian(module, data=batch)
    directions = peers.as_list(vector, module)
    return lambda: peers.as_vector(list(product(operator.gradsH, operator.params, directions)))
