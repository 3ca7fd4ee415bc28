"""What the nightly schedule asks for: partitions that are missing or stale, and that no live run holds.

Staleness is Dagster's own notion, from the tags each materialization carries: another code version, or an input whose
data version has changed since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
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
from kd_assets.orchestration.staleness.latest_tags import latest_tags
from kd_assets.recipes.recipe import SHARD_PLAN, SHARDS_MANIFEST, Recipe

MAX_PARTITIONS_A_RUN = 500
"""Dagster plans each partition of a run with an event of its own before it starts, 6 to 9 ms in sqlite: past this a run
is long in starting."""

MOST_RANGES = 10
"""Ranges that are asked for as they are. A run that was cancelled or failed in the middle leaves its partitions in as
many as its tasks had got to, and each would be a run of its own, which loads the teacher."""

NO_PLAN_YET = "no-plan-yet"
"""The partition that stands for all before the first shard plan: Dagster calls an asset of no partitions green."""

WHY_TAG = "kd_assets/why"
"""Of a run that a schedule or sensor asked for: why its partitions are needed, with numbers."""
MISSING, IN_QUARANTINE = "missing", "in quarantine"
RUNS_LOOKED_AT = 100
"""Failed runs, of all recipes, that a tick looks at to say of what is missing that it failed."""

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
    """That need them: of `few_ranges` there may be others between them."""


def nightly_requests(
    instance: dg.DagsterInstance,
    recipe: Recipe,
    *,
    put_aside: Mapping[str, Collection[str]] = MappingProxyType({}),
    say: Callable[[str], object] = lambda line: None,
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """One run request a partition_range of partitions, which says why in its tags; a reason when there is nothing to
    ask for.

    `put_aside`: asset → partitions that Dagster has for materialized, and whose result is in quarantine. `say` is told
    of each request which partitions, how many and why.
    """
    keys = planned_partitions(instance, recipe)
    if not keys:
        yield dg.SkipReason(f"{recipe.name} has no shards yet: materialize {recipe.name}/{SHARD_PLAN}")
        return
    reasons: dict[str, str] = {}
    needed = assets_needed(instance, recipe, keys, on_needed=reasons.setdefault)
    needed = with_put_aside(recipe, keys, needed, put_aside)
    held = partitions_held_by_live_runs(instance, recipe, keys)
    partition_ranges = few_ranges(
        recipe,
        keys,
        {k: a for k, a in needed.items() if k not in held},
        held=held,
        would_be_made=lambda: needed,
    )
    if not partition_ranges:
        yield dg.SkipReason(
            f"all {len(keys)} partitions of {recipe.name} are there and fresh"
            if not needed
            else f"live runs hold all {len(needed)} partitions of {recipe.name} that are missing or stale"
        )
        return
    position = {key: i for i, key in enumerate(keys)}
    failed_in = failed_runs(instance, recipe, keys)
    for found in partition_ranges:
        of_range = keys[position[found.first] : position[found.last] + 1]
        why = reasons_in_words([key for key in of_range if key in needed], reasons, failed_in)
        if n_between := len(of_range) - found.n_partitions:
            why += f", {n_between:,} between them that are there"
        say(f"{found.first} to {found.last}, {len(of_range):,} partitions of {', '.join(found.assets)}: {why}")
        yield dg.RunRequest(
            asset_selection=[recipe.key(a) for a in found.assets],
            tags={
                ASSET_PARTITION_RANGE_START_TAG: found.first,
                ASSET_PARTITION_RANGE_END_TAG: found.last,
                WHY_TAG: why,
            },
        )
    if held_back := len(needed.keys() & held):
        say(f"{held_back:,} more that are missing or stale are held by live runs")


def reasons_in_words(
    partition_keys: Sequence[str], reasons: Mapping[str, str], failed_in: Mapping[str, str] = MappingProxyType({})
) -> str:
    """`480 missing, 12 failed in run 1f2e3d4c, 8 stale since demo/shard_plan changed`.

    `reasons`: partition → why it is needed; of one that has none, a result is in quarantine. `failed_in`: partition →
    the run that could not make it.
    """

    def why(key: str) -> str:
        reason = reasons.get(key, IN_QUARANTINE)
        return f"failed in run {failed_in[key][:8]}" if reason == MISSING and key in failed_in else reason

    counts = Counter(map(why, partition_keys))
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common())


def planned_partitions(instance: dg.DagsterInstance, recipe: Recipe) -> list[str]:
    """The partitions that a plan has named, in their order; none before the first plan."""
    return [key for key in instance.get_dynamic_partitions(str(recipe.partitions.name)) if key != NO_PLAN_YET]


def assets_needed(
    instance: dg.DagsterInstance,
    recipe: Recipe,
    keys: Sequence[str],
    *,
    plan_version: str | None = None,
    on_needed: Callable[[str, str], object] = lambda key, why: None,
) -> dict[str, tuple[Asset, ...]]:
    """Partition → its assets that are missing or stale. A cache of a missing or stale shard is needed, too: it will be
    found committed, and cost nothing, where the shard turns out the same; and so is an export of such a cache.

    `plan_version`: the hash of the plan that is current, where Dagster does not know it yet. `on_needed` is called with
    a partition and why an asset of it is needed, first with what the others follow from.
    """

    def is_needed(
        key: str, tags: Mapping[str, str] | None, code_version: str, inputs: Mapping[dg.AssetKey, str | None]
    ) -> bool:
        if (why := why_not_fresh(tags, code_version, inputs)) is not None:
            on_needed(key, why)
        return why is not None

    plan_version = plan_version or latest_data_version(instance, recipe.key(SHARD_PLAN))
    teacher = recipe.teacher_asset
    teacher_inputs = {} if teacher is None else {teacher: latest_data_version(instance, teacher)}
    shard_tags = latest_tags(instance, recipe.key(SHARDS_MANIFEST), keys)
    expected_inputs = {recipe.key(SHARD_PLAN): plan_version, **teacher_inputs}
    # Hashed once, and not for each of a hundred thousand partitions.
    code_versions = {asset: recipe.code_version(asset) for asset in recipe.partitioned}
    everything, shards = recipe.partitioned, recipe.key(SHARDS_MANIFEST)
    needed: dict[str, tuple[Asset, ...]] = {
        key: everything
        for key in keys
        if is_needed(key, shard_tags.get(key), code_versions[SHARDS_MANIFEST], expected_inputs)
    }
    with_fresh_shard = [key for key in keys if key not in needed]
    versions: dict[Asset, dict[str, str | None]] = {}
    for asset in recipe.caches:
        tags = latest_tags(instance, recipe.key(asset), with_fresh_shard)
        versions[asset] = {key: of_key.get(DATA_VERSION_TAG) for key, of_key in tags.items()}
        for key in with_fresh_shard:
            inputs = {shards: shard_tags[key].get(DATA_VERSION_TAG), **teacher_inputs}
            if is_needed(key, tags.get(key), code_versions[asset], inputs):
                needed[key] = (*needed.get(key, ()), asset)
    for asset in recipe.export_params:
        tags = latest_tags(instance, recipe.key(asset), with_fresh_shard)
        caches = {cache: recipe.key(cache) for cache in recipe.caches_of([asset])}
        for key in with_fresh_shard:
            inputs = {upstream: versions[cache].get(key) for cache, upstream in caches.items()}
            is_of_needed = bool(set(caches) & set(needed.get(key, ())))
            if is_of_needed or is_needed(key, tags.get(key), code_versions[asset], inputs):
                needed[key] = (*needed.get(key, ()), asset)
    return needed


def with_put_aside(
    recipe: Recipe,
    keys: Sequence[str],
    needed: Mapping[str, tuple[Asset, ...]],
    put_aside: Mapping[str, Collection[str]],
) -> dict[str, tuple[Asset, ...]]:
    """`needed`, and what is in quarantine. Caches of a shard that is come with it, and exports of a cache that is."""
    if not any(put_aside.values()):
        return dict(needed)
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
    return why_not_fresh(tags, code_version, inputs) is None


def why_not_fresh(
    tags: Mapping[str, str] | None, code_version: str, inputs: Mapping[dg.AssetKey, str | None]
) -> str | None:
    """Why a materialization with these tags (None: there is none) is not of this code and these inputs; None where it
    is."""
    if tags is None:
        return MISSING
    if tags.get(CODE_VERSION_TAG) != code_version:
        return "stale since the recipe or the code that computes changed"
    for key, version in inputs.items():
        if version is not None and tags.get(input_data_version_tag(key)) != version:
            return f"stale since {key.to_user_string()} changed"
    return None


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


def few_ranges(
    recipe: Recipe,
    keys: Sequence[str],
    needed: Mapping[str, tuple[Asset, ...]],
    *,
    held: Set[str],
    would_be_made: Callable[[], Mapping[str, tuple[Asset, ...]]],
) -> list[PartitionRange]:
    """`ranges_of`; where these are more than MOST_RANGES, neighbours become one as far as MAX_PARTITIONS_A_RUN goes,
    with what lies between them: its run finds that committed and records it again, which costs milliseconds.

    No range has a `held` partition, and no run makes what is not `needed`. `would_be_made`: partition → its assets that
    a run would make which were asked for them.
    """
    found = list(ranges_of(keys, needed))
    if len(found) <= MOST_RANGES:
        return found
    position = {key: i for i, key in enumerate(keys)}
    unasked = {key: set(assets).difference(needed.get(key, ())) for key, assets in would_be_made().items()}
    joined = found[:1]
    for following in found[1:]:
        before = joined[-1]
        assets = {*before.assets, *following.assets}
        first, end = position[before.first], position[following.last] + 1
        # Those of `before` are looked at again only for assets that are new to it.
        looked_at = keys[first if len(assets) > len(before.assets) else position[before.last] + 1 : end]
        if end - first <= MAX_PARTITIONS_A_RUN and not any(
            key in held or not assets.isdisjoint(unasked.get(key, ())) for key in looked_at
        ):
            joined[-1] = PartitionRange(
                first=before.first,
                last=following.last,
                assets=tuple(asset for asset in recipe.partitioned if asset in assets),
                n_partitions=before.n_partitions + following.n_partitions,
            )
        else:
            joined.append(following)
    return joined


def latest_tags_of_plan(instance: dg.DagsterInstance, recipe: Recipe) -> dict[str, str] | None:
    """The tags of the plan's last materialization; None where there is none."""
    records = instance.fetch_materializations(recipe.key(SHARD_PLAN), limit=1).records
    if not records or records[0].asset_materialization is None:
        return None
    return dict(records[0].asset_materialization.tags or {})


