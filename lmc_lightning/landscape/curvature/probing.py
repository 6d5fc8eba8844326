"""Random probes of a curvature matrix: what the first product of each tells of its trace, by chunks and tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lmc_lightning.core.hvp import CurvatureProduct
from lmc_lightning.core.random_vectors import rademacher
from lmc_lightning.landscape.curvature.eigenvectors import products_by_tensor, squares_by_tensor
from lmc_lightning.landscape.curvature.result import Trace
from lmc_lightning.landscape.statistics.bands import stderr_data
from lmc_lightning.linalg.density import Quadrature, mean_and_stderr
from lmc_lightning.linalg.eigen import Eigenpairs
from lmc_lightning.linalg.subspace import Deflation
from lmc_lightning.linalg.trace import trace_to_precision


class Probing:
    """Draws probes and takes apart the products that give their samples of the trace.

    Args:
        product: The matrix H.
        generator: Source of the probes.
    """

    def __init__(self, product: CurvatureProduct, generator: torch.Generator) -> None:
        self.num_drawn = 0
        self.sizes = product.sizes
        self._product, self._generator = product, generator
        self._chunks: dict[int, Tensor] = {}
        self._tensors: dict[int, Tensor] = {}

    def draw(self) -> Tensor:
        """A new probe ``(P,)`` of independent signs."""
        self.num_drawn += 1
        theta = self._product.theta
        return rademacher(theta.numel(), self._generator).to(theta)

    def draws(self, count: int) -> Iterator[Tensor]:
        """So many new probes."""
        return (self.draw() for _ in range(count))

    def first(self, directions: Tensor, numbers: list[int]) -> Tensor:
        """H v for the directions ``(P,)`` or ``(P, b)`` of the probes of these numbers; vᵀHv is noted in parts."""
        products, forms = self._product.with_forms(directions)
        columns = zip(_columns(directions), _columns(products), _columns(forms), strict=True)
        for number, (direction, product, by_chunk) in zip(numbers, columns, strict=True):
            self._chunks[number] = by_chunk
            self._tensors[number] = products_by_tensor(direction, product, self.sizes)
        return products

    def sample(self, vector: Tensor) -> Tensor:
        """H v for one more probe, after those drawn before."""
        return self.first(vector, [self.num_drawn - 1])

    def parts(self, masses: Tensor) -> tuple[Tensor, Tensor]:
        """vᵀHv of each probe by chunks ``(R, B)`` and by tensors ``(R, T)``; squared norms of the first are ``masses``.

        A probe within the known span has no part in what is sampled.
        """
        scale = torch.ones(self.num_drawn, dtype=torch.float64)
        scale[: len(masses)] = masses
        shapes = len(self._product.weights), len(self.sizes)
        chunks, tensors = (
            scale[:, None] * _rows(found, self.num_drawn, size)
            for found, size in zip((self._chunks, self._tensors), shapes, strict=True)
        )
        return chunks, tensors


def sampled_trace(
    probing: Probing,
    density: Quadrature | None,
    pairs: Eigenpairs | None,
    pair_forms: Tensor,
    weights: Tensor,
    *,
    tolerance: float | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Trace:
    """tr H as the converged eigenvalues plus Hutchinson's estimate on their complement: Hutch++ by eigenvectors.

    The probes of the density are samples already. With ``tolerance``, more are taken, one product each, until the 95 %
    interval is within ±tolerance·|value|. The parts by tensor leave out how far eigenvectors are from being exact, a
    share of the tolerance.

    Args:
        probing: Has taken apart the first products of the probes of ``density``.
        density: Of the complement of the converged ``pairs``.
        pairs: Extreme eigenpairs.
        pair_forms: uᵀH_b u of each of them ``(k, B)``; without those of all, there is no error over data.
        weights: Share of each chunk ``(B,)``.
        tolerance: Precision to be reached.
        should_stop: Asked after each further product.

    Raises:
        ValueError: There are neither a density nor a tolerance.
    """
    known = Deflation(torch.zeros(0, dtype=torch.float64), (), 0.0) if pairs is None else pairs.deflation()
    samples = torch.zeros(0, dtype=torch.float64) if density is None else density.traces
    masses = torch.zeros(0, dtype=torch.float64) if density is None else density.sampled_masses
    converged = True
    if tolerance is not None:
        estimate = trace_to_precision(
            probing.sample,
            probing.draw,
            tolerance=tolerance,
            num_sketch=0,
            deflation=known,
            earlier=samples.tolist(),
            should_stop=should_stop,
        )
        value, stderr, converged = estimate.value, estimate.stderr, estimate.converged
    elif density is not None:
        value, stderr = density.moment(1)
    else:
        raise ValueError("Nothing to take the trace from: give a density or a tolerance.")
    chunks, tensors = probing.parts(masses)
    of_chunks, of_tensors = chunks.mean(0), tensors.mean(0)
    complete = pairs is None or len(pair_forms) == len(pairs.eigenvalues)
    if pairs is not None:
        of_chunks = of_chunks + pair_forms[pairs.converged].sum(0) if complete else of_chunks
        of_tensors = of_tensors + known.values @ squares_by_tensor(known.blocks[0], probing.sizes)
    return Trace(
        method="quadrature" if tolerance is None else "hutch++",
        value=value,
        stderr=stderr,
        stderr_data=stderr_data(of_chunks, weights) if complete else None,
        num_probes=len(chunks),
        tensors=of_tensors,
        tensors_stderr=mean_and_stderr(tensors)[1],
        converged=converged,
    )


def _columns(values: Tensor) -> Sequence[Tensor]:
    return [values] if values.ndim == 1 else values.unbind(1)


def _rows(found: Mapping[int, Tensor], count: int, size: int) -> Tensor:
    """The rows of these numbers, zeros for those that are missing."""
    zeros = torch.zeros(size, dtype=torch.float64)
    return torch.stack([found.get(number, zeros) for number in range(count)])
