"""The arithmetic and the counting of the benchmark of the scheduler, which itself runs in CI as the README has it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kd_assets_tests.benchmarks.scheduler import CountedCommands, Times, medians


def test_overhead_is_what_the_longest_task_does_not_account_for() -> None:
    times = Times(
        run_started=100.0,
        submitted=101.0,
        n_partitions=4,
        materialized=[106.0, 107.0, 112.0, 110.0],
        tasks=[(103.0, 109.0), (102.0, 110.0)],
        run_ended=113.0,
    )
    assert times.figures() == {
        "wall_s": 12.0,
        "run_s": 13.0,
        "task_work_s": 8.0,
        "overhead_ms_per_partition": 1000.0,
        "before_submit_s": 1.0,
        "submit_to_first_result_s": 5.0,
        "after_last_commit_s": 2.0,
    }


def test_medians_are_of_each_figure_and_leave_out_what_is_no_number() -> None:
    rounds = [{"wall_s": 3.0, "calls": 7, "by_command": {}}, {"wall_s": 1.0, "calls": 8, "by_command": {}}]
    assert medians(rounds) == {"wall_s": 2.0, "calls": 7.5}


def test_a_counted_command_is_noted_and_does_what_it_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text('#!/bin/sh\necho "asked for $1"\nexit 3\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    commands = CountedCommands(tmp_path / "counted folder")
    with commands.in_path():
        answers = [subprocess.run(["squeue", f"job {i}"], capture_output=True, text=True) for i in range(2)]
    subprocess.run(["squeue"], capture_output=True)
    assert [(a.stdout, a.returncode) for a in answers] == [("asked for job 0\n", 3), ("asked for job 1\n", 3)]
    assert commands.calls() == {"squeue": 2}
