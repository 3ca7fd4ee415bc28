"""The asset `cache_card`: a recipe on one page, and beside its caches as `README.md` and `croissant.json`.

Made anew at the end of runs over the recipe's caches: no more often than takes a twentieth of the time, since a card
reads every current manifest, and a run of one shard among 100,000 must not; and always when nothing is missing any
more.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dagster as dg

from kd_assets.cards.contents import Measured, contents_of
from kd_assets.cards.current import Coverage
from kd_assets.cards.words import bytes_in_words
from kd_assets.cards.write import write_card
from kd_assets.contract import CACHES
from kd_assets.dagster_internals import CODE_VERSION_TAG, DATA_VERSION_TAG, input_tags
from kd_assets.errors import NotCommittedError
from kd_assets.orchestration.billing.measured import is_of
from kd_assets.orchestration.definition_metadata import definition_metadata
from kd_assets.orchestration.kept_records import require_kept_records
from kd_assets.orchestration.one_project import require_one_project
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.recording.shards_picture import shards_picture_markdown
from kd_assets.orchestration.run import as_failure
from kd_assets.recipes.recipe import SHARDS_MANIFEST, Recipe
from kd_assets.store import Manifest

CACHE_CARD = "cache_card"
SHARE_OF_TIME = 0.05
"""Of the time between two cards, what making them may take at most. A current result costs a card 0.7 ms of a busy
core, two lines of the audit log with it: 26 s of 40,000 results. The files' latency comes on top, and is measured."""
CARD_S, MISSING = "card_s", "partitions missing"
NOTHING_YET = "INITIAL"
"""Dagster's data version of an input of which nothing is made."""
FIRST_EVENT = 1
"""Of any storage. Without a pointer Dagster compares what is made of an input later with itself, and finds it equal."""


def card_asset(recipe: Recipe, at: Platform | None = None) -> dg.AssetsDefinition:
    @dg.asset(
        key=recipe.key(CACHE_CARD),
        deps=[recipe.key(asset) for asset in recipe.partitioned],
        description="What the recipe's caches hold, how far they are, what was measured, and how to use them.",
        metadata=definition_metadata(recipe, CACHE_CARD, at),
        kinds={"markdown", "huggingface"},
        backfill_policy=dg.BackfillPolicy.single_run(),
        group_name=recipe.name,
        owners=recipe.owners,
        tags=recipe.tags,
    )
    def cache_card(
        context: dg.AssetExecutionContext, kd_assets_platform: dg.ResourceParam[Platform]
    ) -> dg.MaterializeResult[None]:
        with as_failure():
            require_kept_records(context, kd_assets_platform)
            require_one_project(recipe, kd_assets_platform)
            return dg.MaterializeResult(metadata=_write(recipe, kd_assets_platform))

    return cache_card


def refresh_card(
    context: dg.AssetExecutionContext,
    recipe: Recipe,
    platform: Platform,
    keys: Sequence[str],
    *,
    clock: Callable[[], float] = time.time,
) -> None:
    """Make the card anew at the end of a run, where it is time; what prevents it is in the log, and stops no run.

    `keys`: all partitions of the plan.
    """
    if (why := why_not_yet(context.instance, recipe, keys, clock())) is not None:
        context.log.info(f"{recipe.name}/{CACHE_CARD} stays as it was: {why}. Materialize it to have it anew now")
        return
    try:
        tags = _provenance_tags(context, recipe)  # before anything is read: what is recorded meanwhile is newer
        # What a run planned of thousands of partitions hangs in cycles, and would lie beside as much of the card's.
        gc.collect()
        metadata = _write(recipe, platform)
    except NotCommittedError:  # a first run that came to nothing says so itself
        context.log.info(f"{recipe.name}/{CACHE_CARD} is not made: there is no result of {recipe.name} yet")
        return
    except Exception as e:  # noqa: BLE001 - whatever is wrong with a card, the run's own work is done
        context.log.warning(f"{recipe.name}/{CACHE_CARD} could not be made anew: {type(e).__name__}: {e}")
        return
    context.log_event(dg.AssetMaterialization(asset_key=recipe.key(CACHE_CARD), metadata=metadata, tags=tags))


