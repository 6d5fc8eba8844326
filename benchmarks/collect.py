"""How long one table of a study of 1,000 cells takes: ``python -m benchmarks.collect``."""

import argparse
import json
import tempfile
import time
from pathlib import Path

from lmc_lightning.experiments.collect import collect, runs, write_table
from lmc_lightning.experiments.work.tasks import cell_folder, record_path

VERSIONS = {"torch": "2.14.1", "lightning": "2.6.6"}


def write_study(folder: Path, cells: int, visits: int, numbers: int) -> None:
    """Records of that many cells, each with the table of a callback."""
    (folder / "records").mkdir(parents=True)
    for i in range(cells):
        name = f"{i:012x}"
        record = {
            "id": name,
            "kind": "cell",
            "status": "completed",
            "cells": [name],
            "hyperparameters": {"width": 2 ** (i % 10), "batch_size": 16 * (1 + i % 7), "seed": i // 70},
            "metrics": {"val_acc": 0.9, "val_loss": 0.3, "steps": 100, "epochs": 10},
            "seconds": 1.0,
            "about": {"versions": VERSIONS, "device": "cpu"},
        }
        record_path(folder, name).write_text(json.dumps(record))
        evidence = {"eval_split": "train", "num_examples": 2048, "probe_digest": "0" * 64, "stderr_data": 0.1}
        lines = [
            {
                "kind": "hessian",
                "step": 10 * v,
                "epoch": v,
                "name": f"hessian/number_{n}",
                "value": v + n,
                "stderr": 0.1,
            }
            | {"unit": "", "evidence": evidence, "status": "ok"}
            for v in range(visits)
            for n in range(numbers)
        ]
        table = cell_folder(folder, name) / "lmc" / "hessian.jsonl"
        table.parent.mkdir(parents=True)
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--numbers", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "study"
        write_study(folder, args.cells, args.visits, args.numbers)
        wall, cpu = time.perf_counter(), time.process_time()
        table = collect(folder)
        wide = runs(table)
        write_table(table, folder / "table.csv")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{args.cells} cells, {len(table):,} numbers, {len(wide)} runs: {wall:.1f} s, {cpu:.1f} s of the processor")


if __name__ == "__main__":
    main()
