"""How far an output is that a task makes file by file, as `progress` events tell it: once a second, and at its end."""

from __future__ import annotations

import time

from kd_assets.contract import Asset, Reporter

INTERVAL_S = 1.0


class OutputProgress:
    def __init__(self, report: Reporter, *, partition_key: str, asset: Asset) -> None:
        self._report, self._partition_key, self._asset = report, partition_key, asset
        self._started = time.monotonic()
        self._reported = -INTERVAL_S

    def tell(
        self,
        *,
        done_documents: int,
        n_documents: int,
        done_tokens: int,
        n_tokens: int,
        done_bytes: int,
        is_last: bool,
    ) -> None:
        now = time.monotonic() - self._started
        if not is_last and now - self._reported < INTERVAL_S:
            return
        self._reported = now
        self._report.emit(
            "progress",
            partition_key=self._partition_key,
            asset=self._asset,
            n_documents=n_documents,
            done_documents=done_documents,
            n_tokens=n_tokens,
            done_tokens=done_tokens,
            tokens_per_s=round(done_tokens / max(now, 1e-9), 1),
            done_bytes=done_bytes,
        )
