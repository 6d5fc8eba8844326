"""Curves of low loss between the run and its children, its start, its last visit or a checkpoint."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from lmc_lightning.branching.lineage import Family
from lmc_lightning.callbacks.bridge.probe_set import Split
from lmc_lightning.callbacks.pairs.charts import curve_charts, quantities_of
from lmc_lightning.callbacks.pairs.comparison import Pairing
from lmc_lightning.callbacks.pairs.curves import CurveComparison, CurvePairing
from lmc_lightning.callbacks.pairs.family_figures import Figures
from lmc_lightning.callbacks.pairs.measurement import PairMeasurement, PathOptions
from lmc_lightning.callbacks.visits.common import Unpack
from lmc_lightning.core.chunks import equal_batches
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.barrier import Barrier
from lmc_lightning.landscape.paths.curves import CurveTraining
from lmc_lightning.loggers import Chart
from lmc_lightning.plotting.barriers import plot_paths
from lmc_lightning.plotting.style import figure_of
from lmc_lightning.recording import Measurement
from lmc_lightning.types import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ModeConnectivity(PairMeasurement):
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
        self._lines: dict[tuple[str, int], Barrier] = {}

    @property
    def table_name(self) -> str:
        """Of the files of a family's tables, beside those of an ``InterpolationBarrier``."""
        return self.kind if self.name is None else f"{self.kind}_{self.name}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the last run."""
        if stage == "fit":
            self._lines.clear()
        super().setup(trainer, pl_module, stage)

    def _comparison(
        self,
        module: nn.Module,
        trainer: Any,
        objectives: Mapping[Split, Objective] | None = None,
        progress: Progress | None = None,
    ) -> CurveComparison:
        common = vars(super()._comparison(module, trainer, objectives, progress))
        pool = self._probes.get("train", self.curve_examples)
        assert pool is not None
        batches = equal_batches(pool.batches, self.batch_size)
        objective = self.objective(module, batches, trainer=trainer, mode="train", keep_batches=True)
        own = {"objective": objective, "training": self.training, "seed": self.seed, "progress": progress}
        return CurveComparison(**{**common, **own})

    def _result(self, pairing: Pairing, label: str, step: int, names: tuple[str, str]) -> Measurement:
        assert isinstance(pairing, CurvePairing)
        self._lines |= {(f"{self.key(name)}/{label}", step): line for name, line in pairing.lines.items()}
        return super()._result(pairing, label, step, names)

    def charts(self) -> list[Chart]:
        """All branch points in one chart for each split and metric."""
        return list(curve_charts(self.tag, quantities_of(self.splits, self.metrics), self.definitions))

    def _figures(self, family: Family) -> Figures:
        last = {key: max(step for other, step in self.barriers if other == key) for key, _ in self.barriers}
        return {key.replace("path/", "path_curves/", 1): partial(self._draw, key, step) for key, step in last.items()}

    def _draw(self, key: str, step: int) -> "Figure":
        curve, line = self.barriers[key, step], self._lines[key, step]
        kind = f"{self.training.kind}, {self.training.num_bends} inner point" + "s" * (self.training.num_bends > 1)
        title = f"{key.split('/', 1)[1]}, step {step}"
        return figure_of(plot_paths({"straight line": line, kind: curve}, title=title))
