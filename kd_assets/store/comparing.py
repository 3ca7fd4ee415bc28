"""How far apart two caches of the same documents are: two variants of a recipe's asset, or those of two recipes.

Documents are joined by partition and id, and compared where both caches have the same tokens; what only one of them
has, or has of other tokens, is counted and named. One pair of documents is in memory at a time.

Of top-k caches the numbers are of one distribution a position: the ids that both kept, and one bucket for all others
(whose mass is known, as log-probabilities are against the full vocabulary, or the one that a cache is cut to). KL over
that is a lower bound of the KL of the whole distributions (log-sum inequality), and exact where both kept every id.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.errors import VariantConflictError
from kd_assets.store.ragged_topk import fixed_logprobs, is_kept
from kd_assets.store.reading.columns import Ragged
from kd_assets.store.reading.reader import CacheReader
from kd_assets.store.schema import hidden_state_of

Float64Array = npt.NDArray[np.float64]
Document = Mapping[str, Any]

SMALLEST_MASS = 1e-6
"""Of the bucket: float16 rounding can leave less than nothing."""


@dataclass(kw_only=True, slots=True)
class Measure:
    """One number a position (or document), over all that were compared."""

    n: int = 0
    total: float = 0.0
    largest: float = 0.0
    n_not_finite: int = 0

    def add(self, values: Float64Array) -> None:
        finite = np.isfinite(values)
        self.n_not_finite += int(values.size - np.count_nonzero(finite))
        values = values[finite]
        self.n += values.size
        self.total += float(values.sum())
        self.largest = max(self.largest, float(values.max(initial=0.0)))

    @property
    def mean(self) -> float | None:
        return self.total / self.n if self.n else None


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class DocumentDifference:
    """A document, and the mean over its positions of the number that documents are ordered by."""

    difference: float
    partition_key: str
    document_id: str
    numbers: dict[str, float] = field(compare=False)


@dataclass(kw_only=True, slots=True)
class Comparison:
    """What two caches of one asset differ by."""

    asset: str
    variants: tuple[str, str]
    n_documents: int = 0
    """That were compared."""
    n_positions: int = 0
    only_in_first: list[tuple[str, str]] = field(default_factory=list)
    """(partition key, document id) of documents that the second does not have; and so on."""
    only_in_second: list[tuple[str, str]] = field(default_factory=list)
    other_tokens: list[tuple[str, str]] = field(default_factory=list)
    """Of other tokens in one than in the other, or in other numbers: cut at another length."""
    measures: dict[str, Measure] = field(default_factory=dict)
    worst: list[DocumentDifference] = field(default_factory=list)
    """Largest first; without those that do not differ."""
    ordered_by: str = ""
    """The measure that says which documents are the worst."""

    def add(self, values: Mapping[str, Float64Array]) -> None:
        for name, of_document in values.items():
            self.measures.setdefault(name, Measure()).add(of_document)


def compare(
    first: CacheReader, second: CacheReader, *, n_worst: int = 5, progress: Callable[[int, int], None] | None = None
) -> Comparison:
    """Compare all documents of two readers. `progress` is called with documents done and to do.

    Raises VariantConflictError for readers of different assets, and for hidden states without a block in common.
    """
    if first.asset != second.asset:
        raise VariantConflictError(f"{first.asset} cannot be compared with {second.asset}: name two of one asset")
    numbers_of, ordered_by = _numbers_of(first, second)
    found = Comparison(asset=first.asset, variants=(first.variant, second.variant), ordered_by=ordered_by)
    rows = {key: row for row, key in enumerate(second.keys())}
    keys = first.keys()
    worst: list[DocumentDifference] = []
    for row, key in enumerate(keys):
        if progress is not None:
            progress(row, len(keys))
        other_row = rows.pop(key, None)
        if other_row is None:
            found.only_in_first.append(key)
            continue
        one, other = first[row], second[other_row]
        if not np.array_equal(one["input_ids"], other["input_ids"]):
            found.other_tokens.append(key)
            continue
        numbers = numbers_of(one, other)
        found.n_documents += 1
        found.n_positions += max((len(values) for values in numbers.values()), default=0)
        found.add(numbers)
        means = {name: float(values.mean()) for name, values in numbers.items() if len(values)}
        apart = means.get(ordered_by, 0.0)
        if n_worst and apart != 0:
            difference = DocumentDifference(
                difference=apart if np.isfinite(apart) else float("inf"),
                partition_key=key[0],
                document_id=key[1],
                numbers=means,
            )
            (heapq.heappush if len(worst) < n_worst else heapq.heappushpop)(worst, difference)
    found.only_in_second = list(rows)
    found.worst = sorted(worst, reverse=True)
    return found


NumbersOf = Callable[[Document, Document], dict[str, Float64Array]]


def _numbers_of(first: CacheReader, second: CacheReader) -> tuple[NumbersOf, str]:
    """What is compared of two documents, and the measure that orders them."""
    if first.asset == "topk_cache":
        return topk_numbers, "kl"
    if first.asset == "hidden_state_cache":
        states = [name for name in first.fields if hidden_state_of(name) is not None and name in second.fields]
        if not states:
            raise VariantConflictError(
                f"{first.folders[0]} has {', '.join(first.fields)}, and {second.folders[0]} has "
                f"{', '.join(second.fields)}: there is no state that both have"
            )
        return lambda one, other: state_numbers(one, other, states), f"distance {states[-1]}"
    if first.asset == "embedding_cache":
        return embedding_numbers, "distance mean_embedding"
    raise VariantConflictError(f"{first.asset} has no numbers that could be compared: name a cache")


def topk_numbers(one: Document, other: Document) -> dict[str, Float64Array]:
    """`kl` (of the first from the second, in nats), `top1_differs` (0 or 1), `ids_differ` (share of the smaller k), and
    the differences of log-probabilities of ids that both kept, of the target's and, where both have it, of logsumexp:
    float64 a position."""
    (one, n_M), (other, other_n_M) = _fixed_rows(one, -1), _fixed_rows(other, -2)
    rows, other_rows = _common_rows(one, other, len(one["topk_ids"]), len(other["topk_ids"]))
    smaller_M = np.minimum(n_M[rows], other_n_M[other_rows])
    ids, other_ids = one["topk_ids"][rows].astype(np.int64), other["topk_ids"][other_rows].astype(np.int64)
    logprobs = one["topk_logprobs"][rows].astype(np.float64)
    other_logprobs = other["topk_logprobs"][other_rows].astype(np.float64)
    in_both_Mk, at_Mk = _where_in(ids, other_ids)
    other_at_Mk = np.take_along_axis(other_logprobs, at_Mk, axis=1)
    differences = np.abs(np.where(in_both_Mk, logprobs - other_at_Mk, 0.0))
    return {
        "kl": _bucketed_kl(logprobs, other_at_Mk, in_both_Mk),
        "top1_differs": (ids[:, 0] != other_ids[:, 0]).astype(np.float64),
        "ids_differ": 1.0 - in_both_Mk.sum(axis=1) / np.maximum(smaller_M, 1),
        "logprob": differences.max(axis=1, initial=0.0),
        **{
            name: _apart(one[name][rows], other[name][other_rows])
            for name in ("target_logprob", "logsumexp")
            if name in one and name in other
        },
    }


def _fixed_rows(document: Document, no_id: int) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """The document with rows of one length, `no_id` and -inf behind what a position keeps, and how many each keeps."""
    ids, logprobs = document["topk_ids"], document["topk_logprobs"]
    if not isinstance(ids, Ragged):
        return dict(document), np.full(len(ids), ids.shape[1], dtype=np.int64)
    k = int(ids.lengths.max(initial=1))
    wide_Mk = np.full((len(ids), k), no_id, dtype=np.int64)
    wide_Mk[is_kept(ids.lengths, k)] = ids.values
    fixed = {**document, "topk_ids": wide_Mk, "topk_logprobs": fixed_logprobs(logprobs, k)}
    return fixed, ids.lengths.astype(np.int64)


def state_numbers(one: Document, other: Document, states: list[str]) -> dict[str, Float64Array]:
    """Of each state `cosine` and `distance` (of the difference over the first's norm): float64 a token."""
    numbers: dict[str, Float64Array] = {}
    for name in states:
        rows, other_rows = _common_rows(one, other, len(one[name]), len(other[name]))
        numbers |= _vector_numbers(name, _bfloat16(one[name][rows]), _bfloat16(other[name][other_rows]))
    return numbers


def embedding_numbers(one: Document, other: Document) -> dict[str, Float64Array]:
    """The same of both embeddings, one number a document."""
    numbers: dict[str, Float64Array] = {}
    for name in ("mean_embedding", "last_token_embedding"):
        vectors = (document[name][None, :].astype(np.float64) for document in (one, other))
        numbers |= _vector_numbers(name, *vectors)
    return numbers


def _vector_numbers(name: str, one: Float64Array, other: Float64Array) -> dict[str, Float64Array]:
    norm, other_norm = np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)
    apart = np.linalg.norm(one - other, axis=1)
    both_zero = (norm == 0) & (other_norm == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.where(both_zero, 1.0, (one * other).sum(axis=1) / (norm * other_norm))
        distance = np.where(apart == 0, 0.0, apart / norm)
    return {f"cosine {name}": cosine, f"distance {name}": distance}


def _common_rows(
    one: Document, other: Document, n_rows: int, n_other_rows: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where in each cache the positions are that both kept."""
    positions, other_positions = _positions(one, n_rows), _positions(other, n_other_rows)
    _, rows, other_rows = np.intersect1d(positions, other_positions, assume_unique=True, return_indices=True)
    return rows, other_rows


def _positions(document: Document, n_rows: int) -> npt.NDArray[np.int64]:
    kept = document.get("positions")
    return np.arange(n_rows) if kept is None else np.asarray(kept, dtype=np.int64)


def _where_in(
    ids_Mk: npt.NDArray[np.int64], other_Mj: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Which ids of each row are in the same row of the other, and where there (0 for those that are not)."""
    order_Mj = np.argsort(other_Mj, axis=1)
    rows_M1 = np.arange(len(ids_Mk))[:, None] << 32  # ids are 32 bits: rows do not mix
    sorted_flat = (np.take_along_axis(other_Mj, order_Mj, axis=1) + rows_M1).reshape(-1)
    wanted_flat = (ids_Mk + rows_M1).reshape(-1)
    at = np.minimum(np.searchsorted(sorted_flat, wanted_flat), max(0, len(sorted_flat) - 1))
    in_both = sorted_flat[at] == wanted_flat if len(sorted_flat) else np.zeros(len(wanted_flat), dtype=np.bool_)
    where = np.where(in_both, order_Mj.reshape(-1)[at] if len(sorted_flat) else 0, 0)
    return in_both.reshape(ids_Mk.shape), where.reshape(ids_Mk.shape)


def _bucketed_kl(logprobs_Mk: Float64Array, other_Mk: Float64Array, in_both_Mk: npt.NDArray[np.bool_]) -> Float64Array:
    """float64 [M]: Σ p (log p - log q) over the ids that both kept and the bucket of all others."""
    p = np.where(in_both_Mk, np.exp(logprobs_Mk), 0.0)
    q = np.where(in_both_Mk, np.exp(other_Mk), 0.0)
    kept = (p * np.where(in_both_Mk, logprobs_Mk - other_Mk, 0.0)).sum(axis=1)
    rest_p, rest_q = (np.maximum(1.0 - mass.sum(axis=1), SMALLEST_MASS) for mass in (p, q))
    kl: Float64Array = kept + rest_p * (np.log(rest_p) - np.log(rest_q))
    return np.maximum(kl, 0.0)


def _apart(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> Float64Array:
    difference: Float64Array = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return difference


def _bfloat16(bits: npt.NDArray[np.uint16]) -> Float64Array:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def named(keys: list[tuple[str, str]], n: int = 3) -> Iterator[str]:
    """The first few documents, by name."""
    for partition_key, document_id in keys[:n]:
        yield f"{document_id!r} of {partition_key}"
    if len(keys) > n:
        yield f"{len(keys) - n:,} more"
