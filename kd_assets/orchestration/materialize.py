"""What a materialization does: plan the work, have what is missing made (`driving`), record each result.

The bodies of the assets that `assets` declares. The rule they keep: every partition that was asked for ends the run
either recorded or named in its failure.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import dagster as dg

from kd_assets.contract import Asset
from kd_assets.dagster_internals import already_recorded, is_forgotten_at_its_end
from kd_assets.durable import storage_errors
from kd_assets.errors import InputError, KdAssetsError
from kd_assets.model_files.digests import Say
from kd_assets.orchestration.billing.bill import Bill, make_bill, require_states_fit_their_codec
from kd_assets.orchestration.billing.words import rows, why_it_does_not_fit
from kd_assets.orchestration.driving.waiting import Log
from kd_assets.orchestration.orphans import alive
from kd_assets.orchestration.planned_exports import export_work
from kd_assets.orchestration.planner import Planner
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.recording.lengths_picture import observe_lengths
from kd_assets.orchestration.recording.loss_picture import loss_picture_markdown
from kd_assets.orchestration.recording.metadata import result_metadata
from kd_assets.orchestration.recording.recorder import Recorder, latest_data_version
from kd_assets.orchestration.run import Run, as_failure, patiently
from kd_assets.orchestration.schedules import partitions_held_by_live_runs
from kd_assets.recipes.recipe import SHARD_PLAN, SHARDS_MANIFEST, Recipe
from kd_assets.sources.planning.plan import ShardPlan
from kd_assets.store import read_manifest

PLAN_TAG = "kd_assets/plan"
"""Of a run: the hash of the shard plan that all its steps work from."""
COLLECT_S = 1.0
"""How long results may wait to be recorded together. While a job is followed they wait for the end of one look at its
events at most."""
ADDED_AT_ONCE = 10_000
"""Partitions that are added in one call: Dagster makes each a variable of one SQL statement, and databases limit
these."""


def planner_of(recipe: Recipe, platform: Platform, *, say: Say = lambda line: None) -> Planner:
    folder = platform.recipe_folder(recipe.name)
    return Planner(recipe, folder, platform.digests(), platform.variables(), say=say)


def materialize_plan(
    context: dg.AssetExecutionContext, recipe: Recipe, platform: Platform
) -> dg.MaterializeResult[None]:
    """Pin the sources and register one dynamic partition a shard, in sorted order."""
    planner = planner_of(recipe, platform, say=context.log.warning)
    with as_failure(), alive(platform.jobs_folder, context.run.run_id):
        plan = planner.draft_plan(keeps_copies=True)
        bill = bill_to_show(recipe, platform, planner, plan, context.log)
        planner.adopt_plan(plan)
    for line in plan.said:
        context.log.warning(line)
    keys = plan.keys
    name = str(recipe.partitions.name)
    present = context.instance.get_dynamic_partitions(name)
    held = partitions_held_by_live_runs(context.instance, recipe, present)
    register_partitions(context.instance, name, keys, held=held)
    if is_forgotten_at_its_end(context.instance):
        context.log.warning(
            f"DAGSTER_HOME is not set, so Dagster keeps this run and its {len(keys)} partitions in a temporary folder "
            "and deletes them when this command ends: no later command will find these partitions. Set it to a folder "
            f"that stays, for every command (export DAGSTER_HOME={platform.home_folder / 'dagster'}), and materialize "
            "shard_plan again"
        )
    return dg.MaterializeResult(
        data_version=dg.DataVersion(plan.plan_hash),
        metadata={
            "shards": len(keys),
            "records": plan.totals["n_records"],
            "documents": plan.totals["n_documents"],
            "tokens": plan.totals["n_tokens"],
            "bytes": sum(s.n_bytes for s in plan.sources),
            "sources": sources_table(plan),
            **({} if bill is None else {"bill": bill_table(bill)}),
            "folder": dg.MetadataValue.path(str(platform.recipe_folder(recipe.name) / SHARD_PLAN)),
        },
    )


def bill_to_show(recipe: Recipe, platform: Platform, planner: Planner, plan: ShardPlan, log: Log) -> Bill | None:
    """The bill of a plan that is about to become current; None where none could be made, which stops no plan.

    Raises InputError where the caches do not fit, unless the recipe says that a warning will do, and RecipeError for a
    codec that the teacher's states do not fit.
    """
    require_states_fit_their_codec(recipe, planner)
    try:
        bill = make_bill(recipe, platform, planner, plan)
    except (KdAssetsError, OSError) as e:
        log.warning(f"no bill could be made: {e}")
        return None
    if (why := why_it_does_not_fit(bill)) is not None:
        if recipe.when_space_is_short == "refuse":
            raise InputError(f"{why}. The plan that was current still is")
        log.warning(why)
    for task in bill.tasks:
        if task.warning:
            log.info(task.warning)
    return bill


def sources_table(plan: ShardPlan) -> dg.TableMetadataValue:
    counts = {c.source: c for c in plan.counts}
    records: list[dict[str, str | int]] = []
    for s in plan.sources:
        count = counts.get(s.name)
        records.append(
            {
                "name": s.name,
                "path": s.path,
                "records": s.n_records,
                "documents": s.n_records if count is None else count.n_documents,
                "tokens": 0 if count is None else count.n_tokens,
                "copies left out": 0 if count is None else count.n_duplicates,
                "left over": 0 if count is None else count.n_left,
                "bytes": s.n_bytes,
                "sha256": s.sha256,
                "licence": s.licence,
                "revision": s.revision or "",
            }
        )
    return dg.MetadataValue.table([dg.TableRecord(record) for record in records])


def bill_table(bill: Bill) -> dg.TableMetadataValue:
    return dg.MetadataValue.table(
        [dg.TableRecord({"what": what, "how much": much, "from": rests_on}) for what, much, rests_on in rows(bill)]
    )


def register_partitions(
    instance: dg.DagsterInstance, name: str, keys: Sequence[str], *, held: Collection[str] = ()
) -> None:
    """Make the dynamic partitions exactly `keys`, in this order; `held` ones that are no longer wanted stay after them
    until the next plan, since Dagster fails a run whose partitions are gone.

    Dagster keeps them in the order they were added, and a range means "between these two in that order"; so unless
    the new keys only go on at the end, all are added anew. Removing a key removes no data and no history. Dagster
    offers no removal of many at once; a plan seldom loses any.
    """
    present = list(instance.get_dynamic_partitions(name))
    kept_for_runs = set(held) - set(keys)
    keys = [*keys, *(key for key in present if key in kept_for_runs)]
    wanted = set(keys)
    kept = [key for key in present if key in wanted]
    if kept != list(keys[: len(kept)]):
        kept = []
    kept_keys = set(kept)
    for key in present:
        if key not in kept_keys:
            instance.delete_dynamic_partition(name, key)
    for start in range(len(kept), len(keys), ADDED_AT_ONCE):
        instance.add_dynamic_partitions(name, keys[start : start + ADDED_AT_ONCE])


def materialize_caches(
    context: dg.AssetExecutionContext, recipe: Recipe, platform: Platform
) -> Iterator[dg.MaterializeResult[None]]:
    """Tokenise, cache and export the selected partitions, whichever of the recipe's assets are selected."""
    with as_failure(), alive(platform.jobs_folder, context.run.run_id):
        selected = _make_caches(context, recipe, platform)
    for asset in selected:
        yield already_recorded(recipe.key(asset))


