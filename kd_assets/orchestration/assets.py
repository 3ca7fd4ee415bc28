"""What a recipe is in Dagster: its assets, checks, jobs, schedules and sensors. A table of contents."""

from collections.abc import Iterator, Sequence

import dagster as dg

from kd_assets.dagster_internals import UnresolvedAssetJobDefinition
from kd_assets.errors import NO_ANSWER
from kd_assets.orchestration.materialize import materialize_caches, materialize_plan, materialize_student
from kd_assets.orchestration.new_data import LOOK_EVERY_S, look_for_new_data
from kd_assets.orchestration.orphans import settle_dead_runs, settle_orphans
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.recording.recorder import check_specs
from kd_assets.orchestration.schedules import nightly_requests
from kd_assets.recipes.recipe import SHARD_PLAN, SHARDS_MANIFEST, STUDENT_SMOKE, Recipe
from kd_assets.store import still_put_aside


def recipe_definitions(recipe: Recipe, description: str | None = None) -> dg.Definitions:
    """All that a recipe is in Dagster. Needs the resource `platform`."""
    assets = [shard_plan_asset(recipe, description), caches_assets(recipe)]
    if recipe.student is not None:
        assets.append(student_asset(recipe))
    jobs = recipe_jobs(recipe)
    return dg.Definitions(
        assets=assets,
        jobs=jobs,
        schedules=[plan_schedule(recipe), caches_schedule(recipe)],
        sensors=[orphan_sensor(recipe), new_data_sensor(recipe, jobs[:2])],
    )


def _made_by(*keys: str | None) -> list[dg.AssetKey]:
    return [dg.AssetKey.from_user_string(key) for key in dict.fromkeys(keys) if key is not None]


def shard_plan_asset(recipe: Recipe, description: str | None) -> dg.AssetsDefinition:
    @dg.asset(
        key=recipe.key(SHARD_PLAN),
        deps=_made_by(*(s.made_by for s in recipe.sources)),
        description=description or "Pins the sources and says which records make which shard.",
        group_name=recipe.name,
        kinds={"python", "dataset"},
        code_version=recipe.code_version(SHARD_PLAN),
        # An unpartitioned asset has one run anyway; the policy lets the CLI take it into a range of partitions.
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def shard_plan(context: dg.AssetExecutionContext, platform: Platform) -> dg.MaterializeResult[None]:
        return materialize_plan(context, recipe, platform)

    return shard_plan


def caches_specs(recipe: Recipe) -> list[dg.AssetSpec]:
    """One spec a partitioned asset: the shards, then each cache of the recipe, then each export."""
    is_cut = recipe.topk is not None and (recipe.topk.vocabulary is not None or recipe.topk.token_ids is not None)
    against = "the ids that a student can have" if is_cut else "the full vocabulary"
    described = {
        SHARDS_MANIFEST: ("Tokenised documents with their loss masks.", {"parquet", "huggingface"}),
        "topk_cache": (f"Top-k next-token log-probabilities against {against}.", {"parquet", "pytorch"}),
        "hidden_state_cache": ("Outputs of decoder blocks, in bfloat16.", {"arrow", "pytorch"}),
        "embedding_cache": ("Final hidden states pooled over each document.", {"parquet", "pytorch"}),
        **{
            asset: (f"The caches as files of the format {params.format_name}.", {"export"})
            for asset, params in recipe.export_params.items()
        },
    }
    partitions = recipe.partitions
    specs = []
    for asset in recipe.partitioned:
        description, kinds = described[asset]
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
                group_name=recipe.name,
                kinds=kinds,
                code_version=recipe.code_version(asset),
                partitions_def=partitions,
                skippable=True,
            )
        )
    return specs


