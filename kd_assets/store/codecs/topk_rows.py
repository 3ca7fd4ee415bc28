"""Rows of a top-k table, as both ways of the codec `compact` need them: where documents begin, and their targets.

Names: D = documents, M = their kept positions, k as in top-k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.store.arrays import arrow_numbers, flat
from kd_assets.store.codecs.draws_compact import SlotIds
from kd_assets.store.codecs.topk_compact import CodeError
from kd_assets.store.ragged_topk import is_kept
from kd_assets.store.writing.documents import Int64Array, offsets_of
from kd_assets.store.writing.encode import list_array, vector_array

NO_ID = np.iinfo(np.uint32).max
"""Behind what a position keeps: an id that none is."""
_ROWS = 2_048
"""Positions that are looked at together: what stays in a core's cache."""


def rows_array(values_Mk: npt.NDArray[Any], n_M: Int64Array | None) -> pa.Array:
    """Vectors of k, or lists of the first `n_M` of each row."""
    if n_M is None:
        return vector_array(values_Mk)
    return list_array(offsets_of(n_M), arrow_numbers(values_Mk[is_kept(n_M, values_Mk.shape[1])]))


def slots_of(ids_Mk: npt.NDArray[np.uint32], n_M: Int64Array | None) -> SlotIds:
    m, k = ids_Mk.shape
    if n_M is not None:
        return SlotIds(ids_S=ids_Mk[is_kept(n_M, k)], offsets=offsets_of(n_M))
    return SlotIds(ids_S=ids_Mk.reshape(-1), offsets=np.arange(m + 1, dtype=np.int64) * k)


def list_offsets(column: pa.ChunkedArray) -> Int64Array:
    """int64 [D + 1]: where each row's list begins among the elements of all, and the end."""
    lengths = [np.diff(flat(chunk.offsets)) for chunk in column.chunks if len(chunk)]
    return offsets_of(np.concatenate([np.zeros(0, np.int32), *lengths]).astype(np.int64))


def targets_of(table: pa.Table) -> npt.NDArray[np.uint32]:
    """uint32 [M]: the token that follows each kept position."""
    input_ids, offsets = flat(table["input_ids"]), list_offsets(table["input_ids"])
    if "positions" not in table.schema.names:
        if (np.diff(offsets) < 1).any():
            raise CodeError("a document has no tokens")
        is_next = np.ones(len(input_ids), np.bool_)
        is_next[offsets[:-1]] = False
        return input_ids[is_next]
    kept, lengths = flat(table["positions"]).astype(np.int64), np.diff(list_offsets(table["positions"]))
    if (kept >= np.repeat(np.diff(offsets) - 1, lengths)).any():
        raise CodeError("a position is beyond the end of its document")
    targets: npt.NDArray[np.uint32] = input_ids[np.repeat(offsets[:-1], lengths) + kept + 1]
    return targets


def targets_among(
    ids_Mk: npt.NDArray[np.uint32], targets_M: npt.NDArray[np.uint32]
) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """int64 [M]: where each row's target is among the ids of all rows, one row after the other; bool [M]: it is not
    among the k, and the other number is that of some slot."""
    m, k = ids_Mk.shape
    at_M = np.arange(0, m * k, k)
    for start in range(0, m, _ROWS):
        rows = slice(start, start + _ROWS)
        at_M[rows] += (ids_Mk[rows] == targets_M[rows, None]).argmax(axis=1)
    return at_M, ids_Mk.reshape(-1).take(at_M) != targets_M


def target_logprobs(
    logprobs_Mk: npt.NDArray[np.float16],
    at_target_M: Int64Array,
    is_outside_M: npt.NDArray[np.bool_],
    outside: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """float32 [M]: of a target among the k that of its slot, of the others those of `outside`, one after the other."""
    found_M: npt.NDArray[np.float32] = logprobs_Mk.reshape(-1).take(at_target_M).astype(np.float32)
    found_M[is_outside_M] = outside
    return found_M
