"""Top-k lists of different lengths: how many tokens a position keeps, and the same numbers in rows of one length.

Used by the store, the teacher, students and whatever needs rows of k. Names: M = positions, S = their kept tokens, k =
the most that one keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.store.reading.columns import Ragged

Int64Array = npt.NDArray[np.int64]
MASS_ATOL = 1e-9
"""What another order of summation in float64 may change in a mass."""


def n_kept(logprobs_Mk: npt.NDArray[np.float16], top_p: float) -> Int64Array:
    """int64 [M]: the fewest of a row's first tokens whose probabilities, as float16 has them, add up to `top_p` or more
    in float64; all where they do not."""
    mass_Mk = np.exp(logprobs_Mk.astype(np.float64)).cumsum(axis=1)
    found: Int64Array = 1 + (mass_Mk[:, :-1] < top_p).sum(axis=1, dtype=np.int64)
    return found


def is_kept(n_M: npt.NDArray[np.integer[Any]], k: int) -> npt.NDArray[np.bool_]:
    """bool [M, k]: the first n of each row."""
    kept_Mk: npt.NDArray[np.bool_] = np.arange(k) < n_M[:, None]
    return kept_Mk


def fixed_ids(ids: Ragged, k: int, fill: int | None = None) -> npt.NDArray[np.uint32]:
    """uint32 [M, k]: behind those that are kept `fill`, or the most likely one again."""
    first_M = ids.values[ids.offsets[:-1]] if fill is None and len(ids) else np.full(len(ids), fill or 0, np.uint32)
    rows_Mk = np.repeat(first_M[:, None], k, axis=1)
    rows_Mk[is_kept(ids.lengths, k)] = ids.values
    return rows_Mk


def fixed_logprobs(logprobs: Ragged, k: int) -> npt.NDArray[np.float16]:
    """float16 [M, k]: behind those that are kept -inf, the logarithm of no probability."""
    rows_Mk = np.full((len(logprobs), k), -np.inf, np.float16)
    rows_Mk[is_kept(logprobs.lengths, k)] = logprobs.values
    return rows_Mk


def with_rows_of_k(document: Mapping[str, Any], k: int, fill: int | None = None) -> dict[str, Any]:
    """A document of a reader with `topk_ids` and `topk_logprobs` as [M, k], as `fixed_ids` and `fixed_logprobs` give
    them; one whose rows have one length as it is."""
    changed = dict(document)
    if isinstance(ids := document.get("topk_ids"), Ragged):
        changed["topk_ids"] = fixed_ids(ids, k, fill)
    if isinstance(logprobs := document.get("topk_logprobs"), Ragged):
        changed["topk_logprobs"] = fixed_logprobs(logprobs, k)
    return changed


def mean_kept_mass(parts: Iterable[Mapping[str, float]]) -> float | None:
    """What a position's kept probabilities add up to on average, by the statistics of parts; of those that have it, as
    parts of earlier versions do not, and None where none has."""
    known = [stats for stats in parts if "n_kept_mass" in stats]
    n_positions = sum(stats["n_positions"] for stats in known)
    return sum(stats["n_kept_mass"] for stats in known) / n_positions if n_positions else None


def mean_kept_tokens(stats: Mapping[str, float]) -> float | None:
    """How many tokens a position keeps on average, by the statistics of a cache; None where all keep k."""
    if "n_kept_ids" not in stats or not stats.get("n_positions"):
        return None
    return stats["n_kept_ids"] / stats["n_positions"]


def mass_difference(logprobs: Ragged, k: int, top_p: float) -> str | None:
    """What is wrong with how many tokens each position keeps of a cache that is not coded, in words; None when all is
    well."""
    n_M = logprobs.lengths
    if not len(n_M):
        return None
    if not 1 <= n_M.min() <= n_M.max() <= k:
        return f"a position keeps {n_M.min() if n_M.min() < 1 else n_M.max()} tokens, and it must be 1 to {k}"
    with np.errstate(over="ignore"):
        p_S = np.exp(logprobs.values.astype(np.float64))
    if (slot := np.flatnonzero(~(np.isfinite(logprobs.values) & np.isfinite(p_S)))).size:
        found = logprobs.values[slot[0]]
        return f"a position keeps a token of log-probability {found}, which is no probability's"
    mass_M = np.add.reduceat(p_S, logprobs.offsets[:-1])  # each by itself: none is empty
    before_M = mass_M - p_S[logprobs.offsets[1:] - 1]
    if (row := np.flatnonzero((mass_M < top_p - MASS_ATOL) & (n_M < k))).size:
        return f"a position keeps {n_M[row[0]]} tokens of a mass of {mass_M[row[0]]:.6f}: below top_p, {top_p}"
    if (row := np.flatnonzero((before_M >= top_p + MASS_ATOL) & (n_M > 1))).size:
        return f"a position keeps {n_M[row[0]]} tokens, and fewer have a mass of top_p, {top_p}"
    return None
