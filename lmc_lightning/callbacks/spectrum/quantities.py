"""The numbers of a spectrum under their logged names, each with its evidence."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from math import nan
from typing import Any

import numpy as np
from torch.nn.utils.rnn import pad_sequence

from lmc_lightning.callbacks.spectrum.figures import NUM_SHOWN
from lmc_lightning.landscape.curvature.blocks import BlockSpectrum, largest_blocks
from lmc_lightning.landscape.curvature.result import SpectrumResult
from lmc_lightning.landscape.curvature.stability import Stability
from lmc_lightning.loggers import Band, Chart
from lmc_lightning.recording import Quantity, Shown, Status

Key = Callable[[str], str]
StatusOf = Callable[[bool], Status]


def spectrum_quantities(result: SpectrumResult, limit: Stability, key: Key, status: StatusOf) -> Iterator[Quantity]:
    """All numbers of a visit.

    Args:
        result: with eigenpairs.
        limit: λ_max in units of the optimizer's threshold, where there is one.
        key: quantity -> logged name.
        status: of a number that has converged, or not.
    """
    yield from eigenvalue_quantities(result, key, status)
    yield from _derived_quantities(result, key)
    yield from _trace_quantities(result, key, status)
    yield from _layer_masses(result, key)
    yield from _block_quantities(result, key, status)
    if limit.value is not None:
        residual = {} if limit.residual is None else {"residual": limit.residual}
        yield Quantity(key("stability"), limit.value, evidence=residual, status=status(limit.converged))


def eigenvalue_quantities(result: SpectrumResult, key: Key, status: StatusOf) -> Iterator[Quantity]:
    """Each eigenvalue with its residual and error over data."""
    pairs = result.eigenpairs
    assert pairs is not None
    count, errors = len(pairs.eigenvalues), dict(enumerate(result.eigenvalues_stderr_data))
    names = [_eigenvalue_name(index, pairs.num_largest, count) for index in range(count)]
    places = list(enumerate(names))
    if result.lambda_min is not None and "lambda_min" not in names:
        places.append((count - 1, "lambda_min"))  # of few parameters, the last one from the top
    for index, name in places:
        shown = {} if name == "lambda_max" or index not in errors else {"stderr_data": errors[index]}
        yield Quantity(
            key(name),
            float(pairs.eigenvalues[index]),
            stderr_data=errors.get(index) if name == "lambda_max" else None,
            evidence={"residual": float(pairs.residuals[index]), **shown},
            status=status(bool(pairs.converged[index])),
        )
    yield Quantity(key("lambda_max_residual"), float(pairs.residuals[0]))


def _eigenvalue_name(index: int, num_largest: int, count: int) -> str:
    if index < num_largest:
        return "lambda_max" if index == 0 else f"eigenvalue_{index + 1}"
    return "lambda_min" if index == count - 1 else f"negative_eigenvalue_{count - index}"


def _derived_quantities(result: SpectrumResult, key: Key) -> Iterator[Quantity]:
    """What follows from eigenvalues, eigenvectors and density; undefined numbers are left out."""
    probes = {} if result.quadrature is None else probe_numbers(result)
    signed = result.lambda_min is not None
    rows: list[tuple[str, float | None, float | None, Shown]] = [
        ("effective_rank", result.effective_rank, result.effective_rank_stderr, "all"),
        ("effective_rank_entropy", result.effective_rank_entropy, None, "none"),
        ("stable_rank", result.stable_rank, result.stable_rank_stderr, "all"),
        ("frobenius_sq", result.frobenius_sq, result.frobenius_sq_stderr, "none"),
        ("negative_mass", result.negative_mass if signed else None, result.negative_mass_stderr, "all"),
        ("null_mass", result.null_mass, result.null_mass_stderr, "none"),
    ]
    for name, value, stderr, shown in rows:
        if result.quadrature is not None and (signed or name != "negative_mass"):
            yield Quantity(key(name), value, stderr, evidence=probes, log=shown)
    if result.spectral_radius is not None:
        yield Quantity(key("spectral_radius"), result.spectral_radius, log="none")
    if result.overlap is not None:
        yield Quantity(key("overlap"), result.overlap)
    if result.gradient_in_top is not None:
        yield Quantity(key("grad_in_topk"), result.gradient_in_top)


def probe_numbers(result: SpectrumResult) -> dict[str, int]:
    """What the density was taken from."""
    num_probes = 0 if result.quadrature is None else len(result.quadrature.nodes)
    return {"num_probes": num_probes, "num_steps": result.cost.num_steps}


def _trace_quantities(result: SpectrumResult, key: Key, status: StatusOf) -> Iterator[Quantity]:
    """The trace by the best method, its mean eigenvalue, and its parts by tensor."""
    if not result.traces:
        return
    best, *others = result.traces
    evidence = {
        "method": best.method,
        "num_probes": best.num_probes,
        "by_other_methods": {t.method: {"value": t.value, "stderr": t.stderr} for t in others},
        "not_exact": result.exactness.reason if result.exactness else None,
    }
    yield Quantity(
        key("trace"),
        best.value,
        best.stderr,
        best.stderr_data,
        evidence=evidence,
        status=status(best.converged),
    )
    per_param = None if result.trace_per_param is None else best.stderr / result.num_params
    yield Quantity(key("trace_per_param"), result.trace_per_param, per_param, log="none")
    shown = {block.name for block in largest_blocks(result.blocks, NUM_SHOWN)}
    parts = zip(result.tensor_names, best.tensors.tolist(), best.tensors_stderr.tolist(), strict=True)
    for name, value, stderr in parts:
        log: Shown = "value" if name in shown else "none"
        yield Quantity(key(f"trace/{name}"), value, stderr, evidence={"method": best.method}, log=log)


def _layer_masses(result: SpectrumResult, key: Key) -> Iterator[Quantity]:
    if result.layer_masses is not None:
        masses = result.layer_masses.tolist()
        shown = sorted(masses, reverse=True)[:NUM_SHOWN]
        for name, mass in zip(result.tensor_names, masses, strict=True):
            yield Quantity(key(f"layer_mass/{name}"), mass, log="value" if mass >= shown[-1] > 0 else "none")


def _block_quantities(result: SpectrumResult, key: Key, status: StatusOf) -> Iterator[Quantity]:
    """λ_max of each block with its density, and its trace, where that is not there as the one of a tensor."""
    shown = largest_blocks(result.blocks, NUM_SHOWN)
    for block in result.blocks:
        log: Shown = "value" if block in shown else "none"
        evidence = {
            "residual": block.residual,
            "lambda_min": block.lambda_min,
            "num_params": block.num_params,
        }
        name = key(f"lambda_max/{block.name}")
        yield Quantity(name, block.lambda_max, evidence=evidence, status=status(block.converged), log=log)
        if result.traces and block.name not in result.tensor_names:
            parts = result.traces[0].tensors[list(block.tensors)]
            yield Quantity(key(f"trace/{block.name}"), float(parts.sum()), log=log)


def spectrum_arrays(result: SpectrumResult, key: Key, *, eigenvectors: bool) -> dict[str, dict[str, np.ndarray]]:
    """What is kept beside the numbers: the densities of blocks, and on demand the eigenpairs."""
    of_blocks = {key("block_density"): _block_arrays(result.blocks)} if result.blocks else {}
    return of_blocks | ({key("eigenvectors"): _pair_arrays(result)} if eigenvectors else {})


def _block_arrays(blocks: Sequence[BlockSpectrum]) -> dict[str, np.ndarray]:
    """The density of each block: nodes and weights, a row a block, with NaN where it has fewer."""
    rows = {name: [getattr(block, name) for block in blocks] for name in ("nodes", "weights")}
    padded = {name: pad_sequence(list(found), batch_first=True, padding_value=nan) for name, found in rows.items()}
    return {"blocks": np.array([block.name for block in blocks]), **{k: v.cpu().numpy() for k, v in padded.items()}}


def _pair_arrays(result: SpectrumResult) -> dict[str, np.ndarray]:
    """Eigenpairs, and which tensor of θ has which of their entries, for a file of plain arrays."""
    pairs = result.eigenpairs
    assert pairs is not None
    return {
        "eigenvalues": pairs.eigenvalues.numpy(),
        "residuals": pairs.residuals.numpy(),
        "eigenvectors": pairs.eigenvectors.cpu().numpy(),
        "tensor_names": np.array(result.tensor_names),
        "tensor_sizes": np.array(result.tensor_sizes),
    }


def spectrum_charts(
    key: Key, tag: Key, *, signed: bool, blocks: bool = False, attribution: bool = False
) -> list[Chart | Band]:
    """What is to be seen together.

    Args:
        key: quantity -> logged name.
        tag: regular expression of quantities -> that of logged names.
        signed: of matrices that have negative eigenvalues.
        blocks: with numbers of diagonal blocks.
        attribution: with shares of examples and classes.
    """
    charts: list[Chart | Band] = [
        Band("λ_max", key("lambda_max")),
        Band("trace", key("trace")),
        Chart("eigenvalues at the top", (tag("lambda_max"), tag(r"eigenvalue_\d+"))),
        Chart("residual of λ_max", (tag("lambda_max_residual"),)),
        Chart("top eigenvector: shares of tensors", (tag("layer_mass/[^/]+"),)),
        Chart("ranks", (tag("(effective|stable)_rank"),)),
        Chart("gradient in, and overlap of, top eigenvectors", (tag("grad_in_topk"), tag("overlap"))),
    ]
    if signed:
        charts += [
            Chart("eigenvalues at the bottom", (tag("lambda_min"), tag(r"negative_eigenvalue_\d+"))),
            Chart("share of eigenvalues below 0", (tag("negative_mass"),)),
            Chart("stability: full-batch training diverges above 1", (tag("stability"),)),
        ]
    for name, title in (("lambda_max", "λ_max"), ("trace", "trace")):
        if blocks:
            charts.append(Chart(f"{title} of blocks", (tag(f"{name}/(?!(low|high)$)[^/]+"),)))
        if attribution:
            charts.append(Chart(f"{title}: shares of classes", (tag(f"{name}_share/[^/]+"),)))
            charts.append(Chart(f"{title}: share of one example in a hundred", (tag(f"{name}_top_percent"),)))
    return charts


def spectrum_evidence(result: SpectrumResult, limit: Stability) -> dict[str, Any]:
    """What all numbers of a visit share, with what it has cost; time is taken by whoever made the visit."""
    return {
        **asdict(result.cost),
        "gradient_norm": result.gradient_norm,
        "converged": result.converged,
        "num_params": result.num_params,
        "no_stability": limit.reason,
    }
