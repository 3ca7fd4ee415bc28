"""What a recipe is in Dagster: its assets, checks, jobs, schedules and sensors. A table of contents."""

from collections.abc import Iterator, Sequence
from datetime import timedelta

import dagster as dg

from kd_assets.dagster_internals import UnresolvedAssetJobDefinition
from kd_assets.errors import NO_ANSWER
from kd_assets.orchestration.automation import automation_sensor, missing_or_stale
from kd_assets.orchestration.card_asset import card_asset
from kd_assets.orchestration.definition_metadata import definition_metadata, kinds
from kd_assets.orchestration.failure_webhook import INTERVAL_S, WEBHOOK_VARIABLE, tell_of_failures
from kd_assets.orchestration.materialize import materialize_caches, materialize_plan, materialize_student
from kd_assets.orchestration.new_data import LOOK_EVERY_S, look_for_new_data
from kd_assets.orchestration.one_project import skip_of_another_project
from kd_assets.orchestration.orphans import settle_dead_runs, settle_orphans
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.recording.check_specs import check_specs, plan_check_specs
from kd_assets.orchestration.run_settings import CachesSettings, JobSettings
from kd_assets.orchestration.schedules import nightly_requests
from kd_assets.orchestration.staleness.coverage import evaluate_selected, results_of_new_plan
from kd_assets.orchestration.staleness.up_to_date import SENSOR_INTERVAL_S, look_whether_up_to_date
from kd_assets.recipes.exports import export_in_words
from kd_assets.recipes.recipe import SHARD_PLAN, SHARDS_MANIFEST, STUDENT_SMOKE, Recipe
from kd_assets.store import still_put_aside


def recipe_definitions(recipe: Recipe, platform: Platform | None = None) -> dg.Definitions:
    """All that a recipe is in Dagster. Needs the resource `kd_assets_platform`; with the same one here assets say where
    they lie, and which scheduler makes them."""
    assets = [shard_plan_asset(recipe, platform), caches_assets(recipe, platform), card_asset(recipe, platform)]
    if recipe.student is not None:
        assets.append(student_asset(recipe, platform))
    jobs = recipe_jobs(recipe)
    return dg.Definitions(
        assets=assets,
        jobs=jobs,
        schedules=[plan_schedule(recipe), *([caches_schedule(recipe)] if recipe.automation == "schedule" else [])],
        sensors=[
            orphan_sensor(recipe),
            up_to_date_sensor(recipe),
            new_data_sensor(recipe, jobs[:2]),
            failure_sensor(recipe),
            *([automation_sensor(recipe)] if recipe.automation == "condition" else []),
        ],
    )


def _made_by(*keys: str | None) -> list[dg.AssetKey]:
    return [dg.AssetKey.from_user_string(key) for key in dict.fromkeys(keys) if key is not None]


def shard_plan_asset(recipe: Recipe, at: Platform | None = None) -> dg.AssetsDefinition:
    @dg.asset(
        key=recipe.key(SHARD_PLAN),
        deps=_made_by(*(s.made_by for s in recipe.sources)),
        description="Pins the sources and says which records make which shard.",
        metadata=definition_metadata(recipe, SHARD_PLAN, at),
        kinds={"python", "dataset"},
        code_version=recipe.code_version(SHARD_PLAN),
        check_specs=plan_check_specs(recipe),
        freshness_policy=None
        if recipe.fresh_within_hours is None
        else dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=recipe.fresh_within_hours)),
        # An unpartitioned asset has one run anyway; the policy lets the CLI take it into a range of partitions.
        backfill_policy=dg.BackfillPolicy.single_run(),
        group_name=recipe.name,
        owners=recipe.owners,
        tags=recipe.tags,
    )
    def shard_plan(
        context: dg.AssetExecutionContext, kd_assets_platform: dg.ResourceParam[Platform]
    ) -> dg.MaterializeResult:  # type: ignore[type-arg]  # beside checks Dagster knows it by its bare name only
        result = materialize_plan(context, recipe, kd_assets_platform)
        assert result.data_version is not None
        checks = results_of_new_plan(context, recipe, kd_assets_platform, result.data_version.value)
        return dg.MaterializeResult(data_version=result.data_version, metadata=result.metadata, check_results=checks)

    return shard_plan


