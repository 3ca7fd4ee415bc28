"""The same epochs as an iterable data set: for loaders of others that keep the state of their workers themselves.

torchdata's StatefulDataLoader asks every worker's copy for its state with each batch, and hands the training loop the
state of the batch that it gave, so prefetched batches do not count. The order is that of `TrainingLoader`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from kd_assets.errors import LoaderStateError, RecipeError
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets.student.loading.epoch import Shares, Shuffle
from kd_assets.student.loading.loader import Batch, BatchesOfRows
from kd_assets.student.loading.plan import EpochPlan, Order, StreamState, decoded_state, documents_sha256, require_epoch

STREAM_STATE_VERSION = 1


@dataclass(kw_only=True, slots=True)
class _Progress:
    """How far a worker's copy is in one iteration."""

    epoch: int
    n_given: int


class TeacherCacheStream(IterableDataset[Batch]):
    """The batches of one rank and epoch. Give it to a DataLoader with `batch_size=None`: it makes batches itself.

    Of a loader's W workers, worker w gives the batches w, w + W, … of the rank, so that each is given once and the
    loader has them in their order. `state_dict` is of one worker's copy, and is loaded into the same worker of as many;
    `TrainingLoader` goes on with other numbers. `set_epoch` before an iteration chooses the epoch (0 unless told), also
    of workers that stay from one iteration to the next (`persistent_workers`).
    """

    def __init__(
        self,
        dataset: TeacherCacheDataset,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: Shuffle = "windows",
        pack_to: int | None = None,
        drop_last: bool = False,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        """As `TrainingLoader`. Raises RecipeError for numbers that cannot be."""
        if not 0 <= rank < n_ranks:
            raise RecipeError(f"rank is {rank}, of {n_ranks} ranks: expected 0 to {n_ranks - 1}")
        # Plain numbers, whatever kind numpy or a configuration gave: states are JSON, and are compared strictly.
        self._rank, self._n_ranks, self._batch_size = int(rank), int(n_ranks), int(batch_size)
        self._drop_last = bool(drop_last)
        self._order = Order(seed=int(seed), shuffle=shuffle, pack_to=None if pack_to is None else int(pack_to))
        self._batches = BatchesOfRows(dataset, pack_to)
        self._n_tokens_D = dataset.n_tokens_D
        self._documents_sha256 = documents_sha256(dataset)
        # The epoch that was set last is in memory that all copies share: workers that stay are told by nothing else.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._progress, self._goes_on = _Progress(epoch=0, n_given=0), False
        self._plan(0, n_workers=1)  # refuses what cannot be before there are workers

    def set_epoch(self, epoch: int) -> None:
        """The epoch of iterations that begin after this; nothing happens where it is that of a state just loaded."""
        require_epoch(epoch)
        if epoch != int(self._epoch):
            self._epoch.fill_(epoch)
            self._progress, self._goes_on = _Progress(epoch=epoch, n_given=0), False

    def __iter__(self) -> Iterator[Batch]:
        """This worker's batches; after `load_state_dict` those that are left."""
        epoch = int(self._epoch)
        if not (self._goes_on and self._progress.epoch == epoch):
            self._progress = _Progress(epoch=epoch, n_given=0)
        self._goes_on = False
        return self._left(self._progress)

    def _left(self, progress: _Progress) -> Iterator[Batch]:
        worker, n_workers = _worker()
        plan = self._plan(progress.epoch, n_workers=n_workers)
        for step in range(worker + progress.n_given * n_workers, plan.n_steps, n_workers):
            batch = self._batches[plan.batch(step)]
            progress.n_given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where this worker's copy is, as JSON values."""
        return self._identity() | {"epoch": self._progress.epoch, "n_given": self._progress.n_given}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on there in the next iteration.

        Raises LoaderStateError for the state of another stream or worker, or that is none; the stream stays where it is
        then.
        """
        if not isinstance(state_dict, Mapping):
            raise LoaderStateError(f"a stream's state is a mapping, found {state_dict!r:.80}")
        for name, value in self._identity().items():
            found = state_dict.get(name)
            if type(found) is not type(value) or found != value:
                raise LoaderStateError(
                    f"the state has {name} {found!r:.80}, this stream {value!r:.80}: make stream and "
                    "loader as those that saved it were made, or go on with a TrainingLoader's state"
                )
        state = decoded_state(StreamState, state_dict, where="the stream's state")
        plan = self._plan(state.epoch, n_workers=state.n_workers)
        n_batches = len(range(state.worker, plan.n_steps, state.n_workers))
        if not 0 <= state.n_given <= n_batches:
            raise LoaderStateError(
                f"the state's n_given is {state.n_given}: expected 0 to {n_batches}, which this worker gives of an "
                "epoch; it was changed"
            )
        self._epoch.fill_(state.epoch)
        self._progress, self._goes_on = _Progress(epoch=state.epoch, n_given=state.n_given), True

    def _identity(self) -> dict[str, Any]:
        worker, n_workers = _worker()
        return {
            "stream_version": STREAM_STATE_VERSION,
            "documents_sha256": self._documents_sha256,
            "seed": self._order.seed,
            "shuffle": self._order.shuffle,
            "pack_to": self._order.pack_to,
            "batch_size": self._batch_size,
            "drop_last": self._drop_last,
            "n_ranks": self._n_ranks,
            "rank": self._rank,
            "n_workers": n_workers,
            "worker": worker,
        }

    def _plan(self, epoch: int, *, n_workers: int) -> EpochPlan:
        shares = Shares(
            n_ranks=self._n_ranks, n_workers=n_workers, batch_size=self._batch_size, drop_last=self._drop_last
        )
        return EpochPlan(self._order.rows(self._n_tokens_D, epoch), (), shares, self._rank)


def _worker() -> tuple[int, int]:
    """Which of how many workers this process is."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
