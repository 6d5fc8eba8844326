"""What a spectrum may be asked for."""

from lmc_lightning.callbacks.bridge.guards import check_choice


def check_choices(operator: str, trace: str, blocks: str | None) -> None:
    """Refuse names that are none of the choices.

    Raises:
        ValueError: naming the argument and its choices.
    """
    check_choice("operator", operator, ("hessian", "ggn", "empirical_fisher"))
    check_choice("trace", trace, ("auto", "sampled"))
    if blocks is not None:
        check_choice("blocks", blocks, ("module", "tensor"))


def check_numbers(operator: str, num_eigenvalues: int, num_negative: int, num_probes: int, num_steps: int) -> None:
    """Refuse what cannot be counted.

    Raises:
        ValueError: a number below its least value, or negative eigenvalues of a matrix that has none.
    """
    if num_eigenvalues < 1 or num_negative < 0 or num_probes < 0 or num_steps < 2:
        raise ValueError(
            f"Expected num_eigenvalues ≥ 1, num_negative ≥ 0, num_probes ≥ 0 and num_steps ≥ 2, got "
            f"{num_eigenvalues}, {num_negative}, {num_probes} and {num_steps}."
        )
    if operator != "hessian" and num_negative:
        raise ValueError(f"operator={operator!r} has no negative eigenvalues: expected num_negative=0.")


def check_limits(
    tolerance: float,
    max_products: int,
    trace_tolerance: float | None,
    memory_budget: int | None,
    block_size: int | None,
    chunk_size: int | None,
) -> None:
    """Refuse limits that nothing can keep.

    Raises:
        ValueError: naming the argument and its range.
    """
    if not 0 < tolerance < 1 or max_products < 1:
        raise ValueError(f"Expected 0 < tolerance < 1 and max_products ≥ 1, got {tolerance} and {max_products}.")
    if trace_tolerance is not None and not 0 < trace_tolerance < 1:
        raise ValueError(f"Expected 0 < trace_tolerance < 1 or None, got {trace_tolerance}.")
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"Expected memory_budget ≥ 0 [bytes] or None, got {memory_budget}.")
    for name, size in (("block_size", block_size), ("chunk_size", chunk_size)):
        if size is not None and size < 1:
            raise ValueError(f"Expected {name} ≥ 1 or None, got {size}.")
