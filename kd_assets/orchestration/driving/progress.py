"""How far one kind of work of a run is, in a line of the run's log:

    teacher: 3 of 10 shards, 41 % of tokens, 4,887 tokens/s, about 6 min left

The share is of the tokens that the plan has for each shard; where it knows none, the line tells shards alone. The rate
is what all tasks together did within the last two minutes, as it was seen here, and what is left follows from it. A
line is due every few seconds, less often in a long run, and is left out where nothing has moved. Knows no dagster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from kd_assets.contract import Output, WorkUnit
from kd_assets.orchestration.driving.waiting import Log
from kd_assets.orchestration.planning.planned_work import PlannedWork

EVERY_S = 5.0
"""Between two lines, at least; and before the first, so that a run of seconds says nothing of it."""
PAUSE_SHARE, LONGEST_PAUSE_S = 0.01, 300.0
"""Of the time that has passed, so that the log of a run of days is not full of it; and never longer."""
WINDOW_S = 120.0
"""Over which the rate is taken."""


class Progress:
    """What is done of the shards of some work."""

    def __init__(self, work: PlannedWork, *, log: Log, clock: Callable[[], float]) -> None:
        self._kind, self._log, self._clock = work.kind, log, clock
        self._units = {unit.partition_key: unit for unit in work.units}
        self._n_tokens = sum(unit.n_tokens for unit in work.units)
        self._open = {unit.partition_key: {output.asset for output in unit.outputs} for unit in work.units}
        """Shard → the assets of which nothing is there yet."""
        self._failed: set[str] = set()
        self._n_done = 0
        self._closed_tokens = 0.0
        """Of results that are made or given up, each with its part of its shard's tokens."""
        self._begun: dict[tuple[str, str | None], float] = {}
        """Shard and, where its task names one, asset → the part that is done of what is open of it."""
        self._started = clock()
        self._next = self._started + EVERY_S
        self._seen: deque[tuple[float, float]] = deque()
        """When, and how many tokens were done then; the rate is taken from the first to the last."""
        self._said = ""

    # ------------------------------------------------------------------ what happens

    def on_event(self, data: Mapping[str, Any]) -> None:
        """Take in a `progress` event. Passed over are those of others' shards and assets, which a job has that this
        run has joined, and those that come when the result is there already."""
        key, asset = data.get("partition_key"), data.get("asset")
        is_open = self._open.get(str(key), set())
        if not is_open or (asset is not None and asset not in is_open):
            return
        # A task knows the tokens of a shard once it is tokenised; its records it knows from the beginning.
        of, done = ("n_tokens", "done_tokens") if data.get("n_tokens") else ("n_documents", "done_documents")
        if n := data.get(of):
            self._begun[str(key), asset] = min(1.0, (data.get(done) or 0) / n)

    def on_closed(self, unit: WorkUnit, output: Output, *, is_made: bool) -> None:
        """A result is there, or given up."""
        key = unit.partition_key
        self._closed_tokens += unit.n_tokens / len(self._units[key].outputs)
        self._begun.pop((key, output.asset), None)
        self._open[key].discard(output.asset)
        if not is_made:
            self._failed.add(key)
        if not self._open[key]:
            self._begun.pop((key, None), None)
            self._n_done += key not in self._failed

    # ------------------------------------------------------------------ what is said

    def tell(self) -> None:
        """Say how far it is, if that is due and something has moved. A training tells its steps itself."""
        if self._kind == "student":
            return
        now = self._clock()
        if not self._seen:
            self._seen.append((now, self._done_tokens()))  # a job that was found is not at its beginning
        if now < self._next:
            return
        self._next = now + min(LONGEST_PAUSE_S, max(EVERY_S, PAUSE_SHARE * (now - self._started)))
        done = self._done_tokens()
        if done == self._seen[0][1]:  # it waits in the queue: that is no slow work
            self._seen.clear()
        while len(self._seen) > 1 and now - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()
        self._seen.append((now, done))
        how_far = self._how_far()
        is_over = self._n_done + len(self._failed) == len(self._units)  # which the run's last line says
        if how_far != self._said and not is_over and (self._n_done or self._failed or done):
            self._said = how_far
            self._log.info(f"{self._kind}: {how_far}{self._how_fast()}")

    def _how_far(self) -> str:
        words = f"{self._n_done:,} of {len(self._units):,} shards"
        if self._failed:
            words += f", {len(self._failed):,} failed"
        if self._n_tokens:
            words += f", {100 * self._done_tokens() / self._n_tokens:.0f} % of tokens"
        return words

    def _how_fast(self) -> str:
        (since, done_then), (now, done) = self._seen[0], self._seen[-1]
        if now <= since or done <= done_then:
            return ""
        rate = (done - done_then) / (now - since)
        return f", {rate:,.0f} tokens/s, about {span_in_words((self._n_tokens - done) / rate)} left"

    def _done_tokens(self) -> float:
        done = self._closed_tokens
        # Of results side by side, one event is of one of them or, of a teacher's pass, of all that are open.
        for (key, asset), part in self._begun.items():
            n_outputs = len(self._units[key].outputs)
            n_meant = len(self._open[key]) if asset is None else 1
            done += part * self._units[key].n_tokens * n_meant / n_outputs
        return min(done, self._n_tokens)


def counts_in_words(n_made: int, n_reused: int, n_failed: int, seconds: float) -> str:
    """`10 made, 0 reused, 0 failed, 42 s`."""
    return f"{n_made:,} made, {n_reused:,} reused, {n_failed:,} failed, {span_in_words(seconds)}"


def span_in_words(seconds: float) -> str:
    """`42 s`, `6 min`, `5.2 h`: as exact as a person reads it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
