"""When a recipe's checks as a whole are looked at: the sensor `<recipe>_up_to_date`.

Whenever anything that a verdict rests on has changed, and no sooner; it submits nothing. A tick has a minute, whatever
the plan's size: what it cannot read the next one does. What the plan's verdict rests on (the sources) and what the
others' does (results) are looked at apart, so that a source that does not answer keeps nobody from the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import dagster as dg

from kd_assets.dagster_internals import CheckTarget
from kd_assets.errors import NO_ANSWER, ContractError, InputError, MissingInputError, StoreError
from kd_assets.orchestration.materialize import register_no_plan_yet
from kd_assets.orchestration.new_data import state_of_sources
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.schedules import LIVE, NO_PLAN_YET, is_of_recipe, planned_partitions
from kd_assets.orchestration.staleness.coverage import asset_evaluations, plan_evaluation
from kd_assets.orchestration.staleness.latest_tags import read_ahead
from kd_assets.orchestration.staleness.planned_checks import withdraw_checks_of_runs
from kd_assets.recipes.recipe import SHARD_PLAN, Recipe
from kd_assets.store import still_put_aside
from kd_assets.store.fingerprint import fingerprint

SENSOR_INTERVAL_S = 120
LOOK_AFAR_EVERY_S = 3600.0
"""Sources behind a URL or a hub are asked no more often: nobody has asked for it."""
READ_S = 20.0
"""How long a tick reads what Dagster has recorded since the last one."""
PAUSE_S_A_RESULT = 0.003
"""Between two looks at all results while runs of the recipe add to them: 20 minutes for 100,000 partitions of four
assets, and no pause to speak of for some thousand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """What the sensor keeps between two looks."""

    plan: str = ""
    """A hash of all that the verdict on the plan rested on."""
    results: str = ""
    """A hash of all that the verdicts on results rested on."""
    results_at: float = 0.0
    """When all results were looked at last."""
    afar: float = 0.0
    """When sources that are not on this machine were asked last."""
    run: str = ""
    """The last run that keeps no checks it was planned to evaluate."""

    @classmethod
    def of(cls, cursor: str | None) -> Looked:
        try:
            raw = json.loads(cursor or "{}")
            return cls(
                plan=str(raw["plan"]),
                results=str(raw["results"]),
                results_at=float(raw["results_at"]),
                afar=float(raw["afar"]),
                run=str(raw["run"]),
            )
        except (ValueError, LookupError, TypeError):
            return cls()

    def cursor(self) -> str:
        return json.dumps(asdict(self))


def look_whether_up_to_date(
    context: dg.SensorEvaluationContext,
    recipe: Recipe,
    platform: Platform,
    *,
    clock: Callable[[], float] = time.time,
) -> dg.SkipReason:
    """Report the checks of a recipe as a whole, where anything that they rest on has changed since the last look, and
    take back those that runs were planned to evaluate."""
    instance = context.instance
    before = Looked.of(context.cursor)
    looked = replace(before, run=withdraw_checks_of_runs(instance, recipe, before.run, clock=clock))
    lines = []
    if register_no_plan_yet(instance, recipe):
        lines.append(f"{recipe.name} has no shard plan yet: its partition {NO_PLAN_YET} stands for all")
    else:
        for look in (_look_at_plan, _look_at_results):
            looked, said = look(instance, recipe, platform, looked, clock())
            lines += said
    if looked != before:
        context.update_cursor(looked.cursor())
    return dg.SkipReason("; ".join(lines) or "nothing has changed since the last look")


def _look_at_plan(
    instance: dg.DagsterInstance,
    recipe: Recipe,
    platform: Platform,
    looked: Looked,
    now: float,
) -> tuple[Looked, list[str]]:
    if _is_afar(recipe):
        if now - looked.afar < LOOK_AFAR_EVERY_S:
            return looked, []
        looked = replace(looked, afar=now)  # whatever comes of it: who does not answer is asked no more often
    try:
        rests_on = _plan_rests_on(instance, recipe, _sources_now(recipe, platform))
        if rests_on == looked.plan:
            return looked, []
        evaluation = plan_evaluation(instance, recipe, platform)
    except (InputError, ContractError, StoreError, *NO_ANSWER) as e:
        return looked, [f"nobody knows whether the plan of {recipe.name} is up to date: {e}"]
    return replace(looked, plan=rests_on), _reported(instance, [evaluation])


