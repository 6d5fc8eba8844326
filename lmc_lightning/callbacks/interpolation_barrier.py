"""Barriers on the straight line between the run and its children, its start, its last visit or a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.callbacks.bridge.guards import check_choice, check_listed
from lmc_lightning.callbacks.pairs.charts import barrier_charts, extra_charts, quantities_of
from lmc_lightning.callbacks.pairs.comparison import ALIGNED, EXTRAS, Comparison, Extra
from lmc_lightning.callbacks.pairs.family_figures import Figures, family_figures
from lmc_lightning.callbacks.pairs.path_pairs import PathOptions, PathPairs
from lmc_lightning.callbacks.visits.common import Unpack
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.landscape.alignment.aligned import Alignment
from lmc_lightning.landscape.alignment.matching import METHODS, Method
from lmc_lightning.landscape.paths.attribution import Attribution
from lmc_lightning.landscape.paths.barrier import Barrier
from lmc_lightning.loggers import Chart


class InterpolationBarrier(PathPairs):
    """How far loss and error rise on the straight line between two states of a network.

    Beside :class:`CheckpointBranching`, the children of each branch point k1 are compared with the trunk, or with each
    other, at the same later epochs (``epochs``), when all have been trained. Without it, the run is compared with
    ``reference``.

    With BatchNorm, statistics are recomputed at each point from training examples, in train mode without dropout.
    Costs ``num_points`` forward passes a pair over each split, the ends once for all pairs. The ``barrier`` is that of
    Entezari et al. (arXiv 2110.06296), max over t of the gap to the chord; ``instability`` (arXiv 1912.05671) and the
    other conventions, with their errors, are in the evidence of each record, in ``barriers`` and in :meth:`to_table`.

    Logged at x = step of the later epoch, each with ``<key>_stderr`` over examples (but not named metrics, whose parts
    are not known):

    ==========================================  =====================================================================
    ``barrier/{split}_loss/k1_{005}``           loss barrier of child and trunk, exactly 0 at the branch step
    ``barrier/{split}_error/k1_{005}``          error (1 − accuracy) barrier, for classification losses
    ``barrier/{metric}/k1_{005}``               a named metric that ``validation_step`` logs
    ``…/{lr_x0.5}``                             appended for children to which something is done at the fork
    ``…/child_{j}``                             appended when a branch point has several children
    ``…/siblings_{i}_{j}``                      appended for two children of it, with ``pairs=("siblings",)``
    ``…/aligned``                               appended, with ``align``: the same barrier to the second network with
                                                its channels permuted, beside the one without
    ``…/{definition}``                          appended for further ``definitions``
    ``barrier/{split}_loss/{reference}``        without branching: ``initial``, ``previous``, ``average``, the file
    ``barrier/{split}_error/{reference}``       likewise
    ``barrier/{metric}/{reference}``            likewise
    ``distance/{l2}/…``                         extra ``distances``, of parameters: ``l2``, ``relative`` to the way
                                                from the start, ``cosine`` of the two ways
    ``distance/{split}_{disagreement}/…``       of predictions: ``disagreement``, ``kl`` and ``jsd`` [nats],
                                                ``logit_cosine``, ``ensemble_accuracy`` of the averaged softmax
    ``soup_gain/{split}_{metric}/…``            extra ``soup``: how much better the midpoint is than the better end
    ``soup_gain/{split}_{metric}/family``       the average of the trunk and all its children than the best of them
    ``barrier_layer/{split}_{metric}/…``        extra ``layers``, then ``/{module}``: only this module's tensors move
                                                and the rest is the first network's; ``/{module}/at_b``: the second's;
                                                ``/{module}/cumulative``: this module and all before it move
    ``barrier_curves/…``                        figure of the path of each pair, a curve for each later epoch, at the
                                                end
    ``barrier_map/…``                           figure of all pairs of a metric, branch point × later epoch, at the end
    ``barrier_gaps/…``                          figure, with the extra ``figures``: the gaps to the chord alone
    ``barrier_branch_points/…``                 figure, likewise: barrier against k1
    ``barrier_pretraining/…``                   figure, likewise: barrier against the trunk's metric at k1
    ``distance_curves/…``                       figure, likewise, with ``distances``: against the step
    ``family_tree``                             figure, likewise: which run left which, and when
    ==========================================  =====================================================================

    Args:
        num_points: equally spaced points on the line, both ends included, or ``"adaptive"``: about ten, refined around
            the peaks of the losses, and 25 for curves with two peaks.
        reference: ``"initial"``, ``"previous"`` (the last visit), ``"average"`` (of the weights, at the same moment, by
            one of Lightning's averaging callbacks) or the path of a checkpoint; only without branching.
        pairs: ``"trunk"``: each child with the trunk; ``"siblings"``: the children of a branch point with each other.
        splits: of ``"train"``, ``"val"`` and ``"test"``; the last needs a datamodule with ``probe_batches``.
        metrics: further metrics by the name that ``validation_step`` logs, and which is better, ``"min"`` or ``"max"``.
        definitions: conventions of the barrier that are logged under keys of their own.
        batch_stats: ``"recompute"`` (default with BatchNorm), ``"interpolate"`` or ``"endpoint"``.
        align: ``"weights"`` or ``"activations"`` (of the training split): a second path for each pair, to the second
            network after the permutation that brings it closest to the first (arXiv 2209.04836) and keeps what it
            computes; how that was found is in the evidence.
        extras: ``"distances"`` (2 more passes a pair), ``"soup"`` (1), ``"layers"`` (3G paths for G modules),
            ``"attribution"`` (1 in all: shares of examples in ``attributions``, those of classes in the evidence),
            ``"figures"``.
        **common: see :class:`MeasurementCallback`. A ``probe_dataloader`` gives the training split, then the only one.

    Raises:
        ValueError: unknown names, fewer than 3 points, or a metric that would share the key of a split's loss or error.
    """

    kind = "barrier"
    offline = "interpolation_barrier"

    def __init__(
        self,
        *,
        align: Method | None = None,
        extras: Sequence[Extra] = (),
        **common: Unpack[PathOptions],
    ) -> None:
        super().__init__(**common)
        check_listed("extras", extras, EXTRAS)
        if align is not None:
            check_choice("align", align, METHODS)
        self.align, self.extras = align, tuple(extras)
        if self.reference is None and "distances" in extras and self.schedule.every is None:
            # The start is what distances are relative to: the family keeps the weights that somebody asks for.
            self.schedule = replace(self.schedule, points=self.schedule.points | {0})

    @property
    def barriers(self) -> dict[tuple[str, int], Barrier]:
        """Full results by (key, later step)."""
        aligned = {(f"{key}/{ALIGNED}", step): found for (key, step), found in self._by_key("aligned").items()}
        return super().barriers | aligned

    @property
    def attributions(self) -> dict[tuple[str, int], Attribution]:
        """With the extra ``attribution``: shares by (key, later step)."""
        return self._by_key("attributions")

    def _comparison(self, visit: Visit, start: Mapping[str, Tensor] | None) -> Comparison:
        shared = self._shared(visit, start)
        alignment = Alignment(self.align, shared["states"].objective, seed=self.seed) if self.align else None
        return Comparison(**shared, extras=self.extras, alignment=alignment)

    def charts(self) -> list[Chart]:
        """All branch points in one chart for each split and metric."""
        quantities = quantities_of(self.splits, self.metrics)
        barriers = barrier_charts(self.tag, quantities, self.definitions)
        return [*barriers, *extra_charts(self.tag, quantities, self.splits, self.extras)]

    def _figures(self, family: Family) -> Figures:
        records = self.results if "figures" in self.extras else None
        return family_figures(family, self.barriers, records, self.name)
