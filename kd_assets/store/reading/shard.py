"""Reading a committed shard whole: tokens of all its documents, as the teacher takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd_assets.store.arrays import flat
from kd_assets.store.manifest import Manifest, read_manifest
from kd_assets.store.reading.chosen import require_place
from kd_assets.store.reading.parts import damage_named, part_in_memory
from kd_assets.store.writing.documents import BoolArray, Documents, Int64Array, Uint32Array, offsets_of


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shard:
    """All documents of a committed `shards_manifest` result, in their order."""

    document_ids: list[str]
    offsets_D1: Int64Array
    """int64 [D + 1]."""
    input_ids_N: Uint32Array
    loss_mask_N: BoolArray
    manifest: Manifest

    @property
    def n_tokens_D(self) -> Int64Array:
        """int64 [D]."""
        return np.diff(self.offsets_D1)

    def slice(self, first: int, n: int, max_length: int | None = None) -> Documents:
        """Documents `first` to `first + n - 1`, each cut to its first `max_length` tokens."""
        return Documents(
            document_ids=self.document_ids,
            offsets=self.offsets_D1,
            input_ids=self.input_ids_N,
            loss_mask=self.loss_mask_N,
        ).slice(first, n, max_length)


def read_shard(folder: Path) -> Shard:
    """The shard in a result folder, every byte verified: what is damaged must not become teacher data.

    Raises NotCommittedError, CorruptManifestError, CorruptPartError or StorageUnavailableError, which name the file.
    """
    manifest = read_manifest(folder)
    require_place(folder, manifest)
    document_ids: list[str] = []
    lengths, input_ids, loss_masks = [], [], []
    for record in manifest.parts:
        path = folder / record.name
        with part_in_memory(path, record) as part, damage_named(path):
            table = part.read(["document_id", "n_tokens", "input_ids", "loss_mask"])
            document_ids += table["document_id"].to_pylist()
            lengths.append(flat(table["n_tokens"]).astype(np.int64))
            input_ids.append(flat(table["input_ids"]))
            loss_masks.append(flat(table["loss_mask"]))
    return Shard(
        document_ids=document_ids,
        offsets_D1=offsets_of(np.concatenate([np.zeros(0, np.int64), *lengths])),
        input_ids_N=np.concatenate([np.zeros(0, np.uint32), *input_ids]),
        loss_mask_N=np.concatenate([np.zeros(0, np.bool_), *loss_masks]),
        manifest=manifest,
    )
