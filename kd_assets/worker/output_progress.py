"""How far an output is that a task makes file by file, as `progress` events tell it: once a second, and at its end."""

from __future__ import annotations

import time
from typing import Protocol

from kd_assets.contract import Asset, Reporter

INTERVAL_S = 1.0


class Counts(Protocol):
    """How much of an output is on disk, and of how much."""

    @property
    def n_documents(self) -> int: ...
    @property
    def of_documents(self) -> int: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def of_tokens(self) -> int: ...
    @property
    def n_bytes(self) -> int: ...


class OutputProgress:
    def __init__(self, report: Reporter, *, partition_key: str, asset: Asset) -> None:
        self._report, self._partition_key, self._asset = report, partition_key, asset
        self._started = time.monotonic()
        self._reported = -INTERVAL_S

    def tell(self, counts: Counts, *, is_last: bool) -> None:
        now = time.monotonic() - self._started
        if not is_last and now - self._reported < INTERVAL_S:
            return
        self._reported = now
        self._report.emit(
            "progress",
            partition_key=self._partition_key,
            asset=self._asset,
            n_documents=counts.of_documents,
            done_documents=counts.n_documents,
            n_tokens=counts.of_tokens,
            done_tokens=counts.n_tokens,
            tokens_per_s=round(counts.n_tokens / max(now, 1e-9), 1),
            done_bytes=counts.n_bytes,
        )
