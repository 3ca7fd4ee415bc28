"""What a materialization does: plan the work, have what is missing made (`driving`), record each result.

The bodies of the assets that `assets` declares. The rule they keep: every partition that was asked for ends the run
either recorded or named in its failure.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import dagster as dg

from kd_assets.cards.words import bytes_in_words
from kd_assets.contract import Asset
from kd_assets.dagster_internals import already_recorded, is_forgotten_at_its_end, withdraw_planned_checks
from kd_assets.durable import storage_errors
from kd_assets.errors import InputError, KdAssetsError
from kd_assets.model_files.digests import Say
from kd_assets.orchestration.billing.bill import Bill, make_bill, require_states_fit_their_codec
from kd_assets.orchestration.billing.words import rows, why_it_does_not_fit
from kd_assets.orchestration.card_asset import refresh_card
from kd_assets.orchestration.driving.waiting import Log
from kd_assets.orchestration.kept_records import require_kept_records
from kd_assets.orchestration.one_project import require_one_project
from kd_assets.orchestration.orphans import alive
from kd_assets.orchestration.planning.planned_exports import export_work
from kd_assets.orchestration.planning.planned_recoding import partition_key_of, recode_work
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.orchestration.planning.planner import Planner
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.recomputing import Recomputing
from kd_assets.orchestration.recording.check_specs import UP_TO_DATE
from kd_assets.orchestration.recording.earlier_jobs import EarlierJobs
from kd_assets.orchestration.recording.lengths_picture import observe_lengths
from kd_assets.orchestration.recording.loss_picture import loss_picture_markdown
from kd_assets.orchestration.recording.metadata import result_metadata
from kd_assets.orchestration.recording.recorder import Recorder, latest_data_version
from kd_assets.orchestration.run import Run, as_failure, patiently
from kd_assets.orchestration.run_settings import CachesSettings, JobSettings, settle
from kd_assets.orchestration.schedules import NO_PLAN_YET, partitions_held_by_live_runs, planned_partitions
from kd_assets.recipes.recipe import SHARD_PLAN, SHARDS_MANIFEST, STUDENT_SMOKE, Recipe
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
        require_kept_records(context, platform)
        require_one_project(recipe, platform)
        plan = planner.draft_plan(keeps_copies=True)
        bill = bill_to_show(recipe, platform, planner, plan, context.log)
        planner.adopt_plan(plan)
    for line in plan.said:
        context.log.warning(line)
    keys = plan.keys
    name = str(recipe.partitions.name)
    present = planned_partitions(context.instance, recipe)
    held = partitions_held_by_live_runs(context.instance, recipe, present)
    register_partitions(context.instance, name, keys, held=held)
    if is_forgotten_at_its_end(context.instance):
        context.log.warning(
            f"DAGSTER_HOME is not set, so this Dagster is a temporary folder and forgets the {len(keys)} partitions "
            "when it ends. Set it to a folder that stays, for every command (export DAGSTER_HOME="
            f"{platform.home_folder / 'dagster'}), and materialize shard_plan again"
        )
    return dg.MaterializeResult(
        data_version=dg.DataVersion(plan.plan_hash),
        metadata={
            "shards": len(keys),
            "records": plan.totals["n_records"],
            "documents": plan.totals["n_documents"],
            "tokens": plan.totals["n_tokens"],
            "source_bytes": (n_bytes := sum(s.n_bytes for s in plan.sources)),
            "source_size": bytes_in_words(n_bytes),
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


def register_no_plan_yet(instance: dg.DagsterInstance, recipe: Recipe) -> bool:
    """Whether the recipe has no partition but the one that stands for them until it is planned; it gets that, and loses
    it where there are others: nothing keeps a plan from registering its own in the moment between question and
    answer."""
    name = str(recipe.partitions.name)
    present = instance.get_dynamic_partitions(name)
    if not present:
        instance.add_dynamic_partitions(name, [NO_PLAN_YET])
    elif NO_PLAN_YET in present and len(present) > 1:
        instance.delete_dynamic_partition(name, NO_PLAN_YET)
    return set(present) <= {NO_PLAN_YET}


def materialize_caches(
    context: dg.AssetExecutionContext, recipe: Recipe, platform: Platform, settings: CachesSettings
) -> Iterator[dg.MaterializeResult[None] | dg.Output[None]]:
    """Tokenise, cache and export the selected partitions, whichever of the recipe's assets are selected."""
    with as_failure(), alive(platform.jobs_folder, context.run.run_id):
        withdraw_planned_checks(context.instance, context.run.run_id, context.selected_asset_check_keys)
        selected = _make_caches(context, recipe, platform, settings)
    for asset in selected:
        yield already_recorded(recipe.key(asset))
    for output_name in context.assets_def.check_specs_by_output_name:
        # Each partition's evaluation is logged: without an output of its own Dagster would end a good run by saying
        # that the check has none.
        yield dg.Output(None, output_name)