def caches_specs(recipe: Recipe, at: Platform | None = None) -> list[dg.AssetSpec]:
    """One spec a partitioned asset: the shards, then each cache of the recipe, then each export."""
    is_cut = recipe.topk is not None and (recipe.topk.vocabulary is not None or recipe.topk.token_ids is not None)
    against = "the ids that a student can have" if is_cut else "the full vocabulary"
    described = {
        SHARDS_MANIFEST: ("Tokenised documents with their loss masks.", {"parquet", "huggingface"}),
        "topk_cache": (f"Top-k next-token log-probabilities against {against}.", {"parquet", "pytorch"}),
        "hidden_state_cache": ("Outputs of decoder blocks, in bfloat16.", {"arrow", "pytorch"}),
        "embedding_cache": ("Final hidden states pooled over each document.", {"parquet", "pytorch"}),
        **{
            asset: (export_in_words(params, recipe.caches_of([asset])), {"export"})
            for asset, params in recipe.export_params.items()
        },
    }
    partitions = recipe.partitions
    specs = []
    for asset in recipe.partitioned:
        description, of_files = described[asset]
        if asset in recipe.export_params:
            deps = [recipe.key(cache) for cache in recipe.caches_of([asset])]
        else:
            # The tokenizer comes with the teacher, so the shards depend on it, too.
            deps = [
                recipe.key(SHARD_PLAN if asset == SHARDS_MANIFEST else SHARDS_MANIFEST),
                *_made_by(recipe.teacher.made_by),
            ]
        specs.append(
            dg.AssetSpec(
                recipe.key(asset),
                deps=deps,
                description=description,
                metadata=definition_metadata(recipe, asset, at),
                kinds=kinds(recipe, asset, of_files, at),
                code_version=recipe.code_version(asset),
                partitions_def=partitions,
                automation_condition=missing_or_stale() if recipe.automation == "condition" else None,
                skippable=True,
                group_name=recipe.name,
                owners=recipe.owners,
                tags=recipe.tags,
            )
        )
    return specs


def caches_assets(recipe: Recipe, at: Platform | None = None) -> dg.AssetsDefinition:
    """Shards, caches and exports in one step that any subset can be taken from.

    One step, so that a shard that cannot be tokenised does not keep the other shards of the same run from their caches,
    and a re-execution from failure comes back to all.
    """

    @dg.multi_asset(
        name=f"{recipe.name}__teacher_caches",
        specs=caches_specs(recipe, at),
        check_specs=check_specs(recipe, recipe.partitions),
        can_subset=True,
        partitions_def=recipe.partitions,
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool=f"{recipe.name}_teacher",
    )
    def teacher_caches(
        context: dg.AssetExecutionContext, config: CachesSettings, kd_assets_platform: dg.ResourceParam[Platform]
    ) -> Iterator[dg.MaterializeResult[None] | dg.Output[None]]:
        yield from materialize_caches(context, recipe, kd_assets_platform, config)
        evaluate_selected(context, recipe, kd_assets_platform)

    return teacher_caches


def student_asset(recipe: Recipe, at: Platform | None = None) -> dg.AssetsDefinition:
    @dg.asset(
        key=recipe.key(STUDENT_SMOKE),
        deps=[recipe.key(asset) for asset in recipe.caches],
        description="A small student trained for a few steps: proof that the caches teach.",
        metadata=definition_metadata(recipe, STUDENT_SMOKE, at),
        kinds=kinds(recipe, STUDENT_SMOKE, {"pytorch"}, at),
        code_version=recipe.code_version(STUDENT_SMOKE),
        backfill_policy=dg.BackfillPolicy.single_run(),
        group_name=recipe.name,
        owners=recipe.owners,
        tags=recipe.tags,
    )
    def student_smoke(
        context: dg.AssetExecutionContext, config: JobSettings, kd_assets_platform: dg.ResourceParam[Platform]
    ) -> dg.MaterializeResult[None]:
        return materialize_student(context, recipe, kd_assets_platform, config)

    return student_smoke


def recipe_jobs(recipe: Recipe) -> list[UnresolvedAssetJobDefinition]:
    """`<recipe>_plan`, `<recipe>_caches` and, with a student, `<recipe>_student`. Their runs are one process each,
    whatever executor the project has: see `TeacherCaches.build_defs`."""
    jobs = [
        dg.define_asset_job(
            f"{recipe.name}_plan",
            selection=dg.AssetSelection.assets(recipe.key(SHARD_PLAN)),
            description="Pin the sources and register the shards.",
            executor_def=dg.in_process_executor,
        ),
        dg.define_asset_job(
            f"{recipe.name}_caches",
            selection=dg.AssetSelection.assets(*map(recipe.key, recipe.partitioned)),
            description="Tokenise shards, fill all caches of them in one teacher pass, and export them.",
            executor_def=dg.in_process_executor,
        ),
    ]
    if recipe.student is not None:
        student = dg.define_asset_job(
            f"{recipe.name}_student",
            selection=dg.AssetSelection.assets(recipe.key(STUDENT_SMOKE)),
            description="Train the small student on every complete shard.",
            executor_def=dg.in_process_executor,
        )
        jobs.append(student)
    return jobs


