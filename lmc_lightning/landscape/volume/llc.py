"""The local learning coefficient of a minimum, by Langevin dynamics around it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, isfinite, log, nan, sqrt
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import derive_seed, gaussian
from lmc_lightning.landscape.curvature.dynamics import chunk_step
from lmc_lightning.landscape.sharpness.measured import require_positive
from lmc_lightning.types import Progress

Excess: TypeAlias = Callable[[Tensor], tuple[float, Tensor]]
"""w ``(P,)`` ↦ L(w) − L(w*) and ∇L(w), or unbiased estimates of them from some of the data."""

RHAT_LIMIT, DRIFT_LIMIT = 1.1, 3.0


@dataclass(frozen=True)
class Langevin:
    """How the tempered and localised posterior is sampled.

    A step is w ← w − ½ε (nβ ∇L(w) + γ (w − w*)) + √ε ξ. For small ε its stationary density is proportional to
    exp(−nβ L(w) − ½γ‖w − w*‖²); stable where ε (nβ λ_max + γ) < 4.

    Attributes:
        step_size: ε.
        gamma: γ, of the localisation; directions of curvature below γ/nβ count for less than a half.
        n_beta: nβ; by default n / ln n of the n examples of the probe set.
        num_chains: independent chains from w*.
        num_burn_in: steps that are not counted.
        num_draws: steps of each chain that are.
        seed: of all chains.
    """

    step_size: float = 1e-4
    gamma: float = 100.0
    n_beta: float | None = None
    num_chains: int = 4
    num_burn_in: int = 300
    num_draws: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled.

        Raises:
            ValueError: a size or number is not positive, or γ is negative.
        """
        require_positive(
            step_size=self.step_size, num_chains=self.num_chains, num_draws=self.num_draws, n_beta=self.n_beta or 1.0
        )
        if self.gamma < 0 or self.num_burn_in < 0:
            raise ValueError(f"Expected gamma and num_burn_in of 0 or more, got {self.gamma} and {self.num_burn_in}.")


@dataclass(frozen=True)
class LearningCoefficient:
    """λ̂ = nβ (E L(w) − L(w*)) with the chains behind it.

    Attributes:
        traces: L(w) − L(w*) at each step of each chain, burn-in included, ``(C, T)`` float64; NaN after a
            chain has left all bounds.
        settings: how they were sampled.
        n_beta: nβ as it was used.
        num_gradients: gradients of one chunk.
    """

    traces: Tensor = field(repr=False)
    settings: Langevin
    n_beta: float
    num_gradients: int = 0

    def __repr__(self) -> str:
        chains = f"{len(self.traces)} chains of {self.traces.shape[1]} steps"
        return f"LearningCoefficient({self.value:.4g} ± {self.stderr:.2g}, {chains}, R̂ = {self.r_hat:.3g})"

    @cached_property
    def _draws(self) -> NDArray[np.float64]:
        return np.asarray(self.n_beta * self.traces[:, self.settings.num_burn_in :].numpy())

    @property
    def value(self) -> float:
        """λ̂; NaN if a chain has diverged."""
        return float(self._draws.mean())

    @property
    def per_chain(self) -> list[float]:
        """λ̂ of each chain by itself."""
        return [float(v) for v in self._draws.mean(1)]

    @property
    def stderr(self) -> float:
        """Over chains; NaN of one."""
        chains = self._draws.mean(1)
        return float(chains.std(ddof=1)) / sqrt(len(chains)) if len(chains) > 1 else nan

    @property
    def r_hat(self) -> float:
        """Split R̂ of the losses (Gelman and Rubin, each chain in two halves): near 1 where chains agree."""
        half = self._draws.shape[1] // 2
        if half < 2:
            return nan
        parts = np.concatenate([self._draws[:, :half], self._draws[:, -half:]])
        within, between = parts.var(1, ddof=1).mean(), parts.mean(1).var(ddof=1)
        return float(np.sqrt((half - 1) / half + between / within)) if within > 0 else nan

    @property
    def effective_sample_size(self) -> float:
        """Independent draws that all chains are worth, by their autocorrelation (Geyer's initial positive sequence)."""
        return sum(_effective_size(chain) for chain in self._draws) if isfinite(self.value) else nan

    @property
    def drift(self) -> float:
        """The last half of the draws minus the first, in standard errors over chains: large while w still wanders."""
        half = self._draws.shape[1] // 2
        moved = self._draws[:, -half:].mean(1) - self._draws[:, :half].mean(1)
        spread = moved.std(ddof=1) / sqrt(len(moved)) if len(moved) > 1 else nan
        return float(moved.mean() / spread) if spread > 0 else nan

    @property
    def flags(self) -> tuple[str, ...]:
        """``diverged``; ``negative`` (w* is no minimum); ``not_mixed`` (R̂ > 1.1); ``drifting`` (beyond 3 errors)."""
        if not isfinite(self.value):
            return ("diverged",)
        found = {
            "negative": self.value < 0,
            "not_mixed": self.r_hat > RHAT_LIMIT,
            "drifting": abs(self.drift) > DRIFT_LIMIT,
        }
        return tuple(name for name, applies in found.items() if applies)

    @property
    def converged(self) -> bool:
        """Whether nothing speaks against the estimate but its standard error."""
        return not self.flags


