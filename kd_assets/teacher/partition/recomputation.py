"""The recomputation check of one partition: some of its documents again by the plain path, against what is on disk.

Used by `kd_assets.teacher` only; what is compared, and how far apart it may be: `kd_assets.teacher.recompute`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.contract import Asset, TeacherParams
from kd_assets.store import Documents, PartPlan, ResultWriter, Shard
from kd_assets.store.positions import kept_positions
from kd_assets.teacher.devices.compiled import Blocks
from kd_assets.teacher.devices.teacher_on_devices import TeacherOnDevices
from kd_assets.teacher.partition.batching import longest
from kd_assets.teacher.recompute import Comparison, Reference, sampled_documents, sampled_positions, stored_row


class Recomputation:
    """Which documents are recomputed, and what came of it."""

    def __init__(
        self,
        *,
        partition_key: str,
        shard: Shard,
        params: TeacherParams,
        devices: TeacherOnDevices,
        blocks: Blocks,
        with_logits: bool,
    ) -> None:
        """`with_logits`: whether any of what is compared comes from logits."""
        self._shard, self._params, self._devices, self._blocks = shard, params, devices, blocks
        self._with_logits = with_logits
        self._sample = documents_to_recompute(shard, params, partition_key)
        self._first: Reference | None = None

    def begin(self) -> None:
        """Recompute the first document of the sample; for while the last parts are being written. No more of them: a
        reference holds as much as a document's states and some rows of logits."""
        if self._sample:
            self._first = self._reference(self._sample[0])

    def compare(self, parts: Sequence[PartPlan], results: Mapping[Asset, ResultWriter]) -> dict[Asset, dict[str, Any]]:
        """Compare the sample as it is on disk with the plain path; what `checks["recomputed"]` keeps, by asset."""
        teacher = self._devices.teacher
        comparisons = {
            asset: Comparison(
                asset=asset,
                dtype=teacher.dtype,
                seed=self._params.seed,
                quantisation=teacher.quantisation,
                token_ids=None if self._params.topk is None else self._params.topk.token_ids,
                routed=teacher.routed,
                codec=self._params.codec_of(asset),
                top_p=None if self._params.topk is None else self._params.topk.top_p,
            )
            for asset in results
        }
        for index in self._sample:
            part = next(p for p in reversed(parts) if p.first_document <= index)
            expected, self._first = self._first or self._reference(index), None
            for asset, result in results.items():
                path = result.folder / result.finished[part.index].name
                comparisons[asset].add(stored_row(path, index - part.first_document), expected)
        ids = [self._shard.document_ids[index] for index in self._sample]
        return {asset: comparison.result(ids) for asset, comparison in comparisons.items()}

    def _reference(self, index: int) -> Reference:
        """A document by the plain path, as far as it is compared."""
        hidden = self._params.hidden_states
        document = self._shard.slice(index, 1, max_length=longest(self._params))
        with self._blocks.plain():
            return self._devices.reference(
                document.input_ids,
                hidden.blocks if hidden is not None else (),
                self._positions(document) if self._with_logits else np.arange(0),
                hidden.final if hidden is not None else (),
            )

    def _positions(self, document: Documents) -> npt.NDArray[np.int64]:
        """Where the document's logits are compared: among the positions that are kept."""
        topk = self._params.topk
        assert topk is not None
        cut = document.slice(0, 1, topk.max_length)
        kept = kept_positions(topk.positions, cut, has_next=True)
        positions_M = np.arange(cut.n_tokens - 1) if kept is None else kept.positions_M.astype(np.int64)
        chosen = sampled_positions(len(positions_M), seed=self._params.seed, document_id=document.document_ids[0])
        return positions_M[chosen]


def documents_to_recompute(shard: Shard, params: TeacherParams, partition_key: str) -> list[int]:
    """The sample of a partition: of documents of which a cache keeps only some positions, those that have any."""
    candidates = np.arange(len(shard.document_ids))
    for cache in (params.topk, params.hidden_states):
        if cache is None or cache.positions.kept == "all" or not len(candidates):
            continue
        cut = shard.slice(0, len(shard.document_ids), max_length=cache.max_length)
        kept = kept_positions(cache.positions, cut, has_next=cache is params.topk)
        assert kept is not None
        candidates = np.intersect1d(candidates, np.flatnonzero(np.diff(kept.offsets)))
    if not len(candidates):  # nothing is kept of any document in all caches: whatever there is, is compared
        candidates = np.arange(len(shard.document_ids))
    chosen = sampled_documents(
        len(candidates), params.recompute_documents, seed=params.seed, partition_key=partition_key
    )
    return [int(candidates[i]) for i in chosen]
