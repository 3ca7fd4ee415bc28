"""Disturbs a process at exactly its n-th operation on files: kills it there, or lets the operation fail.

Python's own functions are wrapped (`os.replace`, `os.fsync`, `io.open` …), which is how all of the product's writing is
done; what C++ reads through a memory map is not seen. Standard library only: a worker's process installs this before
anything else, told by its environment (see `claim`).
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

How = Literal["kill before", "kill after", "kill half", "ENOSPC", "ENOSPC from then on", "EIO", "ESTALE", "only count"]

PLAN = "KD_CAMPAIGN_PLAN"
"""Environment variable: the file of a disturbance that waits for its process."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_real_open, _real_kill, _real_write, _real_rename = io.open, os.kill, os.write, os.rename


@dataclass(frozen=True, kw_only=True, slots=True)
class Disturbance:
    """What is to happen, and where."""

    below: str
    """Only operations on files below this folder count."""
    nth: int
    """Which one, from 1."""
    how: How
    of: Literal["writes", "reads"] = "writes"
    """Whose operations are counted: those that change something, or those that look."""
    done_file: str = ""
    """Gets a line when it has happened: `<n> <operation> <path>`."""


class _Counter:
    def __init__(self, disturbance: Disturbance) -> None:
        self.plan, self.n, self.pid = disturbance, 0, os.getpid()

    def around(
        self, of: str, name: str, path: str, operation: Callable[[], Any], half: Callable[[], Any] | None
    ) -> Any:
        """Do the operation, unless this is where something happens."""
        plan = self.plan
        if of != plan.of or not path.startswith(plan.below) or os.getpid() != self.pid:
            return operation()
        self.n += 1
        if plan.how == "only count":
            self._note(name, path)
            return operation()
        if self.n < plan.nth or (self.n > plan.nth and plan.how != "ENOSPC from then on"):
            return operation()
        self._note(name, path)
        if not plan.how.startswith("kill"):
            number = getattr(errno, plan.how.split()[0])
            raise OSError(number, os.strerror(number), path)
        if plan.how == "kill half" and half is not None:
            half()
        if plan.how == "kill after":
            operation()
        _real_kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    def _note(self, name: str, path: str) -> None:
        if self.plan.done_file:
            with _real_open(self.plan.done_file, "a") as file:
                file.write(f"{self.n} {name} {path.removeprefix(self.plan.below)}\n")


class _File:
    """A file opened to be written, whose writing counts."""

    def __init__(self, file: Any, path: str, counter: _Counter) -> None:
        self._file, self._path, self._counter = file, path, counter

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        return self._counter.around("writes", "write", self._path, lambda: self._file.write(data), half)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *exception: object) -> Any:
        return self._file.__exit__(*exception)

    def __iter__(self) -> Any:
        return iter(self._file)


def install(disturbance: Disturbance) -> None:
    """From here on this process is disturbed as planned. There is no way back: it is for a process of its own."""
    counter = _Counter(disturbance)

    def wrap(name: str, of: str, place: int = 0) -> None:
        real = getattr(os, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            target = arguments[place] if len(arguments) > place else next(iter(named.values()), "")
            half: Callable[[], Any] | None = None
            if name in ("write", "pwrite") and len(arguments) > 1:
                cut = (arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                half = partial(real, *cut)
            return counter.around(of, name, _path_of(target), lambda: real(*arguments, **named), half)

        setattr(os, name, wrapped)

    for name in ("mkdir", "rmdir", "unlink", "remove", "fsync", "ftruncate", "truncate", "fchmod", "chmod", "utime"):
        wrap(name, "writes")
    for name in ("write", "pwrite"):
        wrap(name, "writes")
    for name in ("replace", "rename", "link", "symlink"):
        wrap(name, "writes", 1)
    for name in ("stat", "lstat", "scandir", "listdir", "pread"):
        wrap(name, "reads")
    _wrap_opening(counter)


def _wrap_opening(counter: _Counter) -> None:
    real_os_open = os.open

    def os_open(path: Any, flags: int, *arguments: Any, **named: Any) -> Any:
        of = "writes" if flags & _WRITING else "reads"
        return counter.around(of, "open", _path_of(path), lambda: real_os_open(path, flags, *arguments, **named), None)

    def io_open(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        path, writes = _path_of(file), any(letter in mode for letter in "wax+")
        operation: Callable[[], Any] = partial(_real_open, file, mode, *arguments, **named)
        if isinstance(file, int):  # opened already, which has been counted
            opened = operation()
        else:
            opened = counter.around("writes" if writes else "reads", "open", path, operation, None)
        return _File(opened, path, counter) if writes and path.startswith(counter.plan.below) else opened

    os.open = os_open
    io.open = io_open
    builtins.open = io_open


def _path_of(target: Any) -> str:
    """Of a path or of an open file's number; empty where there is none."""
    try:
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        return os.path.abspath(os.fsdecode(target))
    except (OSError, TypeError, ValueError):
        return ""


def leave(plan_file: Path, disturbance: Disturbance, argument: str) -> None:
    """A disturbance for the next process that has `argument` on its command line and finds the file by `PLAN`."""
    plan_file.write_text(json.dumps({"argument": argument, "disturbance": asdict(disturbance)}))


def claim() -> None:
    """Called at the start of each Python process (see `write_site`): take the disturbance that waits, if it is ours."""
    plan_file = os.environ.get(PLAN, "")
    try:
        with _real_open(plan_file) as file:
            plan = json.load(file)
        with _real_open("/proc/self/cmdline", "rb") as file:
            if plan["argument"].encode() not in file.read().split(b"\0"):
                return
        _real_rename(plan_file, f"{plan_file}.taken")
    except (OSError, ValueError):
        return
    install(Disturbance(**plan["disturbance"]))


def write_site(folder: Path) -> None:
    """A folder for PYTHONPATH, by which every Python process calls `claim` before anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).resolve().parents[2])
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {root!r})\n"
        f"from kd_assets_tests.campaign.file_operations import claim\nsys.path.pop(0)\nclaim()\n"
    )
