"""Whether the average of networks is better than the best of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from lmc_lightning.core.evaluation import Evaluation
from lmc_lightning.landscape.paths.line import Endpoint
from lmc_lightning.landscape.paths.states import StateEvaluator, StateMetrics
from lmc_lightning.landscape.statistics.bands import standard_error


@dataclass(frozen=True)
class SoupGain:
    """How much better the uniform average of networks is than the best of them (arXiv 2203.05482).

    Attributes:
        metric: One that is better when smaller.
        split: Name of the data.
        gain: Metric of the best network minus that of the average: positive where averaging pays.
        stderr: Of the gain, paired over examples; NaN where these are not known.
        average: The metric of the average.
        networks: The metric of each network.
    """

    metric: str
    split: str
    gain: float
    stderr: float
    average: float
    networks: tuple[float, ...]


def average_of(ends: Sequence[Endpoint]) -> Endpoint:
    """The mean of states, taken in float64; integer buffers, and entries in which all agree, are those of the first."""
    first = ends[0]
    buffers = {name: _mean([end.buffers[name] for end in ends]) for name in first.buffers}
    return Endpoint(_mean([end.theta for end in ends]), buffers, first.layout)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if not (first.is_floating_point() or first.is_complex()):
        return first
    wide = torch.complex128 if first.is_complex() else torch.float64
    total = first.to(wide, copy=True)
    for tensor in tensors[1:]:
        total += tensor
    # Entries that agree stay as they are: −∞ in an attention mask, and the parameters of equal networks.
    same = torch.stack([t == first for t in tensors]).all(0)
    return torch.where(same, first, (total / len(tensors)).to(first.dtype))


def soup_gains(states: StateEvaluator, ends: Sequence[Endpoint]) -> dict[str, dict[str, SoupGain]]:
    """The gain of the uniform average of networks, by split and metric; for two networks, that of their midpoint.

    All are evaluated under one BatchNorm policy, so that the gain is that of averaging and not of new statistics. Costs
    one state, and each endpoint that was not evaluated before.
    """
    average = average_of(ends)
    mixed, alone = states.end(average), [states.end(end) for end in ends]
    return {
        split: {metric: _gain(metric, split, found, [own[split] for own in alone]) for metric in _metrics(found)}
        for split, found in mixed.items()
    }


def _metrics(measured: StateMetrics) -> list[str]:
    known = ["loss"] + ["error"] * (measured.evaluation.error is not None)
    return [*known, *measured.further]


def _gain(metric: str, split: str, average: StateMetrics, networks: Sequence[StateMetrics]) -> SoupGain:
    values = [_value(m, metric) for m in networks]
    best = networks[min(range(len(values)), key=values.__getitem__)]
    return SoupGain(
        metric,
        split,
        min(values) - _value(average, metric),
        _paired_stderr(_samples(best.evaluation, metric), _samples(average.evaluation, metric), average.evaluation),
        _value(average, metric),
        tuple(values),
    )


def _value(measured: StateMetrics, metric: str) -> float:
    if metric in measured.further:
        return measured.further[metric]
    value = measured.evaluation.loss if metric == "loss" else measured.evaluation.error
    return nan if value is None else value


def _samples(evaluation: Evaluation, metric: str) -> Tensor | None:
    return {"loss": evaluation.example_losses, "error": evaluation.example_errors}.get(metric)


def _paired_stderr(best: Tensor | None, average: Tensor | None, evaluation: Evaluation) -> float:
    weights = evaluation.example_weights
    if best is None or average is None or weights is None:
        return nan
    return float(standard_error(best - average, weights))
