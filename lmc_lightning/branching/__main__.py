"""``python -m lmc_lightning.branching FOLDER``: train children in a process of their own."""

import sys

from lmc_lightning.branching.command_line import main

if __name__ == "__main__":
    sys.exit(main())
