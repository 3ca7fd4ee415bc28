"""The local scheduler with its real batch script; the worker's place is taken by small real programs.

The batch script runs `$KD_PYTHON -m kd_assets.worker JOB.json`; here KD_PYTHON is a shell script of the test's, so what
a task does, how it ends and what it is told can be seen.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from kd_assets.errors import JobFilesUnavailableError, SchedulerError
from kd_assets.orchestration.platform import PROJECT_FOLDER
from kd_assets.scheduler import Ending, LocalScheduler, Profile, SlurmScheduler, Submission, TaskPhase, TaskState
from kd_assets.scheduler.local.scheduler import process_group
from kd_assets_tests.disks import failing, opened_files
from kd_assets_tests.patience import PATIENCE_S
from kd_assets_tests.scheduler.jobs import job_spec, write_job_file
from kd_assets_tests.store.test_storage import run_in_mount_namespace

SCRIPT = PROJECT_FOLDER / "slurm" / "task.sbatch"


class Jobs:
    """A local scheduler whose tasks run a given shell text; cancels what is left at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.submissions: list[tuple[LocalScheduler, Submission]] = []

    def scheduler(self, body: str, kill_wait_s: float = 30.0) -> LocalScheduler:
        """The supervisor needs a real Python; the tasks' "worker" is `body`."""
        program = self.folder / "python"
        program.write_text(
            f'#!/bin/bash\n[ "$2" = kd_assets.scheduler.local.supervisor ] && exec "{sys.executable}" "$@"\n'
            + textwrap.dedent(body)
        )
        program.chmod(0o755)
        return LocalScheduler(self.folder / "jobs", script=SCRIPT, python=str(program), kill_wait_s=kill_wait_s)

    def submit(self, scheduler: LocalScheduler, n_tasks: int = 1, concurrency: int = 1) -> Submission:
        submission = scheduler.submit(job_spec(n_tasks, concurrency=concurrency), write_job_file)
        self.submissions.append((scheduler, submission))
        return submission


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    folder = tmp_path / "a folder with spaces & 'quotes'"
    folder.mkdir()
    made = Jobs(folder)
    yield made
    for scheduler, submission in made.submissions:
        scheduler.cancel([submission])


