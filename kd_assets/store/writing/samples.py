"""The table of a shard's samples: what each document is, without its tokens. FORMAT.md, F58."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from kd_assets.store.writing.documents import Int64Array

SAMPLES_NAME = "samples.parquet"

_SCHEMA = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("parent_id", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("record_number", pa.int64(), nullable=False),
        pa.field("n_tokens", pa.int64(), nullable=False),
        pa.field("n_loss_tokens", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Samples:
    """A row a document of a shard, in their order."""

    document_id: Sequence[str]
    parent_id: Sequence[str]
    """The id of its record: another one where a record became several documents."""
    sample_id: Sequence[str]
    """Of the record's content, the same wherever it lies."""
    source: Sequence[str]
    file: Sequence[str]
    record_number: Int64Array
    n_tokens: Int64Array
    n_loss_tokens: Int64Array

    def to_parquet(self) -> bytes:
        """Equal samples give equal bytes."""
        table = pa.table([pa.array(getattr(self, field.name), field.type) for field in _SCHEMA], schema=_SCHEMA)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", compression_level=3, use_dictionary=["source", "file"])
        return sink.getvalue()
