"""A real task in a process of its own, asked to stop while it works, and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_assets.contract import WorkUnit, event_file, read_events
from kd_assets.errors import EXIT_RESUMABLE
from kd_assets.store import read_manifest
from kd_assets_tests.teacher.tiny import Desk, part_bytes, save_teacher, tiny_documents, tiny_params

N_DOCUMENTS = 80
WAIT_S = 300


def start(job_path: Path, attempt: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "SLURM_RESTART_COUNT": str(attempt),
        "SLURM_ARRAY_TASK_ID": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "kd_assets.worker", str(job_path)], env=environment, stdout=subprocess.DEVNULL
    )


def prepared(desk: Desk) -> tuple[Path, WorkUnit]:
    """A job of one partition with a part for every document, in a folder with spaces."""
    folder = desk.folder / "teacher"
    params = tiny_params(save_teacher(folder), part_documents=1)
    unit = desk.unit(desk.commit_shard(tiny_documents([40] * N_DOCUMENTS)), params)
    job_path = desk.folder / "job.json"
    job_path.write_text(desk.job(params, [unit]).to_json())
    return job_path, unit


def wait_for_progress(desk: Desk, task: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and task.poll() is None:
        events = (event for _, event in read_events(event_file(desk.folder / "events", 0)))
        if any(not isinstance(event, str) and event.type == "progress" for event in events):
            return
        time.sleep(0.01)
    raise AssertionError(f"no progress, exit code {task.poll()}")


@pytest.mark.slow
def test_task_stopped_by_usr1_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole, stopped = Desk(tmp_path / "whole run"), Desk(tmp_path / "stopped run")
    whole_job, whole_unit = prepared(whole)
    stopped_job, stopped_unit = prepared(stopped)

    task = start(stopped_job, attempt=0)
    wait_for_progress(stopped, task)
    task.send_signal(signal.SIGUSR1)
    assert task.wait(WAIT_S) == EXIT_RESUMABLE
    n_finished = len(part_bytes(stopped_unit))
    assert 0 < n_finished < 3 * N_DOCUMENTS
    assert not any((Path(o.path) / "manifest.json").exists() for o in stopped_unit.outputs)

    tasks = [start(stopped_job, attempt=1), start(whole_job, attempt=0)]
    assert [task.wait(WAIT_S) for task in tasks] == [0, 0]
    assert part_bytes(stopped_unit) == part_bytes(whole_unit)
    for one, other in zip(stopped_unit.outputs, whole_unit.outputs, strict=True):
        resumed = read_manifest(Path(one.path))
        assert resumed.data_version == read_manifest(Path(other.path)).data_version
        assert resumed.provenance["attempt"] == 1
        assert resumed.facts["computed_tokens"] < resumed.n_tokens
