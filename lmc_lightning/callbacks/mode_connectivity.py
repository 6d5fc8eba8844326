"""Curves of low loss between the run and its children, its start, its last visit or a checkpoint."""

from collections.abc import Mapping

from torch import Tensor

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.callbacks.pairs.charts import curve_charts, quantities_of
from lmc_lightning.callbacks.pairs.curves import CurveComparison
from lmc_lightning.callbacks.pairs.family_figures import Figures
from lmc_lightning.callbacks.pairs.path_pairs import PathOptions, PathPairs
from lmc_lightning.callbacks.visits.common import Unpack
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.core.chunks import equal_batches
from lmc_lightning.landscape.paths.curves import CurveTraining
from lmc_lightning.loggers import Chart
from lmc_lightning.plotting.barriers import plot_paths
from lmc_lightning.plotting.style import deferred


class ModeConnectivity(PathPairs):
    """How low the loss can be kept on a curve between two states of a network, where the straight line has a barrier.

    Which states: as for :class:`~lmc_lightning.callbacks.interpolation_barrier.InterpolationBarrier`, the children of a
    family with the trunk or with each other, or the run with ``reference``. The ends stay, the inner points of a
    quadratic Bezier curve or polygonal chain start on the line and are trained by SGD on E_t L(γ(t)) (Garipov et al.,
    arXiv 1802.10026) over training examples, dropout off; then loss and error are measured along it and along the line,
    BatchNorm's statistics recomputed at each point. Costs ``num_epochs`` gradients of ``curve_examples`` examples and
    2 · ``num_points`` − 2 passes over each split, a pair.

    Logged at x = step of the later epoch, each with ``<key>_stderr`` over examples:

    ==========================================  =====================================================================
    ``path/{split}_loss/k1_{005}``              loss barrier along the curve: largest height above the chord
    ``path/{split}_error/k1_{005}``             error (1 − accuracy) barrier along it, for classification losses
    ``path/{metric}/k1_{005}``                  a named metric that ``validation_step`` logs
    ``…/max``                                   appended: the largest value of the metric itself on the curve
    ``…/mean``                                  appended: its mean over t
    ``…/arc_mean``                              appended: its mean over arc length
    ``…/line``                                  appended: the barrier of the straight line, for comparison
    ``…/{definition}``                          appended for further ``definitions``, e.g. ``signed_deviation``, the
                                                mode connectivity mc of arXiv 2107.11228
    ``path/length/k1_{005}``                    length of the curve [units of θ]
    ``path/length_ratio/k1_{005}``              over that of the line
    ``path/training_loss/k1_{005}``             mean loss on the curve in the last epoch of its training
    ``path/…/{reference}``                      without branching: ``initial``, ``previous``, the checkpoint's name
    ``path_curves/…``                           figure of each pair: the metric along line and curve at its last epoch
    ==========================================  =====================================================================

    With several children of a branch point or with siblings, keys are longer as those of ``InterpolationBarrier``.

    Args:
        training: kind of curve, bends, epochs, rates: see :class:`~lmc_lightning.landscape.paths.curves.CurveTraining`.
        batch_size: of the training of curves.
        curve_examples: training examples that curves are trained on; of a datamodule with ``probe_batches`` any number.
        num_points: equally spaced points on the curve, both ends included, or ``"adaptive"``.
        reference: ``"initial"``, ``"previous"`` (the last visit) or the path of a checkpoint; only without branching.
        pairs: ``"trunk"``: each child with the trunk; ``"siblings"``: the children of a branch point with each other.
        splits: of ``"train"``, ``"val"`` and ``"test"``, on which the curve is measured.
        metrics: further metrics by the name that ``validation_step`` logs, and which is better, ``"min"`` or ``"max"``.
        definitions: conventions of the barrier that are logged under keys of their own.
        batch_stats: ``"recompute"`` (default with BatchNorm), ``"interpolate"`` or ``"endpoint"``.
        **common: see :class:`MeasurementCallback`.

    Raises:
        ValueError: unknown names, fewer than 3 points, or a number that is not positive.
    """

    kind = "path"
    offline = "connect"

    def __init__(
        self,
        training: CurveTraining | None = None,
        *,
        batch_size: int = 128,
        curve_examples: int = 5000,
        **common: Unpack[PathOptions],
    ) -> None:
        super().__init__(**common)
        if batch_size < 1 or curve_examples < 1:
            raise ValueError(f"Expected positive batch_size and curve_examples, got {batch_size} and {curve_examples}.")
        self.training, self.batch_size, self.curve_examples = training or CurveTraining(), batch_size, curve_examples
        self._probes.reserve = curve_examples

    @property
    def table_name(self) -> str:
        """Of the files of a family's tables, beside those of an ``InterpolationBarrier``."""
        return self.kind if self.name is None else f"{self.kind}_{self.name}"

    def _comparison(self, visit: Visit, start: Mapping[str, Tensor] | None) -> CurveComparison:
        pool = self._probes.get("train", self.curve_examples)
        assert pool is not None
        batches = equal_batches(pool.batches, self.batch_size)
        return CurveComparison(
            **self._shared(visit, start),
            objective=visit.loss_on(batches, mode="train", keep_batches=True),
            training=self.training,
            seed=self.seed,
            progress=visit.progress,
        )

    def charts(self) -> list[Chart]:
        """All branch points in one chart for each split and metric."""
        return list(curve_charts(self.tag, quantities_of(self.splits, self.metrics), self.definitions))

    def _figures(self, family: Family) -> Figures:
        barriers, lines = self.barriers, self._by_key("lines")
        kind = f"{self.training.kind}, {self.training.num_bends} inner point" + "s" * (self.training.num_bends > 1)
        last = dict(sorted(barriers))
        return {
            key.replace("path/", "path_curves/", 1): deferred(
                plot_paths,
                {"straight line": lines[key, step], kind: barriers[key, step]},
                title=f"{key.split('/', 1)[1]}, step {step}",
            )
            for key, step in last.items()
        }
