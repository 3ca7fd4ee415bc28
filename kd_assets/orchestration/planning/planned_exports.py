"""From a selection of exports to the exact results that must exist: beside `planner`, and by its rules.

An export is named by its format, its options, the variants of its caches, and which results of theirs it is of; so a
cache that is made anew names another export, and equal ones are found again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd_assets.contract import Asset, Output, WorkUnit
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.orchestration.planning.planner import Planner
from kd_assets.recipes.recipe import Recipe
from kd_assets.store import Manifest, failed_check

_Caches = Mapping[Asset, tuple[Output, Manifest]]
"""What is committed of one partition."""


def export_work(
    planner: Planner, recipe: Recipe, partition_keys: Sequence[str], assets: Sequence[Asset]
) -> PlannedWork:
    """These exports of these partitions, from the caches that the current plan and recipe name. What lacks a cache, or
    has one that failed a check, is impossible; other exports of the partition are not."""
    caches = recipe.caches_of(assets)
    work = planner.teacher_work(partition_keys, caches, weights=planner.planned_weights())
    committed: dict[str, dict[Asset, tuple[Output, Manifest]]] = {unit.partition_key: {} for unit in work.units}

    def remember(unit: WorkUnit, output: Output, manifest: Manifest) -> None:
        committed[unit.partition_key][output.asset] = (output, manifest)

    survey = work.survey(remember)
    unknown = {
        unit.partition_key: survey.unreachable[output.path]
        for unit in work.units
        for output in unit.outputs
        if output.path in survey.unreachable
    }
    units: list[WorkUnit] = []
    impossible = dict(survey.impossible)
    for unit in work.units:
        key = unit.partition_key
        if key in unknown or key in impossible:
            continue
        outputs: list[Output] = []
        for asset in assets:
            if (why := _why_not(recipe, asset, key, committed[key])) is not None:
                impossible[key] = "; ".join(filter(None, (impossible.get(key), why)))
            else:
                outputs.append(_output(planner, recipe, asset, key, committed[key]))
        if outputs:
            units.append(
                WorkUnit(
                    partition_key=key,
                    n_tokens=unit.n_tokens,
                    inputs={
                        cache: (committed[key][cache][0].path,) for cache in recipe.caches_of(o.asset for o in outputs)
                    },
                    outputs=tuple(outputs),
                )
            )
    return PlannedWork(
        kind="export", units=tuple(units), impossible=impossible, unreachable={**work.unreachable, **unknown}
    )


def _why_not(recipe: Recipe, asset: Asset, key: str, committed: _Caches) -> str | None:
    """Why an export cannot be made of what is committed of a partition; None where it can."""
    for cache in recipe.caches_of([asset]):
        if cache not in committed:
            return (
                f"{recipe.name}/{asset} is made of {recipe.name}/{cache}, which has no partition {key} for the current "
                "plan and recipe: materialize it, or select it in the same run"
            )
        if (why := failed_check(committed[cache][1])) is not None:
            return f"{recipe.name}/{asset} is not made of a cache that failed a check: {cache} of {key}: {why}"
    return None


def _output(planner: Planner, recipe: Recipe, asset: Asset, key: str, committed: _Caches) -> Output:
    caches = recipe.caches_of([asset])
    variant: dict[str, Any] = {
        "params": recipe.export_params[asset].content(),
        "caches": {cache: committed[cache][0].variant for cache in caches},
    }
    # Both: what is written names the very results, and their content may differ under one fingerprint.
    made_of = {
        cache: {"fingerprint": committed[cache][1].fingerprint, "data_version": committed[cache][1].data_version}
        for cache in caches
    }
    return planner.output(asset, key, variant, made_of)


def cache_versions(identity: Mapping[str, Any]) -> dict[Asset, str]:
    """Cache → the data version of the result that an export with this identity was made of."""
    return {cache: str(made_of["data_version"]) for cache, made_of in identity["input"].items()}
