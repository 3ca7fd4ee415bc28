"""Which checks a recipe's assets have, and what each of them says: `recorder` evaluates those of single results,
`coverage` those of a recipe as a whole."""

from __future__ import annotations

import warnings

import dagster as dg

from kd_assets.contract import Asset
from kd_assets.recipes.recipe import SHARD_PLAN, Recipe
from kd_assets.store.params_in_identity import params_in_identity
from kd_assets.store.recoding.sources import Form, codec_names

CHECKS: dict[str, str] = {
    "complete": "Documents and tokens of the part files equal those of the shards manifest.",
    "schema": "Every part file has exactly the schema of FORMAT.md.",
    "finite": "No stored number is NaN or infinite; kept probabilities add up to at most 1.",
    "recomputed": "A seeded sample of documents, computed again one at a time with a plain log_softmax, agrees.",
}

REBUILT = (
    "Log-probabilities that the teacher's head makes of a seeded sample of the final states equal those of the top-k "
    "cache. Evaluated of both once both are made, where the teacher's head is proven."
)
REBUILT_NAME = "rebuilt"

FILES = "Every file of the export has the size and the hash that were written."
CODEC = (
    "Coding has changed no stored distribution and no state by more than the codec can cost: measured when the parts "
    "were written."
)

RECODED = (
    "Each part, decoded from the disk again, is what the result says that it was recoded from. Evaluated for results "
    "that were made so, without the teacher."
)

UP_TO_DATE = "up_to_date"
COVERAGE = "coverage"

PLAN_CHECKS: dict[str, str] = {
    UP_TO_DATE: "The sources, and the recipe's words about them, are as they were when they were planned.",
    COVERAGE: "Every partition of every asset of the recipe is made, from today's plan, teacher and parameters.",
}
ASSET_UP_TO_DATE = (
    "No partition that is made is stale: of another plan, teacher or parameter, or of an input that has changed since; "
    "and none is in quarantine, which Dagster itself goes on showing as materialized. (Those that are not made yet are "
    "counted as missing, and are no failure.)"
)


def check_specs(recipe: Recipe, partitions: dg.PartitionsDefinition[str]) -> list[dg.AssetCheckSpec]:
    """Those of the partitioned assets: of each of their partitions, and of an asset as a whole."""
    with warnings.catch_warnings():
        # Checks of partitions are in preview in Dagster 1.13; its version is pinned.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        of_partitions = [
            dg.AssetCheckSpec(name, asset=recipe.key(asset), description=description, partitions_def=partitions)
            for asset, name, description in _described(recipe)
        ]
    of_assets = [
        dg.AssetCheckSpec(UP_TO_DATE, asset=recipe.key(asset), description=ASSET_UP_TO_DATE)
        for asset in recipe.partitioned
    ]
    return of_partitions + of_assets


def _described(recipe: Recipe) -> list[tuple[Asset, str, str]]:
    """Asset, name and description of each check of partitions."""
    described = [(asset, name, CHECKS[name]) for asset in recipe.caches for name in CHECKS]
    described += [(asset, "codec", CODEC) for asset in recipe.coded]
    described += [(asset, "recoded", RECODED) for asset in recipe.caches if _can_be_recoded(recipe, asset)]
    described += [(asset, REBUILT_NAME, REBUILT) for asset in recipe.rebuilt_from]
    return described + [(asset, "files", FILES) for asset in recipe.export_params]


def _can_be_recoded(recipe: Recipe, asset: Asset) -> bool:
    """Whether there is another form of the cache that a run makes it of: `raw` states are made of `split` ones, and a
    `plain` top-k of nothing."""
    wanted = Form.of(asset, params_in_identity(recipe.cache_params[asset], seed=recipe.teacher.seed))
    others = (Form(codec=name) for name in codec_names(asset))
    return recipe.recode and any(form != wanted and form.why_not(wanted) is None for form in others)


def plan_check_specs(recipe: Recipe) -> list[dg.AssetCheckSpec]:
    key = recipe.key(SHARD_PLAN)
    return [dg.AssetCheckSpec(name, asset=key, description=said) for name, said in PLAN_CHECKS.items()]


def check_keys(recipe: Recipe) -> list[dg.AssetCheckKey]:
    """All checks of a recipe."""
    return [
        *(dg.AssetCheckKey(recipe.key(asset), name) for asset, name, _ in _described(recipe)),
        *(dg.AssetCheckKey(recipe.key(asset), UP_TO_DATE) for asset in recipe.partitioned),
        *(dg.AssetCheckKey(recipe.key(SHARD_PLAN), name) for name in PLAN_CHECKS),
    ]
