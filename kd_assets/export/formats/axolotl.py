"""`axolotl`: prepared rows for axolotl's trainer of knowledge distillation (`kd_trainer`, as of version 0.19.0).

A folder of `datasets.save_to_disk`, a document a row: `input_ids`, `labels` int32 [L], `attention_mask` int8 [L],
`target_logprobs` float32 [L, k], `target_token_ids` int32 [L, k] and `target_mask` int8 [L, k]. The trainer shifts
labels and not targets: row i is about token i + 1, and its mask is set where that token is learned and the cache keeps
the position. The others have mask 0, those without a prediction (the last of a document among them) log-probability
−1e9 and id 0.

Log-probabilities are natural, at temperature 1 and of the whole vocabulary: `kd_temperature: 1.0`, and
`kd_normalize_topk: false`, which compares them with the student's over its whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.errors import RecipeError
from kd_assets.export.columns import CachesOfRecipe, Column, columns_of
from kd_assets.export.documents import JoinedDocument
from kd_assets.export.format import ExportOptions, Needs, SectionFiles, Source
from kd_assets.export.formats.topk_targets import IGNORED, labels_of, require_topk_alone
from kd_assets.export.saved_dataset import finish_saved_dataset, numbers, section_name, section_rows

NOTHING_PREDICTED = -1e9
"""A log-probability where there is none, as its collator pads."""

_BYTES_PER_BYTE = 4.0
"""Written for each byte of the cache: float32 and int32 for float16 and compressed ids, and a mask a candidate."""

_SCHEMA = pa.schema(
    {
        "input_ids": numbers(pa.int32()),
        "attention_mask": numbers(pa.int8()),
        "labels": numbers(pa.int32()),
        "target_logprobs": numbers(numbers(pa.float32())),
        "target_token_ids": numbers(numbers(pa.int32())),
        "target_mask": numbers(numbers(pa.int8())),
    }
)


@dataclass(frozen=True, slots=True)
class Axolotl:
    """The format; see the module."""

    name: str = "axolotl"

    def needs(self, source: Source, options: ExportOptions) -> Needs:
        require_topk_alone(options, self.name)
        if options.pack_to is not None:
            raise RecipeError(
                f"{self.name}: axolotl packs documents itself and numbers them as it does (sample_packing: true): "
                "pack_to is not for it"
            )
        return Needs(
            assets=("topk_cache",), all_positions=False, fixed_k=False, min_tokens=2, expansion=_BYTES_PER_BYTE
        )

    def columns(self, caches: CachesOfRecipe, options: ExportOptions) -> Sequence[Column]:
        k = caches.k
        return columns_of(
            _SCHEMA,
            {
                "input_ids": "[L] token ids",
                "attention_mask": "[L] all ones",
                "labels": f"[L] the ids of tokens that are learned, {IGNORED} elsewhere; not shifted",
                "target_logprobs": f"[L, {k}] natural log-probabilities at temperature 1; row i is about token i + 1",
                "target_token_ids": f"[L, {k}] the token ids of these",
                "target_mask": f"[L, {k}] 1 where the token that follows is learned and the cache has a prediction",
            },
        )

    def writer(self, folder: Path, source: Source, options: ExportOptions) -> _Writer:
        return _Writer(folder)


class _Writer:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def section(self, index: int, partition_key: str, documents: Iterable[JoinedDocument]) -> SectionFiles:
        n_documents = n_tokens = 0
        with section_rows(self._folder, index, _SCHEMA) as (rows, file):
            for document in documents:
                rows.add(_row(document))
                n_documents, n_tokens = n_documents + 1, n_tokens + len(document.input_ids_L)
        return SectionFiles(
            index=index,
            partition_key=partition_key,
            n_documents=n_documents,
            n_tokens=n_tokens,
            names=(section_name(index),),
            sha256={section_name(index): file.sha256},
        )

    def finish(self, sections: Sequence[SectionFiles]) -> Sequence[str]:
        return finish_saved_dataset(self._folder, _SCHEMA, sections)


def _row(document: JoinedDocument) -> dict[str, npt.NDArray[Any]]:
    assert document.topk is not None, "needs() asked for it"
    topk = document.topk
    labels_L = labels_of(document)
    shape = (len(labels_L), topk.ids_Mk.shape[1])
    logprobs_Lk = np.full(shape, NOTHING_PREDICTED, dtype=np.float32)
    is_kept_Mk = ~np.isneginf(topk.logprobs_Mk)  # of a cache with top_p a row may have fewer than k
    logprobs_Lk[topk.positions_M] = np.where(is_kept_Mk, topk.logprobs_Mk.astype(np.float32), NOTHING_PREDICTED)
    ids_Lk = np.zeros(shape, dtype=np.int32)
    ids_Lk[topk.positions_M] = topk.ids_Mk
    mask_Lk = np.zeros(shape, dtype=np.int8)
    mask_Lk[topk.positions_M] = (labels_L[topk.positions_M + 1] != IGNORED)[:, None] & is_kept_Mk
    return {
        "input_ids": document.input_ids_L.astype(np.int32),
        "attention_mask": np.ones(len(labels_L), dtype=np.int8),
        "labels": labels_L.astype(np.int32),
        "target_logprobs": logprobs_Lk,
        "target_token_ids": ids_Lk,
        "target_mask": mask_Lk,
    }
