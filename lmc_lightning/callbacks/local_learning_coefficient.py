"""The local learning coefficient while a network trains."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.visits.common import Common, Unpack
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.landscape.volume.llc import Langevin, local_learning_coefficient
from lmc_lightning.loggers import Band, Chart
from lmc_lightning.plotting.llc import plot_chains
from lmc_lightning.plotting.style import deferred
from lmc_lightning.recording import Measurement, Quantity

if TYPE_CHECKING:
    pass


class LocalLearningCoefficient(MeasurementCallback):
    """Effective number of parameters (times ½) of the loss near θ, by Langevin dynamics (Lau et al., arXiv 2308.12108).

    Meant for states near a minimum: elsewhere the chains run downhill and λ̂ may be negative, which is flagged. Costs
    ``num_chains · (num_burn_in + num_draws)`` gradients of one chunk. Biased by localisation and step size: compare
    numbers of equal settings only.

    ============================  =====================================================================================
    ``llc/llc``                   λ̂ = nβ (E L(w) − L(θ)), ``_stderr`` over chains
    ``llc/r_hat``                 agreement of the chains, near 1
    ``llc/chains``                figure: the chains
    ============================  =====================================================================================

    Args:
        sampling: step size, localisation, chains: see :class:`~lmc_lightning.landscape.volume.llc.Langevin`.
        **common: see :class:`MeasurementCallback`.
    """

    kind = "llc"
    advice = "Chains wander, disagree or diverge: see flags. Take smaller steps, more of them, or a larger gamma."

    def __init__(self, sampling: Langevin | None = None, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.sampling = sampling or Langevin(seed=self.seed)

    def measure(self, visit: Visit) -> Measurement:
        """The coefficient at this visit."""
        found = local_learning_coefficient(visit.objective, visit.theta, self.sampling, progress=visit.progress)
        evidence = {
            **asdict(self.sampling),
            "n_beta": found.n_beta,
            "per_chain": found.per_chain,
            "effective_sample_size": found.effective_sample_size,
            "drift": found.drift,
            "flags": list(found.flags),
        }
        title = f"Local learning coefficient, epoch {visit.epoch}"
        return Measurement(
            (
                Quantity(
                    self.key("llc"),
                    found.value,
                    found.stderr,
                    evidence=evidence,
                    status="ok" if found.converged else "not_converged",
                ),
                Quantity(self.key("r_hat"), found.r_hat, log="value"),
            ),
            evidence={"num_matvecs": 0, "num_gradients": found.num_gradients},
            figures={self.key("chains"): deferred(plot_chains, found, title=title)},
        )

    def charts(self) -> list[Chart | Band]:
        """The coefficient with its error, and how far the chains agree."""
        return [
            Band("local learning coefficient", self.key("llc")),
            Chart("agreement of the chains, near 1", (self.tag("r_hat"),)),
        ]
