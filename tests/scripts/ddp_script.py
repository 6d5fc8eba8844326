"""A user's script that trains on two processes: Lightning starts the second one itself."""

import sys

from tests.scripts.deaths import Slow
from tests.scripts.distributed import callbacks, fit, seeded

if __name__ == "__main__":
    if "linger" in sys.argv:
        fit(0, seeded(), [Slow(5, steps=[2, 5], num_examples=20)], max_epochs=1)
    else:
        fit(0, seeded(), callbacks(epochs=[0, 1], num_examples=100), max_epochs=1)
