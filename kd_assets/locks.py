"""Locks on files, all that there are: of one kind to write a result, of another to tell whether a process lives.

The lease is a POSIX record lock: it works over networks, belongs to the process, and the kernel drops it when the
process dies, however it dies. `locked` is flock: it belongs to the open file, so a process hands it on to its children,
and it is free exactly when all of them are gone. Nothing else locks a file, but for `durable.append_line`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from kd_assets.durable import FILE_MODE, read_if_there, storage_errors
from kd_assets.errors import ResultBusyError

# ---------------------------------------------------------------------- leases


_FLOCK = struct.Struct("hhqqi4x")
"""`struct flock` of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (fcntl(2))."""


# ------------------------------------------------------------------------------------------------------------- locks
#
# Two kinds, since each does what the other cannot; nothing else in the project locks files.
# - `Lease` is a POSIX record lock (lockf) and belongs to the process: no child inherits it, so a loader worker that
#   outlives its killed parent does not hold the parent's result; and network file systems have these locks, if any.
# - `locked`, `try_locked` and `is_locked` are flock, which belongs to the open file: threads of a process exclude each
#   other, a look at a lock does not drop it, and whoever inherits the descriptor holds the lock, too (a local job lives
#   for as long as any of its processes does). Linux passes it on to NFS servers as a record lock of the whole file.


class Lease:
    """The right to write one result folder, held by at most one live process on any machine that mounts it.

    POSIX locks belong to the process: they die with it, are not inherited by a fork, and work over NFS. Their price
    is that they do not exclude within a process and that closing any descriptor of the file drops them, so this
    class keeps its own account of what the process holds, and nothing else opens the file.
    """

    _held: ClassVar[set[tuple[int, Path]]] = set()
    """(process id, path) of every lease that is held: after a fork the child's id differs, as its locks do."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._descriptor: int | None = None

    def acquire(self, holder: Mapping[str, Any]) -> None:
        """Take the lease or raise ResultBusyError, naming who has it. `holder` is what others will be told."""
        key = (os.getpid(), self._path)
        if key in Lease._held:
            raise ResultBusyError(f"{self._path.parent} is being computed by this very process")
        with storage_errors(self._path, "lock"):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
            try:
                try:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as e:
                    if e.errno in (errno.EACCES, errno.EAGAIN):
                        raise self._busy(descriptor) from e
                    raise
                os.fchmod(descriptor, FILE_MODE)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder, sort_keys=True).encode() + b"\n", 0)
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        Lease._held.add(key)

    def raise_if_busy(self) -> None:
        """Raise ResultBusyError where another process has the lease now; takes nothing and makes no file.

        Asks only (F_GETLK): a lock that is taken to see whether it can be taken would turn away who needs it.
        """
        if (os.getpid(), self._path) in Lease._held:
            return  # closing a descriptor of the file would drop the lock
        with storage_errors(self._path, "lock"):
            try:
                descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return  # nobody has begun
            try:
                asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
                if kind != fcntl.F_UNLCK:
                    raise self._busy(descriptor)
            finally:
                os.close(descriptor)

    def _busy(self, descriptor: int) -> ResultBusyError:
        other = os.pread(descriptor, 4096, 0).decode("utf-8", "replace").strip()
        return ResultBusyError(
            f"{self._path.parent} is being computed by another live task ({other or 'unknown'}): wait for it, or "
            "cancel its job"
        )

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def holder(self) -> dict[str, Any] | None:
        """What the last process that took the lease said of itself; None where it has said nothing (yet).

        Only for who does not hold it: closing a second descriptor of the file would drop the lock.
        """
        assert not self.held
        try:
            raw = json.loads(read_if_there(self._path) or b"")
        except ValueError:  # it is about to write it
            return None
        return raw if isinstance(raw, dict) else None

    def release(self) -> None:
        """Give the lease back. The file stays: removing a lock file lets two holders in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            Lease._held.discard((os.getpid(), self._path))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Alone, among all threads and processes that lock the same path; waits for its turn.

    Yields the file's descriptor. A child that inherits it keeps the lock after the block's end, until it ends itself.
    Raises StorageUnavailableError where the file system has no locks. The file stays: see `Lease.release`.
    """
    descriptor = _open_to_lock(path)
    try:
        with storage_errors(path, "lock"):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def try_locked(path: Path) -> Iterator[bool]:
    """As `locked`, without waiting: yields whether this is the one that has it now."""
    descriptor = _open_to_lock(path)
    try:
        with storage_errors(path, "lock"):
            has_it = _flock_now(descriptor, fcntl.LOCK_EX)
        yield has_it
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock that this file stands for (`locked`), this process included."""
    with storage_errors(path, "look at the lock"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            # Shared, so that two who ask at once do not take each other for the holder.
            return not _flock_now(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)


def _open_to_lock(path: Path) -> int:
    with storage_errors(path, "lock"):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)


def _flock_now(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def local_locks(path: Path, mounts: str | None = None) -> str | None:
    """Why locks on files below `path` are not seen on other machines; None where nothing says so.

    Some mounts grant every lock without asking the server (nfs(5): nolock, local_lock; Lustre: localflock): leases
    then exclude the processes of one machine only, and no error tells. `mounts` is the text of /proc/self/mounts.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text()
        except OSError:
            return None
    mount_point, found = "", ("", frozenset[str]())
    for line in mounts.splitlines():
        _, point, file_system, options, *_ = line.split()
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
        if path.is_relative_to(point) and len(point) >= len(mount_point):  # a later mount hides an earlier one
            mount_point, found = point, (file_system, frozenset(options.split(",")))
    file_system, options_found = found
    for kind, local in _LOCAL_LOCK_OPTIONS.items():
        if file_system.startswith(kind) and (reasons := sorted(options_found & local)):
            return f"{mount_point} is mounted with {reasons[0]} ({file_system})"
    return None


_LOCAL_LOCK_OPTIONS = {
    "nfs": frozenset({"nolock", "local_lock=all", "local_lock=posix"}),
    "lustre": frozenset({"localflock"}),
}
