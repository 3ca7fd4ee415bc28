"""What the nightly schedule asks for: partitions that are missing or stale, and that no live run holds.

Staleness is Dagster's own notion, from the tags each materialization carries: another code version, or an input whose
data version has changed since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType

import dagster as dg

from kd_assets.contract import Asset
from kd_assets.dagster_internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    PARTITION_NAME_TAG,
    input_data_version_tag,
)
from kd_assets.orchestration.recording.recorder import latest_data_version
from kd_assets.recipes.recipe import SHARD_PLAN, SHARDS_MANIFEST, Recipe

MAX_PARTITIONS_A_RUN = 500
"""Dagster plans each partition of a run with an event of its own before it starts, 6 to 9 ms in sqlite: past this a run
is long in starting."""

READ_AT_ONCE = 1000
"""Materializations of one query: Dagster makes each a variable of it, and databases limit these."""

LIVE = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionRange:
    """Consecutive partitions that need the same assets."""

    first: str
    last: str
    assets: tuple[Asset, ...]
    n_partitions: int


def nightly_requests(
    instance: dg.DagsterInstance, recipe: Recipe, *, put_aside: Mapping[str, Set[str]] = MappingProxyType({})
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """One run request a partition_range of partitions; a reason when there is nothing to ask for.

    `put_aside`: asset → partitions that Dagster has for materialized, and whose result is in quarantine.
    """
    keys = list(instance.get_dynamic_partitions(str(recipe.partitions.name)))
    if not keys:
        yield dg.SkipReason(f"{recipe.name} has no shards yet: materialize {recipe.name}/{SHARD_PLAN}")
        return
    needed = with_put_aside(recipe, keys, assets_needed(instance, recipe, keys), put_aside)
    held = partitions_held_by_live_runs(instance, recipe, keys)
    partition_ranges = list(ranges_of(keys, {k: a for k, a in needed.items() if k not in held}))
    if not partition_ranges:
        yield dg.SkipReason(
            f"all {len(keys)} partitions of {recipe.name} are there and fresh"
            if not needed
            else f"live runs hold all {len(needed)} partitions of {recipe.name} that are missing or stale"
        )
        return
    for found in partition_ranges:
        yield dg.RunRequest(
            asset_selection=[recipe.key(a) for a in found.assets],
            tags={
                ASSET_PARTITION_RANGE_START_TAG: found.first,
                ASSET_PARTITION_RANGE_END_TAG: found.last,
            },
        )


def assets_needed(instance: dg.DagsterInstance, recipe: Recipe, keys: Sequence[str]) -> dict[str, tuple[Asset, ...]]:
    """Partition → its assets that are missing or stale. A cache of a missing or stale shard is needed, too: it will be
    found committed, and cost nothing, where the shard turns out the same; and so is an export of such a cache."""
    plan_version = latest_data_version(instance, recipe.key(SHARD_PLAN))
    teacher = recipe.teacher_asset
    teacher_inputs = {} if teacher is None else {teacher: latest_data_version(instance, teacher)}
    shard_tags = latest_tags(instance, recipe.key(SHARDS_MANIFEST), keys)
    expected_inputs = {recipe.key(SHARD_PLAN): plan_version, **teacher_inputs}
    needed: dict[str, tuple[Asset, ...]] = {
        key: recipe.partitioned
        for key in keys
        if not is_fresh(shard_tags.get(key), recipe.code_version(SHARDS_MANIFEST), expected_inputs)
    }
    with_fresh_shard = [key for key in keys if key not in needed]
    versions: dict[Asset, dict[str, str | None]] = {}
    for asset in recipe.caches:
        tags = latest_tags(instance, recipe.key(asset), with_fresh_shard)
        versions[asset] = {key: of_key.get(DATA_VERSION_TAG) for key, of_key in tags.items()}
        for key in with_fresh_shard:
            inputs = {recipe.key(SHARDS_MANIFEST): shard_tags[key].get(DATA_VERSION_TAG), **teacher_inputs}
            if not is_fresh(tags.get(key), recipe.code_version(asset), inputs):
                needed[key] = (*needed.get(key, ()), asset)
    for asset in recipe.export_params:
        tags, caches = latest_tags(instance, recipe.key(asset), with_fresh_shard), recipe.caches_of([asset])
        for key in with_fresh_shard:
            inputs = {recipe.key(cache): versions[cache].get(key) for cache in caches}
            is_of_needed = bool(set(caches) & set(needed.get(key, ())))
            if is_of_needed or not is_fresh(tags.get(key), recipe.code_version(asset), inputs):
                needed[key] = (*needed.get(key, ()), asset)
    return needed


def with_put_aside(
    recipe: Recipe, keys: Sequence[str], needed: Mapping[str, tuple[Asset, ...]], put_aside: Mapping[str, Set[str]]
) -> dict[str, tuple[Asset, ...]]:
    """`needed`, and what is in quarantine. Caches of a shard that is come with it, and exports of a cache that is."""
    found: dict[str, tuple[Asset, ...]] = {}
    for key in keys:
        wanted = set(needed.get(key, ()))
        wanted |= {asset for asset in recipe.partitioned if key in put_aside.get(asset, ())}
        if SHARDS_MANIFEST in wanted:
            wanted |= set(recipe.caches)
        wanted |= {export for export in recipe.export_params if wanted & set(recipe.caches_of([export]))}
        if wanted:
            found[key] = tuple(asset for asset in recipe.partitioned if asset in wanted)
    return found


def is_fresh(tags: Mapping[str, str] | None, code_version: str, inputs: Mapping[dg.AssetKey, str | None]) -> bool:
    """Whether a materialization with these tags (None: there is none) was made by this code from these inputs."""
    if tags is None or tags.get(CODE_VERSION_TAG) != code_version:
        return False
    return all(version is None or tags.get(input_data_version_tag(key)) == version for key, version in inputs.items())


def ranges_of(keys: Sequence[str], needed: Mapping[str, tuple[Asset, ...]]) -> Iterator[PartitionRange]:
    """The needed partitions as ranges, since a run takes one: split where a partition is left out, where other assets
    are needed, and after MAX_PARTITIONS_A_RUN. `keys` gives the order."""
    current: list[str] = []
    for key in [*keys, None]:
        ends = (
            key is None
            or key not in needed
            or (current and needed[key] != needed[current[0]])
            or len(current) == MAX_PARTITIONS_A_RUN
        )
        if ends and current:
            yield PartitionRange(
                first=current[0], last=current[-1], assets=needed[current[0]], n_partitions=len(current)
            )
            current = []
        if key is not None and key in needed:
            current.append(key)


def latest_tags(
    instance: dg.DagsterInstance, key: dg.AssetKey, partition_keys: Sequence[str]
) -> dict[str, dict[str, str]]:
    """The tags of each partition's last materialization.

    One query says which these are, and only they are read, however long the history is. (Dagster can also give tags
    without their materializations, but only the data version's: it keeps no others by themselves.)
    """
    ids = instance.get_latest_storage_id_by_partition(key, dg.DagsterEventType.ASSET_MATERIALIZATION)
    wanted = [ids[partition_key] for partition_key in partition_keys if partition_key in ids]
    found: dict[str, dict[str, str]] = {}
    for start in range(0, len(wanted), READ_AT_ONCE):
        page = wanted[start : start + READ_AT_ONCE]
        filters = dg.AssetRecordsFilter(asset_key=key, storage_ids=page)
        for record in instance.fetch_materializations(filters, limit=len(page)).records:
            if record.asset_materialization is not None:
                found[str(record.partition_key)] = dict(record.asset_materialization.tags or {})
    return found


def is_of_recipe(run: dg.DagsterRun, recipe: Recipe) -> bool:
    """Whether a run makes partitions of this recipe."""
    ours = {recipe.key(a) for a in recipe.partitioned}
    return bool(ours & set(run.asset_selection or ())) or run.job_name == f"{recipe.name}_caches"


def partitions_held_by_live_runs(instance: dg.DagsterInstance, recipe: Recipe, keys: Sequence[str]) -> set[str]:
    """Partitions of this recipe that a queued or running run is going to materialize."""
    position = {key: i for i, key in enumerate(keys)}
    held: set[str] = set()
    for run in instance.get_runs(dg.RunsFilter(statuses=LIVE)):
        if not is_of_recipe(run, recipe):
            continue
        single = run.tags.get(PARTITION_NAME_TAG)
        first, last = run.tags.get(ASSET_PARTITION_RANGE_START_TAG), run.tags.get(ASSET_PARTITION_RANGE_END_TAG)
        if single is not None:
            held.add(single)
        elif first in position and last in position:
            held |= set(keys[position[first] : position[last] + 1])
    return held