def wait_for(condition: Callable[[], object], limit_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def wait_until_ready(scheduler: LocalScheduler, submission: Submission, task: int = 0) -> None:
    log = scheduler.log_file(submission, task)
    wait_for(lambda: log.exists() and "ready" in log.read_text())


def group_of(submission: Submission) -> int:
    group = process_group(submission)
    assert group is not None
    return group


def ended(scheduler: LocalScheduler, submission: Submission) -> Mapping[int, TaskState]:
    wait_for(lambda: not scheduler.is_live(submission))
    return scheduler.poll([submission]).states[submission]


def test_tasks_see_the_variables_that_slurm_gives_an_array_task(jobs: Jobs) -> None:
    scheduler = jobs.scheduler('env | grep ^SLURM_ | sort; echo "args: $*"')
    submission = jobs.submit(scheduler, n_tasks=2)
    assert {s.exit_code for s in ended(scheduler, submission).values()} == {0}
    log = scheduler.log_file(submission, 1).read_text()
    assert "SLURM_ARRAY_TASK_ID=1\n" in log
    assert "SLURM_ARRAY_TASK_COUNT=2\n" in log
    assert "SLURM_RESTART_COUNT=0\n" in log
    assert f"SLURM_ARRAY_JOB_ID={group_of(submission)}\n" in log
    assert f"args: -m kd_assets.worker {submission.job_file}\n" in log


def test_no_more_tasks_run_at_once_than_were_asked_for(jobs: Jobs) -> None:
    scheduler = jobs.scheduler(
        """
        touch "running-$SLURM_ARRAY_TASK_ID"; ls | grep -c ^running-; sleep 0.2; rm "running-$SLURM_ARRAY_TASK_ID"
        """
    )
    submission = jobs.submit(scheduler, n_tasks=5, concurrency=2)
    ended(scheduler, submission)
    assert {int(scheduler.log_file(submission, i).read_text()) for i in range(5)} <= {1, 2}


def test_a_task_that_stopped_resumable_is_started_again_with_its_restart_count(jobs: Jobs) -> None:
    scheduler = jobs.scheduler('echo "start $SLURM_RESTART_COUNT"; [ "$SLURM_RESTART_COUNT" = 2 ] || exit 75')
    submission = jobs.submit(scheduler)
    state = ended(scheduler, submission)[0]
    assert (state.ending, state.exit_code, state.restarts) == (Ending.EXITED, 0, 2)
    assert scheduler.log_file(submission, 0).read_text() == "start 0\nstart 1\nstart 2\n"


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
    log = scheduler.log_file(submission, 0)
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    os.kill(int(log.read_text().split()[0]), signal.SIGKILL)
    assert ended(scheduler, submission)[0].reason == "killed by SIGKILL"


def test_a_signal_before_the_worker_listens_restarts_the_task(jobs: Jobs) -> None:
    scheduler = jobs.scheduler('[ "$SLURM_RESTART_COUNT" = 1 ] && exit 0; echo ready; exec sleep 300')
    submission = jobs.submit(scheduler)
    log = scheduler.log_file(submission, 0)
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    os.killpg(group_of(submission), signal.SIGUSR1)
    state = ended(scheduler, submission)[0]
    assert (state.ending, state.exit_code, state.restarts) == (Ending.EXITED, 0, 1)


def test_a_folder_that_cannot_be_written_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("in the way")
    scheduler = LocalScheduler(tmp_path / "jobs", script=SCRIPT)
    with pytest.raises(SchedulerError, match="KD_HOME must be a folder that this user can write"):
        scheduler.submit(job_spec(), lambda s: None)


def test_usr1_reaches_the_worker_and_the_script_waits_for_it_to_flush(jobs: Jobs) -> None:
    scheduler = jobs.scheduler(
        """
        trap 'echo flushing; sleep 0.3; echo flushed; exit 75' USR1
        [ "$SLURM_RESTART_COUNT" = 1 ] && exit 0
        echo ready; while :; do sleep 0.05; done
        """
    )
    submission = jobs.submit(scheduler)
    log = scheduler.log_file(submission, 0)
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    os.killpg(group_of(submission), signal.SIGUSR1)
    assert ended(scheduler, submission)[0].restarts == 1
    assert "flushing\nflushed\n" in log.read_text()


def test_cancel_ends_every_process_of_the_job_even_one_that_ignores_term(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("trap '' TERM; echo $$ ready; (trap '' TERM; sleep 300) & wait", kill_wait_s=0.5)
    submission = jobs.submit(scheduler, n_tasks=3, concurrency=2)
    wait_for(
        lambda: scheduler.log_file(submission, 1).exists() and "ready" in scheduler.log_file(submission, 1).read_text()
    )
    scheduler.cancel([submission])
    assert not scheduler.is_live(submission)
    assert all(s.phase is TaskPhase.ENDED for s in scheduler.poll([submission]).states[submission].values())
    group = str(group_of(submission))
    left = subprocess.run(["ps", "-o", "pid=,stat=", "-g", group], capture_output=True, text=True, check=False).stdout
    assert [line for line in left.splitlines() if "Z" not in line] == []


def test_term_lets_the_worker_flush_and_is_no_reason_to_restart(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("trap 'echo flushed; exit 75' TERM; echo ready; while :; do sleep 0.05; done")
    submission = jobs.submit(scheduler)
    log = scheduler.log_file(submission, 0)
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    scheduler.cancel([submission])
    assert log.read_text().endswith("flushed\n")
    assert scheduler.poll([submission]).states[submission][0].restarts == 0


def test_a_live_job_is_found_and_its_work_submitted_again_is_the_next_number(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("while [ ! -e go ]; do sleep 0.02; done")
    first = jobs.submit(scheduler)
    assert scheduler.live("demo", "teacher") == [first]
    assert scheduler.live("demo", "shards") == scheduler.live("other", "teacher") == []
    (first.folder / "go").touch()
    ended(scheduler, first)
    assert scheduler.live("demo", "teacher") == []
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
        from kd_assets.scheduler import LocalScheduler
        from kd_assets_tests.scheduler.jobs import job_spec, write_job_file
        folder, python, script = sys.argv[1:]
        scheduler = LocalScheduler(Path(folder), script=Path(script), python=python)
        scheduler.submit(job_spec(), write_job_file)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", program, jobs.folder / "jobs", jobs.folder / "python", SCRIPT],
        check=False,
        timeout=PATIENCE_S,
    )
    assert run.returncode == -signal.SIGKILL
    (submission,) = scheduler.live("demo", "teacher")
    jobs.submissions.append((scheduler, submission))
    (submission.folder / "go").touch()
    assert ended(scheduler, submission)[0].exit_code == 0
    assert scheduler.log_file(submission, 0).read_text() == "done\n"


def test_of_several_who_decide_at_once_one_submits(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("echo started; sleep 300")
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from kd_assets.scheduler import LocalScheduler
        from kd_assets_tests.scheduler.jobs import job_spec, write_job_file
        folder, python, script = sys.argv[1:]
        scheduler = LocalScheduler(Path(folder), script=Path(script), python=python)
        with scheduler.deciding("demo", "teacher"):
            is_new = not scheduler.live("demo", "teacher")
            if is_new:
                scheduler.submit(job_spec(), write_job_file)
        print(is_new)
        """
    )
    command = [sys.executable, "-c", program, str(jobs.folder / "jobs"), str(jobs.folder / "python"), str(SCRIPT)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sorted(p.communicate(timeout=PATIENCE_S)[0].strip() for p in running) == ["False", "False", "False", "True"]
    (submission,) = scheduler.live("demo", "teacher")
    jobs.submissions.append((scheduler, submission))


def test_a_job_lives_as_long_as_any_of_its_tasks_even_without_its_supervisor(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("echo ready; while [ ! -e go ]; do sleep 0.02; done")
    submission = jobs.submit(scheduler, n_tasks=2)
    wait_for(
        lambda: scheduler.log_file(submission, 0).exists() and "ready" in scheduler.log_file(submission, 0).read_text()
    )
    subprocess.run(
        ["pkill", "-KILL", "-g", str(group_of(submission)), "-f", "kd_assets.scheduler.local.supervisor"], check=True
    )
    time.sleep(0.2)
    assert scheduler.is_live(submission), "its first task still runs"
    assert scheduler.poll([submission]).states[submission][0].phase is TaskPhase.RUNNING
    (submission.folder / "go").touch()
    states = ended(scheduler, submission)
    assert "gone without an exit status" in states[0].reason
    assert "never started" in states[1].reason


def test_a_job_is_ended_when_its_processes_are_whatever_its_state_file_says(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("echo ready; sleep 300")
    submission = jobs.submit(scheduler)
    wait_for(
        lambda: scheduler.log_file(submission, 0).exists() and "ready" in scheduler.log_file(submission, 0).read_text()
    )
    state = submission.folder / "state.json"
    wait_for(lambda: state.exists() and json.loads(state.read_text())["0"]["phase"] == "running")
    os.killpg(group_of(submission), signal.SIGKILL)
    states = ended(scheduler, submission)
    assert json.loads(state.read_text())["0"]["phase"] == "running"
    assert states[0].phase is TaskPhase.ENDED


def test_a_full_disk_neither_ends_the_supervisor_nor_loses_how_tasks_ended(tmp_path: Path) -> None:
    """A real file system that is really full, from the middle of the first task until after the last one."""
    program = """
import subprocess, sys, time
from pathlib import Path
from kd_assets.scheduler import LocalScheduler
from kd_assets_tests.scheduler.jobs import job_spec, write_job_file
mount, python, script = map(Path, sys.argv[1:])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=True)
scheduler = LocalScheduler(mount / "jobs", script=script, python=str(python))
submission = scheduler.submit(job_spec(2, concurrency=1), write_job_file)
while not (submission.folder / "at its end").exists():
    time.sleep(0.05)
time.sleep(0.5)
(submission.folder / "large").unlink()
while scheduler.is_live(submission):
    time.sleep(0.05)
print([s.reason for s in scheduler.poll([submission]).states[submission].values()])
"""
    jobs = Jobs(tmp_path)
    jobs.scheduler(
        """
        if [ "$SLURM_ARRAY_TASK_ID" = 0 ]; then head -c 2M /dev/zero >large 2>/dev/null; exit 3; fi
        touch "at its end"; exit 4
        """
    )
    (tmp_path / "mount").mkdir()
    done = run_in_mount_namespace(program, str(tmp_path / "mount"), str(tmp_path / "python"), str(SCRIPT))
    assert done.stdout.strip() == "['exit status 3', 'exit status 4']", done.stderr


def test_a_job_is_not_over_because_slurm_looked_for_its_own(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("while [ ! -e go ]; do sleep 0.02; done")
    with scheduler.deciding("demo", "teacher"):
        submission = jobs.submit(scheduler)
    slurm = SlurmScheduler(jobs.folder / "jobs", profile=Profile(name="site"), script=SCRIPT, python="python3")
    assert slurm.live("demo", "teacher") == []
    assert scheduler.live("demo", "teacher") == [submission]
    (submission.folder / "go").touch()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_a_job_whose_files_cannot_be_read_keeps_its_last_known_states(jobs: Jobs, number: int) -> None:
    scheduler = jobs.scheduler("echo ready; while [ ! -e go ]; do sleep 0.02; done")
    submission = jobs.submit(scheduler)
    wait_until_ready(scheduler, submission)
    wait_for(lambda: scheduler.poll([submission]).states[submission][0].phase is TaskPhase.RUNNING)
    known = scheduler.poll([submission])
    for path in (submission.state_file, submission.job_lock, submission.spec_file):
        with failing(number, of=path):
            poll = scheduler.poll([submission])
            assert poll.states == known.states
            assert str(path) in str(poll.unreachable)
    with failing(number, of=submission.job_lock), pytest.raises(JobFilesUnavailableError):
        scheduler.live("demo", "teacher")
    assert scheduler.poll([submission]) == known
    (submission.folder / "go").touch()


def test_a_full_disk_does_not_keep_a_job_that_is_cancelled_alive(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("echo ready; sleep 300")
    submission = jobs.submit(scheduler)
    wait_until_ready(scheduler, submission)
    with failing(errno.ENOSPC, of=submission.cancelled_mark):
        with pytest.raises(JobFilesUnavailableError, match="cancelled: No space left on device"):
            scheduler.cancel([submission])
    assert not scheduler.is_live(submission)


def test_a_job_that_has_ended_is_looked_at_once_more_and_never_again(jobs: Jobs) -> None:
    scheduler = jobs.scheduler("true")
    ended(scheduler, jobs.submit(scheduler))
    assert scheduler.live("demo", "teacher") == []
    with scheduler.deciding("demo", "teacher"):  # makes the index: this job was started outside of a decision
        assert scheduler.live("demo", "teacher") == []
    with opened_files(jobs.folder / "jobs") as opened:
        assert scheduler.live("demo", "teacher") == []
    assert opened == []
