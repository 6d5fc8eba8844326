"""Curvature, sharpness, branching and barriers of a LeNet-5 while it trains, in TensorBoard: the demo of the package.

python examples/quickstart.py  # the digits that ship inside scikit-learn, no network
python examples/quickstart.py --dataset mnist --data-dir data  # also fashion_mnist, cifar10
python examples/quickstart.py --small  # one quick pass through everything

The same as ``lmc-lightning demo``. Its code, one screen, is in lmc_lightning/experiments/quickstart.py; attach.py shows
how to add callbacks to a trainer that you have.
"""

import sys

from lmc_lightning.experiments.quickstart import main

if __name__ == "__main__":
    sys.exit(main())
