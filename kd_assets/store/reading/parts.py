"""The one door to the part files of committed results: what comes through it has the bytes that were committed.

A part is compared with its record before its documents are believed: size, SHA-256, number of rows. Without that a
flipped bit is another log-probability that nobody notices. Hashing reads all of a file from front to back, so that what
is read of it next is in the page cache; `VerifiedParts` sees to it that this is done once.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from kd_assets.durable import file_sha256, read_patiently, size_if_there
from kd_assets.errors import CorruptPartError, UnknownCodecError
from kd_assets.store.manifest import PartRecord
from kd_assets.store.partfile import PartFile

_REMEDY = "remove this file and materialize the partition again: only what is missing is made"


class VerifiedParts:
    """Which of a reader's parts were found to be what was committed.

    Shared with the processes that are forked off: data loaders start theirs anew every epoch, and each would read every
    part once more. A file that was touched since (by its inode, size, mtime or ctime) is verified again.
    """

    def __init__(self, n_parts: int) -> None:
        # Anonymous and shared: what a child writes its parent and its siblings see. One aligned word a part, so that
        # there is nothing to lock: two who come at the same time both hash the file.
        self._stamps = np.frombuffer(mmap.mmap(-1, max(n_parts, 1) * 8), dtype=np.uint64)

    def require(self, index: int, path: Path, record: PartRecord) -> None:
        """`require_unchanged`, unless it has been done of this part since the file was touched."""
        _require_size(path, record)
        stamp = _stamp(path)
        if self._stamps[index] != stamp:
            require_unchanged(path, record)
            self._stamps[index] = stamp


def require_unchanged(path: Path, record: PartRecord) -> None:
    """Raise CorruptPartError, which says what to do, unless the file's bytes are those that were committed;
    StorageUnavailableError where the file system does not let us look."""
    _require_size(path, record)
    _require_digest(path, record, file_sha256(path))


def open_part(path: Path, record: PartRecord, *, vocabulary: int | None = None) -> PartFile:
    """The part file, to be closed by the caller; its bytes are not hashed here. `vocabulary` as of `PartFile`.

    Raises CorruptPartError unless its size and number of rows are those of the record.
    """
    _require_size(path, record)
    try:
        part = PartFile(path, vocabulary=vocabulary)
    except UnknownCodecError:
        require_unchanged(path, record)  # a flipped bit makes a name that no codec has, too
        raise
    return _of_as_many_documents(part, record)


def part_in_memory(path: Path, record: PartRecord) -> PartFile:
    """The part file, read once and whole, its bytes those that were committed. Raises as `require_unchanged` does."""
    _require_size(path, record)
    data = read_patiently(path.read_bytes, path)
    _require_digest(path, record, hashlib.sha256(data).hexdigest())
    return _of_as_many_documents(PartFile(path, data), record)


def _of_as_many_documents(part: PartFile, record: PartRecord) -> PartFile:
    if part.n_rows != record.n_documents:
        raise CorruptPartError(f"{part.path}: expected {record.n_documents} documents, it has {part.n_rows}; {_REMEDY}")
    return part


def _require_size(path: Path, record: PartRecord) -> None:
    if "\0" in record.name:
        raise CorruptPartError(f"{str(path)!r} cannot be a file: its manifest was forged")
    n_bytes = size_if_there(path, known=path.parents[record.name.count("/")])
    if n_bytes != record.n_bytes:
        found = "it is missing" if n_bytes is None else f"it has {n_bytes}"
        raise CorruptPartError(f"{path}: expected {record.n_bytes} bytes, {found}; {_REMEDY}")


def _require_digest(path: Path, record: PartRecord, digest: str) -> None:
    if digest != record.sha256:
        raise CorruptPartError(
            f"{path} was changed after its commit: it has sha256 {digest}, expected {record.sha256}; {_REMEDY}"
        )


def _stamp(path: Path) -> int:
    """Tells a file from what it becomes when it is written to or replaced; never 0."""
    status = read_patiently(path.stat, path)
    words = f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") or 1


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what Arrow and numpy say of impossible values in a table of `path` into a CorruptPartError."""
    try:
        yield
    except (pa.ArrowException, ValueError, LookupError, OverflowError) as e:
        raise CorruptPartError(f"{path} is no sound table ({e}); {_REMEDY}") from e
