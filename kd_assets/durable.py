"""Files that survive: whole or absent after any kill, with fixed modes, and errors that say what to do.

A file appears under its name by rename after its bytes are on disk, and the folder is synced after that. Modes are set
explicitly, so they do not depend on the umask. Every OSError becomes a StorageUnavailableError that names the path.
The lease is a POSIX record lock: the kernel drops it when the process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from kd_assets.errors import ResultBusyError, StorageUnavailableError

TEMPORARY_SUFFIX = ".tmp"
"""Ends the names of files that are being written: what a kill left of them is swept (FORMAT.md, F20)."""

FILE_MODE = 0o640
FOLDER_MODE = 0o750

_SPECIAL_BITS = 0o7000
"""A setgid folder hands its group on to what is made in it: shared stores rely on that, so the bits are kept."""

_FULL = "free some space or raise the quota"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the largest file size (ulimit -f), or make parts smaller",
    errno.EACCES: "make it writable for the user that runs the job",
    errno.EPERM: "make it writable for the user that runs the job",
    errno.EROFS: "mount it writable, or choose another store",
    errno.ENOENT: "check that the store is mounted on this machine",
    errno.EEXIST: "a file is in the way: move it, or choose another store",
    errno.ENOTDIR: "a file is in the way: move it, or choose another store",
    errno.ENOLCK: "the file system has no locks: mount it with them (Lustre: -o flock; NFS: with its lock service)",
    errno.EOPNOTSUPP: "the file system has no locks: mount it with them (Lustre: -o flock; NFS: with its lock service)",
    errno.ENOSYS: "the file system has no locks: mount it with them (Lustre: -o flock; NFS: with its lock service)",
    errno.ENAMETOOLONG: "choose a shorter recipe name, partition key or store path",
}


@contextlib.contextmanager
def storage_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError of the block into a StorageUnavailableError that names `path` and what to do.

    `doing` completes "cannot …", such as "write".
    """
    try:
        yield
    except OSError as e:
        number = e.errno or 0
        reason = e.strerror or str(e)
        remedy = _REMEDIES.get(number, "check the file system")
        raise StorageUnavailableError(
            f"cannot {doing} {path}: {reason}; {remedy}, then run again: what is finished is kept"
        ) from e


def prepare_folder(path: Path) -> None:
    """Create the folder and whichever parents are missing, all with mode 0750, and sync their entries."""
    missing = []
    with storage_errors(path, "create the folder"):
        folder = path
        while not folder.is_dir():
            missing.append(folder)
            if folder.parent == folder:
                break
            folder = folder.parent
        for folder in reversed(missing):
            try:
                folder.mkdir(mode=FOLDER_MODE)
            except FileExistsError:
                if not folder.is_dir():
                    raise
                continue  # another task was faster, and sets the mode
            folder.chmod(folder.stat().st_mode & _SPECIAL_BITS | FOLDER_MODE)
            _sync_folder(folder.parent)


class HashingFile(io.RawIOBase):
    """A file being written, hashed as it goes: `sha256` and `n_bytes` of all that was written."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._digest = hashlib.sha256()
        self.n_bytes = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.n_bytes

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._file.write(view)
        self.n_bytes += len(view)
        return len(view)


@contextlib.contextmanager
def atomic_file(path: Path, *, mode: int = FILE_MODE) -> Iterator[HashingFile]:
    """A file to write, which takes the place of `path` when the block ends well and vanishes when it does not.

    Only this user can read it before it has its `mode`.
    """
    with storage_errors(path, "write"):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, mode)
                yield HashingFile(file)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)


def atomic_write(path: Path, data: bytes, *, mode: int = FILE_MODE) -> str:
    """Put `data` under `path`, whole or not at all; returns its SHA-256."""
    with atomic_file(path, mode=mode) as file:
        file.write(data)
    return file.sha256


def remove_file(path: Path) -> None:
    """Remove the file if it is there, and sync its folder."""
    with storage_errors(path, "remove"):
        path.unlink(missing_ok=True)
        _sync_folder(path.parent)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line of JSON and sync it. Writers exclude each other; half a line of a killed one is ended first."""
    line = json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"
    with storage_errors(path, "append to"):
        is_new = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            if is_new:
                os.fchmod(descriptor, FILE_MODE)
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            written = os.write(descriptor, line)
            if written != len(line):  # the disk filled up inside the line; readers skip what is no whole record
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            _sync_folder(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                other = os.pread(descriptor, 4096, 0).decode("utf-8", "replace").strip()
                os.close(descriptor)
                if e.errno in (errno.EACCES, errno.EAGAIN):
                    raise ResultBusyError(
                        f"{self._path.parent} is being computed by another live task ({other or 'unknown'}): wait for "
                        "it, or cancel its job"
                    ) from e
                raise
            try:
                os.fchmod(descriptor, FILE_MODE)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder, sort_keys=True).encode() + b"\n", 0)
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        Lease._held.add(key)

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def holder(self) -> dict[str, Any] | None:
        """What the last process that took the lease said of itself; None where it has said nothing (yet).

        Only for who does not hold it: closing a second descriptor of the file would drop the lock.
        """
        assert not self.held
        with storage_errors(self._path, "read"):
            try:
                raw = json.loads(self._path.read_bytes())
            except (FileNotFoundError, ValueError):  # it is about to write it
                return None
        return raw if isinstance(raw, dict) else None

    def release(self) -> None:
        """Give the lease back. The file stays: removing a lock file lets two holders in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            Lease._held.discard((os.getpid(), self._path))


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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
