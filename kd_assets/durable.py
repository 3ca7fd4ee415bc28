"""Files that survive: whole or absent after any kill, with fixed modes, and errors that say what to do.

A file appears under its name by rename after its bytes are on disk, and the folder is synced after that. Modes are set
explicitly, so they do not depend on the umask. Every OSError becomes a StorageUnavailableError that names the path; one
that usually passes is a StorageUnreachableError, and reading is tried again before it is raised; what is no file is an
ObstructedError. Locks are in `locks`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from kd_assets.errors import ObstructedError, StorageUnavailableError, StorageUnreachableError, StoreError

T = TypeVar("T")

TEMPORARY_SUFFIX = ".tmp"
"""Ends the names of files that are being written: what a kill left of them is swept (FORMAT.md, F20)."""

FILE_MODE = 0o640
FOLDER_MODE = 0o750

_SPECIAL_BITS = 0o7000
"""A setgid folder hands its group on to what is made in it: shared stores rely on that, so the bits are kept."""

# ---------------------------------------------------------------------- errors of the file system

_FULL = "free some space or raise the quota"
_NO_LOCKS = "the file system has no locks: mount it with them (Lustre: -o flock; NFS: with its lock service)"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the largest file size (ulimit -f), or make parts smaller",
    errno.EROFS: "mount it writable, or choose another store",
    errno.EEXIST: "a file is in the way: move it, or choose another store",
    errno.ENOTDIR: "a file is in the way: move it, or choose another store",
    errno.ENOLCK: _NO_LOCKS,
    errno.EOPNOTSUPP: _NO_LOCKS,
    errno.ENOSYS: _NO_LOCKS,
    errno.ENAMETOOLONG: "choose a shorter recipe name, partition key or store path",
    errno.ENOENT: "check that the store is mounted on this machine",
}
_NO_PERMISSION = (errno.EACCES, errno.EPERM)
_OBSTRUCTED = (errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV)

_PASSING = frozenset(
    {
        errno.ENOENT,  # of what must be there: a mount that comes back, or another node's news that is not here yet
        errno.ESTALE,  # NFS: the server has restarted, or the file was replaced
        errno.EIO,  # a server that is failing over; Lustre: this client was evicted
        errno.ETIMEDOUT,
        errno.ENOTCONN,  # FUSE and Lustre: the connection is being made again
        errno.ESHUTDOWN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EREMOTEIO,
        errno.ECOMM,  # BeeGFS
    }
)
"""What a shared file system says while a server, a network or a mount comes back. Who may find no file takes ENOENT for
an answer before it comes to this."""

READ_WAITS_S = (0.1, 0.4, 1.5)
"""Between the tries of a read: four in two seconds. A stale handle is gone with the next lookup; what takes longer is
for the caller to wait for, who knows what else there is to do."""


def is_passing(e: OSError) -> bool:
    """Whether the failure is one that usually passes; also of a file that is not there, which may be an answer."""
    return e.errno in _PASSING


def storage_error(e: OSError, path: Path, doing: str, *, n_tries: int = 1) -> StoreError:
    """The error that names `path` and what to do; `doing` completes "cannot …", such as "write"."""
    number = e.errno or 0
    if number in _OBSTRUCTED:
        return ObstructedError(f"cannot {doing} {path}: {e.strerror or e}; it is in the way of a file: move it away")
    tries = f" ({n_tries} tries)" if n_tries > 1 else ""
    what = f"cannot {doing} {path}: {e.strerror or e}{tries}"
    if is_passing(e):
        remedy = _REMEDIES.get(number, "the file system or its server is away, which says nothing about the results")
        return StorageUnreachableError(f"{what}; {remedy}, then run again: what is finished is kept")
    if number in _NO_PERMISSION:
        remedy = f"make it {'readable' if doing == 'read' else 'writable'} for the user that runs the job"
    else:
        remedy = _REMEDIES.get(number, "check the file system")
    return StorageUnavailableError(f"{what}; {remedy}, then run again: what is finished is kept")


@contextlib.contextmanager
def storage_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError of the block into the error of `storage_error`."""
    try:
        yield
    except OSError as e:
        raise storage_error(e, path, doing) from e


# ---------------------------------------------------------------------- reading


def read_patiently(read: Callable[[], T], path: Path, *, sleep: Callable[[float], None] = time.sleep) -> T:
    """What `read` returns, called again while the file system fails in a way that passes: see READ_WAITS_S.

    Raises StorageUnreachableError when it still fails so at last, StorageUnavailableError or ObstructedError at once
    for what no waiting mends. `read` begins anew each time, and returns what it takes a file that is not there for.
    """
    for wait_s in READ_WAITS_S:
        try:
            return read()
        except OSError as e:
            if not is_passing(e):
                raise storage_error(e, path, "read") from e
        sleep(wait_s)
    try:
        return read()
    except OSError as e:
        raise storage_error(e, path, "read", n_tries=len(READ_WAITS_S) + 1) from e


def open_file(path: Path) -> io.BufferedReader:
    """The file, open for reading. OSError for anything else under this name: a pipe would be waited at for ever."""
    require_file(path)  # before it is opened: opening a device may do something
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _require_file(os.fstat(descriptor).st_mode)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_file(path: Path) -> None:
    """Raise OSError for anything but a file under this name: a pipe, a socket, a device, a folder."""
    _require_file(os.stat(path).st_mode)