def _make_caches(context: dg.AssetExecutionContext, recipe: Recipe, platform: Platform) -> list[Asset]:
    """See to it that all that is selected is there and recorded; returns the selected assets."""
    selected = [a for a in recipe.partitioned if recipe.key(a) in context.selected_asset_keys]
    checked = assets_only_checked(context, recipe)
    keys = partitions_asked_for(context, recipe, checked)
    if not keys:
        raise dg.Failure(description="the selection holds no partition: is the range reversed?", allow_retries=False)
    planner = planner_of(recipe, platform, say=context.log.info)
    plan = patiently(planner.current_plan, context.log)
    plan_hash = plan.plan_hash
    if context.has_partition_key_range:
        keys = resolved(keys, plan, context.log)
    # For the steps after this one: a plan that is made meanwhile is for the runs after this one.
    context.instance.add_run_tags(context.run.run_id, {PLAN_TAG: plan_hash})
    recorder = Recorder(
        context,
        recipe,
        plan_hash=plan_hash,
        teacher_version=None
        if recipe.teacher_asset is None
        else latest_data_version(context.instance, recipe.teacher_asset),
        collect_s=COLLECT_S,
    )
    run = Run(context, recipe, platform, planner, recorder)
    if "topk_cache" in selected:  # before the shards, which may take hours
        planner.require_vocabulary()
    if SHARDS_MANIFEST in selected:
        run.carry_out(run.planned(planner.shards_work, keys))
    if caches := [a for a in selected if a in recipe.caches]:
        run.carry_out(run.planned(lambda some: planner.teacher_work(some, caches), run.without_failure(keys)))
    if exports := [a for a in selected if a in recipe.export_params]:
        run.carry_out(run.planned(lambda some: export_work(planner, recipe, some, exports), run.without_failure(keys)))
    if caches := [a for a in checked if a in recipe.caches]:
        weights = planner.planned_weights()
        run.check(run.planned(lambda some: planner.teacher_work(some, caches, weights=weights), keys))
    if exports := [a for a in checked if a in recipe.export_params]:
        run.check(run.planned(lambda some: export_work(planner, recipe, some, exports), keys))
    recorder.finish()
    if (variant := run.variants_made.get(SHARDS_MANIFEST)) is not None:
        observe_lengths(context, recipe, platform.recipe_folder(recipe.name), variant)
    run.raise_if_anything_failed()
    return selected