def is_of_recipe(run: dg.DagsterRun, recipe: Recipe) -> bool:
    """Whether a run makes partitions of this recipe."""
    ours = {recipe.key(a) for a in recipe.partitioned}
    return bool(ours & set(run.asset_selection or ())) or run.job_name == f"{recipe.name}_caches"


def partitions_held_by_live_runs(instance: dg.DagsterInstance, recipe: Recipe, keys: Sequence[str]) -> set[str]:
    """Partitions of this recipe that a queued or running run is going to materialize."""
    position = {key: i for i, key in enumerate(keys)}
    held: set[str] = set()
    for run in instance.get_runs(dg.RunsFilter(statuses=LIVE)):
        if is_of_recipe(run, recipe):
            held.update(partitions_of_run(run, keys, position))
    return held


def failed_runs(instance: dg.DagsterInstance, recipe: Recipe, keys: Sequence[str]) -> dict[str, str]:
    """Partition → the last run over it that failed, among the last RUNS_LOOKED_AT that did."""
    position = {key: i for i, key in enumerate(keys)}
    found: dict[str, str] = {}
    for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]), limit=RUNS_LOOKED_AT):
        if is_of_recipe(run, recipe):
            for key in partitions_of_run(run, keys, position):
                found.setdefault(key, run.run_id)
    return found


def partitions_of_run(run: dg.DagsterRun, keys: Sequence[str], position: Mapping[str, int]) -> Sequence[str]:
    """The partitions that a run is of, as its tags say. `position`: of each of `keys`."""
    single = run.tags.get(PARTITION_NAME_TAG)
    first, last = run.tags.get(ASSET_PARTITION_RANGE_START_TAG), run.tags.get(ASSET_PARTITION_RANGE_END_TAG)
    if single is not None:
        return [single]
    if first is not None and last is not None and first in position and last in position:
        return keys[position[first] : position[last] + 1]
    return []
