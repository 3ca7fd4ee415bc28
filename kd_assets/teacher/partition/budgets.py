"""The token budget of each window of a partition; a window is one part of each cache.

No torch. The invariant: a window's batches depend on its documents and on its token budget, and the budget of a part
that is on disk is known (it is kept with the part). So another cache of the same part, and an attempt that goes on from
another, run the batches that an uninterrupted attempt runs, also where the device ran out of memory on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kd_assets.store import PartRecord
from kd_assets.teacher.partition.batching import Batch

BUDGET_STAT = "min_token_budget"
"""The statistic of a part that keeps the token budget it was made with; of a result: the smallest of its parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetRules:
    """What holds for the token budget of every partition."""

    first: int
    """Most tokens of a batch that a partition begins with."""
    limit: int | None
    """Most tokens of a batch whatever a part was made with before; None where the budget was measured."""
    can_halve: bool
    """Whether a step may be tried again after it ran out of memory: not where other processes take part in it."""


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

    def __init__(self, *, rules: BudgetRules, recorded: Mapping[int, int]) -> None:
        self._rules = rules
        self._of_parts = dict(recorded)
        self.n_halvings = 0

    def of(self, index: int) -> int:
        """For the window of part `index`; never above the limit, which is the recipe's own budget if it names one."""
        before = max((i for i in self._of_parts if i <= index), default=None)
        budget = self._rules.first if before is None else self._of_parts[before]
        return budget if self._rules.limit is None else min(budget, self._rules.limit)

    def halve(self, index: int, failed: Batch) -> int:
        """The new budget of window `index` and of those after it: halved until `failed` does not occur again."""
        assert len(failed.documents_B) > 1, "a single document runs whatever the budget"
        budget = self.of(index)
        while budget >= failed.n_padded_tokens:
            budget //= 2
            self.n_halvings += 1
        self._of_parts[index] = budget
        return budget
