"""The windows of a partition: what each still has to run, with which token budget, and how far all of them are.

Used by `kd_assets.teacher` only; no torch. One window is one part of each cache.

The invariant: a window's batches depend on its documents and on its token budget, and the budget of a part that is on
disk is known (it is kept with the part). So another cache of the same part, and an attempt that goes on from another,
run the batches that an uninterrupted attempt runs, also where the device ran out of memory on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kd_assets.report import Reporter
from kd_assets.store import PartRecord
from kd_assets.teacher.batching import Batch

PROGRESS_S = 1.0

BUDGET_STAT = "min_token_budget"
"""The statistic of a part that keeps the token budget it was made with; of a result: the smallest of its parts."""


def recorded_budgets(finished: Iterable[Mapping[int, PartRecord]]) -> dict[int, int]:
    """Part index → the token budget it was made with, from the finished parts of all caches."""
    budgets: dict[int, int] = {}
    for records in finished:
        for index, record in records.items():
            if BUDGET_STAT in record.stats:
                budget = int(record.stats[BUDGET_STAT])
                budgets[index] = min(budget, budgets.get(index, budget))
    return budgets


class Budgets:
    """The token budget of each window of one partition.

    A part that some cache has already is made with the same budget again. Any other window goes on with the budget of
    the last part before it, and the first with that of the recipe. So every partition begins with the same budget: what
    an earlier one ran into must not decide its bytes.
    """

    def __init__(self, *, first: int, limit: int | None, recorded: Mapping[int, int]) -> None:
        self._first, self._limit = first, limit
        self._of_parts = dict(recorded)
        self.n_halvings = 0

    def of(self, index: int) -> int:
        """For the window of part `index`; never above the limit, which is the recipe's own budget if it names one."""
        before = max((i for i in self._of_parts if i <= index), default=None)
        budget = self._first if before is None else self._of_parts[before]
        return budget if self._limit is None else min(budget, self._limit)

    def halve(self, index: int, failed: Batch) -> int:
        """The new budget of window `index` and of those after it: halved until `failed` does not occur again."""
        assert len(failed.documents_B) > 1, "a single document runs whatever the budget"
        budget = self.of(index)
        while budget >= failed.n_padded_tokens:
            budget //= 2
            self.n_halvings += 1
        self._of_parts[index] = budget
        return budget


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What has run."""

    documents: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    """Padding included."""
    batches: int = 0

    def plus(self, batches: Sequence[Batch], *, sign: int = 1) -> Counts:
        return Counts(
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
    done: Counts = field(default_factory=Counts)
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
