"""The current results that a card tells of: those of one variant of each asset, each manifest read once.

What was replaced is not read, nor other variants but for one manifest of each: a card must not cost more with every
night that has passed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kd_assets.contract import CACHES, EXPORTS
from kd_assets.durable import listing
from kd_assets.errors import CorruptManifestError, NotCommittedError, StorageUnavailableError, StoreError
from kd_assets.store import Manifest, read_head, read_manifest
from kd_assets.store.fingerprint import INPUT_KEY
from kd_assets.store.layout import is_result_folder_name, is_variant_name
from kd_assets.store.reading.chosen import NOT_THERE, require_place, why_not_read
from kd_assets.store.reading.planned import PlannedPartitions
from kd_assets.store.reading.summary import CacheSummary, summary_of
from kd_assets.store.recorded_checks import failed_check

Coverage = Literal["made", "missing", "stale", "failed"]
_SHARDS = "shards_manifest"


@dataclass(kw_only=True, slots=True)
class CurrentResults:
    """Those of a recipe's folder. Ask for the shards first: they say which caches are stale."""

    recipe_folder: Path
    plan: PlannedPartitions | None
    shards: dict[str, str] = field(default_factory=dict)
    """Partition → the data version of the shard that the plan names, where it is current."""

    def variants(self, asset: str) -> dict[str, Manifest]:
        """Variant → one current result of it; without variants that have none."""
        names = filter(is_variant_name, listing(self.recipe_folder / asset))
        found = ((name, next(self._of_variant(asset, name), None)) for name in names)
        return {name: first[1] for name, first in found if first is not None}

    def newest_in(self, asset: str, variant: str) -> str:
        """When the newest of them was committed."""
        return max(manifest.created_at for _, manifest in self._of_variant(asset, variant))

    def summary(
        self, asset: str, variant: str, seen: Callable[[Manifest], None]
    ) -> tuple[CacheSummary, dict[str, Coverage]]:
        """What there is of a variant that has a current result, and how far it is: of every planned partition, in the
        plan's order; of those that are there where there is no plan. `seen` is told of each."""
        results: list[tuple[Path, Manifest]] = []
        left_out: dict[str, str] = {}
        newest = 0
        for folder, manifest in self._of_variant(asset, variant):
            seen(manifest)
            if (why := self._why_not_read(manifest)) is not None:
                left_out[manifest.partition_key] = why
            elif asset == _SHARDS:
                self.shards[manifest.partition_key] = manifest.data_version
            # Of all but the newest only numbers are asked for, and 40,000 whole ones are a GB.
            if results and manifest.created_at <= results[newest][1].created_at:
                results.append((folder, _numbers_of(manifest)))
                continue
            if results:
                results[newest] = (results[newest][0], _numbers_of(results[newest][1]))
            newest = len(results)
            results.append((folder, manifest))
        there = {manifest.partition_key: folder for folder, manifest in results}
        planned = list(there) if self.plan is None else list(self.plan.input_hashes)
        left_out |= {key: NOT_THERE for key in planned if key not in there}
        n_planned = None if self.plan is None else len(planned)
        summary = summary_of(results, n_planned=n_planned, left_out=left_out)
        of_variant = self.recipe_folder / asset / variant
        partitions = listing(of_variant).keys()

        def of(key: str) -> Coverage:
            if key not in left_out:
                return "made"
            if key in partitions and _has_failed(of_variant / key, there.get(key)):
                return "failed"
            return "stale" if key in there else "missing"

        return summary, {key: of(key) for key in planned}

    def _of_variant(self, asset: str, variant: str) -> Iterator[tuple[Path, Manifest]]:
        """The current results, in the order of their partitions."""
        of_variant = self.recipe_folder / asset / variant
        for key in listing(of_variant):
            with contextlib.suppress(NotCommittedError):
                if (folder := _head(of_variant / key)) is not None:
                    manifest = read_manifest(folder)
                    require_place(folder, manifest)
                    yield folder, manifest

    def _why_not_read(self, manifest: Manifest) -> str | None:
        """As `why_not_read` says, which reads manifests of shards again: asked only about what seems stale."""
        if self.plan is None:
            return failed_check(manifest)
        key, made_of = manifest.partition_key, manifest.identity.get(INPUT_KEY)
        if manifest.asset in CACHES and key in self.plan.input_hashes and self.shards.get(key) == made_of:
            return failed_check(manifest)
        return why_not_read(self.recipe_folder, manifest.asset, self.plan, manifest)


def _numbers_of(manifest: Manifest) -> Manifest:
    facts = manifest.facts if manifest.asset in EXPORTS else {}
    return dataclasses.replace(manifest, facts=facts, provenance={}, identity={}, parts=())


def _head(partition_folder: Path) -> Path | None:
    try:
        return read_head(partition_folder)
    except CorruptManifestError:
        return None


def _has_failed(partition_folder: Path, current: Path | None) -> bool:
    """Whether a result that is not the current one failed a check."""
    for name in listing(partition_folder):
        folder = partition_folder / name
        if not is_result_folder_name(name) or folder == current:
            continue
        try:
            if failed_check(read_manifest(folder)) is not None:
                return True
        except StorageUnavailableError:
            raise
        except StoreError:
            continue
    return False
