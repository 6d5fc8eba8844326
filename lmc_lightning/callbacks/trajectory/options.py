"""How a way may be recorded and drawn."""


def check_trajectory(dimension: int | None, loss_points: int) -> None:
    """Refuse impossible numbers, and the loss on a plane of sketches.

    Raises:
        ValueError: naming the arguments, what is possible and the values.
    """
    if dimension is not None and dimension < 2:
        raise ValueError(f"Expected dimension of at least 2 or None (the weights themselves), got {dimension}.")
    if loss_points and (loss_points < 2 or dimension is not None):
        raise ValueError(
            f"Expected loss_points of at least 2, on a plane of weights, got {loss_points} with dimension={dimension}."
        )
