"""Loss and error at 25 points between two networks, on training and on held-out images."""

import copy
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.harness import Contender, Found, Run, Values
from benchmarks.tasks.eigenvalues import peer
from benchmarks.works import Batch, Work, in_chunks, mean_loss
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.barrier import barriers_on, line_profiles
from lmc_lightning.landscape.paths.line import endpoint_of
from lmc_lightning.landscape.paths.states import StateEvaluator

POINTS = 25
_PLACES = ("train loss", "train error", "validation loss", "validation error")

Score = Callable[[nn.Module], list[float]]
"""Some of the four numbers of ``_PLACES`` at one point."""


def contenders(work: Work) -> list[Contender]:
    """Ours in one call; peers with one metric per call, as documented, and with all four from one pass."""
    made = [Contender("lmc_lightning", partial(_ours, work), ours=True)]
    for name, curve in (("loss-landscapes", _loss_landscapes), ("rebasin", _rebasin)):
        if peers.installed(name):
            made += [
                peer(work, f"{name}, one metric a call", partial(_four_calls, work=work, curve=curve)),
                peer(work, f"{name}, all from one pass", partial(_one_pass, work=work, curve=curve)),
            ]
    return made


def errors(work: Work, found: Found) -> Values:
    """Largest difference from float64 at the points that were evaluated."""
    difference = np.abs(np.asarray(found["curves"]) - _truth(work))
    return {
        "loss": float(np.nanmax(difference[:, [0, 2]])),
        "error": float(np.nanmax(difference[:, [1, 3]])),
        "missing_points": float(np.isnan(difference[:, 0]).sum()),
    }


def _ours(work: Work, seed: int) -> Run:
    module, other = work.module(), work.second_module()

    def run() -> Found:
        splits = {"train": work.probe, "validation": work.validation}
        objectives = {name: Objective(module, [batch], mean_loss) for name, batch in splits.items()}
        first = objectives["train"]
        tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        ends = endpoint_of(first), endpoint_of(first, tensors)
        evaluator = StateEvaluator(objectives, batch_stats="endpoint")
        found = barriers_on(line_profiles(evaluator, *ends, num_points=POINTS))
        curves = [found[split][metric].values for split in splits for metric in ("loss", "error")]
        return {"curves": torch.stack(curves, dim=1).numpy()}

    return run


def _four_calls(module: nn.Module, *, work: Work, curve: Callable[..., list[list[float]]]) -> Found:
    splits = (work.probe, work.probe, work.validation, work.validation)
    scores = [partial(_single, batch=batch, wrong=bool(i % 2)) for i, batch in enumerate(splits)]
    return {"curves": np.concatenate([curve(module, work.second_module(), score) for score in scores], axis=1)}


def _one_pass(module: nn.Module, *, work: Work, curve: Callable[..., list[list[float]]]) -> Found:
    return {"curves": np.array(curve(module, work.second_module(), partial(_all, work=work)))}


@torch.no_grad()
def _single(module: nn.Module, *, batch: Batch, wrong: bool) -> list[float]:
    outputs = module(batch[0])
    if wrong:
        return [float((outputs.argmax(1) != batch[1]).float().mean())]
    return [float(F.cross_entropy(outputs, batch[1]))]


@torch.no_grad()
def _all(module: nn.Module, *, work: Work) -> list[float]:
    scores: list[float] = []
    for split in (work.probe, work.validation):
        totals = np.zeros(2)
        for images, labels in in_chunks(split, work.recipe.chunk_size):
            outputs = module(images)
            loss = F.cross_entropy(outputs, labels, reduction="sum")
            totals += float(loss), float((outputs.argmax(1) != labels).sum())
        scores += (totals / len(split[1])).tolist()
    return scores


def _loss_landscapes(module: nn.Module, other: nn.Module, score: Score) -> list[list[float]]:
    """``linear_interpolation`` begins one step from the start, whose value is taken apart."""
    from loss_landscapes import linear_interpolation

    metric = lambda wrapper: score(wrapper.modules[0])  # noqa: E731
    rest = linear_interpolation(module, other, metric, steps=POINTS - 1, deepcopy_model=True)
    return [score(module), *rest.tolist()]


def _rebasin(module: nn.Module, other: nn.Module, score: Score) -> list[list[float]]:
    """``LerpSimple`` with n steps has points j/(n + 1) for j < n: of our grid it cannot reach the last but one."""
    from rebasin.interpolation import LerpSimple

    scores: list[list[float]] = []

    def eval_fn(model: nn.Module, device: object) -> float:
        scores.append(score(model))
        return scores[-1][0]

    LerpSimple([module, other], eval_fn).interpolate(steps=POINTS - 3)
    last = score(other)
    return [score(module), *scores, [np.nan] * len(last), last]


@lru_cache(maxsize=1)
def _truth(work: Work) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """``(25, 4)``, in float64 by nothing but torch; buffers are those of the first network until the end is reached."""
    first, last = work.module().double(), work.second_module().double()
    double = copy.copy(work)
    double.__dict__ |= {name: (b[0].double(), b[1]) for name, b in _splits(work).items()}
    rows = []
    for i in range(POINTS):
        point = copy.deepcopy(last if i == POINTS - 1 else first)
        for own, a, b in zip(point.parameters(), first.parameters(), last.parameters(), strict=True):
            own.data = torch.lerp(a, b, i / (POINTS - 1)).detach()
        rows.append(_all(point, work=double))
    return np.array(rows)


def _splits(work: Work) -> dict[str, tuple[Tensor, Tensor]]:
    return {"probe": work.probe, "validation": work.validation}
