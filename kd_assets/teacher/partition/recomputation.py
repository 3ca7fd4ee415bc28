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
        self._sample = sampled_documents(
            len(shard.document_ids), params.recompute_documents, seed=params.seed, partition_key=partition_key
        )
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
                routed=teacher.routed,
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
        """Where the document's logits are compared."""
        assert self._params.topk is not None
        n_positions = min(document.n_tokens, self._params.topk.max_length) - 1
        return sampled_positions(n_positions, seed=self._params.seed, document_id=document.document_ids[0])
