"""What a shard's manifest says of it besides counts: its samples, lengths, rows covered, fingerprints and licences.

All of it is taken from the parts as they are on disk and from the records that were read, so that an attempt that goes
on from another one finds the same.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_assets.contract import RecordRange
from kd_assets.errors import BadRecordError, ContractError
from kd_assets.sources.records import Record, file_of
from kd_assets.store import PartRecord, Samples
from kd_assets.store.arrays import flat
from kd_assets.store.partfile import PartFile
from kd_assets.store.writing.documents import Int64Array

SHARE_BINS = 10
"""Of the picture of learned shares: tenths, the last one with 1."""

_SUFFIX = re.compile(r"[#/]\d+$")
"""What the id of one of a record's several documents has after the record's: `#turn`, `/window`, or one and the other.
An id of the source's own may end so, too."""


def samples_of(folder: Path, parts: Mapping[int, PartRecord], records: Sequence[Record | BadRecordError]) -> Samples:
    """The documents of a shard's part files with the records that they are of. Nothing is tokenised."""
    by_id = {record.document_id: record for record in records if isinstance(record, Record)}
    ids: list[str] = []
    found: list[Record] = []
    n_tokens, n_loss_tokens = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for index in sorted(parts):
        with PartFile(folder / parts[index].name) as part:
            table = part.read(["document_id", "source_record", "n_tokens", "loss_mask"])
        part_ids = table["document_id"].to_pylist()
        numbers = table["source_record"].to_pylist()
        found += [_record_of(id_, number, by_id) for id_, number in zip(part_ids, numbers, strict=True)]
        ids += part_ids
        lengths = flat(table["n_tokens"]).astype(np.int64)
        n_tokens.append(lengths)
        n_loss_tokens.append(_sums(flat(table["loss_mask"]), lengths))
    return Samples(
        document_id=ids,
        parent_id=[record.document_id for record in found],
        sample_id=[record.sample_id for record in found],
        source=[record.source for record in found],
        file=[record.file for record in found],
        record_number=np.array([record.number for record in found], dtype=np.int64),
        n_tokens=np.concatenate(n_tokens),
        n_loss_tokens=np.concatenate(n_loss_tokens),
    )


def _record_of(document_id: str, number: int, by_id: Mapping[str, Record]) -> Record:
    id_, shortened = document_id, None
    while id_ != shortened:
        record = by_id.get(id_)
        if record is not None and record.number == number:
            return record
        id_, shortened = _SUFFIX.sub("", id_), id_
    raise ContractError(f"document {document_id!r} of record {number} is of none of the records that were read")


def _sums(values: Any, lengths: Int64Array) -> Int64Array:
    """Sums over consecutive runs of these lengths, each at least 1."""
    if not len(lengths):
        return np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return np.add.reduceat(values, starts, dtype=np.int64)


def length_facts(samples: Samples) -> dict[str, Any]:
    """What the picture of a recipe's lengths is made of, and the share of tokens that is learned."""
    lengths, learned = samples.n_tokens, samples.n_loss_tokens
    n_tokens = int(lengths.sum())
    shares = np.minimum(learned * SHARE_BINS // np.maximum(lengths, 1), SHARE_BINS - 1)
    return {
        "p95_document_tokens": float(np.percentile(lengths, 95)) if len(lengths) else 0.0,
        "learned_share": round(int(learned.sum()) / n_tokens, 6) if n_tokens else 0.0,
        # Element i: documents of 2^i tokens up to one less than 2^(i+1).
        "length_histogram": np.bincount(np.log2(lengths).astype(np.int64)).tolist() if len(lengths) else [],
        # Element i: documents of which i to i + 1 tenths are learned.
        "learned_histogram": np.bincount(shares, minlength=SHARE_BINS).tolist(),
    }


def source_facts(ranges: Sequence[RecordRange], sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows that the shard covers, file by file, their licences, and how many are left out as copies of others;
    `sources` as the plan pins them."""
    pinned = {source.get("name"): source for source in sources}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for records in ranges:
        last = records.first_record + records.n_records - 1
        row = rows.setdefault(
            (records.source, file_of(records)),
            {
                "source": records.source,
                "file": file_of(records),
                "revision": pinned.get(records.source, {}).get("revision"),
                "first": records.first_record,
                "last": last,
                "records": 0,
            },
        )
        row["first"], row["last"] = min(row["first"], records.first_record), max(row["last"], last)
        row["records"] += records.n_records - len(records.dropped)
    licences = {str(pinned.get(source, {}).get("licence", "unknown")) for source, _ in rows}
    n_duplicates = sum(len(records.dropped) for records in ranges)
    facts = {"source_rows": list(rows.values()), "licences": sorted(licences)}
    return facts | ({"n_duplicates": n_duplicates} if n_duplicates else {})


def bad_record_facts(bad: Sequence[BadRecordError]) -> dict[str, Any]:
    """How many records were skipped for which kind of reason; nothing where none was."""
    kinds = Counter(e.kind for e in bad)
    return {"bad_record_kinds": dict(sorted(kinds.items()))} if kinds else {}


def template_facts(records: Sequence[Record | BadRecordError], template: str | None) -> dict[str, Any]:
    """The hash of the chat template's text, where a record of the shard is a chat."""
    if template is None or not any(isinstance(r, Record) and r.messages is not None for r in records):
        return {}
    return {"chat_template_sha256": hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()}
