"""The loader that a training goes on with where it was: every document once an epoch, for any ranks and workers.

A plain torch DataLoader fetches and decodes in worker processes; the training process only knows the order (numbers)
and counts what it has been given. So the state is of what the training loop has seen, whatever the workers have ready.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from kd_assets.errors import LoaderStateError, RecipeError
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets.student.loading.batches import packed_batch, padded_batch
from kd_assets.student.loading.epoch import RUN_TOKENS, WINDOW_RUNS, Segment, Shares, Shuffle
from kd_assets.student.loading.packing import Rows
from kd_assets.student.loading.plan import (
    STATE_VERSION,
    EpochPlan,
    LoaderState,
    Order,
    RowsOfBatch,
    documents_sha256,
    merged,
    require_epoch,
)

Batch = dict[str, Any]

_DECODED_PER_STORED = 3
"""Bytes of decoded rows of a Parquet cache for each one on disk, rather too many."""


class TrainingLoader:
    """Batches of a data set, epoch after epoch; iterating gives what is left of the current epoch.

        loader = TrainingLoader(dataset, batch_size=8, pack_to=4096, num_workers=4)
        loader.load_state_dict(checkpoint["loader"])  # when a training goes on
        while loader.epoch < 3:
            for batch in loader:
                ...
                checkpoint["loader"] = loader.state_dict()

    Every document is in exactly one batch of one rank an epoch (but for what `drop_last` leaves out), in an order that
    follows from `seed` and the epoch. All ranks have the same number of steps, and their states are equal, so that of
    one is enough. A state may be loaded with another batch size and other numbers of ranks and workers; the documents,
    `seed`, `shuffle` and `pack_to` must be the same. An iteration that is left early goes on in the next one.
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
        num_workers: int = 1,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        rank: int | None = None,
        n_ranks: int | None = None,
    ) -> None:
        """`batch_size`: rows of a batch of one rank, documents, or with `pack_to` packed rows of so many tokens.

        `num_workers` processes decode, and hold `prefetch_factor` batches each; with 0 the training process does.
        `rank` and `n_ranks`: those of torch.distributed unless given. Raises RecipeError for numbers that cannot be,
        for documents longer than a packed row, and for fewer units than ranks.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = rank if rank is not None else torch.distributed.get_rank() if distributed else 0
        n_ranks = n_ranks if n_ranks is not None else torch.distributed.get_world_size() if distributed else 1
        if not 0 <= self._rank < n_ranks:
            raise RecipeError(f"rank is {self._rank}, of {n_ranks} ranks: expected 0 to {n_ranks - 1}")
        if num_workers < 0:
            raise RecipeError(f"num_workers is {num_workers}: expected 0 or more")
        self._shares = Shares(
            n_ranks=n_ranks, n_workers=max(1, num_workers), batch_size=batch_size, drop_last=drop_last
        )
        self._order = Order(seed=seed, shuffle=shuffle, pack_to=pack_to)
        self._dataset = dataset
        self._n_tokens_D = dataset.n_tokens_D
        self._documents_sha256 = documents_sha256(dataset)
        self._epoch, self._n_given = 0, 0
        self._planned: tuple[int, Rows] | None = None
        self._iterations = 0
        self._before: tuple[Segment, ...] = ()
        self._plan = self._new_plan()
        if shuffle == "windows":
            dataset.keep_decoded(tokens=RUN_TOKENS * WINDOW_RUNS, per_stored_byte=_DECODED_PER_STORED)
        self._steps = _Steps()
        self._loader: DataLoader[Batch] = DataLoader(
            BatchesOfRows(dataset, pack_to),
            batch_size=None,
            sampler=self._steps,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=prefetch_factor if num_workers else None,
            pin_memory=pin_memory,
        )

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration is of, from 0 on."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; nothing happens where the loader is within it already."""
        require_epoch(epoch)
        if epoch != self._epoch:
            self._go_to(epoch, ())

    def __len__(self) -> int:
        """Steps that are left of the current epoch."""
        return self._plan.n_steps - self._n_given

    def __iter__(self) -> Iterator[Batch]:
        """What is left of the current epoch; when it is through, the loader stands before the next one."""
        self._iterations += 1
        iteration = self._iterations
        self._steps.batches = _Left(self._plan, self._n_given)
        for batch in self._loader:
            if iteration != self._iterations:
                raise RuntimeError("the loader went elsewhere since this iteration began: take its new one")
            self._n_given += 1
            yield batch
        if iteration == self._iterations:
            self._go_to(self._epoch + 1, ())

    def state_dict(self) -> dict[str, Any]:
        """Where the training is, as JSON values: after the batch that was given last."""
        state = LoaderState(
            version=STATE_VERSION,
            documents_sha256=self._documents_sha256,
            order=self._order,
            epoch=self._epoch,
            segments=merged((*self._before, Segment(shares=self._shares, n_steps=self._n_given))),
        )
        return state.to_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the batch that was given last when the state was saved.

        Raises LoaderStateError for a state of other documents or another order, or that is none; the loader stays where
        it is then. Raises RecipeError where too few documents are left of the epoch for the ranks.
        """
        state = LoaderState.of(state_dict, order=self._order, documents_sha256=self._documents_sha256)
        self._go_to(state.epoch, state.segments)

    def _go_to(self, epoch: int, segments: tuple[Segment, ...]) -> None:
        self._iterations += 1
        *before, last = segments or (Segment(shares=self._shares, n_steps=0),)
        if last.shares != self._shares:
            before, last = [*before, last], Segment(shares=self._shares, n_steps=0)
        was = self._epoch, self._before, self._n_given
        self._epoch, self._before, self._n_given = epoch, tuple(before), last.n_steps
        try:
            self._plan = self._new_plan()
            if self._n_given > self._plan.n_steps:
                raise LoaderStateError(
                    f"the state is after {self._n_given} steps, this stretch has {self._plan.n_steps}: it was changed"
                )
        except BaseException:
            self._epoch, self._before, self._n_given = was
            raise
        if segments and self._n_given == self._plan.n_steps:
            self._go_to(epoch + 1, ())

    def _new_plan(self) -> EpochPlan:
        if self._planned is None or self._planned[0] != self._epoch:
            self._planned = self._epoch, self._order.rows(self._n_tokens_D, self._epoch)
        return EpochPlan(self._planned[1], self._before, self._shares, self._rank)


class BatchesOfRows(Dataset[Batch]):
    """Map-style: an index is the documents of each row of a batch, an item is the batch."""

    def __init__(self, dataset: TeacherCacheDataset, pack_to: int | None) -> None:
        self._dataset, self._pack_to = dataset, pack_to

    def __getitem__(self, rows: RowsOfBatch) -> Batch:
        documents = iter(self._dataset.documents([int(i) for row in rows for i in row]))
        if self._pack_to is None:
            return padded_batch(list(documents))
        return packed_batch([[next(documents) for _ in row] for row in rows], self._pack_to)


class _Left:
    """The batches of a plan from a step on."""

    def __init__(self, plan: EpochPlan, first_step: int) -> None:
        self._plan, self._first_step = plan, first_step

    def __len__(self) -> int:
        return self._plan.n_steps - self._first_step

    def __iter__(self) -> Iterator[RowsOfBatch]:
        return map(self._plan.batch, range(self._first_step, self._plan.n_steps))


class _Steps(Sampler[RowsOfBatch]):
    """What the DataLoader hands to its workers: another stretch at each iteration, by the same workers."""

    batches: _Left

    def __init__(self) -> None:
        """Nothing yet."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[RowsOfBatch]:
        return iter(self.batches)


def _as_it_is(batch: Any) -> Any:
    return batch
