"""Sources that grow: `<recipe>_new_data` has them planned anew, and asks for what is missing then.

A look reads no data: names, sizes, times of change (ETags of objects, the commit of a data set). The invariants: the
same state of the sources is planned once, the same partitions of a plan are asked for once, and once more each time
they are put aside (what failed is for people and the nightly), and sources that cannot be reached have not changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import dagster as dg

from kd_assets.contract import Asset
from kd_assets.dagster_internals import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG
from kd_assets.errors import ContractError, InputError, StoreError
from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.recording.recorder import latest_data_version
from kd_assets.orchestration.schedules import (
    LIVE,
    MISSING,
    WHY_TAG,
    assets_needed,
    few_ranges,
    partitions_held_by_live_runs,
    planned_partitions,
    reasons_in_words,
    with_put_aside,
)
from kd_assets.recipes.recipe import SHARD_PLAN, Recipe
from kd_assets.sources.files.find import find_source
from kd_assets.store import PutAsideByAsset, still_put_aside
from kd_assets.store.fingerprint import fingerprint

LOOK_EVERY_S = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What the sensor keeps between two looks."""

    sources: str = ""
    """The state of the sources that was planned, or asked to be."""
    n_changes: int = 0
    """Part of a run's key, so that sources that are again what they were before are planned again."""

    @classmethod
    def of(cls, cursor: str | None) -> Seen:
        try:
            raw = json.loads(cursor or "{}")
            return cls(sources=str(raw["sources"]), n_changes=int(raw["n_changes"]))
        except (ValueError, LookupError, TypeError):
            return cls()

    def cursor(self) -> str:
        return json.dumps({"sources": self.sources, "n_changes": self.n_changes})


def look_for_new_data(
    context: dg.SensorEvaluationContext, recipe: Recipe, platform: Platform
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """A run of the plan where the sources changed; else runs of the partitions that the plan has and that are not
    made yet, or in quarantine."""
    if _plan_is_being_made(context.instance, recipe):
        yield dg.SkipReason(f"the shard plan of {recipe.name} is being made")
        return
    try:
        now = state_of_sources(recipe, platform)
        put_aside = still_put_aside(platform.recipe_folder(recipe.name))
    except (InputError, StoreError, OSError) as e:
        yield dg.SkipReason(f"the sources of {recipe.name} cannot be looked at, so nothing is asked for: {e}")
        return
    seen = Seen.of(context.cursor)
    if now != seen.sources:
        already = not seen.sources and now == planned_state(recipe, platform)
        seen = Seen(sources=now, n_changes=seen.n_changes + 1)
        context.update_cursor(seen.cursor())
        if not already:
            yield dg.RunRequest(run_key=f"{seen.n_changes}-{now[:16]}", job_name=f"{recipe.name}_plan")
            return
    yield from requests_for_missing(context.instance, recipe, put_aside=put_aside)


def state_of_sources(recipe: Recipe, platform: Platform) -> str:
    """A hash of the names, times of change and revisions of all files. Raises InputError where there are none,
    StorageUnreachableError where nobody answers."""
    found = {
        source.spec.name: find_source(source.spec, base_folder=platform.home_folder, environment=platform.variables())
        for source in recipe.sources
    }
    return fingerprint({name: [[f.name, f.path, f.changed] for f in source.files] for name, source in found.items()})


def planned_state(recipe: Recipe, platform: Platform) -> str | None:
    """What `state_of_sources` was when the current plan was made; None where there is no plan."""
    try:
        plan = planner_of(recipe, platform).current_plan()
    except (InputError, ContractError, StoreError):
        return None
    return fingerprint({s.name: [[f.name, f.path, f.changed] for f in s.files] for s in plan.sources})


def requests_for_missing(
    instance: dg.DagsterInstance, recipe: Recipe, *, put_aside: PutAsideByAsset = MappingProxyType({})
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Runs of the partitions that lack an asset, or have one in quarantine, and that no live run holds. (What is stale
    is the nightly's.)"""
    keys = planned_partitions(instance, recipe)
    never_made = assets_missing(instance, recipe, keys)
    missing = with_put_aside(recipe, keys, never_made, put_aside)
    held = partitions_held_by_live_runs(instance, recipe, keys)
    wanted = {key: assets for key, assets in missing.items() if key not in held}
    if not wanted:
        yield dg.SkipReason(
            f"live runs hold all {len(missing)} missing partitions of {recipe.name}"
            if missing
            else f"the sources of {recipe.name} have not changed, and all {len(keys)} partitions are there"
        )
        return
    plan = latest_data_version(instance, recipe.key(SHARD_PLAN)) or "no plan"
    # What is stale stays the nightly's, also where it lies between two that are missing.
    position = {key: i for i, key in enumerate(keys)}
    reasons = dict.fromkeys(never_made, MISSING)
    for found in few_ranges(
        recipe,
        keys,
        wanted,
        held=held,
        would_be_made=lambda: with_put_aside(recipe, keys, assets_needed(instance, recipe, keys), put_aside),
    ):
        of_range = [key for key in keys[position[found.first] : position[found.last] + 1] if key in wanted]
        # What is put aside again after it was made again is asked for again.
        aside = sorted(of[key].folder for of in put_aside.values() for key in of_range if key in of)
        yield dg.RunRequest(
            run_key=f"{plan[:16]} {found.first}..{found.last} {' '.join(found.assets)}"
            + (f" {fingerprint({'put_aside': aside})[:16]}" if aside else ""),
            job_name=f"{recipe.name}_caches",
            asset_selection=[recipe.key(asset) for asset in found.assets],
            tags={
                ASSET_PARTITION_RANGE_START_TAG: found.first,
                ASSET_PARTITION_RANGE_END_TAG: found.last,
                WHY_TAG: reasons_in_words(of_range, reasons),
            },
        )


def assets_missing(instance: dg.DagsterInstance, recipe: Recipe, keys: list[str]) -> dict[str, tuple[Asset, ...]]:
    """Partition → its assets that were never materialized, in the order they are made."""
    there = {asset: instance.get_materialized_partitions(recipe.key(asset)) for asset in recipe.partitioned}
    found = {key: tuple(asset for asset in recipe.partitioned if key not in there[asset]) for key in keys}
    return {key: lacking for key, lacking in found.items() if lacking}


def _plan_is_being_made(instance: dg.DagsterInstance, recipe: Recipe) -> bool:
    return any(
        run.job_name == f"{recipe.name}_plan" or recipe.key(SHARD_PLAN) in (run.asset_selection or ())
        for run in instance.get_runs(dg.RunsFilter(statuses=LIVE))
    )
