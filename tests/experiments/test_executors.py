"""A study on Ray: the same bits as in one process, whoever is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmc_lightning.experiments.plans.study import Study
from lmc_lightning.experiments.work import executors
from lmc_lightning.experiments.work.tasks import outcome_of, tasks_of
from tests.experiments.studies import BRANCHED, PLAN, run_all, write_plan

TWELVE = {**PLAN, "grid": {"model.init_args.lr": [0.05, 0.1, 0.2], "data.init_args.batch_size": [16, 32]}}


def test_tasks_run_in_their_order_in_one_process(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(executors, "run_task", lambda study, task, folder: task.id)
    tasks = tasks_of(Study.of(BRANCHED))
    executors.run_inline(Study.of(BRANCHED), tasks, tmp_path, seen.append)
    assert seen == [task.id for task in tasks]


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lmc-lightning\[ray\]'"):
        executors.run_on_ray(Study.of(PLAN), [], tmp_path, print)


def sweep(plan: Path, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "lmc_lightning.experiments", "sweep", str(plan), "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--executor", "ray", "--workers", "2"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(folder: Path) -> int:
    return len(list((folder / "records").glob("*.json")))


def wait_for(condition, process: subprocess.Popen, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert condition(), process.communicate()[0] if process.poll() is not None else "nothing happened"


def claimed_by(folder: Path) -> list[int]:
    import json

    return [json.loads(p.read_text())["pid"] for p in (folder / "claims").glob("*.json")]


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_driver_lose_no_finished_cell(tmp_path):
    plan, folder = write_plan(tmp_path, TWELVE), tmp_path / "ray"
    driver = sweep(plan, folder)
    wait_for(lambda: finished(folder) >= 2 and claimed_by(folder), driver)
    os.kill(claimed_by(folder)[0], signal.SIGKILL)  # a worker in the middle of a cell
    wait_for(lambda: finished(folder) >= 5, driver)
    os.killpg(driver.pid, signal.SIGKILL)  # the driver, and the cluster that it started
    driver.communicate()
    subprocess.run(["pkill", "-9", "-f", "ray::|raylet|gcs_server"], check=False)
    kept = {path: path.read_bytes() for path in (folder / "records").glob("*.json")}
    assert len(kept) >= 5
    again = sweep(plan, folder)
    told, _ = again.communicate(timeout=400)
    assert again.returncode == 0, told
    assert all(path.read_bytes() == content for path, content in kept.items())
    inline = run_all(TWELVE, tmp_path / "inline")
    assert len(inline) == 12
    for task_id, outcome in inline.items():
        assert outcome_of(folder, task_id).metrics == outcome.metrics, task_id
