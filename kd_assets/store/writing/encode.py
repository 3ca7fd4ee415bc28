"""Arrays in, Arrow tables out, and what to remember about them. Never a Python list of numbers.

Shape suffixes as in `kd_assets.store.writing.documents`. Wrong shapes and dtypes are bugs of the caller: ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.store import schema as schemas
from kd_assets.store.arrays import arrow_numbers, flat
from kd_assets.store.codecs.half_floats import VALUES
from kd_assets.store.ragged_topk import is_kept, n_kept
from kd_assets.store.reading.columns import Ragged, column_of
from kd_assets.store.writing.documents import Documents, KeptPositions, offsets_of

FloatArray = npt.NDArray[np.float32]
_CHUNK = 1 << 17
"""Elements that statistics look at together: what stays in a core's cache."""

_SUMS_APART = 1e-3
"""More than the order of summation changes in a sum, relative to it."""

MAX_DRAWS = np.iinfo(np.uint16).max
"""Token ids drawn at a position: how often one came up is stored in 16 bits."""

_BFLOAT16_MAGNITUDE = np.uint16(0x7FFF)
_BFLOAT16_INFINITY = np.uint16(0x7F80)
"""Bits of bfloat16: with the sign dropped, the order of the bits is the order of the magnitudes; from infinity on
there are only infinity and NaN."""
_SIGN = 0x8000


def encode_shard(documents: Documents, sources: Sequence[str], source_records: npt.NDArray[np.int64]) -> pa.Table:
    """Documents as rows of a shard. Document i came from record `source_records[i]` (int64 [D]) of `sources[i]`."""
    _expect("source_records", source_records, np.int64, (documents.n_documents,))
    if len(sources) != documents.n_documents:
        raise ValueError(f"{len(sources)} sources for {documents.n_documents} documents")
    columns = [pa.array(sources, type=pa.string()), pa.array(source_records)]
    return _table(documents, columns, schemas.shard_schema())


def encode_topk(
    documents: Documents,
    *,
    topk_ids_Mk: npt.NDArray[np.uint32],
    topk_logprobs_Mk: npt.NDArray[np.float16],
    logsumexp_M: FloatArray | None,
    target_logprob_M: FloatArray,
    sampled_ids_Md: npt.NDArray[np.uint32] | None = None,
    outside_mass_M: FloatArray | None = None,
    positions: KeptPositions | None = None,
    top_p: float | None = None,
) -> pa.Table:
    """Top-k log-probabilities as rows of a cache: uint32 and float16 [M, k], float32 [M] and [M].

    `sampled_ids_Md` uint32 [M, d], of a cache with draws: the token ids drawn at each position, in any order.
    `outside_mass_M` float32 [M], of a cache that is cut to a student's vocabulary: the probability of all other ids.
    `positions`, of a cache that keeps some: which; M is then their number. Without `logsumexp_M` it has no such column.
    `top_p`: of a cache whose positions keep as many of these tokens as have this mass.
    """
    offsets = documents.offsets - np.arange(documents.n_documents + 1) if positions is None else positions.offsets
    _expect_positions(documents, positions, has_next=True)
    n_positions = int(offsets[-1])
    if topk_ids_Mk.ndim != 2 or topk_ids_Mk.shape[1] < 1:
        raise ValueError(f"topk_ids must be uint32 [M, k], found {list(topk_ids_Mk.shape)}")
    k = topk_ids_Mk.shape[1]
    _expect("topk_ids", topk_ids_Mk, np.uint32, (n_positions, k))
    _expect("topk_logprobs", topk_logprobs_Mk, np.float16, (n_positions, k))
    if logsumexp_M is not None:
        _expect("logsumexp", logsumexp_M, np.float32, (n_positions,))
    _expect("target_logprob", target_logprob_M, np.float32, (n_positions,))
    rows: list[pa.Array] = [vector_array(topk_ids_Mk), vector_array(topk_logprobs_Mk)]
    if top_p is not None:
        n_M = n_kept(topk_logprobs_Mk, top_p)
        rows = [list_array(offsets_of(n_M), pa.array(of[is_kept(n_M, k)])) for of in (topk_ids_Mk, topk_logprobs_Mk)]
    columns = [
        *(list_array(offsets, of_positions) for of_positions in rows),
        *([] if logsumexp_M is None else [list_array(offsets, pa.array(logsumexp_M))]),
        list_array(offsets, pa.array(target_logprob_M)),
    ]
    draws = 0
    if sampled_ids_Md is not None:
        if sampled_ids_Md.ndim != 2 or not 1 <= sampled_ids_Md.shape[1] <= MAX_DRAWS:
            found = list(sampled_ids_Md.shape)
            raise ValueError(f"sampled_ids must be uint32 [M, d] with d from 1 to {MAX_DRAWS}, found {found}")
        draws = sampled_ids_Md.shape[1]
        _expect("sampled_ids", sampled_ids_Md, np.uint32, (n_positions, draws))
        columns += [list_array(offsets, counted) for counted in _counted(sampled_ids_Md)]
    if outside_mass_M is not None:
        _expect("outside_mass", outside_mass_M, np.float32, (n_positions,))
        columns.append(list_array(offsets, pa.array(outside_mass_M)))
    if positions is not None:
        columns.append(list_array(offsets, pa.array(positions.positions_M)))
    schema = schemas.topk_schema(
        k,
        draws,
        is_cut=outside_mass_M is not None,
        positions=positions is not None,
        logsumexp=logsumexp_M is not None,
        top_p=top_p,
    )
    return _table(documents, columns, schema)