def _make_caches(
    context: dg.AssetExecutionContext, recipe: Recipe, platform: Platform, settings: CachesSettings
) -> list[Asset]:
    """See to it that all that is selected is there and recorded; returns the selected assets."""
    selected = [a for a in recipe.partitioned if recipe.key(a) in context.selected_asset_keys]
    checked = assets_only_checked(context, recipe)
    if not selected and not checked:
        return []  # only what `coverage` evaluates was asked for
    keys = partitions_asked_for(context, recipe, checked)
    if not keys:
        raise dg.Failure(description="the selection holds no partition: is the range reversed?", allow_retries=False)
    require_kept_records(context, platform)
    settled = settle(settings, recipe, platform, selected)
    recipe, platform = settled.recipe, settled.platform
    require_one_project(recipe, platform)
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
    again = Recomputing(context.instance, context.run, settings.recompute, say=run.say)
    with run.saying_how_far_it_came(keys, selected):
        _make_selected(run, recipe, planner, selected, keys, again=again)
    _check_selected(run, recipe, planner, checked, keys)
    recorder.finish()
    if (variant := run.variants_made.get(SHARDS_MANIFEST)) is not None:
        observe_lengths(context, recipe, platform.recipe_folder(recipe.name), variant)
    if selected:
        run.say_what_was_done()
    try:
        run.raise_if_anything_failed()
    finally:
        if selected:
            refresh_card(context, recipe, platform, plan.keys)
    return selected


def _make_selected(
    run: Run, recipe: Recipe, planner: Planner, selected: Sequence[Asset], keys: Sequence[str], *, again: Recomputing
) -> None:
    """One kind of work after the other: each is of the partitions of which nothing has failed before."""
    if "topk_cache" in selected:  # before the shards, which may take hours
        planner.require_vocabulary()
    if SHARDS_MANIFEST in selected:
        run.carry_out(again.first(run.planned(planner.shards_work, keys)))
    if caches := [a for a in selected if a in recipe.caches]:
        work = run.planned(lambda some: planner.teacher_work(some, caches), run.without_failure(keys))
        run.make(recoded_first(run, recipe, run.reused(again.first(work)), run.say))
    if exports := [a for a in selected if a in recipe.export_params]:
        work = run.planned(lambda some: export_work(planner, recipe, some, exports), run.without_failure(keys))
        run.carry_out(again.first(work))


def _check_selected(run: Run, recipe: Recipe, planner: Planner, checked: Sequence[Asset], keys: Sequence[str]) -> None:
    """Checks alone, of what is there."""
    if caches := [a for a in checked if a in recipe.caches]:
        weights = planner.planned_weights()
        run.check(run.planned(lambda some: planner.teacher_work(some, caches, weights=weights), keys))
    if exports := [a for a in checked if a in recipe.export_params]:
        run.check(run.planned(lambda some: export_work(planner, recipe, some, exports), keys))


def recoded_first(run: Run, recipe: Recipe, missing: PlannedWork, say: Say) -> PlannedWork:
    """Have made of other results what can be of what is missing; returns what the teacher is to be asked for. What
    could not be recoded is not asked of it: that would cost what nobody expects."""
    if not recipe.recode or not missing.units:
        return missing
    units = {unit.partition_key: unit for unit in missing.units}
    recoding = run.planned(lambda keys: recode_work([units[key] for key in keys], say), list(units))
    if recoding.units or recoding.impossible:
        run.carry_out(recoding)
    recoded = {output.path for unit in recoding.units for output in unit.outputs}
    return missing.only(
        lambda output: output.path not in recoded and partition_key_of(output) not in recoding.impossible
    )


def resolved(keys: Sequence[str], plan: ShardPlan, log: Log) -> list[str]:
    """A range's partitions that the plan has: others may have been in an older one, when the run was queued. All of
    them where it has none, which then fail by name."""
    planned = set(plan.keys)
    if gone := [key for key in keys if key not in planned]:
        named = ", ".join(gone) if len(gone) <= 5 else f"{gone[0]} … {gone[-1]}"
        log.warning(f"{len(gone)} partitions of the range are not in the plan any more, and are left out: {named}")
    return [key for key in keys if key in planned] or list(keys)


def assets_only_checked(context: dg.AssetExecutionContext, recipe: Recipe) -> list[Asset]:
    """Assets of which checks of partitions are selected, and not themselves: what "Execute" on a check in the web UI
    asks for."""
    checked = {check.asset_key for check in context.selected_asset_check_keys if check.name != UP_TO_DATE}
    keys = checked - set(context.selected_asset_keys)
    return [asset for asset in recipe.partitioned if recipe.key(asset) in keys]


def partitions_asked_for(context: dg.AssetExecutionContext, recipe: Recipe, checked: Sequence[Asset]) -> list[str]:
    """The run's partitions. The web UI starts checks alone without any: those are of all that is materialized."""
    if context.selected_asset_keys or context.has_partition_key or context.has_partition_key_range:
        return list(context.partition_keys)
    materialized = [context.instance.get_materialized_partitions(recipe.key(asset)) for asset in checked]
    return sorted(set.intersection(*materialized)) if materialized else []


def materialize_student(
    context: dg.AssetExecutionContext, recipe: Recipe, platform: Platform, settings: JobSettings
) -> dg.MaterializeResult[None]:
    """Train the small student on every complete partition, and show the curve."""
    with as_failure():
        settled = settle(settings, recipe, platform, [STUDENT_SMOKE])
    recipe, platform = settled.recipe, settled.platform
    planner = planner_of(recipe, platform, say=context.log.info)
    run = Run(context, recipe, platform, planner, recorder=None)
    with as_failure(), alive(platform.jobs_folder, context.run.run_id):
        require_kept_records(context, platform)
        require_one_project(recipe, platform)
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
            **result_metadata(
                manifest,
                folder,
                job=EarlierJobs(platform.jobs_folder).task_facts(manifest),
                reused=manifest.provenance.get("dagster_run_id") != context.run.run_id,
            ),
        },
    )


def plan_of_run(context: dg.AssetExecutionContext) -> str | None:
    """The hash of the plan that this run's caches were made by; None where the run makes none."""
    run = context.instance.get_run_by_id(context.run.run_id)
    return None if run is None else run.tags.get(PLAN_TAG)
