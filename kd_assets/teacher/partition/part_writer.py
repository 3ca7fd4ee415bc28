"""Encoding and writing parts in a thread of its own, so that the device never waits for the disk.

Used by `kd_assets.teacher` only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from kd_assets.contract import Asset
from kd_assets.store import ResultWriter, coded, part_stats
from kd_assets.teacher.background_queue import BackgroundQueue
from kd_assets.teacher.partition.budgets import BUDGET_STAT

QUEUED_PARTS = 2
"""Parts that wait while one is written. Each holds its arrays: 2 GB for 131,072 tokens of one block of 8,192 states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartToWrite:
    """One part of one cache, not yet encoded."""

    result: ResultWriter
    asset: Asset
    index: int
    n_tokens: int
    token_budget: int
    """What its batches were planned with; kept with the part (see `budgets`)."""
    codec: str
    encode: Callable[[], pa.Table]
    """The rows without a codec."""


class PartWriter(BackgroundQueue[PartToWrite]):
    """Writes parts in the order they are put."""

    def __init__(self, *, queued_parts: int = QUEUED_PARTS) -> None:
        super().__init__(name="part-writer", size=queued_parts)

    def do(self, part: PartToWrite) -> None:
        table = coded(part.encode(), part.codec)
        stats = part_stats(part.asset, table.decoded) | table.error | {BUDGET_STAT: float(part.token_budget)}
        part.result.write_part(part.index, table.stored, n_tokens=part.n_tokens, stats=stats)
