"""A program that gets so many seconds and no more. Nothing heavy is imported here.

It runs in a process group of its own with everything that it starts, and nothing of that is left behind, whether it
ends by itself or hangs; it does not outlive this process, whatever becomes of that. One that hangs is first asked for
the tracebacks of all its threads (SIGABRT with Python's fault handler), which are then in its log.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kd_assets.teacher.devices.follower import end_with_parent

ROOT = Path(__file__).parents[3]
"""Of the checkout: where the packages are imported from."""
LOOK_EVERY_S = 0.2
TRACEBACK_S = 3.0
"""For a program that hangs, to say where."""
KILL_S = 5.0
"""For the kernel, to end what was killed: a process that waits for a device may take its time."""
TAIL_BYTES = 12_000

ENVIRONMENT = {
    "PYTHONFAULTHANDLER": "1",
    "HF_HUB_OFFLINE": "1",
    # As slurm/task.sbatch sets them.
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a program ended."""

    status: int | None
    """Its exit status, below 0 the signal that killed it; None: it did not end in time."""
    seconds: float
    tail: str
    """The end of what it printed, on both streams."""

    @property
    def in_words(self) -> str:
        if self.status is None:
            return f"did not end within {self.seconds:.0f} s"
        if self.status < 0:
            return f"was killed by {signal.Signals(-self.status).name}"
        return f"ended with status {self.status}"


def run_bounded(
    argv: Sequence[str],
    *,
    limit_s: float,
    log: Path,
    environment: Mapping[str, str] = os.environ,
    look: Callable[[], bool] = lambda: True,
) -> Ended:
    """Run a program for `limit_s` seconds at most, its output in `log`.

    `look` is called while it runs, several times a second; what it returns is whether the program may go on.
    """
    began = time.monotonic()
    python_path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**environment, **ENVIRONMENT, "PYTHONPATH": python_path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509 - it makes one system call
        )
    try:
        in_time = _has_ended(process, ends_at=began + limit_s, look=look)
        if not in_time:
            _signal_all(process, signal.SIGABRT)
            _has_ended(process, ends_at=time.monotonic() + TRACEBACK_S)
    finally:
        _signal_all(process, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_S)
    return Ended(status=process.returncode if in_time else None, seconds=time.monotonic() - began, tail=tail_of(log))


def tail_of(log: Path) -> str:
    """The end of what is in it; of a line that a progress bar wrote over and over, what stood there last."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")).strip()


def _has_ended(process: subprocess.Popen[bytes], *, ends_at: float, look: Callable[[], bool] = lambda: True) -> bool:
    """Wait for it, but not beyond `ends_at`, nor once `look` says no. It is not reaped: its process group keeps its
    number as long as it is signalled here."""
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() >= ends_at or not look():
            return False
        time.sleep(max(0.0, min(LOOK_EVERY_S, ends_at - time.monotonic())))
    return True


def _signal_all(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """The program and all that it has started and that is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
