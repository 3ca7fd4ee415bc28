"""One record, parsed as the job that tokenises does it."""

from __future__ import annotations

import json
from typing import Any

from kd_assets.contract import RecordRange
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.records import Record, parse_record

WHERE = "/data/web.jsonl:7"


def range_of(**settings: Any) -> RecordRange:
    named: dict[str, Any] = {
        "source": "web",
        "path": "/data/web.jsonl",
        "file_format": "jsonl",
        "first_record": 0,
        "n_records": 1,
        "byte_offset": 0,
        "first_line": 1,
    }
    return RecordRange(**named | settings)


def parsed(record: Any, *, columns: tuple[str, ...] = (), others: tuple[str, ...] = (), **settings: Any) -> Record:
    """`record`: an object, or the line as text. The settings are those of its range."""
    line = record if isinstance(record, str) else json.dumps(record)
    return parse_record(RawRecord(6, 7, 0, line.encode(), columns, others), range_of(**settings))
