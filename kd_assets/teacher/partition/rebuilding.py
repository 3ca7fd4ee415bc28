"""The check `rebuilt` of one partition: its documents from the files of its two caches, made now or committed before.

Used by `kd_assets.teacher` only; what is compared, and how far apart it may be: `kd_assets.teacher.rebuilt`. The check
is recorded in the manifest of the hidden-state cache; where that was committed before the top-k cache, in the latter's.
A partition that has not both caches has no such record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_assets.contract import Asset, TeacherParams, WorkUnit
from kd_assets.errors import NotCommittedError, StorageUnavailableError, StoreError
from kd_assets.store import ResultWriter, Shard, failed_check, read_manifest
from kd_assets.store.manifest import PartRecord
from kd_assets.store.reading.parts import require_unchanged
from kd_assets.teacher.devices.teacher_on_devices import TeacherOnDevices
from kd_assets.teacher.partition.recomputation import documents_to_recompute
from kd_assets.teacher.rebuilt import RebuiltComparison, not_made, why_not
from kd_assets.teacher.recompute import Row, stored_row

PAIR: tuple[Asset, Asset] = ("topk_cache", "hidden_state_cache")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCache:
    """The part files of a cache, in order."""

    folder: Path
    fingerprint: str
    parts: Sequence[PartRecord]
    made_before: bool
    """Committed by an earlier job: then its files are hashed before they are read."""

    def row(self, document: int) -> Row:
        """A document by its place in the partition, as it is on disk. Raises StoreError."""
        lasts = np.cumsum([part.n_documents for part in self.parts])
        at = int(np.searchsorted(lasts, document, side="right"))
        part = self.parts[at]
        path = self.folder / part.name
        if self.made_before:
            require_unchanged(path, part)
        return stored_row(path, document - int(lasts[at]) + part.n_documents)


def rebuilt_checks(
    *,
    unit: WorkUnit,
    shard: Shard,
    params: TeacherParams,
    devices: TeacherOnDevices,
    results: Mapping[Asset, ResultWriter],
    is_resumed: bool,
) -> dict[Asset, dict[str, Any]]:
    """What `checks["rebuilt"]` keeps, by the cache that it is recorded in: of one cache, or of none.

    `is_resumed`: parts of these results were written by an earlier attempt, perhaps on another machine.
    """
    hidden = params.hidden_states
    if params.topk is None or hidden is None or not hidden.final or not any(asset in results for asset in PAIR):
        return {}
    asset: Asset = "hidden_state_cache" if "hidden_state_cache" in results else "topk_cache"
    try:
        caches = {name: _stored(name, unit, results) for name in PAIR}
        if any(cache is None for cache in caches.values()):
            return {}
        if (why := why_not(devices.teacher, is_shared=devices.is_shared)) is not None:
            return {asset: not_made(why)}
        comparison = RebuiltComparison(
            teacher=devices.teacher,
            seed=params.seed,
            token_ids=params.topk.token_ids,
            codec=params.codec_of("topk_cache"),
            same_pass=not is_resumed and all(name in results for name in PAIR),
            states_codec=params.codec_of("hidden_state_cache"),
        )
        for index in documents_to_recompute(shard, params, unit.partition_key):
            topk, states = (cache.row(index) for cache in caches.values() if cache is not None)
            comparison.add(topk, states)
    except StorageUnavailableError:
        raise  # the files may be there: the task is to be tried again
    except StoreError as e:  # of a result that was there before, which its own checks are about
        return {asset: not_made(str(e))}
    compared_with = next(cache.fingerprint for name, cache in caches.items() if cache is not None and name != asset)
    return {asset: comparison.result() | {"compared_with": compared_with}}


def _stored(asset: Asset, unit: WorkUnit, results: Mapping[Asset, ResultWriter]) -> StoredCache | None:
    """The cache as it is on disk; None where there is none. Raises StoreError for one that must not be relied on."""
    if (result := results.get(asset)) is not None:
        parts = [result.finished[index] for index in sorted(result.finished)]
        return StoredCache(folder=result.folder, fingerprint=result.fingerprint, parts=parts, made_before=False)
    for folder in map(Path, unit.inputs.get(asset, ())):
        try:
            manifest = read_manifest(folder)
        except NotCommittedError:
            return None
        if (why := failed_check(manifest)) is not None:
            raise StoreError(f"{folder}: {why}")
        return StoredCache(folder=folder, fingerprint=manifest.fingerprint, parts=manifest.parts, made_before=True)
    return None
