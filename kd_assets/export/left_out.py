"""Documents that a format's reader would fail at: which of a section are not in its files, in a file beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from kd_assets.durable import atomic_write, prepare_folder

log = logging.getLogger(__name__)

_NAMED = 3
"""In the warning."""


def write_left_out(
    folder: Path, section: int, partition_key: str, document_ids: Sequence[str], why: str, *, ensure_ascii: bool = False
) -> list[str]:
    """Write `left_out/<section>.json` with these documents and warn of them; returns its name, none where there are no
    documents. `ensure_ascii`: as of `json.dumps`; a format keeps the one that its files were written with."""
    if not document_ids:
        return []
    first = ", ".join(document_ids[:_NAMED])
    log.warning("%d documents of partition %s are left out: %s (%s)", len(document_ids), partition_key, why, first)
    name = f"left_out/{section:06d}.json"
    prepare_folder((folder / name).parent)
    said = {"partition_key": partition_key, "document_ids": list(document_ids)}
    atomic_write(folder / name, json.dumps(said, indent=1, ensure_ascii=ensure_ascii).encode() + b"\n")
    return [name]