def resolved(keys: Sequence[str], plan: ShardPlan, log: Log) -> list[str]:
    """A range's partitions that the plan has: others may have been in an older one, when the run was queued. All of
    them where it has none, which then fail by name."""
    planned = set(plan.keys)
    if gone := [key for key in keys if key not in planned]:
        named = ", ".join(gone) if len(gone) <= 5 else f"{gone[0]} … {gone[-1]}"
        log.warning(f"{len(gone)} partitions of the range are not in the plan any more, and are left out: {named}")
    return [key for key in keys if key in planned] or list(keys)


def assets_only_checked(context: dg.AssetExecutionContext, recipe: Recipe) -> list[Asset]:
    """Assets whose checks are selected and which are not: what "Execute" on a check in the web UI asks for."""
    keys = {check.asset_key for check in context.selected_asset_check_keys} - set(context.selected_asset_keys)
    return [asset for asset in recipe.partitioned if recipe.key(asset) in keys]


def partitions_asked_for(context: dg.AssetExecutionContext, recipe: Recipe, checked: Sequence[Asset]) -> list[str]:
    """The run's partitions. The web UI starts checks alone without any: those are of all that is materialized."""
    if context.selected_asset_keys or context.has_partition_key or context.has_partition_key_range:
        return list(context.partition_keys)
    materialized = [context.instance.get_materialized_partitions(recipe.key(asset)) for asset in checked]
    return sorted(set.intersection(*materialized)) if materialized else []


def materialize_student(
    context: dg.AssetExecutionContext, recipe: Recipe, platform: Platform
) -> dg.MaterializeResult[None]:
    """Train the small student on every complete partition, and show the curve."""
    planner = planner_of(recipe, platform, say=context.log.info)
    run = Run(context, recipe, platform, planner, recorder=None)
    with as_failure(), alive(platform.jobs_folder, context.run.run_id):
        if (plan_hash := plan_of_run(context)) is not None:
            planner.use_plan(plan_hash)
        work, shards = patiently(planner.student_work, context.log)
        run.carry_out(work)
    run.raise_if_anything_failed()
    ((unit,), n_planned) = work.units, planner.current_plan().n_shards
    folder = Path(unit.outputs[0].path)
    with as_failure(), storage_errors(folder, "read"):
        manifest = read_manifest(folder)
        curve = json.loads((folder / "curve.json").read_bytes())
    return dg.MaterializeResult(
        data_version=dg.DataVersion(manifest.data_version),
        metadata={
            "loss_curve": dg.MetadataValue.md(loss_picture_markdown(curve)),
            "first_loss": manifest.facts["first_loss"],
            "last_loss": manifest.facts["last_loss"],
            "shards": len(shards),
            "shards_in_plan": n_planned,
            **result_metadata(manifest, folder),
        },
    )


def plan_of_run(context: dg.AssetExecutionContext) -> str | None:
    """The hash of the plan that this run's caches were made by; None where the run makes none."""
    run = context.instance.get_run_by_id(context.run.run_id)
    return None if run is None else run.tags.get(PLAN_TAG)
