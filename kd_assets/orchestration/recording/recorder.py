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
from kd_assets.orchestration.recording.check_specs import REBUILT_NAME, UP_TO_DATE
from kd_assets.orchestration.recording.metadata import check_metadata, result_metadata
from kd_assets.orchestration.staleness.latest_tags import remember
from kd_assets.recipes.recipe import SHARD_PLAN, SHARDS_MANIFEST, Recipe
from kd_assets.store import CheckResult, Manifest, ResultFiles, check_all, check_files, check_rebuilt_with
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checked:
    """What the checks of a result found."""

    asset: Asset
    partition_key: str
    results: Sequence[CheckResult]
    data_version: str | None = None
    """Of a result that another run has recorded: Dagster is told where its last materialization is of this one."""


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
        self._rebuilt: set[tuple[str, Asset]] = set()
        """Partition key and asset of each result whose check `rebuilt` this run has recorded."""
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
        checked: list[_Checked] = []
        shards: dict[str, ResultFiles] = {}
        rebuilt = set(self._rebuilt)
        unreachable: list[_Collected] = []
        why: Exception | None = None
        for collected in self._to_check:
            try:
                checked += self._checked(collected, shards, rebuilt)
            except NO_ANSWER as e:
                unreachable.append(collected)
                why = e
        if why is None:
            self._checking = storage_waits()
        else:
            self._wait_for(why)
            if self._checking.failing_for_s(self._clock()) >= STORAGE_PATIENCE_S:
                checked += [self._failed_by(collected, why) for collected in unreachable]
                unreachable.clear()
        with interrupts_held_back():
            self._record_checks(checked)
            self._remember_failed(checked)
            self._rebuilt = rebuilt
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

    def _checked(
        self, collected: _Collected, shards: dict[str, ResultFiles], rebuilt: set[tuple[str, Asset]]
    ) -> list[_Checked]:
        """The selected checks, computed now from the files; `shards` keeps what was read of each partition's shard, and
        `rebuilt` of which results that check is evaluated."""
        asset, key = collected.asset, collected.partition_key
        wanted = self._selected_checks(asset)
        if not wanted:
            return []
        result = ResultFiles(Path(collected.output.path), collected.manifest)
        if asset in EXPORTS:
            return [_Checked(asset=asset, partition_key=key, results=[check_files(result)])]
        (shard_folder,) = collected.unit.inputs[SHARDS_MANIFEST]
        shard = shards.setdefault(shard_folder, ResultFiles(Path(shard_folder)))
        results = check_all(result, shard)
        checked = [
            _Checked(asset=asset, partition_key=key, results=[found for found in results if found.name in wanted])
        ]
        if REBUILT_NAME in wanted and (other := _other_of_pair(self._recipe, collected)) is not None:
            if any(found.name == REBUILT_NAME for found in results):
                rebuilt.add((key, asset))
                checked += self._rebuilt_of_other(collected, ResultFiles(other), result, rebuilt)
            elif (found := check_rebuilt_with(result, ResultFiles(other))) is not None and (key, asset) not in rebuilt:
                rebuilt.add((key, asset))
                checked.append(_Checked(asset=asset, partition_key=key, results=[found]))
        return checked

    def _rebuilt_of_other(
        self, collected: _Collected, other: ResultFiles, result: ResultFiles, rebuilt: set[tuple[str, Asset]]
    ) -> list[_Checked]:
        """The check `rebuilt` of the other of its two caches, which this `result` has the record for: it would be shown
        as never evaluated. Nothing where it has not passed, and where this run comes to that cache later."""
        (asset,) = set(self._recipe.rebuilt_from) - {collected.asset}
        of_other = (collected.partition_key, asset)
        comes_later = REBUILT_NAME in self._selected_checks(asset) and of_other not in self._recorded
        if comes_later or of_other in rebuilt:
            return []
        found = check_rebuilt_with(other, result)
        if found is None or not found.passed:
            return []
        rebuilt.add(of_other)
        return [
            _Checked(
                asset=asset,
                partition_key=collected.partition_key,
                results=[found],
                data_version=other.manifest.data_version,
            )
        ]

    def _failed_by(self, collected: _Collected, why: Exception) -> _Checked:
        """The selected checks as failed: files that they need cannot be reached."""
        names = sorted(self._selected_checks(collected.asset))
        results = [CheckResult(name=name, passed=False, description=str(why), numbers={}) for name in names]
        return _Checked(asset=collected.asset, partition_key=collected.partition_key, results=results)

    def _selected_checks(self, asset: Asset) -> set[str]:
        key = self._recipe.key(asset)
        selected = self._context.selected_asset_check_keys
        return {check.name for check in selected if check.asset_key == key and check.name != UP_TO_DATE}

    def _record_checks(self, checked: Sequence[_Checked]) -> None:
        partitions: dict[Asset, dict[str, str | None]] = {}
        for one in checked:
            if one.results:
                partitions.setdefault(one.asset, {})[one.partition_key] = one.data_version
        targets = {asset: self._check_targets(asset, versions) for asset, versions in partitions.items()}
        events = [
            dg.AssetCheckEvaluation(
                asset_key=self._recipe.key(one.asset),
                check_name=result.name,
                passed=result.passed,
                partition=one.partition_key,
                # Dagster's own text names asset and check only: in a run's log they would all be alike.
                description=f"{one.partition_key}: {result.description}",
                metadata=check_metadata(one.partition_key, result),
                # Without the target Dagster shows no status at the partition.
                target_materialization_data=targets[one.asset].get(one.partition_key),
            )
            for one in checked
            for result in one.results
            if one.data_version is None or one.partition_key in targets[one.asset]
        ]
        record_events(self._context, events)

    def _check_targets(self, asset: Asset, versions: Mapping[str, str | None]) -> dict[str, CheckTarget]:
        """Partition → its last materialization; without those that have none, or one of another data version than is
        given. What this run has recorded is known."""
        mine = {k: self._stored[asset, k] for k in versions if (asset, k) in self._stored}
        instance, key = self._context.instance, self._recipe.key(asset)
        ids = latest_storage_ids(instance, key, [k for k in versions if k not in mine])
        if not ids:
            return mine
        records = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=key, storage_ids=list(ids.values())), limit=len(ids)
        ).records
        return mine | {
            str(r.partition_key): CheckTarget(run_id=r.run_id, storage_id=r.storage_id, timestamp=r.timestamp)
            for r in records
            if versions[str(r.partition_key)] in (None, _data_version(r))
        }

    def _remember_failed(self, checked: Sequence[_Checked]) -> None:
        for one in checked:
            for result in one.results:
                if not result.passed:
                    self.failed_checks.setdefault(one.partition_key, []).append(
                        f"{one.asset}: check {result.name} failed: {result.description}"
                    )


def latest_data_version(instance: dg.DagsterInstance, key: dg.AssetKey) -> str | None:
    """The data version an unpartitioned asset's last materialization gave; None when there is none."""
    records = instance.fetch_materializations(key, limit=1).records
    return _data_version(records[0]) if records else None


def _other_of_pair(recipe: Recipe, collected: _Collected) -> Path | None:
    """Where the result is, or will be, that the check `rebuilt` compares this one with."""
    if collected.asset not in recipe.rebuilt_from:
        return None
    (asset,) = set(recipe.rebuilt_from) - {collected.asset}
    made = [output.path for output in collected.unit.outputs if output.asset == asset]
    return next((Path(folder) for folder in (*made, *collected.unit.inputs.get(asset, ()))), None)


def _data_version(record: dg.EventLogRecord) -> str | None:
    """The data version that a materialization gave."""
    materialization = record.asset_materialization
    return None if materialization is None else (materialization.tags or {}).get(DATA_VERSION_TAG)
