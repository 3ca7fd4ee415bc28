"""One part file: which container an asset uses, writing a table into it, and reading it by groups of rows.

Hidden states are Arrow IPC files, uncompressed, so that a document is read straight out of the page cache; everything
else is Parquet. Both are cut into groups of rows of about `GROUP_TOKENS` tokens: a reader decodes one group to get at a
document, and never more. Nothing here knows about manifests.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from kd_assets.durable import read_patiently, size_if_there
from kd_assets.errors import CorruptPartError, UnknownCodecError
from kd_assets.store.codecs.codec import CODEC_KEY, codec_of
from kd_assets.store.schema import split_columns
from kd_assets.store.writing.documents import plan_parts

T = TypeVar("T")

GROUP_TOKENS = 4_096
"""Larger groups compress 1 % better, and cost a loader that jumps about in proportion (1 ms a group at this size)."""

CODED_GROUP_TOKENS = 512
"""Of coded states, each a thousand times a top-k row: 8 MB of one block of 8,192 values take some 7 ms to decode."""

PARQUET_SUFFIX = ".parquet"
ARROW_SUFFIX = ".arrow"


def part_suffix(asset: str) -> str:
    return ARROW_SUFFIX if asset == "hidden_state_cache" else PARQUET_SUFFIX


def write_table(table: pa.Table, suffix: str, sink: Any) -> None:
    """Write the table as a part file into a binary file object. Equal tables give equal bytes."""
    is_coded = suffix == ARROW_SUFFIX and CODEC_KEY in (table.schema.metadata or {})
    most = CODED_GROUP_TOKENS if is_coded else GROUP_TOKENS
    groups = plan_parts(table["n_tokens"].to_numpy(), max_documents=most, max_tokens=most)
    slices = [table.slice(group.first_document, group.n_documents) for group in groups]
    if suffix == ARROW_SUFFIX:
        with pa.ipc.new_file(sink, table.schema) as writer:
            for rows in slices:
                writer.write_table(rows, max_chunksize=rows.num_rows)
        return
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        # Of coded bytes the faster level leaves fewer: there is nothing to find but how often each comes up.
        compression_level=3 if codec_of(table.schema) is None else 1,
        use_dictionary=False,
        use_byte_stream_split=split_columns(table.schema),
        write_statistics=False,
    ) as writer:
        for rows in slices:
            writer.write_table(rows, row_group_size=rows.num_rows)


class PartFile:
    """A part file opened for reading: an Arrow file is mapped, a Parquet file is read where it is asked for.

    What is wrong with its content is a CorruptPartError, and so is that it is not there. A file system that does not
    let us look is a StorageUnavailableError, after a few tries; but of a mapped page that it cannot bring the kernel
    tells by SIGBUS alone, which ends the process.
    """

    def __init__(self, path: Path, data: bytes | None = None, *, vocabulary: int | None = None) -> None:
        """`data`: the file's bytes, where the caller has read them. `vocabulary`: the number of the teacher's token
        ids, where the caller knows it: then decoding refuses ids beyond."""
        self.path, self._data, self._vocabulary = path, data, vocabulary
        self._is_open = False
        self._patiently(lambda: None)

    def _open(self) -> None:
        if self._data is not None:
            self._source = pa.BufferReader(self._data)
        else:
            open_file = pa.memory_map if self.path.suffix == ARROW_SUFFIX else pa.OSFile
            self._source = open_file(os.fsencode(self.path))  # a path need not be UTF-8
        if self.path.suffix == ARROW_SUFFIX:
            self._arrow = pa.ipc.open_file(self._source)
            self.stored_schema: pa.Schema = self._arrow.schema
            counts = [self._arrow.get_batch(i).num_rows for i in range(self._arrow.num_record_batches)]
        else:
            self._parquet = pq.ParquetFile(self._source)
            self.stored_schema = self._parquet.schema_arrow
            counts = [self._parquet.metadata.row_group(i).num_rows for i in range(self._parquet.num_row_groups)]
        self._codec = codec_of(self.stored_schema)
        self.schema: pa.Schema = (
            self.stored_schema if self._codec is None else self._codec.plain_schema(self.stored_schema)
        )
        """Of the columns that are read: those of the file, unless a codec makes them of others."""
        self.names: list[str] = (
            self.schema.names
        )  # here, since a damaged name is no UTF-8, and Arrow says so when asked
        self.first_rows = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        """int64 [groups + 1]: the first row of each group, and the number of rows."""

    @property
    def is_view(self) -> bool:
        """Whether what is read are views of the mapped file."""
        return self.path.suffix == ARROW_SUFFIX and self._codec is None

    @property
    def n_rows(self) -> int:
        return int(self.first_rows[-1])

    @property
    def n_groups(self) -> int:
        return len(self.first_rows) - 1

    def group_of(self, row: int) -> int:
        return int(np.searchsorted(self.first_rows, row, side="right")) - 1

    def read_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        """These columns of one group of rows. Of an Arrow file without a codec these are views of the mapped file."""

        return self._patiently(lambda: self._decoded(lambda names: self._stored(group, names), columns))

    def stored_group(self, group: int) -> pa.Table:
        """All columns of the file, as they are in it, of one group of rows."""
        return self._patiently(lambda: self._stored(group, self.stored_schema.names))

    def decoded(self, stored: pa.Table) -> pa.Table:
        """All columns that are read, of some rows of a `stored_group`."""
        return self._patiently(lambda: self._decoded(stored.select, self.names))

    def _stored(self, group: int, names: Sequence[str]) -> pa.Table:
        if self.path.suffix == ARROW_SUFFIX:
            return pa.Table.from_batches([self._arrow.get_batch(group)]).select(names)
        # one thread: a process that was forked off must not wait for threads that it does not have
        return self._parquet.read_row_group(group, columns=list(names), use_threads=False).select(names)

    def read(self, columns: Sequence[str]) -> pa.Table:
        """These columns of all rows."""
        if self.path.suffix != ARROW_SUFFIX and self.n_groups:

            def read(names: Sequence[str]) -> pa.Table:
                # a third of the time that its groups take one by one
                return self._parquet.read(columns=list(names), use_threads=False).select(names)

            return self._patiently(lambda: self._decoded(read, columns))
        schema = pa.schema([self.schema.field(name) for name in columns], metadata=self.schema.metadata)
        groups = [self.read_group(group, columns) for group in range(self.n_groups)]
        return pa.concat_tables(groups) if groups else schema.empty_table()

    def read_stored(self) -> pa.Table:
        """All columns of all rows as they are in the file, whatever the codec."""

        def read() -> pa.Table:
            is_arrow = self.path.suffix == ARROW_SUFFIX
            return self._arrow.read_all() if is_arrow else self._parquet.read(use_threads=False)

        return self._patiently(read)

    def _decoded(self, read: Callable[[Sequence[str]], pa.Table], columns: Sequence[str]) -> pa.Table:
        """These columns, made of those that `read` gives of the file."""
        if self._codec is None:
            return read(columns)
        names = self._codec.stored_names(self.stored_schema, columns)
        if names == list(columns):
            return read(columns)
        wanted = pa.schema([self.schema.field(name) for name in columns], metadata=self.schema.metadata)
        return self._codec.decode(read(names), wanted, vocabulary=self._vocabulary)

    def close(self) -> None:
        """Let go of the file. Arrays that were read from it stay valid."""
        if self.path.suffix != ARROW_SUFFIX:
            self._parquet.close()
        self._source.close()

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _patiently(self, read: Callable[[], T]) -> T:
        """What `read` gives, of a file that is opened anew after a failure: a stale handle stays stale."""

        def attempt() -> T:
            try:
                if not self._is_open:
                    self._open()
                    self._is_open = True
                return read()
            except FileNotFoundError as e:
                if size_if_there(self.path) is None:
                    raise CorruptPartError(f"{self.path} is missing") from e
                raise
            except OSError as e:
                self._is_open = False
                if e.errno is None or e.errno == errno.EINVAL:  # Arrow's own words: the file is not what it says
                    raise CorruptPartError(f"{self.path} is damaged: {e}") from e
                raise
            except UnknownCodecError as e:
                raise UnknownCodecError(f"{self.path}: {e}") from e
            except (pa.ArrowException, ValueError, KeyError) as e:
                raise CorruptPartError(f"{self.path} is damaged: {e}") from e

        return read_patiently(attempt, self.path)