def caches_assets(recipe: Recipe) -> dg.AssetsDefinition:
    """Shards, caches and exports in one step that any subset can be taken from.

    One step, so that a shard that cannot be tokenised does not keep the other shards of the same run from their caches,
    and a re-execution from failure comes back to all.
    """

    @dg.multi_asset(
        name=f"{recipe.name}__teacher_caches",
        specs=caches_specs(recipe),
        check_specs=check_specs(recipe, recipe.partitions),
        can_subset=True,
        partitions_def=recipe.partitions,
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool=f"{recipe.name}_teacher",
    )
    def teacher_caches(context: dg.AssetExecutionContext, platform: Platform) -> Iterator[dg.MaterializeResult[None]]:
        yield from materialize_caches(context, recipe, platform)

    return teacher_caches


def student_asset(recipe: Recipe) -> dg.AssetsDefinition:
    @dg.asset(
        key=recipe.key(STUDENT_SMOKE),
        deps=[recipe.key(asset) for asset in recipe.caches],
        description="A small student trained for a few steps: proof that the caches teach.",
        group_name=recipe.name,
        kinds={"pytorch"},
        code_version=recipe.code_version(STUDENT_SMOKE),
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def student_smoke(context: dg.AssetExecutionContext, platform: Platform) -> dg.MaterializeResult[None]:
        return materialize_student(context, recipe, platform)

    return student_smoke


def recipe_jobs(recipe: Recipe) -> list[UnresolvedAssetJobDefinition]:
    """`<recipe>_plan`, `<recipe>_caches` and, with a student, `<recipe>_student`."""
    jobs = [
        dg.define_asset_job(
            f"{recipe.name}_plan",
            selection=dg.AssetSelection.assets(recipe.key(SHARD_PLAN)),
            description="Pin the sources and register the shards.",
        ),
        dg.define_asset_job(
            f"{recipe.name}_caches",
            selection=dg.AssetSelection.assets(*map(recipe.key, recipe.partitioned)),
            description="Tokenise shards, fill all caches of them in one teacher pass, and export them.",
        ),
    ]
    if recipe.student is not None:
        student = dg.define_asset_job(
            f"{recipe.name}_student",
            selection=dg.AssetSelection.assets(recipe.key(STUDENT_SMOKE)),
            description="Train the small student on every complete shard.",
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
        description="Back-fills what is missing or stale; never what a live run already holds.",
    )
    def nightly_caches(
        context: dg.ScheduleEvaluationContext, platform: Platform
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        settle_dead_runs(context.instance, recipe, platform.jobs_folder)
        put_aside = still_put_aside(platform.recipe_folder(recipe.name))
        yield from nightly_requests(context.instance, recipe, put_aside=put_aside)

    return nightly_caches


def orphan_sensor(recipe: Recipe) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{recipe.name}_orphans",
        target=dg.AssetSelection.groups(recipe.name),
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Finds jobs without a run, which get a new run or are cancelled, and runs without a process.",
    )
    def orphans(context: dg.SensorEvaluationContext, platform: Platform) -> Iterator[dg.RunRequest | dg.SkipReason]:
        # It submits nothing, so it writes no secrets.
        scheduler = platform.make_scheduler(submits=False)
        try:
            yield from settle_orphans(context.instance, recipe, scheduler, platform.jobs_folder)
        except NO_ANSWER as e:
            yield dg.SkipReason(f"nobody knows what lives, since there is no answer: {e}")

    return orphans


def new_data_sensor(recipe: Recipe, jobs: Sequence[UnresolvedAssetJobDefinition]) -> dg.SensorDefinition:
    """`jobs`: of the plan and of the caches, the very ones that the recipe's definitions have."""

    @dg.sensor(
        name=f"{recipe.name}_new_data",
        jobs=list(jobs),
        minimum_interval_seconds=LOOK_EVERY_S,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Has sources planned anew that have changed, and then asks for the partitions that are missing.",
    )
    def new_data(context: dg.SensorEvaluationContext, platform: Platform) -> Iterator[dg.RunRequest | dg.SkipReason]:
        yield from look_for_new_data(context, recipe, platform)

    return new_data
