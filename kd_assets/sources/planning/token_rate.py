"""How many bytes of a source's records a token takes, measured on its first records.

It makes shards of sources with different texts about equally long, and it is what a plan's token counts rest on. The
measurement stands in the plan, and is not taken again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kd_assets.contract import RecordRange
from kd_assets.errors import BadRecordError
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.records import Record, parse_record

ASSUMED_BYTES_PER_TOKEN = 4.0
"""Where nothing was measured: about that of English."""
MEASURED_RECORDS = 200
MEASURED_BYTES = 1 << 20

CountTokens = Callable[[Sequence[str]], int]
"""Tokens of these texts together."""


def measured_rate(raws: Iterable[RawRecord], base: RecordRange, count_tokens: CountTokens) -> float | None:
    """Bytes of records a token, of the first of these; None where they have no text. `base`: how they are read."""
    texts: list[str] = []
    n_bytes = 0
    for raw in itertools.islice(raws, MEASURED_RECORDS):
        try:
            texts += _texts(parse_record(raw, base))
        except BadRecordError:
            continue
        n_bytes += len(raw.content)
        if n_bytes >= MEASURED_BYTES:
            break
    n_tokens = count_tokens(texts) if texts else 0
    return n_bytes / n_tokens if n_tokens else None


def _texts(record: Record) -> list[str]:
    """What a record says, without what a template puts around it."""
    if record.messages is None:
        return [record.text or ""]
    return [
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for message in record.messages
        for name, value in message.items()
        if name != "role" and value is not None
    ]


def token_counter(tokenizer_folder: Path) -> CountTokens | None:
    """Counts with the folder's tokenizer.json; None where there is none, or `tokenizers` is not installed."""
    path = tokenizer_folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001 - the library raises bare Exception; the job says what is wrong with it
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: sum(len(e.ids) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False))
