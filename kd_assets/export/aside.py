"""Files of an export, written and hashed by a thread of their own while the next bytes are made.

SHA-256 and writing let go of the interpreter's lock, and so does most of what makes the bytes: on two cores a file
takes as long as the slower of both. The invariant: what is handed over is copied, at most `_N_BUFFERS` buffers wait,
and a file whose bytes are not all written never gets its name (`kd_assets.durable.atomic_file`).
"""

from __future__ import annotations

import contextlib
import io
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from kd_assets.durable import HashingFile, atomic_file

_BUFFER_BYTES = 2 << 20
_N_BUFFERS = 6


@contextlib.contextmanager
def export_file(path: Path) -> Iterator[FileAside]:
    """A file to write, which takes the place of `path` when the block ends well and vanishes when it does not.

    Its `sha256` is known after the block. Raises StorageUnavailableError as `atomic_file` does, be it later than the
    write that failed.
    """
    with atomic_file(path) as file, FileAside(file) as aside:
        yield aside


class FilesAside:
    """Files one after the other, of which one is synced and named while the next is written.

    Every file has its name when the block has ended well; of a block that fails those have it that were whole.
    """

    def __init__(self) -> None:
        self.sha256: dict[Path, str] = {}
        """By path, in the order they were written; of all files after the block."""
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._closing: Future[None] | None = None

    def __enter__(self) -> FilesAside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._thread.shutdown()

    @contextlib.contextmanager
    def file(self, path: Path) -> Iterator[FileAside]:
        """As `export_file`; raises what the file before failed with, too."""
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(FileAside(stack.enter_context(atomic_file(path))))
            yield file
            self._wait()
            self._closing = self._thread.submit(self._close, path, file, stack.pop_all())

    def _close(self, path: Path, file: FileAside, stack: contextlib.ExitStack) -> None:
        with stack:
            pass
        self.sha256[path] = file.sha256

    def _wait(self) -> None:
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.result()


class FileAside(io.RawIOBase):
    """A file whose bytes a thread writes; one that is smaller than a buffer is written without."""

    def __init__(self, file: HashingFile) -> None:
        super().__init__()
        self._file = file
        self._n_bytes = 0
        self._buffer, self._n_held = bytearray(), 0
        self._n_buffers = 0
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def sha256(self) -> str:
        """Of all that was written. Only after the file was closed by the end of its block."""
        return self._file.sha256

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._n_bytes

    def write(self, data: Any) -> int:
        """Copies `data`, which may change afterwards. Raises what the thread failed with."""
        view = memoryview(data).cast("B")
        taken = 0
        while taken < len(view):
            if self._n_held == len(self._buffer):
                self._next_buffer()
            n = min(len(view) - taken, len(self._buffer) - self._n_held)
            # A bytearray would take a copy of anything but its like first.
            memoryview(self._buffer)[self._n_held : self._n_held + n] = view[taken : taken + n]
            self._n_held += n
            taken += n
        self._n_bytes += taken
        return taken

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:  # what waits is not worth writing
            self._error = self._error or error
        elif self._thread is None:
            self._file.write(memoryview(self._buffer)[: self._n_held])
        else:
            self._full.put(memoryview(self._buffer)[: self._n_held])
        if self._thread is not None:
            self._full.put(None)
            self._thread.join()
            if kind is None and self._error is not None:
                raise self._error

    def _next_buffer(self) -> None:
        """Hand the full buffer over, and wait for a free one where all are on their way."""
        if self._n_held:
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_full, name="export-file", daemon=True)
                self._thread.start()
            self._full.put(memoryview(self._buffer))
        if self._error is not None:
            raise self._error
        if self._n_buffers < _N_BUFFERS and self._free.empty():
            self._buffer = bytearray(_BUFFER_BYTES)
            self._n_buffers += 1
        else:
            self._buffer = self._free.get()
        self._n_held = 0

    def _write_full(self) -> None:
        """The thread: goes on to take buffers after a failure, so that nobody waits for one in vain."""
        while (view := self._full.get()) is not None:
            if self._error is None:
                try:
                    self._file.write(view)
                except Exception as e:  # noqa: BLE001 - raised where the file is written to
                    self._error = e
            buffer = view.obj
            assert isinstance(buffer, bytearray)
            view.release()
            self._free.put(buffer)
