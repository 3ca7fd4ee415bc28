"""A copy of a compressed text that can be entered anywhere, so that its last shard costs what its first one costs.

Layout: zstd frames, each of `FRAME_BYTES` of text (the last has the rest), then one skippable frame (RFC 8878, 3.1.2)
with an entry a frame (where it starts, how long it is, CRC-32 of its text) and the footer. So `zstd -d` gives the
text, and byte n of it lies in frame n // FRAME_BYTES. The copy is named after the SHA-256 of the file that it was made
of. The idea is that of zstd's own seekable format, with checksums that the standard library computes.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from kd_assets.durable import (
    FILE_MODE,
    TEMPORARY_SUFFIX,
    file_sha256,
    prepare_folder,
    size_if_there,
    storage_errors,
    sync_folder,
)
from kd_assets.errors import InputError, MissingInputError
from kd_assets.sources.files.storage import PositionedFile, open_source, size_of

FRAME_BYTES = 1 << 20
_LEVEL = 1
"""The copy lasts as long as its plan: fast to write beats small."""

_ENTRY = struct.Struct("<QLL")
"""Start and length of a frame in the copy, CRC-32 of its text."""
_SKIPPABLE = struct.Struct("<LL")
_SKIPPABLE_MAGIC = 0x184D2A50
_FOOTER = struct.Struct("<QQ8s")
"""Bytes of text, number of frames, magic."""
_MAGIC = b"kdtext01"


class SeekableWriter:
    """The text on its way into a copy; `add` takes it in pieces of any size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._codec = pa.Codec("zstd", compression_level=_LEVEL)
        self._pending = bytearray()
        self._entries: list[bytes] = []
        self._n_text_bytes = self._n_bytes = 0

    def add(self, text: bytes | memoryview) -> None:
        self._pending += text
        while len(self._pending) >= FRAME_BYTES:
            self._write_frame(bytes(memoryview(self._pending)[:FRAME_BYTES]))
            del self._pending[:FRAME_BYTES]

    def finish(self) -> None:
        if self._pending:
            self._write_frame(bytes(self._pending))
            self._pending.clear()
        table = b"".join(self._entries) + _FOOTER.pack(self._n_text_bytes, len(self._entries), _MAGIC)
        self._file.write(_SKIPPABLE.pack(_SKIPPABLE_MAGIC, len(table)) + table)

    def _write_frame(self, text: bytes) -> None:
        frame = self._codec.compress(text, asbytes=True)
        self._entries.append(_ENTRY.pack(self._n_bytes, len(frame), _checksum(text, len(self._entries))))
        self._file.write(frame)
        self._n_bytes += len(frame)
        self._n_text_bytes += len(text)


def _checksum(text: bytes, number: int) -> int:
    """Begins with the frame's number: a frame in the place of another is not it."""
    return zlib.crc32(text, number & 0xFFFFFFFF)


class SeekableCopy:
    """A copy on its way to disk. `keep` gives it its name; without it nothing is left."""

    def __init__(self, folder: Path, temporary: Path, writer: SeekableWriter, file: BinaryIO) -> None:
        self._folder, self._temporary, self._file = folder, temporary, file
        self.add = writer.add
        self._finish = writer.finish

    def keep(self, sha256: str) -> Path:
        """The path of the whole copy of the file with this hash.

        One that is there and the same stays: on NFS a reader of a file that is replaced loses it (ESTALE).
        """
        path = self._folder / f"{sha256}.zst"
        with storage_errors(path, "write"):
            self._finish()
            self._file.flush()
            os.fsync(self._file.fileno())
            if size_if_there(path) == self._temporary.stat().st_size and file_sha256(path) == file_sha256(
                self._temporary
            ):
                return path
            os.replace(self._temporary, path)
            sync_folder(self._folder)
        return path


@contextlib.contextmanager
def seekable_copy(folder: Path) -> Iterator[SeekableCopy]:
    """A copy to write in this folder, which is made if need be."""
    prepare_folder(folder)
    with storage_errors(folder, "write in"):
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".copy.", suffix=TEMPORARY_SUFFIX)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, FILE_MODE)
            yield SeekableCopy(folder, Path(name), SeekableWriter(file), file)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


@contextlib.contextmanager
def open_seekable(path: str, of: str) -> Iterator[BinaryIO]:
    """The text of a copy, to be read from any place on; `of` is the file that it was made of.

    Raises InputError, here or while it is read, where the copy is not there or not what was written.
    """
    try:
        with open_source(path) as f, io.BufferedReader(_Text(f, path, of), FRAME_BYTES) as text:
            yield text
    except MissingInputError as e:
        if str(path) not in str(e):
            raise
        raise MissingInputError(f"the copy of {of} that shards are read from is not there ({path}): {_REMEDY}") from e


_REMEDY = "materialize shard_plan again, which writes it again"


class _Text(PositionedFile):
    """The text of a copy; one frame of it is in memory."""

    def __init__(self, f: BinaryIO, path: str, of: str) -> None:
        super().__init__(0)
        self._f, self._path, self._of = f, path, of
        self._codec = pa.Codec("zstd")
        n_bytes = size_of(f)
        footer = self._read_at(n_bytes - _FOOTER.size, _FOOTER.size) if n_bytes >= _FOOTER.size else b""
        self.n_bytes, self._n_frames, magic = _FOOTER.unpack(footer) if footer else (0, 0, b"")
        self._table = n_bytes - _FOOTER.size - self._n_frames * _ENTRY.size
        n_frames = -(-self.n_bytes // FRAME_BYTES)
        if magic != _MAGIC or self._n_frames != n_frames or self._table < _SKIPPABLE.size:
            raise self._damaged("its end is not that of a copy")
        self._number, self._frame = -1, b""

    def readinto(self, buffer: Any) -> int:
        if self.position >= self.n_bytes:
            return 0
        number, skip = divmod(self.position, FRAME_BYTES)
        if number != self._number:
            self._frame, self._number = self._frame_text(number), number
        data = memoryview(self._frame)[skip : skip + len(buffer)]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def _frame_text(self, number: int) -> bytes:
        n_text_bytes = min(FRAME_BYTES, self.n_bytes - number * FRAME_BYTES)
        start, n_bytes, checksum = _ENTRY.unpack(self._read_at(self._table + number * _ENTRY.size, _ENTRY.size))
        if start + n_bytes > self._table:
            raise self._damaged(f"frame {number} lies beyond its end")
        try:
            text: bytes = self._codec.decompress(self._read_at(start, n_bytes), n_text_bytes, asbytes=True)
        except (pa.ArrowException, OSError) as e:
            raise self._damaged(f"frame {number} is no zstd frame") from e
        if len(text) != n_text_bytes or _checksum(text, number) != checksum:
            raise self._damaged(f"frame {number} is not what was written")
        return text

    def _read_at(self, offset: int, n_bytes: int) -> bytes:
        self._f.seek(offset)
        data = self._f.read(n_bytes)
        if len(data) != n_bytes:
            raise self._damaged("it is too short")
        return data

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"the copy of {self._of} that shards are read from is damaged ({self._path}: {what}): {_REMEDY}"
        )
