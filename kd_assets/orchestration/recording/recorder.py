"""Telling Dagster of a committed result: one materialization with metadata and provenance, and its checks.

The manifest on disk is the only source; an event of a job never is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from kd_assets.contract import CACHES, EXPORTS, Asset, Output, WorkUnit
from kd_assets.dagster_internals import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    CheckTarget,
    input_tags,
    interrupts_held_back,
    latest_storage_ids,
    record_events,
)
from kd_assets.errors import NO_ANSWER
from kd_assets.orchestration.driving.waiting import STORAGE_PATIENCE_S, storage_waits
from kd_assets.orchestration.planning.planned_exports import cache_versions
from kd_assets.orchestration.recording.check_specs import UP_TO_DATE
from kd_assets.orchestration.recording.metadata import check_metadata, result_metadata
from kd_assets.orchestration.staleness.latest_tags import remember
from kd_assets.recipes.recipe import SHARD_PLAN, SHARDS_MANIFEST, Recipe
from kd_assets.store import CheckResult, Manifest, ResultFiles, check_all, check_files
from kd_assets.store.fingerprint import INPUT_KEY

COLLECT_RESULTS = 50
"""Results that are written together at most. Whoever else writes to Dagster's sqlite waits meanwhile."""

COLLECT_TOKENS = 1_000_000
"""Tokens of the results that are collected: their checks read them, and delay what comes after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Collected:
    """A committed output that Dagster is still to be told of."""

    unit: WorkUnit
    output: Output
    manifest: Manifest
    reused: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def partition_key(self) -> str:
        return self.unit.partition_key

    @property
    def asset(self) -> Asset:
        return self.output.asset


class Recorder:
    """Records each result at most once in a run, and remembers which checks failed.

    Results are collected for up to `collect_s` and then written together, which takes less than writing each alone.
    Call `flush` while waiting and at a bad end, and `finish` at a good one. What was collected and is not written is
    lost to this run only: it is committed, and the next run records it.
    """

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        recipe: Recipe,
        *,
        plan_hash: str,
        teacher_version: str | None,
        collect_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`plan_hash` and `teacher_version` are the data versions of the shard plan and of the asset that makes the
        teacher (None where no asset does) that this run works from. With a `collect_s` of 0 each result is written at
        once."""
        self._context, self._recipe = context, recipe
        self._plan_hash, self._teacher_version = plan_hash, teacher_version
        self._collect_s, self._clock = collect_s, clock
        self._recorded: set[tuple[str, Asset]] = set()
        self._to_record: list[_Collected] = []
        self._to_check: list[_Collected] = []
        self._stored: dict[tuple[Asset, str], CheckTarget] = {}
        """Where the materializations of this run are."""
        self._collecting_since = 0.0
        self._checking = storage_waits()
        self.failed_checks: dict[str, list[str]] = {}
        """Partition key → what failed, in words. Complete after `finish`."""

    def record(
        self, unit: WorkUnit, output: Output, manifest: Manifest, *, reused: bool, facts: Mapping[str, Any]
    ) -> None:
        """Record the materialization and the checks of one committed output, unless this run already has.

        `facts` are of the task that made it rather than of the result: where the log is, for instance.
        """
        if (unit.partition_key, output.asset) in self._recorded:
            return
        self._begin_collecting()
        self._to_record.append(_Collected(unit=unit, output=output, manifest=manifest, reused=reused, facts=facts))
        self._recorded.add((unit.partition_key, output.asset))
        self._flush_if_due()

    def record_checks(self, unit: WorkUnit, output: Output, manifest: Manifest) -> None:
        """Record the selected checks of one committed cache or export; its materialization must be recorded."""
        self._begin_collecting()
        self._to_check.append(_Collected(unit=unit, output=output, manifest=manifest))
        self._flush_if_due()

    def flush(self) -> None:
        """Write what was collected: first all materializations, then, once they are computed, all checks.

        Materializations are written a kind at a time (shards, caches, exports), and each of these and the checks wholly
        or, on an exception, not at all, and are tried again by the next flush; a termination that comes during a write
        takes effect after it. When this returns all is in the web UI, but for the checks of
        results whose files cannot be reached at the moment.
        """
        if self._to_record:
            with interrupts_held_back():
                # In the order they are made: the materializations of caches point to those of their shards, and those
                # of exports to those of their caches.
                for made_of in ({SHARDS_MANIFEST}, CACHES, EXPORTS):
                    self._record_materializations([c for c in self._to_record if c.asset in made_of])
        if self._to_check and self._checking.is_due(self._clock()):
            self._write_checks()

    def finish(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Flush until nothing is left, however long files cannot be reached: after STORAGE_PATIENCE_S a check that they
        are needed for has failed."""
        self.flush()
        while self._to_check:
            sleep(max(0.0, self._checking.next_at - self._clock()))
            self.flush()

    def _write_checks(self) -> None:
        results: list[tuple[_Collected, Sequence[CheckResult]]] = []
        shards: dict[str, ResultFiles] = {}
        unreachable: list[_Collected] = []
        why: Exception | None = None
        for collected in self._to_check:
            try:
                results.append((collected, self._check_results(collected, shards)))
            except NO_ANSWER as e:
                unreachable.append(collected)
                why = e
        if why is None:
            self._checking = storage_waits()
        else:
            self._wait_for(why)
            if self._checking.failing_for_s(self._clock()) >= STORAGE_PATIENCE_S:
                results += [(collected, self._failed_by(collected, why)) for collected in unreachable]
                unreachable.clear()
        with interrupts_held_back():
            self._record_checks(results)
            self._remember_failed(results)
            self._to_check = unreachable

    def _wait_for(self, why: Exception) -> None:
        if not self._checking.n_failures:
            self._context.log.warning(
                f"checks wait for files that cannot be reached ({why}), for {STORAGE_PATIENCE_S / 60:g} minutes at most"
            )
        self._checking.failed(self._clock())

    def _begin_collecting(self) -> None:
        if not self._to_record and not self._to_check:
            self._collecting_since = self._clock()

    def _flush_if_due(self) -> None:
        collected = [*self._to_record, *self._to_check]
        if (
            len(collected) >= COLLECT_RESULTS
            or sum(c.unit.n_tokens for c in collected) >= COLLECT_TOKENS
            or self._clock() - self._collecting_since >= self._collect_s
        ):
            self.flush()

    # ------------------------------------------------------------------ materializations

    def _record_materializations(self, results: Sequence[_Collected]) -> None:
        """Together, and take them from what is to be recorded to what is to be checked."""
        if not results:
            return
        inputs = [self._upstream_versions(c) for c in results]
        partition_keys = [c.partition_key for c in results]
        pointers = {key: self._event_pointers(key, partition_keys) for key in {key for i in inputs for key in i}}
        events = []
        for collected, versions in zip(results, inputs, strict=True):
            manifest = collected.manifest
            tags = {
                DATA_VERSION_TAG: manifest.data_version,
                CODE_VERSION_TAG: self._recipe.code_version(collected.asset),
            }
            for upstream, data_version in versions.items():
                tags |= input_tags(upstream, data_version, pointers[upstream].get(collected.partition_key))
            events.append(
                dg.AssetMaterialization(
                    self._recipe.key(collected.asset),
                    partition=collected.partition_key,
                    metadata=result_metadata(
                        manifest, Path(collected.output.path), job=collected.facts, reused=collected.reused
                    ),
                    tags=tags,
                )
            )
        stored = record_events(self._context, events)
        remember(self._context.instance, list(zip(events, stored, strict=False)))
        self._stored |= {(c.asset, c.partition_key): at for c, at in zip(results, stored, strict=False)}
        self._to_check += [c for c in results if c.asset != SHARDS_MANIFEST]
        recorded = set(map(id, results))
        self._to_record = [c for c in self._to_record if id(c) not in recorded]

    def _upstream_versions(self, collected: _Collected) -> dict[dg.AssetKey, str]:
        """The inputs a result stands for, with their data versions. A reused shard stands for today's plan, whichever
        plan it was made under: its content is what today's plan names."""
        recipe, manifest = self._recipe, collected.manifest
        if collected.asset in EXPORTS:
            return {recipe.key(cache): version for cache, version in cache_versions(manifest.identity).items()}
        if collected.asset == SHARDS_MANIFEST:
            versions = {recipe.key(SHARD_PLAN): self._plan_hash}
        else:
            versions = {recipe.key(SHARDS_MANIFEST): str(manifest.identity[INPUT_KEY])}
        if recipe.teacher_asset is not None and self._teacher_version is not None:
            versions[recipe.teacher_asset] = self._teacher_version
        return versions

    def _event_pointers(self, upstream: dg.AssetKey, partition_keys: Sequence[str]) -> Mapping[str, int]:
        """Partition → storage id of the last materialization of `upstream` for it; without those that have none."""
        instance = self._context.instance
        for asset in self._recipe.partitioned:
            if upstream == self._recipe.key(asset):
                mine = {k: self._stored[asset, k].storage_id for k in partition_keys if (asset, k) in self._stored}
                others = [key for key in partition_keys if key not in mine]
                return {**mine, **latest_storage_ids(instance, upstream, others)}
        records = instance.fetch_materializations(upstream, limit=1).records
        return dict.fromkeys(partition_keys, records[0].storage_id) if records else {}

    # ------------------------------------------------------------------ checks

    def _check_results(self, collected: _Collected, shards: dict[str, ResultFiles]) -> list[CheckResult]:
        """The selected checks, computed now from the files; `shards` keeps what was read of each partition's shard."""
        wanted = self._selected_checks(collected.asset)
        if not wanted:
            return []
        result = ResultFiles(Path(collected.output.path), collected.manifest)
        if collected.asset in EXPORTS:
            return [check_files(result)]
        (shard_folder,) = collected.unit.inputs[SHARDS_MANIFEST]
        shard = shards.setdefault(shard_folder, ResultFiles(Path(shard_folder)))
        results = check_all(result, shard)
        return [result for result in results if result.name in wanted]

    def _failed_by(self, collected: _Collected, why: Exception) -> list[CheckResult]:
        """The selected checks as failed: files that they need cannot be reached."""
        names = sorted(self._selected_checks(collected.asset))
        return [CheckResult(name=name, passed=False, description=str(why), numbers={}) for name in names]

    def _selected_checks(self, asset: Asset) -> set[str]:
        key = self._recipe.key(asset)
        selected = self._context.selected_asset_check_keys
        return {check.name for check in selected if check.asset_key == key and check.name != UP_TO_DATE}

    def _record_checks(self, checked: Sequence[tuple[_Collected, Sequence[CheckResult]]]) -> None:
        partitions: dict[Asset, list[str]] = {}
        for collected, results in checked:
            if results:
                partitions.setdefault(collected.asset, []).append(collected.partition_key)
        targets = {asset: self._check_targets(asset, keys) for asset, keys in partitions.items()}
        events = [
            dg.AssetCheckEvaluation(
                asset_key=self._recipe.key(collected.asset),
                check_name=result.name,
                passed=result.passed,
                partition=collected.partition_key,
                # Dagster's own text names asset and check only: in a run's log they would all be alike.
                description=f"{collected.partition_key}: {result.description}",
                metadata=check_metadata(collected.partition_key, result),
                # Without the target Dagster shows no status at the partition.
                target_materialization_data=targets[collected.asset].get(collected.partition_key),
            )
            for collected, results in checked
            for result in results
        ]
        record_events(self._context, events)

    def _check_targets(self, asset: Asset, partition_keys: Sequence[str]) -> dict[str, CheckTarget]:
        """Partition → its last materialization; without those that have none. What this run has recorded is known."""
        mine = {k: self._stored[asset, k] for k in partition_keys if (asset, k) in self._stored}
        instance, key = self._context.instance, self._recipe.key(asset)
        ids = latest_storage_ids(instance, key, [k for k in partition_keys if k not in mine])
        if not ids:
            return mine
        records = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=key, storage_ids=list(ids.values())), limit=len(ids)
        ).records
        return mine | {
            str(r.partition_key): CheckTarget(run_id=r.run_id, storage_id=r.storage_id, timestamp=r.timestamp)
            for r in records
        }

    def _remember_failed(self, checked: Sequence[tuple[_Collected, Sequence[CheckResult]]]) -> None:
        for collected, results in checked:
            for result in results:
                if not result.passed:
                    self.failed_checks.setdefault(collected.partition_key, []).append(
                        f"{collected.asset}: check {result.name} failed: {result.description}"
                    )


def latest_data_version(instance: dg.DagsterInstance, key: dg.AssetKey) -> str | None:
    """The data version an unpartitioned asset's last materialization gave; None when there is none."""
    records = instance.fetch_materializations(key, limit=1).records
    if not records or records[0].asset_materialization is None:
        return None
    return (records[0].asset_materialization.tags or {}).get(DATA_VERSION_TAG)
