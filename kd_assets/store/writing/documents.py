"""Documents in memory: a run of them as flat arrays with offsets, and how they are cut into parts.

Legend of shape suffixes, used throughout the store: D documents, N tokens of all documents, M = N - D predicted
positions (position i of a document predicts token i + 1, so the last token has none), H hidden size, k of top-k,
d random draws of a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Uint32Array = npt.NDArray[np.uint32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Documents:
    """Consecutive documents of a shard, each with at least one token."""

    document_ids: Sequence[str]
    offsets: Int64Array
    """int64 [D + 1]: document i has the tokens `offsets[i]:offsets[i + 1]`; starts at 0, ends at N."""
    input_ids: Uint32Array
    """uint32 [N]."""
    loss_mask: BoolArray
    """bool [N]: which tokens a student is trained to predict."""

    def __post_init__(self) -> None:
        n_documents, n_tokens = len(self.document_ids), len(self.input_ids)
        if self.offsets.dtype != np.int64 or self.offsets.shape != (n_documents + 1,):
            raise ValueError(
                f"offsets must be int64 [{n_documents + 1}], found {self.offsets.dtype} {list(self.offsets.shape)}"
            )
        if self.input_ids.dtype != np.uint32 or self.input_ids.ndim != 1:
            raise ValueError(f"input_ids must be uint32 [N], found {self.input_ids.dtype}")
        if self.loss_mask.dtype != np.bool_ or self.loss_mask.shape != (n_tokens,):
            raise ValueError(f"loss_mask must be bool [{n_tokens}], found {self.loss_mask.dtype}")
        if self.offsets[0] != 0 or self.offsets[-1] != n_tokens:
            raise ValueError(f"offsets must run from 0 to {n_tokens}, found {self.offsets[0]} to {self.offsets[-1]}")
        if n_documents and int(np.diff(self.offsets).min()) < 1:
            empty = int(np.diff(self.offsets).argmin())
            raise ValueError(f"document {self.document_ids[empty]!r} has no tokens: keep it out of the store")

    @property
    def n_documents(self) -> int:
        return len(self.document_ids)

    @property
    def n_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def n_tokens_D(self) -> Int64Array:
        """int64 [D]."""
        return np.diff(self.offsets)

    def slice(self, first: int, n: int, max_length: int | None = None) -> Documents:
        """Documents `first` to `first + n - 1`, each cut to its first `max_length` tokens.

        Without a cut the arrays are views of these.
        """
        if first < 0 or n < 0 or first + n > self.n_documents:
            raise ValueError(f"documents {first} to {first + n - 1} of {self.n_documents}")
        start, stop = int(self.offsets[first]), int(self.offsets[first + n])
        offsets = self.offsets[first : first + n + 1] - start
        input_ids, loss_mask = self.input_ids[start:stop], self.loss_mask[start:stop]
        lengths = np.diff(offsets)
        if max_length is not None and n and int(lengths.max()) > max_length:
            if max_length < 1:
                raise ValueError(f"max_length must be at least 1, found {max_length}")
            kept = np.arange(stop - start) - np.repeat(offsets[:-1], lengths) < max_length
            input_ids, loss_mask = input_ids[kept], loss_mask[kept]
            offsets = offsets_of(np.minimum(lengths, max_length))
        return Documents(
            document_ids=self.document_ids[first : first + n], offsets=offsets, input_ids=input_ids, loss_mask=loss_mask
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptPositions:
    """Which positions of consecutive documents a cache keeps."""

    offsets: Int64Array
    """int64 [D + 1]: those of document i are `positions_M[offsets[i]:offsets[i + 1]]`."""
    positions_M: Uint32Array
    """uint32 [M], ascending in each document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartPlan:
    """The run of documents that one part file holds."""

    index: int
    first_document: int
    n_documents: int


def plan_parts(n_tokens: npt.NDArray[np.integer], *, max_documents: int, max_tokens: int) -> tuple[PartPlan, ...]:
    """Cut documents of these lengths, in order, into the fewest greedy parts within both limits.

    Every document is in exactly one part; one that is longer than `max_tokens` is a part of its own. Depends on
    nothing but its arguments, so every attempt of a task plans alike.
    """
    if max_documents < 1 or max_tokens < 1:
        raise ValueError(f"max_documents {max_documents} and max_tokens {max_tokens} must be at least 1")
    plans: list[PartPlan] = []
    first = tokens = 0
    for i, length in enumerate(n_tokens.tolist()):
        if i > first and (i - first == max_documents or tokens + length > max_tokens):
            plans.append(PartPlan(index=len(plans), first_document=first, n_documents=i - first))
            first, tokens = i, 0
        tokens += length
    if len(n_tokens) > first:
        plans.append(PartPlan(index=len(plans), first_document=first, n_documents=len(n_tokens) - first))
    return tuple(plans)


def offsets_of(lengths: npt.NDArray[np.integer]) -> Int64Array:
    """int64 [D + 1]: where each of D consecutive runs starts, and the end."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
