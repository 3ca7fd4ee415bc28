"""How far a partition is, as `progress` events tell it. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kd_assets.contract import Reporter
from kd_assets.teacher.partition.batching import Batch

PROGRESS_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DoneCounts:
    """What has run."""

    documents: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    """Padding included."""
    batches: int = 0

    def plus(self, batches: Sequence[Batch], *, sign: int = 1) -> DoneCounts:
        return DoneCounts(
            documents=self.documents + sign * sum(len(b.documents_B) for b in batches),
            tokens=self.tokens + sign * sum(b.n_tokens for b in batches),
            padded_tokens=self.padded_tokens + sign * sum(b.n_padded_tokens for b in batches),
            batches=self.batches + sign * len(batches),
        )

    @property
    def padding_fraction(self) -> float:
        return 1.0 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


@dataclass(kw_only=True, slots=True)
class Tally:
    """How much of a partition's work is done, and its progress events. Used by one thread at a time."""

    report: Reporter
    partition_key: str
    n_documents: int
    n_tokens: int
    tokens_done: Callable[[int], None]
    """Called after each batch."""
    done: DoneCounts = field(default_factory=DoneCounts)
    started: float = field(default_factory=time.perf_counter)
    reported: float = 0.0

    def add(self, batch: Batch) -> None:
        self.done = self.done.plus([batch])
        self.tokens_done(self.done.tokens)
        now = time.perf_counter()
        if now - self.reported >= PROGRESS_S or self.done.tokens == self.n_tokens:
            self.reported = now
            self.report.emit(
                "progress",
                partition_key=self.partition_key,
                n_documents=self.n_documents,
                done_documents=self.done.documents,
                n_tokens=self.n_tokens,
                done_tokens=self.done.tokens,
                tokens_per_s=round(self.done.tokens / max(now - self.started, 1e-9), 1),
            )

    def take_back(self, batches: Sequence[Batch]) -> None:
        """What was added, and has to be run again."""
        self.done = self.done.plus(batches, sign=-1)
