"""``python -m lmc_lightning.data download NAME --data-dir DIR``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lmc_lightning.data.download import DOWNLOADS, download


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and fetch the set that it names."""
    parser = argparse.ArgumentParser(prog="python -m lmc_lightning.data", description="Public image sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("download", help="fetch a set into a folder")
    fetch.add_argument("name", choices=sorted(DOWNLOADS))
    fetch.add_argument("--data-dir", type=Path, default=Path("data"))
    options = parser.parse_args(arguments)
    download(options.name, options.data_dir)


if __name__ == "__main__":
    main()
