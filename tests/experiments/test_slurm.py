"""The script of job arrays, run against a stand-in for sbatch."""

import os
import subprocess
import sys
from pathlib import Path

from lmc_lightning.experiments.plans.study import Study
from lmc_lightning.experiments.work.slurm import slurm_script
from lmc_lightning.experiments.work.tasks import tasks_of
from tests.experiments.studies import BRANCHED

SBATCH = """#!/bin/bash
echo "$@" >> "$LOG"
cat > "$LOG.job$(wc -l < "$LOG")"
wc -l < "$LOG"
"""


def test_arrays_wait_for_each_other_and_each_element_runs_its_task(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    tasks = tasks_of(Study.of(BRANCHED))
    text = slurm_script(Path("my plan.yaml"), tasks, Path("out"), name="tiny", python=sys.executable)
    (tmp_path / "tiny.sh").write_text(text)
    log = tmp_path / "log"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
    command = ["bash", str(tmp_path / "tiny.sh"), "--partition=gpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "cell: job 1, 2 tasks"
    lines = log.read_text().splitlines()
    assert lines == [
        "--parsable --job-name=tiny-cell --array=0-1%50 --partition=gpu",
        "--parsable --job-name=tiny-child --array=0-1%50 --dependency=afterany:1 --partition=gpu",
        "--parsable --job-name=tiny-family --array=0-1%50 --dependency=afterany:2 --partition=gpu",
        "--parsable --job-name=tiny-pair --array=0-0%50 --dependency=afterany:1 --partition=gpu",
    ]
    job = (tmp_path / "log.job2").read_text().replace(sys.executable, "echo")
    element = subprocess.run(
        ["bash"], input=job, env={**environment, "SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True, check=True
    )
    child = [task.id for task in tasks if task.kind == "child"][1]
    options = "-m lmc_lightning.experiments sweep my plan.yaml --folder out --task"
    assert element.stdout.strip() == f"{options} {child}"
