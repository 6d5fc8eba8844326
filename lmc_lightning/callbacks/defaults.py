"""The callbacks for a run that is to be watched without being slowed down."""

from typing import Any

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.hessian_spectrum import HessianSpectrum
from lmc_lightning.callbacks.sharpness import Sharpness

SHARES = (0.7, 0.3)
"""Of what the callbacks may take together, by what a visit of each costs."""

TOLERANCE, MAX_PRODUCTS, NUM_SAMPLES = 0.3, 16, 2
"""With probability 0.99 over starts none lies 30 % above the eigenvalue reported; its error is mostly far smaller."""


def default_callbacks(
    *, num_examples: int = 256, max_overhead: float | None = 0.1, **common: Any
) -> list[MeasurementCallback]:
    """λ_max and sharpness on a few training examples, at the start and after every epoch.

    Each visit costs 5 to 7 Hessian products (the first one up to 16), 2 gradients and 8 losses of ``num_examples``
    examples; under Adam as many products again, for ``hessian/stability``. λ_max of so few examples is too large,
    scatters, and is found to a tolerance of 30 % only: enough to follow a run, while numbers to report come from
    ``HessianSpectrum()``.

    >>> [type(callback).__name__ for callback in default_callbacks()]
    ['HessianSpectrum', 'Sharpness']

    Args:
        num_examples: size of the probe set.
        max_overhead: time of all visits over training time, at most; ``None`` for no limit.
        **common: for both, see :class:`MeasurementCallback`; ``every_n_epochs=5`` for fewer visits.
    """
    shares = [None if max_overhead is None else share * max_overhead for share in SHARES]
    first, second = ({"num_examples": num_examples, "max_overhead": share, **common} for share in shares)
    return [
        HessianSpectrum(
            num_eigenvalues=1,
            num_negative=0,
            num_probes=0,
            tolerance=TOLERANCE,
            max_products=MAX_PRODUCTS,
            density=False,
            **first,
        ),
        Sharpness(num_samples=NUM_SAMPLES, **second),
    ]
