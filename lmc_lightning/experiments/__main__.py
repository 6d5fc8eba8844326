"""``python -m lmc_lightning.experiments``: the command line, where its script is not on the path."""

import sys

from lmc_lightning.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
