"""``python -m lmc_lightning.branching FOLDER``: train children in a process of their own."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from lmc_lightning.branching.elsewhere import finish_family, train_from_snapshot
from lmc_lightning.branching.family.plan import Noise

DESCRIPTION = """Train children of a family in this process. FOLDER is a family: its unfinished children are trained;
or a snapshot: one child is. Finished children, and those that another process is training, are left alone. The module,
data and callbacks are read from a pickle in FOLDER, which runs code: use only folders that you trust."""


def noise_argument(text: str) -> Noise:
    """``fresh``, ``same``, or ``order=fresh,augmentation=same,dropout=fresh``."""
    if "=" not in text:
        return text  # type: ignore[return-value]  # checked where it is used
    return dict(part.split("=", 1) for part in text.split(","))  # type: ignore[return-value]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the command line names; the number of children among these that are not completed."""
    parser = argparse.ArgumentParser(prog="python -m lmc_lightning.branching", description=DESCRIPTION)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of a family or of a snapshot")
    parser.add_argument("--noise-seed", type=int, default=0, help="of a child of a snapshot (0)")
    parser.add_argument("--noise", type=noise_argument, default="fresh", help=f"of it: {noise_argument.__doc__}")
    parser.add_argument("--output", type=Path, help="the family that it is added to (the snapshot's own)")
    options = parser.parse_args(arguments)
    if (options.folder / "lineage.json").is_file():
        family = finish_family(options.folder)
        nodes = family.children
    else:
        family, name = train_from_snapshot(options.folder, options.noise, options.noise_seed, options.output)
        nodes = [family.node(name)]
    logging.getLogger("lightning.pytorch").info("%r", family)
    return sum(node.status != "completed" for node in nodes)


if __name__ == "__main__":
    sys.exit(main())
