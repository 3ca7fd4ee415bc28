"""The text of files compressed with gzip (RFC 1952) or zstd (RFC 8878), in one or in several members or frames."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from kd_assets.contract import Compression
from kd_assets.errors import InputError

_BUFFER_BYTES = 1 << 20
MAGIC: dict[Compression, bytes] = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}


@contextlib.contextmanager
def decompressed(f: BinaryIO, path: str, compression: Compression) -> Iterator[BinaryIO]:
    """The text of a compressed file that stands at its beginning. Reads each byte of the file once, in order.

    Raises InputError, also while the text is read, for a file that was cut, is damaged, or is compressed otherwise.
    """
    with io.BufferedReader(_Decompressing(f, path, compression), _BUFFER_BYTES) as text:
        yield text


class _Decompressing(io.RawIOBase):
    """Decompressors raise what they please when a file is cut: here it becomes an error that names the file."""

    def __init__(self, f: BinaryIO, path: str, compression: Compression) -> None:
        super().__init__()
        self._path, self._compression = path, compression
        if compression == "gzip":
            self._text: Any = gzip.GzipFile(fileobj=f, mode="rb")
        else:
            self._text = pa.CompressedInputStream(pa.PythonFile(f, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._text.read(len(buffer))
        except EOFError as e:
            raise InputError(
                f"{self._path} was cut: it ends inside a {self._compression} member: write it again"
            ) from e
        except (gzip.BadGzipFile, zlib.error, pa.ArrowException) as e:
            raise self._damaged(e) from e
        except OSError as e:
            if e.errno is not None:
                raise  # of the file system, not the decoder's own words about the content
            raise self._damaged(e) from e
        buffer[: len(data)] = data
        return len(data)

    def _damaged(self, e: BaseException) -> InputError:
        reason = str(e).strip()
        if "truncated" in reason.lower():
            return InputError(f"{self._path} was cut: it ends inside a {self._compression} frame: write it again")
        return InputError(
            f"{self._path} cannot be read as {self._compression} ({reason}): write it again, or correct "
            "its name's suffix"
        )

    def close(self) -> None:
        if not self.closed:
            self._text.close()
        super().close()