def plan_schedule(recipe: Recipe) -> dg.ScheduleDefinition:
    return dg.ScheduleDefinition(
        name=f"{recipe.name}_nightly_plan",
        job_name=f"{recipe.name}_plan",
        cron_schedule=recipe.nightly_plan_cron,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Looks at the sources, so that the night's caches follow what changed in them.",
    )


def caches_schedule(recipe: Recipe) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=f"{recipe.name}_nightly_caches",
        job_name=f"{recipe.name}_caches",
        cron_schedule=recipe.nightly_caches_cron,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Back-fills what is missing, stale or in quarantine; never what a live run already holds.",
    )
    def nightly_caches(
        context: dg.ScheduleEvaluationContext, kd_assets_platform: dg.ResourceParam[Platform]
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        if (skip := skip_of_another_project(recipe, kd_assets_platform)) is not None:
            yield skip
            return
        settle_dead_runs(context.instance, recipe, kd_assets_platform.jobs_folder)
        put_aside = still_put_aside(kd_assets_platform.recipe_folder(recipe.name))
        yield from nightly_requests(context.instance, recipe, put_aside=put_aside, say=context.log.info)

    return nightly_caches


def orphan_sensor(recipe: Recipe) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{recipe.name}_orphans",
        target=dg.AssetSelection.groups(recipe.name),
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Finds jobs without a run, which get a new run or are cancelled, and runs without a process.",
    )
    def orphans(
        context: dg.SensorEvaluationContext, kd_assets_platform: dg.ResourceParam[Platform]
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        if (skip := skip_of_another_project(recipe, kd_assets_platform)) is not None:
            yield skip
            return
        # It submits nothing, so it writes no secrets.
        scheduler = kd_assets_platform.make_scheduler(submits=False)
        try:
            yield from settle_orphans(
                context.instance,
                recipe,
                scheduler,
                kd_assets_platform.jobs_folder,
                put_aside=lambda: still_put_aside(kd_assets_platform.recipe_folder(recipe.name)),
            )
        except NO_ANSWER as e:
            yield dg.SkipReason(f"nobody knows what lives, since there is no answer: {e}")

    return orphans


def up_to_date_sensor(recipe: Recipe) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{recipe.name}_up_to_date",
        target=dg.AssetSelection.groups(recipe.name),
        minimum_interval_seconds=SENSOR_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Says on each asset's page whether it is complete and that of today. It runs nothing.",
    )
    def up_to_date(
        context: dg.SensorEvaluationContext, kd_assets_platform: dg.ResourceParam[Platform]
    ) -> dg.SkipReason:
        return skip_of_another_project(recipe, kd_assets_platform) or look_whether_up_to_date(
            context, recipe, kd_assets_platform
        )

    return up_to_date


def new_data_sensor(recipe: Recipe, jobs: Sequence[UnresolvedAssetJobDefinition]) -> dg.SensorDefinition:
    """`jobs`: of the plan and of the caches, the very ones that the recipe's definitions have."""

    @dg.sensor(
        name=f"{recipe.name}_new_data",
        jobs=list(jobs),
        minimum_interval_seconds=LOOK_EVERY_S,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Has sources planned anew that have changed, and then asks for what is missing or in quarantine.",
    )
    def new_data(
        context: dg.SensorEvaluationContext, kd_assets_platform: dg.ResourceParam[Platform]
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        if (skip := skip_of_another_project(recipe, kd_assets_platform)) is not None:
            yield skip
            return
        yield from look_for_new_data(context, recipe, kd_assets_platform)

    return new_data


def failure_sensor(recipe: Recipe) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{recipe.name}_failures",
        target=dg.AssetSelection.groups(recipe.name),
        minimum_interval_seconds=INTERVAL_S,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description=f"Tells the webhook that {WEBHOOK_VARIABLE} names of each failed run. It runs nothing.",
    )
    def failures(context: dg.SensorEvaluationContext, kd_assets_platform: dg.ResourceParam[Platform]) -> dg.SkipReason:
        return skip_of_another_project(recipe, kd_assets_platform) or tell_of_failures(context, recipe)

    return failures
