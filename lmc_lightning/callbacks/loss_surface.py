"""The loss around a network while it trains, on a line or a plane."""

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.bridge.guards import check_choice
from lmc_lightning.callbacks.bridge.probes import STATISTICS_EXAMPLES
from lmc_lightning.callbacks.surface.figures import surface_figures, surface_mesh
from lmc_lightning.callbacks.surface.options import check_surface
from lmc_lightning.callbacks.visits.common import CommonButExamples, Unpack
from lmc_lightning.callbacks.visits.second_order import SecondOrder
from lmc_lightning.callbacks.visits.visit import NO_DERIVATIVES, Visit
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.batchnorm import has_batch_norm
from lmc_lightning.landscape.surface.directions import Directions, Kind, directions_around
from lmc_lightning.landscape.surface.slices import NUM_POINTS, Surface, centred_grid, surface
from lmc_lightning.loggers import Chart
from lmc_lightning.recording import Measurement, Quantity

NUM_EXAMPLES = 512


class LossSurface(MeasurementCallback):
    """Mean training loss, and error, on a line or a plane with the present weights θ in its centre.

    Costs ``num_points²`` losses over the probe set at each visit (625, of LeNet-5 some 20 seconds of a CPU;
    ``num_points`` on a line), hence 512 examples by default, and better ``epochs=[…]`` than every one;
    ``directions="hessian"`` adds some 15 Hessian products. Directions start from equal random numbers at every visit.

    ============================  =================================================================================
    ``landscape/mean_rise``       mean of L − L(θ) over the grid: the sharpness of the slice
    ``landscape/max_rise``        largest of them
    ``landscape/min_rise``        smallest of them; below 0, θ is not the lowest point of the slice
    ``landscape/curvature_1``     second difference of L at θ along the first direction over a step of the grid, in
                                  units of the direction; along eigenvectors it goes to λ_max as ``span`` goes to 0
    ``landscape/curvature_2``     along the second
    ``landscape/contours``        figure of the loss on a plane, with BatchNorm's policy
    ``landscape/relief``          figure of the same in three dimensions
    ``landscape/profile``         figure of loss and error on a line, in place of both
    ``landscape/mesh``            figure to turn in TensorBoard's mesh viewer, of the last visit
    ============================  =================================================================================

    The grid of each visit is in ``surfaces``, and in ``<log_dir>/lmc/arrays/landscape_surface_<step>.npz``, from which
    ``load_surface`` reads it; ``animate(callback.surfaces, path)`` makes a film of the visits.

    Random directions are made as long as the weights filter by filter (Li et al., arXiv 1712.09913), and orthogonal in
    each filter, where there they are independent. A slice shows two of P directions: compare slices along equal ones,
    and read curvature off :class:`HessianSpectrum`.

    Args:
        directions: ``"random"``, ``"hessian"`` (top eigenvectors, of length 1), or the columns of a tensor ``(P, k)``.
        dimensions: 2 for a plane, 1 for a line.
        num_points: along each direction, odd.
        span: half the width of the slice, in units of its directions.
        biases: whether random directions move biases, gains of normalisation layers and other vectors too.
        batch_stats: ``"endpoint"`` (default with BatchNorm): the statistics of θ at each point, so that the centre is
            L(θ); ``"recompute"``: those of training examples at each point, at a pass over them.
        mesh: of the ``"last"`` visit, of ``"all"`` or of ``"none"``; the viewer shows a few at a time at most.
        num_examples: as everywhere, but fewer.
        **common: see :class:`MeasurementCallback`.

    Raises:
        ValueError: unknown names, or an even number of points.
    """

    kind = "landscape"

    def __init__(
        self,
        directions: Kind | Tensor = "random",
        *,
        dimensions: Literal[1, 2] = 2,
        num_points: int = NUM_POINTS,
        span: float = 1.0,
        biases: bool = False,
        batch_stats: Literal["endpoint", "recompute"] | None = None,
        mesh: Literal["last", "all", "none"] = "last",
        num_examples: int | None = NUM_EXAMPLES,
        **common: Unpack[CommonButExamples],
    ) -> None:
        super().__init__(num_examples=num_examples, **common)
        check_surface(directions, dimensions, batch_stats)
        check_choice("mesh", mesh, ("last", "all", "none"))
        self.grid = centred_grid(span, num_points)
        self.directions, self.dimensions, self.biases = directions, dimensions, biases
        self.batch_stats, self.mesh = batch_stats, mesh
        self.surfaces: dict[int, Surface] = {}
        """The surfaces of this run by step."""
        self._second_order = SecondOrder(self)

    def measure(self, visit: Visit) -> Measurement:
        """The surface at this visit."""
        directions = self._directions(visit)
        found = surface(
            visit.objective,
            directions,
            *[self.grid] * self.dimensions,
            split="train",
            batch_stats=self.batch_stats,
            stats_objective=self._statistics(visit),
            progress=visit.progress,
        )
        self.surfaces[visit.step] = found
        of_this_state = found.batch_stats == "endpoint" and visit.step == 0  # which are untrained, as the evidence says
        return Measurement(
            tuple(self._quantities(found)),
            evidence={
                **NO_DERIVATIVES,
                **directions.evidence,
                "directions": directions.description,
                "span": float(self.grid[-1]),
                "num_points": found.losses.numel(),
                "num_nonfinite": int((~found.losses.isfinite()).sum()),
                **({} if of_this_state else {"batch_stats": found.batch_stats}),
            },
            figures=surface_figures(found, visit.epoch, self.key),
            arrays={self.key("surface"): found.to_arrays()},
            meshes={self.key("mesh"): surface_mesh(found)} if self.mesh == "all" and self.dimensions == 2 else {},
        )

    def charts(self) -> list[Chart]:
        """How the loss rises over the slice, and how it bends along its directions."""
        rises = Chart("rise of the loss over the slice", (self.tag("(mean|max|min)_rise"),))
        return [rises, Chart("curvature along the directions", (self.tag("curvature_[12]"),))]

    def _quantities(self, found: Surface) -> Iterator[Quantity]:
        rises = found.rises
        for name, value in (("mean_rise", rises.mean()), ("max_rise", rises.max()), ("min_rise", rises.min())):
            yield Quantity(self.key(name), float(value), unit="loss")
        for axis in range(self.dimensions):
            yield Quantity(self.key(f"curvature_{axis + 1}"), found.curvature(axis), unit="loss")

    def _directions(self, visit: Visit) -> Directions:
        objective = self._second_order.objective(visit) if self.directions == "hessian" else visit.objective
        options: dict[str, Any] = {"count": self.dimensions, "biases": self.biases, "progress": visit.progress}
        return directions_around(self.directions, objective, visit.generator, **options)

    def _statistics(self, visit: Visit) -> Objective | None:
        """The module on the training batches that BatchNorm statistics are recomputed from."""
        if self.batch_stats != "recompute" or not has_batch_norm(visit.module):
            return None
        pool = self._probes.get("train", STATISTICS_EXAMPLES)
        batches = visit.objective.batches if pool is None else pool.batches
        return visit.loss_on(batches, mode="train", keep_batches=True)

    def forget(self) -> None:
        """Forget the surfaces of another run too."""
        super().forget()
        self.surfaces, self._second_order.check = {}, None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ask for the training examples of BatchNorm's statistics too."""
        if stage == "fit" and self.batch_stats == "recompute" and has_batch_norm(pl_module):
            self._probes.reserve = STATISTICS_EXAMPLES
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the visits that still wait, and show the last surface as a mesh."""
        super().on_train_end(trainer, pl_module)
        if self.surfaces and self.mesh == "last" and self.dimensions == 2 and trainer.is_global_zero:
            step = max(self.surfaces)
            last = Measurement((), meshes={self.key("mesh"): surface_mesh(self.surfaces[step])})
            self._recorder.add(last, step=step, epoch=trainer.current_epoch, loggers=trainer.loggers)
