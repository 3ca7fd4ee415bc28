"""Locks that belong to an open file: who excludes whom, for how long, and what is said where there are none."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_assets.errors import StorageUnavailableError
from kd_assets.locks import is_locked, locked, try_locked


def test_one_at_a_time_has_a_lock_even_within_a_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with try_locked(path) as first, try_locked(path) as second:
        assert (first, second) == (True, False)
    with try_locked(path) as again:
        assert again


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []

    def second() -> None:
        with locked(path):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(path):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_look_at_a_lock_neither_takes_nor_drops_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    assert not path.exists()
    with locked(path):
        assert is_locked(path)
        assert is_locked(path)
        with try_locked(path) as has_it:
            assert not has_it
    assert not is_locked(path)


def test_a_child_that_inherits_a_lock_holds_it_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path) as descriptor:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(descriptor,))
        stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_locked(path)
    child.communicate(b"\n")
    assert not is_locked(path), "the other child was not given it"
    stranger.communicate(b"\n")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("ask", [lambda p: locked(p).__enter__(), lambda p: try_locked(p).__enter__(), is_locked])
def test_a_file_system_without_locks_is_named_with_its_remedy(
    ask: Callable[[Path], object], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake: no file system here is without locks."""

    def flock(descriptor: int, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "lock").touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageUnavailableError, match=r"the file system has no locks: mount it with them") as raised:
        ask(tmp_path / "lock")
    assert str(tmp_path / "lock") in str(raised.value)
    assert not [name for name in os.listdir("/proc/self/fd") if _target(name) == str(tmp_path / "lock")], "it is closed"


def _target(descriptor: str) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return None