def _look_at_results(
    instance: dg.DagsterInstance,
    recipe: Recipe,
    platform: Platform,
    looked: Looked,
    now: float,
) -> tuple[Looked, list[str]]:
    keys, assets = planned_partitions(instance, recipe), [recipe.key(asset) for asset in recipe.partitioned]
    try:
        put_aside = still_put_aside(platform.recipe_folder(recipe.name))
        rests_on = _results_rest_on(instance, recipe, put_aside)
        if rests_on == looked.results:
            return looked, []
        wait_s = looked.results_at + PAUSE_S_A_RESULT * len(keys) * len(assets) - now
        if wait_s > 0 and looked.results and _has_live_runs(instance, recipe):
            return looked, [f"runs are at work: their results are looked at in {wait_s / 60:.0f} minutes"]
        if n_left := read_ahead(instance, assets, keys, until=time.monotonic() + READ_S):
            return looked, [f"{n_left:,} results are still to be looked at: the next tick goes on"]
        evaluations = asset_evaluations(instance, recipe, keys, put_aside)
    except (InputError, ContractError, StoreError, *NO_ANSWER) as e:
        return looked, [f"nobody knows whether the results of {recipe.name} are up to date: {e}"]
    return replace(looked, results=rests_on, results_at=now), _reported(instance, evaluations)


def _reported(instance: dg.DagsterInstance, evaluations: Sequence[dg.AssetCheckEvaluation]) -> list[str]:
    """Each says which materialization it is of: by times alone Dagster takes one that is reported in the second of its
    asset's materialization for older."""
    records = instance.get_asset_records([e.asset_key for e in evaluations])
    last = {r.asset_entry.asset_key: r.asset_entry.last_materialization_record for r in records}
    for evaluation in evaluations:
        of = last.get(evaluation.asset_key)
        target = of and CheckTarget(run_id=of.run_id, storage_id=of.storage_id, timestamp=of.timestamp)
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=evaluation.asset_key,
                check_name=evaluation.check_name,
                passed=evaluation.passed,
                metadata=evaluation.metadata,
                severity=evaluation.severity,
                description=evaluation.description,
                target_materialization_data=target,
            )
        )
    return [f"{e.asset_key.path[-1]}: {e.description}" for e in evaluations]


def _has_live_runs(instance: dg.DagsterInstance, recipe: Recipe) -> bool:
    return any(is_of_recipe(run, recipe) for run in instance.get_runs(dg.RunsFilter(statuses=LIVE)))


def _is_afar(recipe: Recipe) -> bool:
    """Whether a source is behind a URL or in a hub."""
    return any(s.spec.dataset is not None or "://" in (s.spec.path or "") for s in recipe.sources)


def _sources_now(recipe: Recipe, platform: Platform) -> str:
    try:
        return state_of_sources(recipe, platform)
    except MissingInputError as e:
        return str(e)


def _plan_rests_on(instance: dg.DagsterInstance, recipe: Recipe, sources: str) -> str:
    """A hash that changes with the sources, what makes them, the recipe's words about them, and every plan."""
    made_by = [dg.AssetKey.from_user_string(s.made_by) for s in recipe.sources if s.made_by is not None]
    return fingerprint(
        {
            "sources": sources,
            "code": recipe.code_version(SHARD_PLAN),
            "last": _last_materializations(instance, [recipe.key(SHARD_PLAN), *made_by]),
        }
    )


def _results_rest_on(instance: dg.DagsterInstance, recipe: Recipe, put_aside: Mapping[str, Collection[str]]) -> str:
    """A hash that changes with the recipe, the quarantine, and every materialization of the plan, of the recipe's
    assets, and of what makes the teacher."""
    teacher = [] if recipe.teacher_asset is None else [recipe.teacher_asset]
    keys = [*map(recipe.key, (SHARD_PLAN, *recipe.partitioned)), *teacher]
    return fingerprint(
        {
            "code": {asset: recipe.code_version(asset) for asset in recipe.partitioned},
            "put_aside": {asset: sorted(of_asset) for asset, of_asset in put_aside.items()},
            "last": _last_materializations(instance, keys),
        }
    )


def _last_materializations(instance: dg.DagsterInstance, keys: Sequence[dg.AssetKey]) -> dict[str, int | None]:
    return {
        record.asset_entry.asset_key.to_user_string(): record.asset_entry.last_materialization_storage_id
        for record in instance.get_asset_records(keys)
    }
