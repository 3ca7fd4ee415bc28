"""Fakes of SLURM's commands: first on PATH, and behind each the real one."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo")


def put_first(folder: Path, command: str, body: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake of a command, in Bash: `body`, for which `real` is the command itself, `first` says whether this is its
    first call, and which goes on to be the real one at its end. Processes started from now on find it in `folder`."""
    real = shutil.which(command)
    assert real is not None
    folder.mkdir(exist_ok=True)
    fake, called = folder / command, shlex.quote(str(folder / f"{command}.called"))
    fake.write_text(
        f"""#!/bin/bash
# A fake of {command}, for a test.
real() {{ {real} "$@"; }}
first() {{ mkdir {called} 2>/dev/null; }}
{body}
exec {real} "$@"
"""
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return fake


def count_calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, int]]:
    """From now on every call of one of SLURM's commands is counted; returns what says how often each was called."""
    files = {command: folder / f"{command}.calls" for command in COMMANDS}
    for command, file in files.items():
        put_first(folder, command, f"echo . >> {shlex.quote(str(file))}", monkeypatch)
    return lambda: {command: len(f.read_text().split()) for command, f in files.items() if f.exists()}
