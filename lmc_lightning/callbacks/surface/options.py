"""What a surface may be asked for."""

from torch import Tensor

from lmc_lightning.callbacks.bridge.guards import check_choice


def check_surface(directions: object, dimensions: int, batch_stats: str | None) -> None:
    """Refuse what gives no surface.

    Raises:
        ValueError: naming the argument, what is possible and the value.
    """
    if isinstance(directions, Tensor):
        columns = directions.reshape(len(directions), -1).shape[1]
        if columns != dimensions:
            raise ValueError(
                f"Expected a direction for each of {dimensions} dimensions, as columns (P, {dimensions}), got "
                f"{columns}. Pass dimensions={columns}."
            )
    else:
        check_choice("directions", directions, ("random", "hessian"))
    if dimensions not in (1, 2):
        raise ValueError(f"Expected dimensions to be 1 (a line) or 2 (a plane), got {dimensions}.")
    if batch_stats is not None:
        check_choice("batch_stats", batch_stats, ("endpoint", "recompute"))
