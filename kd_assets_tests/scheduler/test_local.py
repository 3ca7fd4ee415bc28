"""The local scheduler with its real batch script; the worker's place is taken by small real programs.

The batch script runs `$KD_PYTHON -m kd_assets.worker JOB.json`; here KD_PYTHON is a shell script of the test's, so what
a task does, how it ends and what it is told can be seen.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kd_assets.errors import SchedulerError
from kd_assets.orchestration.platform import PROJECT_FOLDER
from kd_assets.scheduler import JobSpec, LocalScheduler, Submission, TaskPhase, TaskState

SCRIPT = PROJECT_FOLDER / "slurm" / "task.sbatch"


class Jobs:
    """A local scheduler whose tasks run a given shell text; cancels what is left at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.submissions: list[tuple[LocalScheduler, Submission]] = []

    def scheduler(self, body: str, kill_wait_s: float = 5.0) -> LocalScheduler:
        """The supervisor needs a real Python; the tasks' "worker" is `body`."""
        program = self.folder / "python"
        program.write_text(
            f'#!/bin/bash\n[ "$2" = kd_assets.scheduler.supervisor ] && exec "{sys.executable}" "$@"\n'
            + textwrap.dedent(body)
        )
        program.chmod(0o755)
        return LocalScheduler(self.folder / "jobs", script=SCRIPT, python=str(program), kill_wait_s=kill_wait_s)

    def submit(self, scheduler: LocalScheduler, n_tasks: int = 1, concurrency: int = 1, key: str = "k1") -> Submission:
        submission, _ = scheduler.find_or_submit(
            spec(n_tasks, concurrency, key), lambda s: s.job_file.write_text("{}") and None
        )
        self.submissions.append((scheduler, submission))
        return submission


def spec(n_tasks: int = 1, concurrency: int = 1, key: str = "k1") -> JobSpec:
    return JobSpec(key=key, recipe="demo", kind="teacher", n_tasks=n_tasks, concurrency=concurrency)


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    folder = tmp_path / "a folder with spaces & 'quotes'"
    folder.mkdir()
    made = Jobs(folder)
    yield made
    for scheduler, submission in made.submissions:
        scheduler.cancel(submission)


