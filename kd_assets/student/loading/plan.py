"""What a training will be given of an epoch, and where it is: the plan that loaders follow, and the state they save."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from kd_assets.contract import decode
from kd_assets.errors import ContractError, LoaderStateError, RecipeError
from kd_assets.store.writing.documents import Int64Array
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets.student.loading.epoch import Deal, Segment, Shares, Shuffle, epoch_order, units_left
from kd_assets.student.loading.packing import Rows, first_fit, single

STATE_VERSION = 1

MAX_EPOCH = 2**63 - 1

RowsOfBatch = list[Int64Array]
"""The documents of each row of a batch, from left to right."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What decides the units of an epoch and their order, besides the documents."""

    seed: int
    shuffle: Shuffle
    pack_to: int | None
    """Tokens of a packed row; None: one document a row."""

    def __post_init__(self) -> None:
        if self.pack_to is not None and self.pack_to < 1:
            raise RecipeError(f"pack_to is {self.pack_to}: a row needs at least one token")

    def rows(self, n_tokens_D: Int64Array, epoch: int) -> Rows:
        """The units of an epoch, in order."""
        documents = epoch_order(n_tokens_D, shuffle=self.shuffle, seed=self.seed, epoch=epoch)
        return single(documents) if self.pack_to is None else first_fit(documents, n_tokens_D, length=self.pack_to)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoaderState:
    """How far a training is: the same on all ranks after equally many steps, and JSON.

    Raises RecipeError for an epoch or a number of steps that cannot be.
    """

    version: int
    documents_sha256: str
    order: Order
    epoch: int
    segments: tuple[Segment, ...]
    """The stretches of the epoch that have been given, one after the other, with the steps that every rank took."""

    def __post_init__(self) -> None:
        require_epoch(self.epoch)
        for segment in self.segments:
            if segment.n_steps < 0:
                raise RecipeError(f"n_steps is {segment.n_steps}: expected 0 or more")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"segments": [dataclasses.asdict(segment) for segment in self.segments]}

    @classmethod
    def of(cls, raw: Mapping[str, Any], *, order: Order, documents_sha256: str) -> LoaderState:
        """The state in `raw`. Raises LoaderStateError for one that is of other documents or another order."""
        if not isinstance(raw, Mapping) or raw.get("version") != STATE_VERSION:
            found = raw.get("version") if isinstance(raw, Mapping) else raw
            raise LoaderStateError(f"a loader's state has version {STATE_VERSION}, found {found!r:.80}")
        state = decoded_state(cls, raw, where="the loader's state")
        if state.order != order:
            raise LoaderStateError(
                f"the state is of {state.order}, the loader has {order}: make the loader as the one that saved it was "
                "made (batch size, ranks and workers may differ), or begin anew"
            )
        if state.documents_sha256 != documents_sha256:
            raise LoaderStateError(
                "the state is of other documents than the loader's (another recipe, partitions, max_length or caches): "
                "what was seen of them cannot be told; give the loader the same documents, or begin anew"
            )
        return state


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StreamState:
    """How far the copy of a stream in one worker is, and what its stream and loader are; JSON.

    Raises RecipeError for numbers that cannot be.
    """

    stream_version: int
    documents_sha256: str
    seed: int
    shuffle: Shuffle
    pack_to: int | None
    batch_size: int
    drop_last: bool
    n_ranks: int
    rank: int
    n_workers: int
    worker: int
    epoch: int
    n_given: int
    """Batches that this worker has given of the epoch."""

    def __post_init__(self) -> None:
        require_epoch(self.epoch)


T = TypeVar("T", LoaderState, StreamState)


def decoded_state(cls: type[T], raw: Mapping[str, Any], *, where: str) -> T:
    """What a training loop has saved, field by field. Raises LoaderStateError for what no loader has given to it."""
    try:
        return decode(cls, dict(raw), where=where)
    except (ContractError, RecipeError) as e:
        raise LoaderStateError(f"this is no state of a loader: {e}") from e


class EpochPlan:
    """The rest of an epoch for one rank, after what earlier stretches have given."""

    def __init__(self, rows: Rows, before: Sequence[Segment], shares: Shares, rank: int) -> None:
        self._rows, self._rank = rows, rank
        self._units = units_left(len(rows), before)
        self._deal = Deal(len(self._units), shares)

    @property
    def n_steps(self) -> int:
        """The same for every rank."""
        return self._deal.n_steps

    def batch(self, step: int) -> RowsOfBatch:
        return [self._rows.row(int(unit)) for unit in self._units[self._deal.batch(self._rank, step)]]


def documents_sha256(dataset: TeacherCacheDataset) -> str:
    """Of which documents in which order, by their ids, partitions and lengths. Of indexed ids only hashes are read."""
    digest = hashlib.sha256()
    for name, value in dataset.ids_sha256().items():
        digest.update(f"{name}:{value}\n".encode())
    digest.update(np.ascontiguousarray(dataset.n_tokens_D, dtype="<i8").tobytes())
    return digest.hexdigest()


def require_epoch(epoch: int) -> None:
    """Raise RecipeError for an epoch that cannot be."""
    if not 0 <= epoch <= MAX_EPOCH:
        raise RecipeError(f"epoch is {epoch}: expected 0 or more" + (" and below 2^63" if epoch > 0 else ""))


def merged(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Without stretches of no steps."""
    return tuple(segment for segment in segments if segment.n_steps)
