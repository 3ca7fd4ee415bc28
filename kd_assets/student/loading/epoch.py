"""The order of an epoch, and how it is dealt to ranks and loader workers. Numbers only: nothing here reads a cache.

A *unit* is what a batch is made of: a document, or a packed row of documents. The order of units follows from seed and
epoch alone, so it is the same for every number of ranks and workers. A `Deal` cuts it into one slice for each rank and
one lane for each worker, since neighbours in the order lie in the same few groups of rows: each group is decoded by
one worker. Every rank has the same number of steps. The invariant, however often a training goes on with other numbers:
what has been given and what is left are the units of the epoch, each once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from kd_assets.errors import LoaderStateError, RecipeError
from kd_assets.store.writing.documents import Int64Array, offsets_of

Shuffle = Literal["windows", "documents", "none"]
"""`documents`: any order is as likely as any other, and each document costs the decoding of its group of rows.
`windows`: runs of neighbouring documents are shuffled, then the documents within every `WINDOW_RUNS` runs, which a
worker decodes once. `none`: as they lie."""

RUN_TOKENS = 32_768
WINDOW_RUNS = 16
MAX_LANES = 1 << 20
"""Workers of all ranks together: more are a damaged state or a slip, and dealing to them would take for ever."""


def epoch_order(n_tokens_D: npt.NDArray[np.integer], *, shuffle: Shuffle, seed: int, epoch: int) -> Int64Array:
    """int64 [D]: the documents in the order of an epoch. The same for ever: it depends on no version of numpy.

    Sorted by the raw words of `numpy.random.Philox` (4x64-10), whose stream numpy guarantees.
    """
    n_documents = len(n_tokens_D)
    if shuffle == "none":
        return np.arange(n_documents)
    words_D = _words(f"documents:{seed}:{epoch}", n_documents)
    if shuffle == "documents":
        return np.argsort(words_D, kind="stable")
    if shuffle != "windows":
        raise RecipeError(f"shuffle must be windows, documents or none, found {shuffle!r}")
    run_D = offsets_of(n_tokens_D)[:-1] // RUN_TOKENS
    n_runs = int(run_D[-1]) + 1 if n_documents else 0
    place_of_run = np.empty(n_runs, np.int64)
    place_of_run[np.argsort(_words(f"runs:{seed}:{epoch}", n_runs), kind="stable")] = np.arange(n_runs)
    return np.lexsort((words_D, place_of_run[run_D] // WINDOW_RUNS))


def _words(name: str, n: int) -> npt.NDArray[np.uint64]:
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.asarray(np.random.Philox(key=key).random_raw(n), dtype=np.uint64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Into how many parts units are dealt, and of what size."""

    n_ranks: int
    n_workers: int
    """Of each rank; 1 where batches are made in the training process."""
    batch_size: int
    """Units of a batch of one rank."""
    drop_last: bool
    """Leave out what is less than a batch on every rank."""

    def __post_init__(self) -> None:
        for name in ("n_ranks", "n_workers", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if (n_lanes := self.n_ranks * self.n_workers) > MAX_LANES:
            raise RecipeError(f"n_ranks x n_workers is {n_lanes}: it can be at most {MAX_LANES}")


class Deal:
    """`n_units` units, dealt to ranks as batches; all ranks have `n_steps` of them.

    Batches have `batch_size` units but for the last ones of a rank, which share what is left evenly. Where that cannot
    be (batches of one), a few last ones have one unit more. Raises RecipeError for fewer units than ranks.
    """

    def __init__(self, n_units: int, shares: Shares) -> None:
        self.n_units, self.shares = n_units, shares
        n_ranks, n_lanes, size = shares.n_ranks, shares.n_workers, shares.batch_size
        self._least, self._more = divmod(n_units, n_ranks)
        if n_units and not self._least and not shares.drop_last:
            raise RecipeError(
                f"{n_units} documents or rows are left of the epoch, for {n_ranks} ranks: use fewer ranks, or leave "
                "them out (drop_last, or set_epoch to the next one)"
            )
        self._of_lane = self._least // n_lanes // size
        """Whole batches of each lane."""
        left = self._least - self._of_lane * n_lanes * size
        if shares.drop_last:
            self._n_last = left // size
        else:
            if not left and self._more and self._of_lane:  # some ranks have one unit more: room for it
                self._of_lane -= 1
                left += n_lanes * size
            self._n_last = min(math.ceil((left + (self._more > 0)) / size), left)
        self._n_whole = self._of_lane * n_lanes
        self.n_steps = self._n_whole + self._n_last

    def batch(self, rank: int, step: int) -> Int64Array:
        """int64: the units of a rank's batch, as places in the order."""
        size = self.shares.batch_size
        if step < self._n_whole:
            lane, of_lane = step % self.shares.n_workers, step // self.shares.n_workers
            start = self._lane(rank, lane)[0] + of_lane * size
            return np.arange(start, start + size)
        last, step = self._last(rank), step - self._n_whole
        if self.shares.drop_last:
            return last[step * size : (step + 1) * size]
        return last[step * len(last) // self._n_last : (step + 1) * len(last) // self._n_last]

    def given(self, n_steps: int) -> npt.NDArray[np.bool_]:
        """bool [n_units]: which have been given to any rank after so many steps of each."""
        given = np.zeros(self.n_units, np.bool_)
        size, n_lanes = self.shares.batch_size, self.shares.n_workers
        for rank in range(self.shares.n_ranks):
            for lane in range(n_lanes):
                start = self._lane(rank, lane)[0]
                n_batches = (min(n_steps, self._n_whole) - lane + n_lanes - 1) // n_lanes
                given[start : start + n_batches * size] = True
            for step in range(self._n_whole, n_steps):
                given[self.batch(rank, step)] = True
        return given

    def _lane(self, rank: int, lane: int) -> tuple[int, int]:
        """Where a lane starts and ends."""
        start = rank * self._least + min(rank, self._more)
        n, n_lanes = self._least + (rank < self._more), self.shares.n_workers
        return start + lane * n // n_lanes, start + (lane + 1) * n // n_lanes

    def _last(self, rank: int) -> Int64Array:
        """What is left of a rank's lanes after their whole batches."""
        whole = self._of_lane * self.shares.batch_size
        lanes = [self._lane(rank, lane) for lane in range(self.shares.n_workers)]
        return np.concatenate([np.arange(start + whole, stop) for start, stop in lanes])


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of an epoch with one and the same shares."""

    shares: Shares
    n_steps: int


def units_left(n_units: int, segments: Sequence[Segment]) -> Int64Array:
    """int64: the units that these stretches, one after the other, have not given, in the order of the epoch.

    Raises LoaderStateError for stretches that cannot have been.
    """
    left = np.arange(n_units)
    for segment in segments:
        try:
            deal = Deal(len(left), segment.shares)
        except RecipeError as e:
            raise LoaderStateError(f"the state has a stretch of an epoch that cannot have been: {e}") from e
        if not 0 <= segment.n_steps <= deal.n_steps:
            raise LoaderStateError(
                f"the state is after {segment.n_steps} steps of a stretch of {deal.n_steps}: it was changed"
            )
        left = left[~deal.given(segment.n_steps)]
    return left
