"""A joined document as named arrays: for formats that keep all of the cache's own fields under its own names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.export.columns import CachesOfRecipe, Dimension
from kd_assets.export.documents import Int64Array, JoinedDocument
from kd_assets.store import Ragged
from kd_assets.store.schema import HiddenState, hidden_field


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Field:
    """One array of a document."""

    name: str
    values: npt.NDArray[Any]
    dtype: str
    """numpy's name of it, or bfloat16, whose values are its bits in uint16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldColumn:
    """A field of every document, before there is one."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


def fields_of(document: JoinedDocument, *, learned_only: bool = False) -> Iterator[Field]:
    """The document's arrays under the cache's names, in a fixed order; L tokens, M predictions, N states.

    `input_ids` uint32 [L], `loss_mask` bool [L]; `topk_ids` uint32 and `topk_logprobs` float16 [M, k], `logsumexp`
    (unless the cache leaves it out), `target_logprob` float32 [M], `outside_mass` float32 [M] (of a cache that is cut
    to a student's vocabulary), `sampled_ids` uint32 and `sampled_counts` int64 (flat, with `sampled_offsets` int64
    [M + 1]), `hidden_…` bfloat16 [N, H], `mean_embedding` and `last_token_embedding` float32 [H]. Of a cache that does
    not keep all positions, and with `learned_only` (those of which the loss mask asks for the next token),
    `topk_positions` int64 [M] and `hidden_positions` int64 [N] say which they are.
    """
    yield Field(name="input_ids", values=document.input_ids_L, dtype="uint32")
    yield Field(name="loss_mask", values=document.loss_mask_L, dtype="bool")
    if (topk := document.topk) is not None:
        kept = kept_positions(document, topk.positions_M, learned_only=learned_only)
        yield Field(name="topk_ids", values=_of(topk.ids_Mk, kept), dtype="uint32")
        yield Field(name="topk_logprobs", values=_of(topk.logprobs_Mk, kept), dtype="float16")
        if topk.logsumexp_M is not None:
            yield Field(name="logsumexp", values=_of(topk.logsumexp_M, kept), dtype="float32")
        yield Field(name="target_logprob", values=_of(topk.target_logprob_M, kept), dtype="float32")
        if topk.outside_mass_M is not None:
            yield Field(name="outside_mass", values=_of(topk.outside_mass_M, kept), dtype="float32")
        if topk.sampled_ids is not None and topk.sampled_counts is not None:
            yield from _sampled(topk.sampled_ids, topk.sampled_counts, kept)
        if kept is not None or not topk.keeps_all:
            yield Field(name="topk_positions", values=_of(topk.positions_M, kept), dtype="int64")
    if (states := document.states) is not None:
        kept = kept_positions(document, states.positions_N, learned_only=learned_only)
        for state, bits_NH in states.bits_NH.items():
            yield Field(name=hidden_field(state), values=_of(bits_NH, kept), dtype="bfloat16")
        if kept is not None or not states.keeps_all:
            yield Field(name="hidden_positions", values=_of(states.positions_N, kept), dtype="int64")
    for name, vector in (
        ("mean_embedding", document.mean_embedding_H),
        ("last_token_embedding", document.last_token_embedding_H),
    ):
        if vector is not None:
            yield Field(name=name, values=vector, dtype="float32")


def field_columns(caches: CachesOfRecipe, states: Sequence[HiddenState], *, learned_only: bool) -> list[FieldColumn]:
    """The fields that `fields_of` gives of every document of these caches, in its order."""
    h, schemas = caches.hidden(), caches.schemas
    found = [
        FieldColumn(name="input_ids", dtype="uint32", shape=("L",)),
        FieldColumn(name="loss_mask", dtype="bool", shape=("L",)),
    ]
    if (topk := schemas.get("topk_cache")) is not None:
        found += [
            FieldColumn(name="topk_ids", dtype="uint32", shape=("M", caches.k)),
            FieldColumn(name="topk_logprobs", dtype="float16", shape=("M", caches.k)),
        ]
        for name in ("logsumexp", "target_logprob", "outside_mass"):
            if name in topk.names:
                found.append(FieldColumn(name=name, dtype="float32", shape=("M",)))
        if "sampled_ids" in topk.names:
            found += [
                FieldColumn(name="sampled_ids", dtype="uint32", shape=("draws",)),
                FieldColumn(name="sampled_counts", dtype="int64", shape=("draws",)),
                FieldColumn(name="sampled_offsets", dtype="int64", shape=("M + 1",)),
            ]
        if learned_only or "positions" in topk.names:
            found.append(FieldColumn(name="topk_positions", dtype="int64", shape=("M",)))
    if (hidden := schemas.get("hidden_state_cache")) is not None:
        found += [FieldColumn(name=hidden_field(state), dtype="bfloat16", shape=("N", h)) for state in states]
        if learned_only or "positions" in hidden.names:
            found.append(FieldColumn(name="hidden_positions", dtype="int64", shape=("N",)))
    if "embedding_cache" in schemas:
        names = ("mean_embedding", "last_token_embedding")
        found += [FieldColumn(name=name, dtype="float32", shape=(h,)) for name in names]
    return found


def kept_positions(document: JoinedDocument, positions: Int64Array, *, learned_only: bool) -> Int64Array | None:
    """Which elements of `positions` are learned: those whose next token the loss mask asks for; None: all are kept."""
    if not learned_only:
        return None
    asked_L = np.append(document.loss_mask_L[1:], np.False_)
    return np.flatnonzero(asked_L[positions])


def _of(values: npt.NDArray[Any], kept: Int64Array | None) -> npt.NDArray[Any]:
    return values if kept is None else values[kept]


def _sampled(ids: Ragged, counts: Ragged, kept: Int64Array | None) -> Iterator[Field]:
    rows = range(len(ids)) if kept is None else kept.tolist()
    lengths = [len(ids[row]) for row in rows]
    yield Field(name="sampled_ids", values=_joined(ids, rows, np.uint32), dtype="uint32")
    yield Field(name="sampled_counts", values=_joined(counts, rows, np.int64), dtype="int64")
    yield Field(name="sampled_offsets", values=np.cumsum([0, *lengths], dtype=np.int64), dtype="int64")


def _joined(lists: Ragged, rows: Any, dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(lists[row].astype(dtype) for row in rows)])
