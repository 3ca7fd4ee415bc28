"""The same epochs as an iterable data set: for loaders of others that keep the state of their workers themselves.

torchdata's StatefulDataLoader asks every worker's copy for its state with each batch, and hands the training loop the
state of the batch that it gave, so prefetched batches do not count. The order is that of `TrainingLoader`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from kd_assets.errors import LoaderStateError, RecipeError
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets.student.loading.epoch import Shares, Shuffle
from kd_assets.student.loading.loader import Batch, BatchesOfRows
from kd_assets.student.loading.plan import EpochPlan, Order, documents_sha256

STREAM_STATE_VERSION = 1


class TeacherCacheStream(IterableDataset[Batch]):
    """The batches of one rank and epoch. Give it to a DataLoader with `batch_size=None`: it makes batches itself.

    Of a loader's W workers, worker w gives the batches w, w + W, … of the rank, so that each is given once and the
    loader has them in their order. `state_dict` is of one worker's copy, and is loaded into the same worker of as many;
    `TrainingLoader` goes on with other numbers. `set_epoch` before an iteration chooses the epoch (0 unless told).
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
        self._rank, self._n_ranks, self._batch_size, self._drop_last = rank, n_ranks, batch_size, drop_last
        self._order = Order(seed=seed, shuffle=shuffle, pack_to=pack_to)
        self._batches = BatchesOfRows(dataset, pack_to)
        self._n_tokens_D = dataset.n_tokens_D
        self._documents_sha256 = documents_sha256(dataset)
        self._epoch, self._n_given, self._goes_on = 0, 0, False
        self._plan(1)  # refuses what cannot be before there are workers

    def set_epoch(self, epoch: int) -> None:
        """The epoch of iterations that begin after this."""
        self._epoch, self._n_given, self._goes_on = epoch, 0, False

    def __iter__(self) -> Iterator[Batch]:
        """This worker's batches; after `load_state_dict` those that are left."""
        worker, n_workers = _worker()
        plan = self._plan(n_workers)
        if not self._goes_on:
            self._n_given = 0
        self._goes_on = False
        for step in range(worker + self._n_given * n_workers, plan.n_steps, n_workers):
            batch = self._batches[plan.batch(step)]
            self._n_given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where this worker's copy is, as JSON values."""
        return self._identity() | {"epoch": self._epoch, "n_given": self._n_given}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on there in the next iteration. Raises LoaderStateError for the state of another stream or worker."""
        for name, value in self._identity().items():
            if state_dict.get(name) != value:
                raise LoaderStateError(
                    f"the state has {name} {state_dict.get(name)!r:.80}, this stream {value!r:.80}: make stream and "
                    "loader as those that saved it were made, or go on with a TrainingLoader's state"
                )
        self._epoch, self._n_given = int(state_dict["epoch"]), int(state_dict["n_given"])
        self._goes_on = True

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

    def _plan(self, n_workers: int) -> EpochPlan:
        shares = Shares(
            n_ranks=self._n_ranks, n_workers=n_workers, batch_size=self._batch_size, drop_last=self._drop_last
        )
        return EpochPlan(self._order.rows(self._n_tokens_D, self._epoch), (), shares, self._rank)


def _worker() -> tuple[int, int]:
    """Which of how many workers this process is."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
