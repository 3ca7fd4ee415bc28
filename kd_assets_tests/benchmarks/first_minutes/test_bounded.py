"""Programs that end, fail, hang and leave children behind: each is over when its time is, and says what it can."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_assets_tests.benchmarks.first_minutes.bounded import Ended, run_bounded, tail_of

LONG_S = 300.0
HANG = "import time; print('begun', flush=True); time.sleep(600)"


def run(code: str, tmp_path: Path, *, limit_s: float = LONG_S) -> Ended:
    return run_bounded([sys.executable, "-c", code], limit_s=limit_s, log=tmp_path / "log")


def is_gone(pid: int) -> bool:
    """Whether the process has ended; a moment is given to it."""
    for _ in range(3600):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_program_that_ends_has_a_status_and_a_tail_of_both_streams(tmp_path: Path) -> None:
    ended = run("import sys; print('out', flush=True); sys.exit('err')", tmp_path)
    assert (ended.status, ended.tail) == (1, "out\nerr")
    assert ended.in_words == "ended with status 1"


def test_a_program_that_hangs_is_ended_and_says_where_it_was(tmp_path: Path) -> None:
    ended = run(HANG, tmp_path, limit_s=10.0)
    assert ended.status is None
    assert "did not end within" in ended.in_words
    assert "begun" in ended.tail
    assert "most recent call first" in ended.tail, "the traceback of Python's fault handler"


def test_a_program_that_takes_no_notice_of_a_request_to_end_is_killed(tmp_path: Path) -> None:
    ended = run(f"import signal; signal.signal(signal.SIGABRT, signal.SIG_IGN); {HANG}", tmp_path, limit_s=10.0)
    assert ended.status is None


def test_a_signal_that_killed_a_program_is_named(tmp_path: Path) -> None:
    ended = run("import os; os.kill(os.getpid(), 11)", tmp_path)
    assert ended.in_words == "was killed by SIGSEGV"


@pytest.mark.parametrize("end", ["import sys; sys.exit(0)", "import time; time.sleep(600)"])
def test_what_a_program_started_ends_with_it(end: str, tmp_path: Path) -> None:
    start = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    ended = run(f"{start}; print(child.pid, flush=True); {end}", tmp_path, limit_s=10.0)
    assert is_gone(int(ended.tail.split()[0]))


def test_a_program_ends_when_it_is_said_that_it_may_not_go_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ended = run_bounded(
        [sys.executable, "-c", HANG], limit_s=LONG_S, log=log, look=lambda: b"begun" not in log.read_bytes()
    )
    assert ended.status is None
    assert ended.seconds < LONG_S


def test_a_program_does_not_outlive_the_one_that_runs_it(tmp_path: Path) -> None:
    """Whatever ends that one: here, as a time limit's last word, SIGKILL."""
    hang = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = f"""
import sys
from pathlib import Path
from kd_assets_tests.benchmarks.first_minutes.bounded import run_bounded
run_bounded([sys.executable, "-c", {hang!r}], limit_s=600, log=Path({str(tmp_path / "log")!r}))
"""
    runs = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text().endswith("\n"):
        assert runs.poll() is None
        time.sleep(0.05)
    os.kill(runs.pid, signal.SIGKILL)
    runs.wait()
    assert is_gone(int((tmp_path / "log").read_text()))


def test_of_a_progress_bar_only_its_last_state_is_in_the_tail(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"Loading:   0%\rLoading:  50%\rLoading: 100%\nloaded\r\n")
    assert tail_of(log) == "Loading: 100%\nloaded"
