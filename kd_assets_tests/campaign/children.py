"""Work in forked children, since what is disturbed may hang, crash the interpreter or be killed on purpose.

The parent imports everything once and calls none of it, so that children start warm and inherit no thread and no lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Say = Callable[[str, float], None]
"""Tells the parent what is being done now, and how many seconds it may take."""

FIRST_WORD_S = 120.0
"""How long a child may take to make itself ready."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """An item whose child did not come back: it hung and was killed, or it crashed."""

    hung: bool
    at: str
    """What the child had said last."""
    words: str


def in_children(
    items: Sequence[int],
    work: Callable[[int, Say], dict[str, Any]],
    *,
    log: Path,
    n_a_child: int = 500,
) -> Iterator[tuple[int, dict[str, Any] | Lost]]:
    """Does each item in a child, `n_a_child` after the other in the same one; a new one after one that was lost.

    `work` returns JSON. What children print goes to `log`.
    """
    left = list(items)
    while left:
        reading, writing = os.pipe()
        child = fork(partial(_work_off, left[:n_a_child], work, reading, writing), log=log)
        os.close(writing)
        try:
            for item in left[:n_a_child]:
                outcome = _hear(reading, child)
                left.remove(item)
                yield item, outcome
                if isinstance(outcome, Lost):
                    break
        finally:
            os.close(reading)
            end(child, group=True)


def fork(body: Callable[[], object], *, log: Path) -> int:
    """A child that does `body` and ends with 0, or with 1 after an exception, which is in `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        # Anew: the parent's may lead elsewhere, as those of a test do.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        body()
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:  # noqa: BLE001 - nothing of a child may go on in its parent's code
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def end(child: int, *, group: bool = False) -> None:
    """Kill the child if it lives; with `group` also what it started and left in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL) if group else os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def wait(child: int, timeout_s: float) -> int | None:
    """The wait status of a child; None when it still lives after `timeout_s`."""
    until, pause_s = time.monotonic() + timeout_s, 0.001
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if time.monotonic() > until:
            return None
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.02)


def _work_off(items: Sequence[int], work: Callable[[int, Say], dict[str, Any]], reading: int, writing: int) -> None:
    def tell(kind: str, value: Any) -> None:
        line = json.dumps([kind, value]).encode() + b"\n"
        while line:
            line = line[os.write(writing, line) :]

    os.setsid()
    os.close(reading)  # held open here, a write would wait for ever for a parent that was killed
    for item in items:
        tell("done", work(item, lambda words, patience_s: tell("at", [words, patience_s])))


def _hear(reading: int, child: int) -> dict[str, Any] | Lost:
    """The outcome of the item that the child is at."""
    at, patience_s = "its beginning", FIRST_WORD_S
    until = time.monotonic() + patience_s
    while True:
        left_s = until - time.monotonic()
        if left_s <= 0:
            return Lost(hung=True, at=at, words=f"no answer after {patience_s:g} s")
        if not select.select([reading], [], [], min(left_s, 0.5))[0]:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:  # children of its own may live on, and hold the pipe open
                return Lost(hung=False, at=at, words=in_words(status))
            continue
        received = _line(reading)
        if received is None:
            return Lost(hung=False, at=at, words=in_words(os.waitpid(child, 0)[1]))
        kind, value = json.loads(received)
        if kind == "done":
            return dict(value)
        at, patience_s = value
        until = time.monotonic() + patience_s


def in_words(status: int) -> str:
    """How a child ended."""
    code = os.waitstatus_to_exitcode(status)
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _line(reading: int) -> bytes | None:
    """One line; None at the end. Byte after byte, so that nothing of the next is taken."""
    line = b""
    while byte := os.read(reading, 1):
        if byte == b"\n":
            return line
        line += byte
    return None
