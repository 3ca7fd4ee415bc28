"""The hash of what a shard's documents are made of, by which the shard is named.

Used by the planner, which takes it while it cuts, and by the job, which takes it again and refuses other records than
were planned. The invariant: it changes exactly when what the documents are made of changes; the path of a file, its
time of change, line ends, blank lines and other records of the file do not count.

A range of text, or of a small file of columns, is named by its records; one of a large file of columns, which a plan
does not read, by what the file was (`RecordRange.file_identity`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from kd_assets.contract import RecordRange
from kd_assets.sources.fields import ID_FIELD
from kd_assets.store.fingerprint import canonical_json, fingerprint


class RangeHash:
    """The hash over one range: SHA-256 over how its records are read, then each record in order."""

    def __init__(self, records: RecordRange) -> None:
        """`records`: how they are read; `n_records` and `dropped` may be known later."""
        self._digest = hashlib.sha256()
        self._digest.update(canonical_list(header_of(records)) + b"\n")

    def add(self, content: bytes) -> None:
        """The next record's canonical line, also of one that is left out."""
        self._digest.update(content)
        self._digest.update(b"\n")  # no record holds one: no two lists of records give the same bytes

    def of(self, records: RecordRange) -> str:
        """Of the records that were added, with those of them that `records` leaves out."""
        found = self._digest.hexdigest()
        if not records.dropped:
            return found
        return fingerprint({"records": found, "dropped": [number - records.first_record for number in records.dropped]})


def hash_by_identity(records: RecordRange) -> str:
    """Of a range of a file of columns that was not read."""
    assert records.file_identity is not None
    return fingerprint(
        {"header": header_of(records), "file": records.file_identity, "n_records": records.n_records}
        | ({"dropped": list(records.dropped)} if records.dropped else {})
    )


class ShardHash:
    """The input hash of a shard while its ranges are read, one after the other."""

    def __init__(self) -> None:
        self._ranges: list[str] = []

    def add(self, range_hash: str) -> None:
        self._ranges.append(range_hash)

    def hexdigest(self) -> str:
        return shard_hash(self._ranges)


def shard_hash(range_hashes: Sequence[str]) -> str:
    """The input hash of a shard: that of its one range, or over those of several."""
    return range_hashes[0] if len(range_hashes) == 1 else fingerprint({"ranges": list(range_hashes)})


def header_of(records: RecordRange) -> list[Any]:
    """How the records of a range are read, as far as it decides their documents: the source's name and the first
    record's number (they name the documents that have no id) and the fields that are read."""
    header: list[Any] = [records.source, records.first_record, records.text_field, records.messages_field]
    # What came later is in the hash where it is used, so that what was planned before stays what it is.
    if records.id_field != ID_FIELD or records.ignore_fields:
        header += [records.id_field, list(records.ignore_fields)]
    later = {
        "file_name": records.file_name,
        "shape": "" if records.shape == "auto" else records.shape,
        "fields": records.fields,
        "prefer": records.prefer,
        "roles": records.roles,
        "control_tokens": "" if records.control_tokens == "tokens" else records.control_tokens,
    }
    used = {name: value for name, value in later.items() if value}
    return [*header, used] if used else header


def canonical_list(header: list[Any]) -> bytes:
    """As it was written before there were dictionaries in it: with a space after each comma."""
    if isinstance(header[-1], dict):
        return canonical_json({"header": header}).encode()
    return json.dumps(header).encode()