def encode_hidden_states(
    documents: Documents,
    hidden_by_state: Mapping[schemas.HiddenState, npt.NDArray[np.uint16]],
    positions: KeptPositions | None = None,
) -> pa.Table:
    """States as rows of a cache: of each decoder block, and of the decoder's end, the bits of bfloat16, uint16 [N, H].

    `positions`, of a cache that keeps some: which; N is then their number.
    """
    if not hidden_by_state:
        raise ValueError("no states to encode")
    hidden_size = next(iter(hidden_by_state.values())).shape[-1]
    offsets = documents.offsets if positions is None else positions.offsets
    _expect_positions(documents, positions, has_next=False)
    for state, hidden_NH in hidden_by_state.items():
        _expect(schemas.hidden_field(state), hidden_NH, np.uint16, (int(offsets[-1]), hidden_size))
    blocks = sorted(state for state in hidden_by_state if isinstance(state, int))
    final = [name for name in schemas.FINAL_CONVENTIONS if name in hidden_by_state]
    columns = [list_array(offsets, vector_array(hidden_by_state[state])) for state in (*blocks, *final)]
    if positions is not None:
        columns.append(list_array(offsets, pa.array(positions.positions_M)))
    schema = schemas.hidden_state_schema(blocks, hidden_size, final=final, positions=positions is not None)
    return _table(documents, columns, schema)


def encode_embeddings(documents: Documents, *, mean_DH: FloatArray, last_token_DH: FloatArray) -> pa.Table:
    """Pooled embeddings as rows of a cache: float32 [D, H] each."""
    hidden_size = mean_DH.shape[-1]
    _expect("mean_embedding", mean_DH, np.float32, (documents.n_documents, hidden_size))
    _expect("last_token_embedding", last_token_DH, np.float32, (documents.n_documents, hidden_size))
    return _table(
        documents, [vector_array(mean_DH), vector_array(last_token_DH)], schemas.embedding_schema(hidden_size)
    )


def part_stats(asset: str, table: pa.Table) -> dict[str, float]:
    """What the checks will ask of a part, taken while it is in memory. Keys start with n_, min_ or max_.

    Non-finite numbers are counted in `n_non_finite` and left out of the others, which are therefore always finite.
    """
    if asset == "topk_cache":
        return _topk_stats(table)
    if asset == "hidden_state_cache":
        return _bfloat16_stats([flat(table[n]) for n in table.schema.names if schemas.hidden_state_of(n) is not None])
    if asset == "embedding_cache":
        return _float_stats([flat(table[name]) for name in ("mean_embedding", "last_token_embedding")])
    return {}


def _topk_stats(table: pa.Table) -> dict[str, float]:
    stats = _ragged_stats(table) if schemas.is_ragged(table.schema) else _rows_stats(table)
    names = ("logsumexp", "target_logprob", "outside_mass")
    others = [flat(table[name]) for name in names if name in table.schema.names]
    stats["n_non_finite"] += sum(int(np.count_nonzero(~np.isfinite(values))) for values in others)
    if "sampled_ids" in table.schema.names:
        ids, counts = flat(table["sampled_ids"]), flat(table["sampled_counts"])
        stats |= {"n_sampled_ids": len(ids), "n_draws": int(counts.sum()), "max_sampled_id": int(ids.max(initial=0))}
    if "outside_mass" in table.schema.names:
        stats |= _outside_stats(flat(table["outside_mass"]))
    return {name: float(value) for name, value in stats.items()}


