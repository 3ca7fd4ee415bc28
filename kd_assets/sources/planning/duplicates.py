"""Which records are exact copies of earlier ones, in memory that does not grow with their number.

Two records are copies when their fields are equal, the id left out. The hashes lie in a temporary table on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kd_assets.sources.files.raw import RawRecord

HASH_BYTES = 16
"""Of SHA-256: two different records among 10^12 are taken for copies once in 10^15 plans."""


class SeenRecords:
    """The records that were seen so far."""

    def __init__(self, table: sqlite3.Connection, id_field: str) -> None:
        self._table, self._id_field = table, id_field

    def is_copy(self, raw: RawRecord) -> bool:
        """Whether an equal record was seen before; from now on this one was."""
        added = self._table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (content_hash(raw, self._id_field),))
        return added.rowcount == 0


@contextlib.contextmanager
def seen_records() -> Iterator[sqlite3.Connection]:
    """A table for `SeenRecords`, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="kd-duplicates-") as folder:
        table = sqlite3.connect(Path(folder) / "seen", isolation_level=None)
        try:
            table.execute("PRAGMA journal_mode = OFF")
            table.execute("PRAGMA synchronous = OFF")
            table.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")
            table.execute("BEGIN")
            yield table
        finally:
            table.close()


def content_hash(raw: RawRecord, id_field: str) -> bytes:
    """Of a record without its id; of what is no JSON object, of its bytes."""
    content = raw.content
    try:
        fields = json.loads(content)
        if isinstance(fields, dict):
            fields.pop(id_field, None)
            content = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        pass  # it becomes a bad record, twice or once
    return hashlib.sha256(content).digest()[:HASH_BYTES]
