"""Which positions of a document a cache keeps, of those that could be kept: a function of its parameters, of the
document's id and of its loss mask, and of nothing else.

Position i predicts token i + 1. Who writes a cache, who checks it and who recomputes it asks here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from kd_assets.contract import PositionChoice
from kd_assets.errors import StoreError
from kd_assets.store.writing.documents import BoolArray, Documents, Int64Array, KeptPositions, offsets_of

ALL = PositionChoice()


def choice_in_identity(choice: PositionChoice) -> object:
    """As a cache's parameters have it: `"learned"`, or `{"share": …, "seed": …}`."""
    return {"share": choice.share, "seed": choice.seed} if choice.kept == "share" else choice.kept


def choice_of(params: Mapping[str, Any]) -> PositionChoice:
    """What the parameters in a manifest say; without a word all are kept. Raises StoreError for what this version does
    not know."""
    found = params.get("positions", "all")
    if found in ("all", "learned"):
        return PositionChoice(kept=found)
    if isinstance(found, dict) and set(found) == {"share", "seed"}:
        return PositionChoice(kept="share", share=float(found["share"]), seed=int(found["seed"]))
    raise StoreError(f"a cache keeps the positions {found!r}, which this version of kd_assets does not know")


def kept_positions(choice: PositionChoice, documents: Documents, *, has_next: bool) -> KeptPositions | None:
    """Which positions are kept of each document; None: all. `has_next`: only those that have a next token."""
    if choice.kept == "all":
        return None
    kept = [
        _kept(choice, documents.document_ids[i], documents.loss_mask[start:stop], has_next=has_next)
        for i, (start, stop) in enumerate(zip(documents.offsets[:-1], documents.offsets[1:], strict=True))
    ]
    return KeptPositions(
        offsets=offsets_of(np.array([len(positions) for positions in kept], dtype=np.int64)),
        positions_M=np.concatenate([np.zeros(0, np.int64), *kept]).astype(np.uint32),
    )


def _kept(choice: PositionChoice, document_id: str, loss_mask_L: BoolArray, *, has_next: bool) -> Int64Array:
    n = len(loss_mask_L)
    if choice.kept == "learned":
        return np.flatnonzero(loss_mask_L[1:])
    assert choice.share is not None
    return np.flatnonzero(uniforms(choice.seed, document_id, n - 1 if has_next else n) < choice.share)


def uniforms(seed: int, document_id: str, n_positions: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """float64 [n_positions] in [0, 1), multiples of 2^-32: number i belongs to position i, however many there are.

    The 32-bit halves, lower first, of the raw words of `numpy.random.Philox` (4x64-10), its key the first 16 bytes,
    little-endian, of the SHA-256 of `positions:<seed>:<document id>` in UTF-8.
    """
    digest = hashlib.sha256(f"positions:{seed}:{document_id}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw((n_positions + 1) // 2)
    halves = np.asarray(words, dtype="<u8").view("<u4")[:n_positions]
    return halves.astype(np.float64) * 2.0**-32
