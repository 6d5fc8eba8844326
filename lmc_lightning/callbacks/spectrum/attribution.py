"""Which examples and classes carry λ_max and the trace: numbers and the figure of a visit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from lmc_lightning.callbacks.spectrum.figures import MATRICES, NUM_SHOWN
from lmc_lightning.core.losstap import NO_OUTPUTS
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature.result import SpectrumResult
from lmc_lightning.landscape.curvature.shares import CurvatureShares, example_images, form_shares, trace_shares
from lmc_lightning.landscape.curvature.spectrum import Operator
from lmc_lightning.plotting.attribution import plot_attribution
from lmc_lightning.recording import Measurement, Quantity, Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_IMAGES = 16


@dataclass(frozen=True)
class SpectrumAttribution:
    """Shares of λ_max and, where it is exact, of the trace; or the reason why there are none."""

    operator: Operator
    shares: dict[str, CurvatureShares] = field(default_factory=dict)
    images: Tensor | None = field(default=None, repr=False)
    reason: str | None = None

    def quantities(self, key: Callable[[str], str]) -> Iterator[Quantity]:
        """The share of the hundredth of the examples that carries most, and that of each class."""
        for name, found in self.shares.items():
            count = max(1, len(found.parts) // 100)
            largest = found.largest(NUM_IMAGES)
            evidence = {"examples": largest.tolist(), "shares": found.shares[largest].tolist()}
            top = float(found.shares[found.largest(count)].sum())
            yield Quantity(key(f"{name}_top_percent"), top, evidence=evidence | {"num_examples": count})
            parts, weights = found.by_class, found.weight_by_class
            shown = sorted(parts, key=lambda c: parts[c], reverse=True)[:NUM_SHOWN]
            for c, part in parts.items():
                of_class = {"part": part, "share_of_examples": weights[c]}
                log: Shown = "value" if c in shown else "none"
                yield Quantity(key(f"{name}_share/{c}"), part / found.value, evidence=of_class, log=log)

    def added_to(self, measurement: Measurement, key: Callable[[str], str], epoch: int) -> Measurement:
        """A measurement with these numbers, and with the figure of λ_max."""
        figures = {key("attribution"): partial(draw_attribution, self, epoch)} if self.shares else {}
        return replace(
            measurement,
            quantities=(*measurement.quantities, *self.quantities(key)),
            evidence={**measurement.evidence, "no_attribution": self.reason},
            figures={**measurement.figures, **figures},
        )


def attribute(objective: Objective, theta: Tensor, result: SpectrumResult, operator: Operator) -> SpectrumAttribution:
    """The attribution of a visit; about 4 gradients."""
    if objective.baseline.example_losses is None:
        return SpectrumAttribution(operator, reason=NO_OUTPUTS)
    assert result.eigenpairs is not None
    found = {"lambda_max": form_shares(objective, theta, result.eigenpairs.eigenvectors[0].to(theta), operator)}
    if result.exact is not None and result.exact.value is not None:
        found["trace"] = trace_shares(result.exact)
    return SpectrumAttribution(operator, found, example_images(objective, found["lambda_max"].largest(NUM_IMAGES)))


def draw_attribution(attribution: SpectrumAttribution, epoch: int) -> "Figure":
    """The examples that carry most of λ_max, and the share of each class."""
    found = attribution.shares["lambda_max"]
    shares, weights = found.by_class, found.weight_by_class
    by_class = {c: (shares[c] / found.value, weights[c]) for c in shares}
    labels = [f"{c}" if c >= 0 else "" for c in found.labels[found.largest(NUM_IMAGES)].tolist()]
    return plot_attribution(
        found.shares.numpy(),
        by_class=by_class,
        images=None if attribution.images is None else attribution.images.float().numpy(),
        labels=labels,
        title=f"What λ_max = {found.value:.3g} is made of, epoch {epoch}",
        caption=f"{MATRICES[attribution.operator]}, {len(found.parts)} training examples; of each, its share in uᵀHu",
    )
