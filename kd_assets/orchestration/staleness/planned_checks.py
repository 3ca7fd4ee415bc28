"""Checks that runs were planned to evaluate, and that are taken back before their steps begin.

Dagster plans them as it creates a run: one that waits in the queue for hours would take the colours of all its
partitions for as long, and one that fails before its step would leave them red. A step takes back its own; this is for
runs that have not come to their step yet, or never did.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import dagster as dg

from kd_assets.dagster_internals import withdraw_planned_checks
from kd_assets.orchestration.recording.check_specs import check_keys
from kd_assets.orchestration.schedules import is_of_recipe
from kd_assets.recipes.recipe import Recipe

RUNS_AT_ONCE = 200
WITHDRAW_S = 10.0
"""After that the next tick goes on: a tick has a minute."""
CREATED_AFTER_S = 600.0
"""A run that has not started may still be being created for so long: Dagster writes an event a partition."""
LOOK_BACK = timedelta(days=7)
"""Where no run is known that was looked at before."""


def withdraw_checks_of_runs(
    instance: dg.DagsterInstance,
    recipe: Recipe,
    last_run: str,
    *,
    clock: Callable[[], float] = time.time,
) -> str:
    """Take back the checks of this recipe that runs after `last_run` (an id, or "") were planned to evaluate and have
    not; returns the id of the last run that need not be looked at again."""
    began = time.monotonic()
    is_known = bool(last_run) and instance.has_run(last_run)
    since = datetime.fromtimestamp(clock(), UTC) - LOOK_BACK
    records = instance.get_run_records(
        filters=None if is_known else dg.RunsFilter(created_after=since),
        limit=RUNS_AT_ONCE,
        ascending=True,
        cursor=last_run if is_known else None,
    )
    checks = check_keys(recipe)
    is_settled = True
    for record in records:
        run = record.dagster_run
        # The steps of one that succeeded have taken back theirs.
        if run.status is not dg.DagsterRunStatus.SUCCESS and _checks_any(run, recipe):
            withdraw_planned_checks(instance, run.run_id, checks)
        age_s = clock() - record.create_timestamp.timestamp()
        is_settled = is_settled and (run.status is not dg.DagsterRunStatus.NOT_STARTED or age_s >= CREATED_AFTER_S)
        if is_settled:
            last_run = run.run_id
        if time.monotonic() - began >= WITHDRAW_S:
            break
    return last_run


def _checks_any(run: dg.DagsterRun, recipe: Recipe) -> bool:
    """Whether a run may evaluate checks of this recipe: of its partitions, of its plan, or checks alone."""
    keys = {check.asset_key for check in check_keys(recipe)}
    selected = {*(run.asset_selection or ()), *(check.asset_key for check in run.asset_check_selection or ())}
    return bool(keys & selected) or is_of_recipe(run, recipe) or run.job_name == f"{recipe.name}_plan"
