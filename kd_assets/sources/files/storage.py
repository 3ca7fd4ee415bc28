"""Files by path or URL: opened for reading, and what the storage says of their version.

A path is of this machine; a URL (`s3://…`, `memory://…`, `https://…`) is fsspec's, whose plug-ins take keys and
endpoints from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL` …), never from a recipe. Whatever fails becomes
an error that names the file: MissingInputError where it is not there or not to be read, StorageUnreachableError where
that may pass.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kd_assets.durable import is_passing, read_patiently, storage_errors
from kd_assets.errors import InputError, MissingInputError, StorageUnreachableError

REMOTE_BLOCK_BYTES = 8 << 20
"""Read of a remote file of text at a time: a request takes tens of milliseconds, whatever its size."""

_REMEDY = "create it, or correct its path in the recipe"
_PLUGINS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "http": "aiohttp",
}
"""Scheme → the package that fsspec needs for it."""


def is_url(path: str) -> bool:
    """Whether the path is of fsspec; `file://` is one of this machine."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> str:
    """A path of this machine without the `file://` before it."""
    return path.removeprefix("file://")


@contextlib.contextmanager
def open_source(path: Path | str, *, in_order: bool = True) -> Iterator[BinaryIO]:
    """A source file for reading, with `seek`. Raises MissingInputError, naming it, when it is not there or not to be
    read; and StorageUnavailableError, also while the block reads, where its file system fails.

    `in_order`: it is read from some place on, so that a remote file is fetched in blocks.
    """
    text = str(path)
    if is_url(text):
        with _open_remote(text, in_order=in_order) as f:
            yield f
        return
    with _open_local(Path(local_path(text))) as f:
        yield f


@contextlib.contextmanager
def _open_local(path: Path) -> Iterator[BinaryIO]:
    def open_file() -> int:
        try:
            # Not blocking: opening a named pipe would wait for its writer for ever.
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as e:
            if isinstance(e, OSError) and is_passing(e) and not isinstance(e, FileNotFoundError):
                raise
            reason = e.strerror if isinstance(e, OSError) else str(e)
            raise MissingInputError(f"source file {path} cannot be read: {reason}; {_REMEDY}") from e

    fd = read_patiently(open_file, path)
    with storage_errors(path, "read"):
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            os.close(fd)
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            expected = f"a source is one JSONL, Parquet or Arrow file{_saved_to_disk(path)}"
            raise MissingInputError(f"source {path} is {kind}; {expected}: {_REMEDY}")
        with os.fdopen(fd, "rb", buffering=1 << 20) as f:
            yield f


def _saved_to_disk(path: Path) -> str:
    """A hint, where a folder is one of `datasets.save_to_disk`."""
    try:
        files = sorted(path.glob("*.arrow"))
    except OSError:
        return ""
    return f" (of this one, name {files[0].name} and its others, each with format: arrow)" if files else ""


def version_of(path: str, f: BinaryIO) -> tuple[int, str]:
    """Bytes of an open file, and what its storage says of its version: see `SourceFile.changed`."""
    if is_url(path):
        info = remote_info(path)
        return info["size"], changed_of(info)
    status = os.fstat(f.fileno())
    return status.st_size, str(status.st_mtime_ns)


def size_of(f: BinaryIO) -> int:
    """Bytes of an open file; leaves it at its beginning."""
    n_bytes = f.seek(0, os.SEEK_END)
    f.seek(0)
    return n_bytes


# ---------------------------------------------------------------------- by URL


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, as it is now, and the path within it. Raises InputError where its plug-in is not
    installed, or the URL is of no kind that fsspec knows."""
    import fsspec

    try:
        found, path = fsspec.core.url_to_fs(url)
    except ImportError as e:
        scheme = url.partition("://")[0]
        package = _PLUGINS.get(scheme.removesuffix("s") if scheme == "https" else scheme)
        remedy = f"pip install {package}" if package else "install the package that it names"
        raise InputError(f"{url} cannot be read: {e}; {remedy}, where Dagster and where the jobs run") from e
    except ValueError as e:
        raise InputError(f"{url} cannot be read: {e}; correct its path in the recipe") from e
    found.invalidate_cache()  # a process that lives for long must see what has come since
    return found, path


def remote_info(url: str) -> dict[str, Any]:
    """What the storage says of a file or folder. Raises as `open_source` does."""
    fs, path = file_system(url)
    with remote_errors(url):
        info: dict[str, Any] = fs.info(path)
        if info.get("type") == "file" and info.get("size") is None:
            raise InputError(f"{url}: its server does not say how large it is: copy it to where that is known")
        return info


def changed_of(info: dict[str, Any]) -> str:
    """What a storage says of a file's version: its ETag, or else when it was last changed."""
    for name in ("ETag", "etag", "e_tag", "LastModified", "last_modified", "mtime", "updated", "created"):
        if info.get(name):
            return str(info[name]).strip('"')
    return ""


@contextlib.contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Turn what a plug-in of fsspec raises in the block into errors that name the URL."""
    try:
        yield
    except (InputError, StorageUnreachableError):
        raise
    except FileNotFoundError as e:
        raise MissingInputError(f"source {url} is not there; {_REMEDY}") from e
    except PermissionError as e:
        raise MissingInputError(
            f"source {url} may not be read ({e}): check the keys in the environment (AWS_ACCESS_KEY_ID …)"
        ) from e
    except Exception as e:  # plug-ins raise the errors of their own clients, which have no base in common
        if type(e).__name__ == "NoCredentialsError":
            raise MissingInputError(
                f"source {url} needs keys, and there are none: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from e
        raise StorageUnreachableError(f"cannot read {url}: {e or type(e).__name__}; run again once it answers") from e


class PositionedFile(io.RawIOBase):
    """A file for reading of `n_bytes`, which its `readinto` takes from its `position` on, wherever that is."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.n_bytes, self.position = n_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.n_bytes}[whence]
        self.position = start + offset
        return self.position


class _RemoteFile(PositionedFile):
    """A file of fsspec whose errors name its URL."""

    def __init__(self, url: str, file: Any, n_bytes: int) -> None:
        super().__init__(n_bytes)
        self._url, self._file = url, file

    def readinto(self, buffer: Any) -> int:
        n_bytes = min(len(buffer), self.n_bytes - self.position)
        if n_bytes <= 0:
            return 0
        with remote_errors(self._url):
            self._file.seek(self.position)
            data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            raise StorageUnreachableError(
                f"cannot read {self._url}: {len(data):,} bytes came of {n_bytes:,}; run again once it answers"
            )
        buffer[:n_bytes] = data
        self.position += n_bytes
        return n_bytes

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextlib.contextmanager
def _open_remote(url: str, *, in_order: bool) -> Iterator[BinaryIO]:
    info = remote_info(url)
    if info.get("type") == "directory":
        raise MissingInputError(f"source {url} is a folder; a source is one file here: {_REMEDY}")
    fs, path = file_system(url)
    caching = {"cache_type": "readahead", "block_size": REMOTE_BLOCK_BYTES} if in_order else {"cache_type": "none"}
    with remote_errors(url):
        file = fs.open(path, "rb", **caching)
    with io.BufferedReader(_RemoteFile(url, file, info["size"]), 1 << 20) as f:
        yield f