def _effective_size(chain: NDArray[np.float64]) -> float:
    size, centred = len(chain), chain - chain.mean()
    variance = float(centred @ centred) / size
    if variance == 0 or size < 4:
        return float(size)
    spectrum = np.fft.rfft(centred, 2 * size)
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[:size] / (size * variance)
    pairs = correlation[: size // 2 * 2].reshape(-1, 2).sum(1)
    negative = np.flatnonzero(pairs <= 0)
    total = 2 * pairs[: negative[0] if len(negative) else len(pairs)].sum() - 1
    return float(size / max(total, 1 / size))


def local_learning_coefficient(
    objective: Objective,
    theta: Tensor,
    settings: Langevin | None = None,
    *,
    progress: Progress | None = None,
) -> LearningCoefficient:
    """λ̂ = nβ (E_w L(w) − L(w*)) over the posterior exp(−nβ L(w) − ½γ‖w − w*‖²) around w* = θ [nats].

    P/2 at a minimum of full rank; less where the set of minima is singular or larger than a point. Estimated by
    stochastic gradient Langevin dynamics: each step takes one chunk, drawn with its weight, for the gradient, and its
    L_chunk(w) − L_chunk(w*) as an unbiased estimate of the excess loss. Localisation, step size, the noise of chunks
    and a short chain all bias it; compare estimates of equal settings only. An objective of one chunk has no such
    noise.
    Costs ``num_chains · (num_burn_in + num_draws)`` gradients of one chunk and one evaluation of the whole.

    Source: Lau et al., arXiv 2308.12108, eq. 10 and algorithm 1; there the loss is that of the minibatch alone.

    Args:
        objective: the mean loss on training examples.
        theta: w* ``(P,)``, a minimum; elsewhere λ̂ may be negative.
        settings: how it is sampled.
        progress: told every hundred steps.

    Raises:
        ValueError: the number of examples is not known and no ``n_beta`` is given.
    """
    settings = settings or Langevin()
    n_beta = settings.n_beta or default_n_beta(objective.num_examples)
    at_minimum = objective.evaluate(theta).chunk_losses.tolist()
    weights, total = objective.baseline.weights, settings.num_chains * (settings.num_burn_in + settings.num_draws)
    traces = []
    for chain in range(settings.num_chains):
        generator = torch.Generator().manual_seed(derive_seed(settings.seed, "chain", chain))

        def excess(w: Tensor, generator: torch.Generator = generator) -> tuple[float, Tensor]:
            index = int(torch.multinomial(weights, 1, generator=generator)) if len(weights) > 1 else 0
            loss, gradient = chunk_step(objective, index, w) or (at_minimum[index], torch.zeros_like(w))
            return loss - at_minimum[index], gradient

        done = chain * (total // settings.num_chains)
        told = None if progress is None else lambda step, done=done: progress(done + step, total, "steps")
        traces.append(langevin_trace(excess, theta, n_beta, settings, generator, told))
    return LearningCoefficient(torch.stack(traces), settings, n_beta, total)


def default_n_beta(num_examples: int | None) -> float:
    """n / ln n.

    Raises:
        ValueError: n is not known, or less than 2.
    """
    if num_examples is None or num_examples < 2:
        raise ValueError(f"nβ = n/ln n needs the number of examples, which is {num_examples}. Pass n_beta=.")
    return num_examples / log(num_examples)


def langevin_trace(
    excess: Excess,
    start: Tensor,
    n_beta: float,
    settings: Langevin,
    generator: torch.Generator,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """L(w) − L(w*) along one chain from w* = ``start``, before each step, ``(T,)``; NaN from where it is not finite."""
    w, step, noise = start.clone(), settings.step_size, sqrt(settings.step_size)
    length = settings.num_burn_in + settings.num_draws
    trace = torch.full((length,), nan, dtype=torch.float64)
    for number in range(length):
        value, gradient = excess(w)
        if not abs(value) < inf:
            break
        trace[number] = value
        pull = n_beta * gradient + settings.gamma * (w - start)
        w = w - 0.5 * step * pull + noise * gaussian(len(w), generator).to(w)
        if progress is not None and number % 100 == 99:
            progress(number + 1)
    return trace
