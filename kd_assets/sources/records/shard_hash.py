"""The input hash of a shard: over its records and over what else its documents are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from kd_assets.contract import RecordRange, RecordShape
from kd_assets.sources.fields import ID_FIELD, HasFields, fields_of
from kd_assets.sources.record_files import RawRecord


class IsRead(HasFields, Protocol):
    """A source as the recipe (`SourceSpec`) or the contract (`RecordRange`) says how it is read."""

    @property
    def shape(self) -> RecordShape: ...
    @property
    def prefer(self) -> Literal["chosen", "rejected"] | None: ...
    @property
    def roles(self) -> dict[str, str]: ...


class ShardHash:
    """SHA-256 over the records of a shard, range by range.

    In it are the source's name and the first record's number (they name the documents that have no id), the fields
    that are read and how; not the path, the time of change, line ends, blank lines or other records of the file.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def begin_range(self, reading: IsRead, *, source: str, first_record: int, file_name: str = "") -> None:
        """`source` is its name, `file_name` that of a file of a source of several."""
        self._digest.update(json.dumps(_header(reading, source, first_record, file_name)).encode() + b"\n")

    def add(self, record: RawRecord) -> None:
        self._digest.update(record.content)
        self._digest.update(b"\n")  # no record holds one: no two lists of records give the same bytes

    def add_dropped(self) -> None:
        """In the place of `add`, for a record that is left out: an exact copy of an earlier one."""
        self._digest.update(b"\n")  # no record is empty

    def add_planned(self, records: RecordRange, *, found: str | None = None) -> None:
        """A whole range by its `file_identity`, or by the hash of its records: the one that was `found`, or that its
        plan has. Nothing is read."""
        if records.file_identity is not None:
            self.begin_range(
                records, source=records.source, first_record=records.first_record, file_name=records.file_name
            )
            rows: dict[str, Any] = {"file_identity": records.file_identity, "n_records": records.n_records}
            if records.dropped:
                rows["dropped"] = list(records.dropped)
            self._digest.update(json.dumps(rows, sort_keys=True).encode() + b"\n")
        else:
            records_hash = found or records.records_hash
            assert records_hash is not None, "a range without either is hashed record by record"
            self._digest.update(json.dumps({"records_hash": records_hash}).encode() + b"\n")

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def planned_hash(ranges: Sequence[RecordRange]) -> str:
    """The input hash of a shard all of whose ranges have a `file_identity` or a `records_hash`; what
    `read_records` finds where the files are what was planned."""
    shard_hash = ShardHash()
    for records in ranges:
        shard_hash.add_planned(records)
    return shard_hash.hexdigest()


def _header(reading: IsRead, source: str, first_record: int, file_name: str) -> list[Any]:
    fields = fields_of(reading)
    header: list[Any] = [source, first_record, fields.text, fields.messages]
    # What came later is in the hash where it is used, so that what was planned before stays what it is.
    if fields.id != ID_FIELD or fields.ignored:
        header += [fields.id, list(fields.ignored)]
    later: dict[str, Any] = {
        "shape": None if reading.shape == "auto" else reading.shape,
        "fields": _sorted(reading.fields),
        "prefer": reading.prefer,
        "roles": _sorted(reading.roles),
        "file_name": file_name,
    }
    if used := {name: value for name, value in later.items() if value}:
        header.append(used)
    return header


def _sorted(names: Mapping[str, str]) -> dict[str, str]:
    return dict(sorted(names.items()))
