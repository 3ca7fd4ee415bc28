"""Of a recipe with `automation: condition`: what the nightly schedule asks for, as a condition of each asset.

A partition is asked for when it becomes missing (a plan has named it), when the recipe's or the code's version changes,
and when what it is made of has other content than before; once, as long as nothing else changes: what failed is for
people. It waits for inputs that are missing or being made, and for a live run of its own. Dagster evaluates it without
our code.
"""

import dagster as dg

from kd_assets.orchestration.schedules import WHY_TAG
from kd_assets.recipes.recipe import Recipe

LOOK_EVERY_S = 60


def missing_or_stale() -> dg.AutomationCondition[dg.AssetKey]:
    condition = dg.AutomationCondition
    became = (
        condition.newly_missing()
        | condition.code_version_changed()
        | condition.any_deps_match(condition.data_version_changed())
    )
    # Not `since_last_handled`: that takes what is missing when the sensor looks first for handled.
    wanted = became.since(condition.newly_requested() | condition.newly_updated())
    return (
        wanted & ~condition.any_deps_missing() & ~condition.any_deps_in_progress() & ~condition.in_progress()
    ).with_label("missing or stale")


def automation_sensor(recipe: Recipe) -> dg.AutomationConditionSensorDefinition:
    return dg.AutomationConditionSensorDefinition(
        name=f"{recipe.name}_automation",
        target=dg.AssetSelection.assets(*map(recipe.key, recipe.partitioned)),
        minimum_interval_seconds=LOOK_EVERY_S,
        default_status=dg.DefaultSensorStatus.STOPPED,
        run_tags={WHY_TAG: "automation condition: missing or stale"},
        description="Back-fills what is missing or stale, by the automation condition of each asset.",
    )