def wait_for(condition: Callable[[], object], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def ended(scheduler: LocalScheduler, submission: Submission) -> dict[int, TaskState]:
    wait_for(lambda: not scheduler.is_live(submission))
    return scheduler.states(submission)


def test_tasks_see_the_variables_that_slurm_gives_an_array_task(jobs: Jobs) -> None:
    scheduler = jobs.scheduler('env | grep ^SLURM_ | sort; echo "args: $*"')
    submission = jobs.submit(scheduler, n_tasks=2)
    assert {s.exit_code for s in ended(scheduler, submission).values()} == {0}
    log = submission.log_file(1).read_text()
    assert "SLURM_ARRAY_TASK_ID=1\n" in log
    assert "SLURM_ARRAY_TASK_COUNT=2\n" in log
    assert "SLURM_RESTART_COUNT=0\n" in log
    assert f"SLURM_ARRAY_JOB_ID={scheduler.job_id(submission)}\n" in log
    assert f"args: -m kd_assets.worker {submission.job_file}\n" in log


def test_no_more_tasks_run_at_once_than_were_asked_for(jobs: Jobs) -> None:
    scheduler = jobs.scheduler(
        """
        touch "running-$SLURM_ARRAY_TASK_ID"; ls running-* | wc -l; sleep 0.2; rm "running-$SLURM_ARRAY_TASK_ID"
        """
    )
    submission = jobs.submit(scheduler, n_tasks=5, concurrency=2)
    ended(scheduler, submission)
    assert {int(submission.log_file(i).read_text()) for i in range(5)} <= {1, 2}


def test_a_task_that_stopped_resumable_is_started_again_with_its_restart_count(jobs: Jobs) -> None:
    scheduler = jobs.scheduler('echo "start $SLURM_RESTART_COUNT"; [ "$SLURM_RESTART_COUNT" = 2 ] || exit 75')
    submission = jobs.submit(scheduler)
    assert ended(scheduler, submission)[0] == TaskState(phase=TaskPhase.ENDED, reason="ended", exit_code=0, restarts=2)
    assert submission.log_file(0).read_text() == "start 0\nstart 1\nstart 2\n"


def test_one_failed_task_leaves_the_others_alone_and_says_how_it_ended(jobs: Jobs) -> None:
    scheduler = jobs.scheduler(
        '[ "$SLURM_ARRAY_TASK_ID" = 1 ] && exit 3; [ "$SLURM_ARRAY_TASK_ID" = 2 ] && kill -9 $$; true'
    )
    states = ended(scheduler, jobs.submit(scheduler, n_tasks=3))
    assert [s.exit_code for s in states.values()] == [0, 3, 137]
    assert [s.reason for s in states.values()] == ["ended", "exit status 3", "killed by SIGKILL"]


def test_a_batch_script_that_is_killed_takes_its_worker_with_it(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("echo $PPID ready; sleep 300")
    submission = jobs.submit(scheduler)
    log = submission.log_file(0)
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    os.kill(int(log.read_text().split()[0]), signal.SIGKILL)
    assert ended(scheduler, submission)[0].reason == "killed by SIGKILL"


def test_a_signal_before_the_worker_listens_restarts_the_task(jobs: Jobs) -> None:
    scheduler = jobs.scheduler('[ "$SLURM_RESTART_COUNT" = 1 ] && exit 0; echo ready; exec sleep 300')
    submission = jobs.submit(scheduler)
    log = submission.log_file(0)
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    os.killpg(int(scheduler.job_id(submission)), signal.SIGUSR1)
    assert ended(scheduler, submission)[0] == TaskState(phase=TaskPhase.ENDED, reason="ended", exit_code=0, restarts=1)


def test_a_folder_that_cannot_be_written_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("in the way")
    scheduler = LocalScheduler(tmp_path / "jobs", script=SCRIPT)
    with pytest.raises(SchedulerError, match="KD_HOME must be a folder that this user can write"):
        scheduler.find_or_submit(spec(), lambda s: None)


def test_usr1_reaches_the_worker_and_the_script_waits_for_it_to_flush(jobs: Jobs) -> None:
    scheduler = jobs.scheduler(
        """
        trap 'echo flushing; sleep 0.3; echo flushed; exit 75' USR1
        [ "$SLURM_RESTART_COUNT" = 1 ] && exit 0
        echo ready; while :; do sleep 0.05; done
        """
    )
    submission = jobs.submit(scheduler)
    log = submission.log_file(0)
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    os.killpg(int(scheduler.job_id(submission)), signal.SIGUSR1)
    assert ended(scheduler, submission)[0].restarts == 1
    assert "flushing\nflushed\n" in log.read_text()


def test_cancel_ends_every_process_of_the_job_even_one_that_ignores_term(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("trap '' TERM; echo $$ ready; (trap '' TERM; sleep 300) & wait", kill_wait_s=0.5)
    submission = jobs.submit(scheduler, n_tasks=3, concurrency=2)
    wait_for(lambda: submission.log_file(1).exists() and "ready" in submission.log_file(1).read_text())
    scheduler.cancel(submission)
    assert not scheduler.is_live(submission)
    assert all(s.phase is TaskPhase.ENDED for s in scheduler.states(submission).values())
    group = scheduler.job_id(submission)
    left = subprocess.run(["ps", "-o", "pid=,stat=", "-g", group], capture_output=True, text=True, check=False).stdout
    assert [line for line in left.splitlines() if "Z" not in line] == []


def test_term_lets_the_worker_flush_and_is_no_reason_to_restart(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("trap 'echo flushed; exit 75' TERM; echo ready; while :; do sleep 0.05; done")
    submission = jobs.submit(scheduler)
    log = submission.log_file(0)
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    scheduler.cancel(submission)
    assert log.read_text().endswith("flushed\n")
    assert scheduler.states(submission)[0].restarts == 0


def test_equal_work_finds_the_live_job_and_a_second_submission_comes_only_after_its_end(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("while [ ! -e go ]; do sleep 0.02; done")
    first = jobs.submit(scheduler)
    again, is_new = scheduler.find_or_submit(spec(), lambda s: pytest.fail("a job file was written twice"))
    assert (again, is_new) == (first, False)
    (first.folder / "go").touch()
    ended(scheduler, first)
    assert scheduler.find(spec()) is None
    second = jobs.submit(scheduler)
    assert second.folder.name == "0002"
    assert (first.folder / "job.json").exists(), "nothing of an ended job is deleted"
    (second.folder / "go").touch()


def test_a_job_outlives_the_process_that_submitted_it_and_another_finds_it(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("while [ ! -e go ]; do sleep 0.02; done; echo done")
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from kd_assets.scheduler import JobSpec, LocalScheduler
        folder, python, script = sys.argv[1:]
        scheduler = LocalScheduler(Path(folder), script=Path(script), python=python)
        spec = JobSpec(key="k1", recipe="demo", kind="teacher", n_tasks=1, concurrency=1)
        scheduler.find_or_submit(spec, lambda s: s.job_file.write_text("{}") and None)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", program, jobs.folder / "jobs", jobs.folder / "python", SCRIPT], check=False, timeout=60
    )
    assert run.returncode == -signal.SIGKILL
    submission = scheduler.find(spec())
    assert submission is not None
    jobs.submissions.append((scheduler, submission))
    (submission.folder / "go").touch()
    assert ended(scheduler, submission)[0].exit_code == 0
    assert submission.log_file(0).read_text() == "done\n"


def test_two_who_submit_the_same_work_at_once_start_one_job(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("echo started; sleep 1")
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from kd_assets.scheduler import JobSpec, LocalScheduler
        folder, python, script = sys.argv[1:]
        scheduler = LocalScheduler(Path(folder), script=Path(script), python=python)
        spec = JobSpec(key="k1", recipe="demo", kind="teacher", n_tasks=1, concurrency=1)
        print(scheduler.find_or_submit(spec, lambda s: s.job_file.write_text("{}") and None)[1])
        """
    )
    command = [sys.executable, "-c", program, str(jobs.folder / "jobs"), str(jobs.folder / "python"), str(SCRIPT)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sorted(p.communicate(timeout=60)[0].strip() for p in running) == ["False", "False", "False", "True"]
    submission = scheduler.find(spec())
    assert submission is not None
    jobs.submissions.append((scheduler, submission))


def test_a_job_lives_as_long_as_any_of_its_tasks_even_without_its_supervisor(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("echo ready; while [ ! -e go ]; do sleep 0.02; done")
    submission = jobs.submit(scheduler, n_tasks=2)
    wait_for(lambda: submission.log_file(0).exists() and "ready" in submission.log_file(0).read_text())
    subprocess.run(
        ["pkill", "-KILL", "-g", scheduler.job_id(submission), "-f", "kd_assets.scheduler.supervisor"], check=True
    )
    time.sleep(0.2)
    assert scheduler.is_live(submission), "its first task still runs"
    assert scheduler.states(submission)[0].phase is TaskPhase.RUNNING
    (submission.folder / "go").touch()
    states = ended(scheduler, submission)
    assert "gone without an exit status" in states[0].reason
    assert "never started" in states[1].reason


def test_a_job_is_ended_when_its_processes_are_whatever_its_state_file_says(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("echo ready; sleep 300")
    submission = jobs.submit(scheduler)
    wait_for(lambda: submission.log_file(0).exists() and "ready" in submission.log_file(0).read_text())
    os.killpg(int(scheduler.job_id(submission)), signal.SIGKILL)
    states = ended(scheduler, submission)
    assert json.loads((submission.folder / "state.json").read_text())["0"]["phase"] == "running"
    assert states[0].phase is TaskPhase.ENDED
