"""Standard errors over the data, from the values of the chunks of a probe set."""

import math

from torch import Tensor


def stderr_data(values: Tensor, weights: Tensor) -> float | None:
    """Standard error of a weighted mean of the values of B chunks, ``(B,)``: √(Σ w²(q − Σ w q)² · B/(B − 1)).

    ``None`` for a single chunk.
    """
    count = int(weights.count_nonzero())
    if count < 2:
        return None
    deviations = weights * (values - weights @ values)
    return math.sqrt(float(deviations.square().sum()) * count / (count - 1))
