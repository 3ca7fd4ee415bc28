"""Which documents run together: batches under a token budget, sorted by length within a window.

Used by `kd_assets.teacher` only; numpy, no torch. Names: D = documents of a window, B = documents of a batch,
T = its width (tokens of its longest document, rounded up), N = real tokens, W = tokens of the window.

The invariant: a batch depends on the lengths in its window and on the token budget, on nothing else. Not on which
caches are wanted, nor on what an earlier attempt left behind: a matrix product may round differently in another shape,
so only equal batches give equal bytes after an interruption.

Widths lie on a geometric grid (see `rounded_up`), so that the shapes of a pass are few: allocated memory fits again,
and the libraries' choice of kernels is made once. The padding this adds takes part in choosing the batches.

Padding is on the right, without an attention mask. That is exact for a causal model: position i attends to positions
<= i only, and right of a document's last token there is nothing but padding, whose own rows are never read. It also
keeps attention on its fastest path, since a mask of any kind would rule out the `is_causal` kernels. (Proved for each
teacher on loading, see `anatomy.prove_causal`.)
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kd_assets.contract import TeacherParams

Int64Array = npt.NDArray[np.int64]

BATCH_OVERHEAD_TOKENS = 64
"""What starting one more batch costs, in tokens of work: reading all weights once more, and its launches. Measured
between 20 (CPU) and 100 (an 8B model on an H200); it only weighs fewer batches against less padding."""

WIDTH_BITS = 6
"""Leading binary digits, after the first, that a width keeps: 64 widths between a power of two and the next, so a
document grows by less than 1/64 (0.8 % on average, less where the planner can cut at a width of the grid), and all
widths from 512 on are multiples of 8."""

PAD_ID = 0
"""What fills a row after its document: any id the embedding table has, since nothing ever attends to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Documents that run together, longest first."""

    documents_B: Int64Array
    """int64: indexes of documents in the window."""
    lengths_B: Int64Array
    """int64: tokens of each that run."""
    width: int
    """T: tokens of the longest document, rounded up to the grid of widths."""

    @property
    def n_tokens(self) -> int:
        """N: real tokens."""
        return int(self.lengths_B.sum())

    @property
    def n_padded_tokens(self) -> int:
        """B x T: what the model computes."""
        return self.width * len(self.lengths_B)


def longest(params: TeacherParams) -> int:
    """The largest `max_length` of the recipe's caches: tokens of a document that run, whatever is selected."""
    caches = (params.topk, params.hidden_states, params.embeddings)
    return max(cache.max_length for cache in caches if cache is not None)


def plan_batches(
    lengths_D: Int64Array, *, token_budget: int, alone_above: int | None = None, limits: Collection[int] = ()
) -> tuple[Batch, ...]:
    """Batches of at most `token_budget` tokens, padding included, with the least padding; every document in one.

    A document longer than the budget is a batch of its own (nothing is ever cut here), and so is one of more than
    `alone_above` tokens, for a teacher whose numbers depend on the longest of the batch. No width is rounded up over
    one of `limits`: lengths where the teacher begins to behave otherwise, or where many documents were cut.

    Documents are sorted by length (longest first, so that running out of memory shows at once; ties in document order),
    and the sorted sequence is cut where the sum over batches of B x T + `BATCH_OVERHEAD_TOKENS` is smallest: the
    shortest path from 0 to D, where a step i → j is a batch of documents i..j-1.
    """
    order_D = np.argsort(-lengths_D, kind="stable")
    sorted_D = lengths_D[order_D].astype(np.int64)
    stops = {token_budget, *limits} | ({alone_above} if alone_above is not None else set())
    widths_D = rounded_up(sorted_D, stops)
    n_alone = 0 if alone_above is None else int((sorted_D > alone_above).sum())
    cuts = [*range(n_alone), *(n_alone + cut for cut in _cheapest_cuts(widths_D[n_alone:], token_budget))]
    return tuple(
        Batch(documents_B=order_D[first:end], lengths_B=sorted_D[first:end], width=int(widths_D[first]))
        for first, end in itertools.pairwise(cuts)
    )


def rounded_up(lengths_D: Int64Array, stops: Collection[int] = ()) -> Int64Array:
    """int64 [D]: the next width of the grid, or the next of `stops` where that is nearer.

    The grid has every number below 2 x 2^`WIDTH_BITS`, then every second up to twice that, then every fourth, ...
    """
    at_least_1_D = np.maximum(lengths_D, 1)
    steps_D = 1 << np.maximum(np.frexp(at_least_1_D)[1].astype(np.int64) - 1 - WIDTH_BITS, 0)
    widths_D: Int64Array = -(-at_least_1_D // steps_D) * steps_D
    for stop in stops:
        widths_D = np.where(at_least_1_D <= stop, np.minimum(widths_D, stop), widths_D)
    return widths_D


def _cheapest_cuts(widths_D: Int64Array, token_budget: int) -> list[int]:
    """Ends of the batches of a descending sequence, from 0 to D, by dynamic programming from the back."""
    n = len(widths_D)
    cost = np.zeros(n + 1, dtype=np.int64)  # cost[i]: cheapest way to batch documents i..D-1
    end = np.zeros(n, dtype=np.int64)  # end[i]: where the first of those batches ends
    for i in range(n - 1, -1, -1):
        width = int(widths_D[i])
        most = max(1, min(n - i, token_budget // width))
        sizes = np.arange(1, most + 1)
        costs = sizes * width + BATCH_OVERHEAD_TOKENS + cost[i + 1 : i + 1 + most]
        best = int(costs.argmin())
        cost[i], end[i] = costs[best], i + 1 + best
    cuts = [0]
    while cuts[-1] < n:
        cuts.append(int(end[cuts[-1]]))
    return cuts


def concatenated_ranges(starts_B: Int64Array, lengths_B: Int64Array) -> Int64Array:
    """int64 [sum of lengths]: start, start + 1, ... of each range in turn, without a loop over ranges."""
    ends_B = np.cumsum(lengths_B)
    n = int(ends_B[-1]) if len(ends_B) else 0
    ranges: Int64Array = np.arange(n, dtype=np.int64) + np.repeat(starts_B - (ends_B - lengths_B), lengths_B)
    return ranges


def padded_ids(input_ids_W: npt.NDArray[np.uint32], offsets: Int64Array, batch: Batch) -> Int64Array:
    """int64 [B, T]: the batch's documents out of the window's tokens, each padded on the right with `PAD_ID`.

    `offsets` int64 [D + 1]: where the window's documents begin in `input_ids_W`.
    """
    ids_BT = np.full((len(batch.documents_B), batch.width), PAD_ID, dtype=np.int64)
    rows_N = concatenated_ranges(offsets[batch.documents_B], batch.lengths_B)
    ids_BT.reshape(-1)[batch_rows(batch, batch.lengths_B)] = input_ids_W[rows_N]
    return ids_BT


def batch_rows(batch: Batch, lengths_B: Int64Array) -> Int64Array:
    """int64 [sum of lengths]: positions, in the flattened [B x T], of the first `lengths_B` tokens of each document."""
    starts_B = np.arange(len(lengths_B), dtype=np.int64) * batch.width
    return concatenated_ranges(starts_B, lengths_B)
