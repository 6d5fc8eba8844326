"""A study as a shell script of Slurm job arrays: for clusters without Ray."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from lmc_lightning.experiments.work.tasks import Kind, Task

_HEAD = """#!/bin/bash
# Submits the study {name}: {count} tasks, as job arrays that wait for each other. Run it on a login node.
# Arguments are given to every sbatch: bash {script} --partition=gpu --gpus=1 --time=4:00:00
# A task that is done is skipped, so that the script may be submitted again after failures.
set -euo pipefail
"""

_ARRAY = """
{kind}=$(sbatch --parsable --job-name={name}-{kind} --array=0-{last}%50 {after}"$@" <<'JOB'
#!/bin/bash
tasks=({tasks})
exec {command} --task "${{tasks[$SLURM_ARRAY_TASK_ID]}}"
JOB
)
echo "{kind}: job ${{{kind}}}, {count} tasks"
"""


def slurm_script(
    plan: Path,
    tasks: Sequence[Task],
    folder: Path,
    *,
    name: str,
    variants: Sequence[str] = (),
    python: str = "python",
) -> str:
    """The script: cells, then their children, then families, then pairs, each array after those that it needs.

    Arrays wait with ``afterany``: a failed cell takes only its own children and pairs with it.

    Args:
        plan: the study's file, as seen from the nodes.
        tasks: of the study.
        folder: of its results, shared by all nodes.
        name: of the jobs.
        variants: of the plan.
        python: the interpreter on the nodes.
    """
    run = [python, "-m", "lmc_lightning.experiments", "sweep", str(plan), "--folder", str(folder)]
    run += [word for variant in variants for word in ("--variant", variant)]
    parts = [_HEAD.format(name=name, count=len(tasks), script=f"{name}.sh")]
    needed: dict[Kind, tuple[Kind, ...]] = {"cell": (), "child": ("cell",), "family": ("child",), "pair": ("cell",)}
    for kind, before in needed.items():
        mine = [task.id for task in tasks if task.kind == kind]
        if not mine:
            continue
        after = "".join(f"--dependency=afterany:${b} " for b in before)
        parts.append(
            _ARRAY.format(
                kind=kind,
                name=name,
                last=len(mine) - 1,
                after=after,
                tasks=" ".join(mine),
                command=shlex.join(run),
                count=len(mine),
            )
        )
    return "".join(parts)