def _provenance_tags(context: dg.AssetExecutionContext, recipe: Recipe) -> dict[str, str]:
    """What Dagster writes of an asset that a step returns, with the run for the card's version, as there.

    Without them Dagster goes by times, and calls a card out of date for each partition that is not made yet.
    """
    tags = {CODE_VERSION_TAG: context.run.run_id, DATA_VERSION_TAG: context.run.run_id}
    keys = [recipe.key(asset) for asset in recipe.partitioned]
    entries = {r.asset_entry.asset_key: r.asset_entry for r in context.instance.get_asset_records(keys)}
    for key in keys:
        last = entries[key].last_materialization_record if key in entries else None
        made = None if last is None else last.asset_materialization
        version = NOTHING_YET if made is None else (made.tags or {}).get(DATA_VERSION_TAG, NOTHING_YET)
        tags |= input_tags(key, version, FIRST_EVENT if last is None else last.storage_id)
    return tags


def why_not_yet(instance: dg.DagsterInstance, recipe: Recipe, keys: Sequence[str], now: float) -> str | None:
    """Why the card is not to be made anew at the end of a run; None where it is."""
    event = instance.get_latest_materialization_event(recipe.key(CACHE_CARD))
    if event is None or event.asset_materialization is None:
        return None
    metadata = event.asset_materialization.metadata
    took_s, was_missing = (_number(metadata, name) for name in (CARD_S, MISSING))
    if took_s is None:  # of an earlier version
        return None
    age_s, wait_s = now - event.timestamp, took_s / SHARE_OF_TIME
    if not 0 <= age_s < wait_s:
        return None
    if was_missing and not _is_anything_missing(instance, recipe, keys):
        return None
    return f"the last one is {age_s:.0f} s old and took {took_s:.1f} s, so that the next is due after {wait_s:.0f} s"


def _is_anything_missing(instance: dg.DagsterInstance, recipe: Recipe, keys: Sequence[str]) -> bool:
    return any(set(keys) - instance.get_materialized_partitions(recipe.key(asset)) for asset in recipe.partitioned)


def _number(metadata: Mapping[str, dg.MetadataValue[Any]], name: str) -> float | None:
    value = metadata[name].value if name in metadata else None
    return float(value) if isinstance(value, int | float) else None


def is_of_recipe(recipe: Recipe) -> Callable[[Manifest], bool]:
    """Whether a result is of the recipe as it is now; of exports, which follow their caches, whether it has them."""

    def of_now(manifest: Manifest) -> bool:
        asset: Any = manifest.asset
        if asset in (SHARDS_MANIFEST, *recipe.caches):
            return is_of(recipe, asset, manifest)
        return asset in recipe.export_params

    return of_now


def shards_metadata(measured: Sequence[Measured]) -> dict[str, Any]:
    picture = shards_picture_markdown(measured)
    return {} if picture is None else {"shards": dg.MetadataValue.md(picture)}


def _write(recipe: Recipe, platform: Platform) -> dict[str, Any]:
    """Write the card's files; returns what the web UI shows of it."""
    started = time.monotonic()
    contents = contents_of(
        platform.recipe_folder(recipe.name), is_of_recipe=is_of_recipe(recipe), of_recipe=recipe.partitioned
    )
    written = write_card(contents, description=recipe.description)
    n: dict[Coverage, int] = {"made": 0, "missing": sum(contents.never_made.values()), "stale": 0, "failed": 0}
    for cache in contents.caches:
        for state in n:
            n[state] += cache.n(state)
    documents = contents.of_documents.summary
    n_bytes = sum(cache.summary.n_bytes for cache in contents.caches if cache.asset in CACHES)
    return {
        "card": dg.MetadataValue.md(written.page),
        **shards_metadata(contents.measured),
        "contents": f"{documents.n_documents:,} documents, {documents.n_tokens:,} tokens, {bytes_in_words(n_bytes)}",
        "dagster/size_bytes": n_bytes,
        **{f"partitions {state}": number for state, number in n.items()},
        "folder": dg.MetadataValue.path(str(contents.folder)),
        "files": ", ".join(path.name for path in written.files),
        **({} if written.kept_in_words is None else {"kept": written.kept_in_words}),
        CARD_S: round(time.monotonic() - started, 3),
    }
