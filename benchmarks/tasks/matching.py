"""Permuting a second network towards a first one by their weights, groups of channels found for each anew."""

import copy
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.harness import Contender, Found, Run, Values
from benchmarks.works import Work
from lmc_lightning.callbacks.offline.alignment import align
from lmc_lightning.landscape.alignment.groups import permutation_groups

_EXAMPLES = 8
"""With which a network is traced."""


def contenders(work: Work, *, planted: bool = False) -> list[Contender]:
    """Ours with and without restarts, and rebasin; the second network is trained apart, or the first one permuted."""
    made = [
        Contender("lmc_lightning", partial(_run, work, planted, partial(_ours, work, restarts=2)), ours=True),
        Contender("lmc_lightning, no restarts", partial(_run, work, planted, partial(_ours, work, restarts=0))),
    ]
    if peers.installed("rebasin"):
        made.append(Contender("rebasin", partial(_run, work, planted, partial(_rebasin, work))))
    return made


def errors(work: Work, found: Found) -> Values:
    """‖θ_A − πθ_B‖ as a share of that before, and how far the permutation changed the outputs, relative to their size.

    For a planted permutation the first is 0; between networks that were trained apart, smaller is better.
    """
    first, second, aligned = (found[name] for name in ("first", "second", "aligned"))
    images = work.probe[0][:64]
    with torch.no_grad():
        before, after = (m.double()(images.double()) for m in (copy.deepcopy(second), copy.deepcopy(aligned)))
    return {
        "distance": float((_theta(first) - _theta(aligned)).norm() / (_theta(first) - _theta(second)).norm()),
        "function": float((after - before).abs().max() / before.abs().max()),
    }


def _run(work: Work, planted: bool, method: Callable[[nn.Module, nn.Module], nn.Module], seed: int) -> Run:
    first = work.module()
    second = _planted(work, seed) if planted else work.second_module()
    return lambda: {"first": first, "second": second, "aligned": method(work.module(), copy.deepcopy(second))}


def _ours(work: Work, first: nn.Module, second: nn.Module, *, restarts: int) -> nn.Module:
    return align(first, second, [work.probe[0][:_EXAMPLES]], restarts=restarts).module


def _rebasin(work: Work, first: nn.Module, second: nn.Module) -> nn.Module:
    from rebasin import PermutationCoordinateDescent

    PermutationCoordinateDescent(first, second, work.probe[0][:_EXAMPLES]).rebasin()
    return second


@lru_cache(maxsize=1)
def _planted(work: Work, seed: int) -> nn.Module:
    module = work.module()
    groups = permutation_groups(module, work.probe[0][:_EXAMPLES])
    permutations = groups.random(torch.Generator().manual_seed(seed))
    module.load_state_dict(groups.apply(module.state_dict(), permutations))
    return module


def _theta(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in module.parameters()])