def _rows_stats(table: pa.Table) -> dict[str, float]:
    k = schemas.k_of(table.schema)
    logprobs_Mk = flat(table["topk_logprobs"]).reshape(-1, k)
    n_non_finite = 0
    max_sum, kept_mass, min_logprob, max_logprob = 0.0, 0.0, 0.0, -np.inf
    rows = max(1, _CHUNK // k)
    for start in range(0, len(logprobs_Mk), rows):
        chunk = VALUES.take(logprobs_Mk[start : start + rows].view(np.uint16))
        finite = np.isfinite(chunk)
        if not finite.all():
            n_non_finite += int(np.count_nonzero(~finite))
            chunk = np.where(finite, chunk, np.float32(-100))
            min_logprob = min(min_logprob, float(chunk.min(where=finite, initial=0)))
        else:
            min_logprob = min(min_logprob, float(chunk.min()))
        max_logprob = max(max_logprob, float(chunk.max()))
        # a logprob above 0 is wrong, and found so below; far above, its exponential must not become infinite
        probabilities = np.exp(np.minimum(chunk, 10, out=chunk), out=chunk)
        max_sum = max(max_sum, _largest_sum(probabilities))
        kept_mass += float(probabilities.sum(dtype=np.float64))
    stats: dict[str, float] = {
        "n_non_finite": n_non_finite,
        "n_positions": len(logprobs_Mk),
        "n_kept_mass": kept_mass,
        "max_probability_sum": max_sum,
    }
    if len(logprobs_Mk):
        stats |= {"min_logprob": min_logprob, "max_logprob": max_logprob}
    return stats


def _ragged_stats(table: pa.Table) -> dict[str, float]:
    """Of positions that keep different numbers of tokens: `n_kept_ids` besides, all of them together."""
    lists = column_of(table["topk_logprobs"]).values
    assert isinstance(lists, Ragged)
    logprobs, starts = lists.values.astype(np.float32), lists.offsets[:-1]
    finite = np.isfinite(logprobs)
    stats: dict[str, float] = {
        "n_non_finite": int(np.count_nonzero(~finite)),
        "n_positions": len(lists),
        "n_kept_ids": len(logprobs),
        "n_kept_mass": 0.0,
        "max_probability_sum": 0.0,
    }
    if len(lists):
        stats |= {"min_logprob": logprobs.min(where=finite, initial=0)}
        chunk = np.where(finite, logprobs, np.float32(-100))
        stats |= {"max_logprob": chunk.max()}
        # every position keeps a token: no run of these is empty
        probabilities = np.exp(np.minimum(chunk, 10))
        stats["max_probability_sum"] = np.add.reduceat(probabilities, starts).max()
        stats["n_kept_mass"] = probabilities.sum(dtype=np.float64)
    return stats


def _largest_sum(numbers_Mk: FloatArray) -> float:
    """Of a row. numpy's sum is slow over short rows: BLAS, which adds up in another order, tells which rows to ask."""
    nearly_M = numbers_Mk @ np.ones(numbers_Mk.shape[1], np.float32)
    return float(numbers_Mk[nearly_M >= nearly_M.max() * np.float32(1 - _SUMS_APART)].sum(axis=1).max())


def _outside_stats(mass_M: FloatArray) -> dict[str, float]:
    """The sum of masses over positions is how many tokens outside the teacher would give there on average."""
    finite_M = mass_M[np.isfinite(mass_M)]
    stats = {"n_expected_outside": float(finite_M.sum(dtype=np.float64))}
    if len(finite_M):
        stats |= {"min_outside_mass": float(finite_M.min()), "max_outside_mass": float(finite_M.max())}
    return stats


def _bfloat16_stats(columns: list[npt.NDArray[np.uint16]]) -> dict[str, float]:
    n_non_finite, largest = 0, 0
    for bits in columns:
        for start in range(0, len(bits), _CHUNK):
            chunk = bits[start : start + _CHUNK]
            # The largest positive number and the negative one that is furthest from 0: their bits in two orders.
            of_chunk = max(int(chunk.view(np.int16).max()), int(chunk.max()) - _SIGN)
            if of_chunk >= _BFLOAT16_INFINITY:
                magnitude = chunk & _BFLOAT16_MAGNITUDE
                finite = magnitude < _BFLOAT16_INFINITY
                n_non_finite += int(np.count_nonzero(~finite))
                of_chunk = int(magnitude[finite].max(initial=0))
            largest = max(largest, of_chunk)
    max_abs = np.array(largest << 16, dtype=np.uint32).view(np.float32)
    return {"n_non_finite": float(n_non_finite), "max_abs": float(max_abs)}


def _float_stats(columns: list[FloatArray]) -> dict[str, float]:
    n_non_finite, max_abs = 0, 0.0
    for values in columns:
        finite = np.isfinite(values)
        n_non_finite += int(np.count_nonzero(~finite))
        max_abs = max(max_abs, float(np.abs(values).max(where=finite, initial=0)))
    return {"n_non_finite": float(n_non_finite), "max_abs": max_abs}


def _counted(sampled_ids_Md: npt.NDArray[np.uint32]) -> tuple[pa.ListArray, pa.ListArray]:
    """The different ids of each row in ascending order, and how often each is there, as two arrays of M lists."""
    draws = sampled_ids_Md.shape[1]
    sorted_Md = np.sort(sampled_ids_Md, axis=1)
    is_first_Md = np.ones(sorted_Md.shape, dtype=np.bool_)
    np.not_equal(sorted_Md[:, 1:], sorted_Md[:, :-1], out=is_first_Md[:, 1:])
    # Every row starts with a first one, so the distance to the next first one is a count within the row.
    firsts = np.flatnonzero(is_first_Md)
    counts = np.diff(firsts, append=sorted_Md.size).astype(np.uint16)
    offsets = np.searchsorted(firsts, np.arange(len(sorted_Md) + 1) * draws).astype(np.int64)
    return list_array(offsets, pa.array(sorted_Md.reshape(-1)[firsts])), list_array(offsets, pa.array(counts))


def _table(documents: Documents, columns: Sequence[pa.Array], schema: pa.Schema) -> pa.Table:
    common = [
        pa.array(documents.document_ids, type=pa.string()),
        pa.array(documents.n_tokens_D.astype(np.int32)),
        list_array(documents.offsets, pa.array(documents.input_ids)),
        list_array(documents.offsets, pa.array(documents.loss_mask)),
    ]
    return pa.Table.from_arrays([*common, *columns], schema=schema)


def list_array(offsets: npt.NDArray[np.int64], values: pa.Array) -> pa.ListArray:
    """A list for each document: elements `offsets[i]` to `offsets[i + 1]`."""
    if int(offsets[-1]) > np.iinfo(np.int32).max:
        raise ValueError(f"{offsets[-1]} list elements in one part: more than 2^31 - 1, make parts smaller")
    starts = arrow_numbers(offsets.astype(np.int32))
    return pa.ListArray.from_arrays(starts, values, type=schemas.list_of(values.type))


def vector_array(values: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """A vector for each row of `values` [.., size]."""
    numbers = arrow_numbers(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(numbers, type=schemas.vector_of(numbers.type, values.shape[1]))


def _expect_positions(documents: Documents, positions: KeptPositions | None, *, has_next: bool) -> None:
    """`has_next`: whether a document's last position, which predicts nothing, cannot be among them."""
    if positions is None:
        return
    kept_M, counts_D = positions.positions_M, np.diff(positions.offsets)
    if positions.offsets.dtype != np.int64 or positions.offsets.shape != documents.offsets.shape:
        raise ValueError(f"offsets of positions must be int64 {list(documents.offsets.shape)}")
    _expect("positions", kept_M, np.uint32, (int(positions.offsets[-1]),))
    n_positions_D = documents.n_tokens_D - has_next
    if (kept_M >= np.repeat(n_positions_D, counts_D)).any():
        raise ValueError("a position is beyond the end of its document")
    goes_on = np.ones(len(kept_M), dtype=np.bool_)
    goes_on[positions.offsets[:-1][counts_D > 0]] = False  # the first of a document
    if (np.diff(kept_M.astype(np.int64)) <= 0)[goes_on[1:]].any():
        raise ValueError("positions of a document are not in ascending order, each once")


def _expect(name: str, array: npt.NDArray[Any], dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name} must be {np.dtype(dtype)} {list(shape)}, found {array.dtype} {list(array.shape)}")
