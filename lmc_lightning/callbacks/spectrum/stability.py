"""The logged numbers of training at the edge of stability, why one is missing, and their chart."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lmc_lightning.landscape.curvature.dynamics import BatchStatistics, UpdatePrediction
from lmc_lightning.landscape.curvature.stability import Stability
from lmc_lightning.plotting.stability import StabilityCurve, plot_stability
from lmc_lightning.plotting.style import figure_of
from lmc_lightning.recording import Quantity, Record, Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def stability_quantities(
    key: Callable[[str], str],
    full: Stability,
    batches: BatchStatistics,
    update: UpdatePrediction | None,
    status: Status = "ok",
) -> Iterator[Quantity]:
    """Those numbers that there are; ``status`` is that of what comes from Lanczos."""
    if full.value is not None:
        evidence = {"residual": full.residual, "num_fixed": full.num_fixed}
        yield Quantity(key("full_batch"), full.value, evidence=evidence, status=status)
        yield Quantity(key("limit/full_batch"), 1.0, log="value")
    sharpness, stderr = batches.batch_sharpness, batches.batch_sharpness_stderr
    if full.per_curvature is not None:
        value, error = full.per_curvature * (sharpness + full.decay), stderr and full.per_curvature * stderr
        yield Quantity(key("mini_batch"), value, error, evidence={"small_batch_limit": full.small_batch_limit})
        if full.small_batch_limit is not None:
            yield Quantity(key("limit/mini_batch"), full.small_batch_limit, log="value")
    yield Quantity(key("batch_sharpness"), sharpness, stderr)
    if batches.gradient_noise_scale is not None:
        evidence = {"noise_trace": batches.noise_trace, "gradient_sq": batches.gradient_sq}
        value, stderr = batches.gradient_noise_scale, batches.gradient_noise_scale_stderr
        yield Quantity(key("gradient_noise_scale"), value, stderr, unit="examples", evidence=evidence)
    if update is not None:
        terms = {"slope": update.slope, "curvature": update.curvature, "update_norm": update.update_norm}
        predicted, realised = key("update_prediction"), key("update_realised")
        yield Quantity(predicted, update.predicted, update.predicted_stderr, unit="loss", evidence=terms)
        yield Quantity(realised, update.realised, update.realised_stderr, unit="loss")


def not_reported(
    full: Stability, batches: BatchStatistics, update: UpdatePrediction | None
) -> Iterator[tuple[str, str | None]]:
    """The numbers that there are not, each with the reason."""
    if full.value is None:
        yield "full_batch", full.reason
    if full.per_curvature is None:
        yield "mini_batch", full.reason or "It is known for SGD with one learning rate and decay for all of θ."
    if batches.gradient_noise_scale is None:
        yield "gradient_noise_scale", "The mean gradient cannot be told from noise."
    if update is None:
        yield "update_prediction", "The parameters before the last step were not kept."


def draw_stability(records: Sequence[Record], keys: Sequence[str]) -> "Figure":
    """What a run's records say of stability, against steps.

    Args:
        records: of one callback.
        keys: of the full-batch curve and the mini-batch one.
    """
    curves, limit = dict[str, StabilityCurve](), None
    for label, key in zip(("λ, full batch", "batch sharpness"), keys, strict=True):
        found = [r for r in records if r.name == key and r.value is not None]
        if found:
            values = {r.step: r.value for r in found if r.value is not None}
            curves[label] = StabilityCurve(values, {r.step: r.stderr for r in found if r.stderr is not None})
            limit = found[-1].evidence.get("small_batch_limit", limit)
    evidence = next(r.evidence for r in reversed(records) if "batch_size" in r.evidence)
    size, number, mode = (evidence[name] for name in ("batch_size", "num_batches", "mode"))
    caption = f"{number} × {size:g} training examples · mode {mode} · whiskers: 2 standard errors over batches"
    return figure_of(plot_stability(curves, small_batch_limit=limit, caption=caption))
