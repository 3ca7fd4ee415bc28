"""Whether what a recipe has made is that of today: the verdicts of the checks `up_to_date` and `coverage`.

Dagster marks single partitions as stale and shows it nowhere on the page of a partitioned asset, and it knows nothing
of a file that has changed since it was planned. So the verdict is a check, on the page of the plan and of every
partitioned asset. `up_to_date` says when it is looked at. No data are read: names, sizes and times of change of the
sources, and what Dagster has recorded.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import dagster as dg

from kd_assets.errors import NO_ANSWER, KdAssetsError, MissingInputError
from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.new_data import assets_missing
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.recording.check_specs import COVERAGE, UP_TO_DATE
from kd_assets.orchestration.recording.recorder import latest_data_version
from kd_assets.orchestration.schedules import (
    IN_QUARANTINE,
    assets_needed,
    is_fresh,
    latest_tags_of_plan,
    planned_partitions,
    with_put_aside,
)
from kd_assets.orchestration.staleness.latest_tags import read_ahead
from kd_assets.recipes.recipe import SHARD_PLAN, Recipe
from kd_assets.sources.files.find import find_source
from kd_assets.sources.planning.plan import ShardPlan
from kd_assets.store import still_put_aside

NAMED = 5
"""Partitions or files that are named; more are counted."""
READ_IN_PLAN_S = 20.0
"""How long the run of a plan reads what Dagster has recorded of its partitions; the sensor reads the rest."""


def asset_evaluations(
    instance: dg.DagsterInstance,
    recipe: Recipe,
    keys: Sequence[str],
    put_aside: Mapping[str, Collection[str]],
    *,
    plan_version: str | None = None,
) -> list[dg.AssetCheckEvaluation]:
    """`up_to_date` of each partitioned asset that has a partition, and `coverage` of the plan."""
    needed = assets_needed(instance, recipe, keys, plan_version=plan_version)
    needed = with_put_aside(recipe, keys, needed, put_aside)
    missing = assets_missing(instance, recipe, list(keys))
    evaluations, lines = [], []
    for asset in recipe.partitioned:
        lacking = [key for key in keys if asset in missing.get(key, ())]
        recorded = [key for key in keys if asset in needed.get(key, ()) and asset not in missing.get(key, ())]
        aside = [key for key in recorded if key in put_aside.get(asset, ())]
        stale = [key for key in recorded if key not in put_aside.get(asset, ())]
        n_made = len(keys) - len(lacking) - len(aside)
        in_quarantine = f", {len(aside):,} {IN_QUARANTINE}" if aside else ""
        if lacking or recorded:
            lines.append(f"{asset}: {len(lacking):,} missing, {len(stale):,} stale{in_quarantine}")
        if n_made or aside:
            counts = {"partitions": len(keys), "made": n_made, "missing": len(lacking), "stale": len(stale)}
            counts |= {"in_quarantine": len(aside)} if aside else {}
            said = (
                f"{len(stale):,} of {n_made:,} partitions that are made are stale: {_named(stale)}"
                if stale
                else f"all {n_made:,} partitions that are made are those of today"
            )
            said += f"; {len(aside):,} {IN_QUARANTINE}, to be made again: {_named(aside)}" if aside else ""
            evaluations.append(_evaluation(recipe.key(asset), UP_TO_DATE, not recorded, said, counts))
    n_done = len(keys) - len(needed)
    said = f"{n_done:,} of {len(keys):,} partitions are complete and those of today"
    said += f" ({'; '.join(lines)})" if lines else ""
    counts = {"partitions": len(keys), "complete": n_done}
    evaluations.append(_evaluation(recipe.key(SHARD_PLAN), COVERAGE, not needed, said, counts))
    return evaluations


def plan_evaluation(instance: dg.DagsterInstance, recipe: Recipe, platform: Platform) -> dg.AssetCheckEvaluation:
    """`up_to_date` of the plan. Raises MissingInputError where there is no plan, StorageUnavailableError where nobody
    answers for a source."""
    key = recipe.key(SHARD_PLAN)
    inputs = {dg.AssetKey.from_user_string(s.made_by) for s in recipe.sources if s.made_by is not None}
    versions = {made_by: latest_data_version(instance, made_by) for made_by in inputs}
    changes = changed_files(recipe, platform, planner_of(recipe, platform).current_plan())
    if not is_fresh(latest_tags_of_plan(instance, recipe), recipe.code_version(SHARD_PLAN), versions):
        changes.append("what the recipe says of sources and shards, or what makes a source")
    said = f"changed since it was planned: {'; '.join(changes)}" if changes else "the sources are as they were planned"
    return _evaluation(key, UP_TO_DATE, not changes, said, {})


def changed_files(recipe: Recipe, platform: Platform, plan: ShardPlan) -> list[str]:
    """A line a source of which files have come, gone or changed since the plan."""
    planned = {s.name: {f.name: (f.path, f.changed) for f in s.files} for s in plan.sources}
    lines = []
    for source in recipe.sources:
        spec = source.spec
        try:
            found = find_source(spec, base_folder=platform.home_folder, environment=platform.variables())
        except MissingInputError as e:
            lines.append(str(e))
            continue
        now, before = {f.name: (f.path, f.changed) for f in found.files}, planned.get(spec.name, {})
        if others := sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name)):
            lines.append(f"source {spec.name} ({_named([name or found.files[0].path for name in others])})")
    return lines


def results_of_new_plan(
    context: dg.AssetExecutionContext, recipe: Recipe, platform: Platform, plan_version: str
) -> list[dg.AssetCheckResult]:
    """Both checks of a plan that has just been made, for its own run to return.

    Where nobody can say how much of it is made, `coverage` says why, which takes nothing from the plan.
    """
    instance = context.instance
    keys = planned_partitions(instance, recipe)
    is_new = _evaluation(recipe.key(SHARD_PLAN), UP_TO_DATE, True, "the sources are as they were planned", {})
    assets = [recipe.key(asset) for asset in recipe.partitioned]
    try:
        if n_left := read_ahead(instance, assets, keys, until=time.monotonic() + READ_IN_PLAN_S):
            coverage = _not_yet_looked_at(recipe, keys, n_left)
        else:
            put_aside = still_put_aside(platform.recipe_folder(recipe.name))
            coverage = asset_evaluations(instance, recipe, keys, put_aside, plan_version=plan_version)[-1]
    except (KdAssetsError, *NO_ANSWER) as e:
        # Dagster fails a step that returns a plan without its checks.
        said = f"the plan is made; nobody can say how much of it is, which the sensor looks at again: {e}"
        context.log.warning(said)
        coverage = _evaluation(recipe.key(SHARD_PLAN), COVERAGE, False, said, {"partitions": len(keys)})
    return [
        dg.AssetCheckResult(
            check_name=e.check_name,
            passed=e.passed,
            severity=e.severity,
            description=e.description,
            metadata=e.metadata,
        )
        for e in (is_new, coverage)
    ]


def _not_yet_looked_at(recipe: Recipe, keys: Sequence[str], n_left: int) -> dg.AssetCheckEvaluation:
    said = (
        f"{len(keys):,} partitions are planned; {n_left:,} results are still to be looked at, which the sensor "
        f"{recipe.name}_up_to_date does"
    )
    counts = {"partitions": len(keys), "still_to_be_looked_at": n_left}
    return _evaluation(recipe.key(SHARD_PLAN), COVERAGE, False, said, counts)


def evaluate_selected(context: dg.AssetExecutionContext, recipe: Recipe, platform: Platform) -> None:
    """Log `up_to_date` of assets of which only that was asked for ("Execute" in the web UI). After a materialization
    the sensor looks at it: it costs a look at every partition."""
    wanted = {c.asset_key for c in context.selected_asset_check_keys if c.name == UP_TO_DATE}
    wanted -= set(context.selected_asset_keys)
    if not wanted:
        return
    keys = planned_partitions(context.instance, recipe)
    put_aside = still_put_aside(platform.recipe_folder(recipe.name))
    for evaluation in asset_evaluations(context.instance, recipe, keys, put_aside):
        if evaluation.check_name == UP_TO_DATE and evaluation.asset_key in wanted:
            context.log_event(evaluation)


def _evaluation(
    key: dg.AssetKey, name: str, passed: bool, description: str, counts: Mapping[str, int]
) -> dg.AssetCheckEvaluation:
    """A warning, where it fails: nothing is broken, and a run of the nightly mends it."""
    return dg.AssetCheckEvaluation(
        asset_key=key,
        check_name=name,
        passed=passed,
        severity=dg.AssetCheckSeverity.WARN,
        description=description,
        metadata=dict(counts),
    )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