def _require_file(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.ENODEV, f"it is {kind} and no file")


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_if_there(path: Path, *, known: Path | None = None) -> bytes | None:
    """The file's bytes; None where there is no such file. Raises StorageUnavailableError, and ObstructedError where
    something else has its name.

    `known`: what is there as long as the store is. Where that is gone, too, nothing is known of the file: a mount that
    is away must not pass for missing files.
    """

    def read() -> bytes | None:
        try:
            with open_file(path) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            if known is not None:
                known.stat()
            return None

    return read_patiently(read, path)


def size_if_there(path: Path, *, known: Path | None = None) -> int | None:
    """Bytes of a file in a folder that is known to be there (`known`: one above, where the file's own may be gone,
    too); None where the file is not. Raises StorageUnavailableError, also where that folder is gone, for the reason
    that `read_if_there` gives, and ObstructedError where something else has its name."""

    def read() -> int | None:
        try:
            status = path.stat()
            _require_file(status.st_mode)
            return status.st_size
        except FileNotFoundError:
            (known or path.parent).stat()
            return None
        except NotADirectoryError:
            if known is None:
                raise
            return None

    return read_patiently(read, path)


def mode_if_there(path: Path) -> int | None:
    """`st_mode` of what is under this name, symbolic links followed; None where nothing is. Raises
    StorageUnavailableError."""

    def read() -> int | None:
        try:
            return path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None

    return read_patiently(read, path)


def listing(folder: Path) -> dict[str, bool]:
    """Name → whether it is a folder or a link to one, sorted; empty where there is no such folder. Raises
    StorageUnavailableError."""

    def read() -> dict[str, bool]:
        try:
            with os.scandir(folder) as entries:
                return dict(sorted((entry.name, _is_folder(entry)) for entry in entries))
        except (FileNotFoundError, NotADirectoryError):
            return {}

    return read_patiently(read, folder)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to nowhere that can be told
        return False


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, 64 hexadecimal digits. Raises StorageUnavailableError."""

    def read() -> str:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return read_patiently(read, path)


# ---------------------------------------------------------------------- writing


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
            sync_folder(folder.parent)


_WRITE_BACK_BYTES = 8 << 20
"""Of a file: the kernel is asked to write them before the sync at its end."""
_PAGE_BYTES = 4_096

_HASHED_BESIDE = 1 << 20
"""Bytes from which on a thread for hashing pays off."""


class HashingFile(io.RawIOBase):
    """A file being written, hashed as it goes: `sha256` and `n_bytes` of all that was written."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._digest = hashlib.sha256()
        self.n_bytes = 0
        self._n_begun = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.n_bytes

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) < _HASHED_BESIDE:
            self._digest.update(view)
            self._write(view)
        else:  # hashing takes three times as long as writing, and holds no lock of the interpreter
            hashing = threading.Thread(target=self._digest.update, args=(view,))
            hashing.start()
            try:
                for start in range(0, len(view), _WRITE_BACK_BYTES):
                    self._write(view[start : start + _WRITE_BACK_BYTES])
            finally:
                hashing.join()
        return len(view)

    def _write(self, view: memoryview) -> None:
        self._file.write(view)
        self.n_bytes += len(view)
        if self.n_bytes - self._n_begun >= _WRITE_BACK_BYTES:
            self._begin_write_back()

    def _begin_write_back(self) -> None:
        """Have the kernel write to the disk what is new, so that the sync at the end does not wait for all of it.

        posix_fadvise(2): POSIX_FADV_DONTNEED begins to write the dirty pages of a range, and waits for none.
        """
        if hasattr(os, "posix_fadvise"):
            # whole pages: one that is on its way to the disk would have to be waited for to be filled
            end = self.n_bytes - self.n_bytes % _PAGE_BYTES
            with contextlib.suppress(OSError):  # only time is saved by it
                os.posix_fadvise(self._file.fileno(), self._n_begun, end - self._n_begun, os.POSIX_FADV_DONTNEED)
            self._n_begun = end


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
        sync_folder(path.parent)


def atomic_write(path: Path, data: bytes, *, mode: int = FILE_MODE) -> str:
    """Put `data` under `path`, whole or not at all; returns its SHA-256."""
    with atomic_file(path, mode=mode) as file:
        file.write(data)
    return file.sha256


def replace_file(path: Path, data: bytes) -> None:
    """`atomic_write` of a small file that several processes may write at once, and that none of them owns.

    Also sweeps (`sweep_beside`), which may take the file of one who is about to rename it; so who finds it gone begins
    anew.
    """
    for n_left in reversed(range(_REPLACEMENTS)):
        try:
            atomic_write(path, data)
            break
        except StorageUnreachableError as e:
            if not n_left or not isinstance(e.__cause__, FileNotFoundError):
                raise
    sweep_beside(path)


_REPLACEMENTS = 20


def sweep_beside(path: Path) -> None:
    """Remove what killed writers of this file left beside it; only for files that `replace_file` writes."""
    for name in listing(path.parent):
        if name.startswith(f".{path.name}.") and name.endswith(TEMPORARY_SUFFIX):
            remove_file(path.parent / name)


def remove_file(path: Path) -> None:
    """Remove the file if it is there, and sync its folder."""
    with storage_errors(path, "remove"):
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


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
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until what was created, renamed or removed in the folder is on disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
