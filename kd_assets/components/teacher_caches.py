"""`TeacherCaches`: a recipe's YAML → its assets, checks, jobs and schedules.

The pydantic models here are the recipe file's schema (`dg check yaml` validates against them); right behind them stands
the frozen `Recipe` that everything else uses. Adding a teacher is adding a file, never code.
"""

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kd_assets.contract import EmbeddingParams, HiddenStateParams, StudentParams, TopkParams
from kd_assets.errors import SchedulerUnreachableError
from kd_assets.orchestration.materialize import materialize_caches, materialize_plan, materialize_student
from kd_assets.orchestration.nightly import nightly_requests
from kd_assets.orchestration.orphans import settle_orphans
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.profiles import Positive, ResourcesModel, refused
from kd_assets.orchestration.recipe import SHARD_PLAN, SHARDS_MANIFEST, STUDENT_SMOKE, Recipe, Source, Tasks, Teacher
from kd_assets.orchestration.recording import check_specs
from kd_assets.sources.plan import SourceSpec


class SourceModel(dg.Model, dg.Resolvable):
    """A file of documents: records with a text field, or with a list of chat messages."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    path: str
    """A file; `$NAME` stands for an environment variable, looked up when the shard plan is made."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    text_field: str = "text"
    messages_field: str = "messages"
    licence: str = "unknown"
    revision: str | None = None
    made_by: str | None = None
    """Key of the asset that writes this file, for the lineage (`demo/corpus`)."""


def _n_devices_refused(placements: list[str], when: dict[str, Any], because: str) -> dict[str, Any]:
    """JSON schema of a teacher: numbers of devices that these placements cannot have."""
    return {
        "if": {"properties": {"placement": {"enum": placements}}, "required": ["placement"]},
        "then": {"properties": {"n_devices": refused({"type": "integer", **when}, because)}},
    }


_ONE_IS_ONE = "1, or left out, beside placement one_device"
_SPLIT_IS_SEVERAL = "2 or more, or left out, beside a placement over several devices"
_NAMES_ITS_METHOD = "name the method: quant_method, as the to_dict() of its transformers configuration does"


class TeacherModel(dg.Model, dg.Resolvable):
    """The model that is run. (`model_id` and not `model`: dagster's Resolvable has a method of that name.)"""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                _n_devices_refused(["one_device"], {"minimum": 2}, _ONE_IS_ONE),
                _n_devices_refused(["tensor_parallel", "device_map"], {"maximum": 1}, _SPLIT_IS_SEVERAL),
            ]
        }
    )

    model_id: str
    """A hub id, or a folder when it starts with `/`, `.`, `~` or `$`."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    token_budget: Positive | None = None
    """Tokens of a batch, padding included; left out: found from the memory that is free once the teacher is loaded."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    quantization: Annotated[dict[str, Any], Field(json_schema_extra={"required": ["quant_method"]})] | None = None
    """A transformers quantisation configuration (`quant_method` and its parameters), applied on loading."""
    placement: Literal["auto", "one_device", "tensor_parallel", "device_map"] = "auto"
    """How a teacher lies on the GPUs of its process; auto: one GPU where it fits, else split over several."""
    n_devices: Positive | None = None
    """GPUs that one teacher is spread over."""
    compile: Literal["auto", "always", "never"] = "auto"
    recompute_documents: Annotated[int, Field(ge=1)] = 2
    seed: int = 0
    made_by: str | None = None

    @field_validator("quantization")
    @classmethod
    def _has_a_method(cls, quantization: dict[str, Any] | None) -> dict[str, Any] | None:
        if quantization is not None and "quant_method" not in quantization:
            raise ValueError(_NAMES_ITS_METHOD)
        return quantization

    @model_validator(mode="after")
    def _devices_suit_the_placement(self) -> "TeacherModel":
        if self.placement == "one_device" and self.n_devices not in (None, 1):
            raise ValueError(f"n_devices is {self.n_devices}; it can only be {_ONE_IS_ONE}")
        if self.placement in ("tensor_parallel", "device_map") and self.n_devices == 1:
            raise ValueError(f"n_devices is 1; it can only be {_SPLIT_IS_SEVERAL}")
        return self


class TopkModel(dg.Model, dg.Resolvable):
    k: Positive
    max_length: Positive
    draws: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Token ids drawn at random from each whole distribution besides (random-sampling KD)."""


class HiddenStatesModel(dg.Model, dg.Resolvable):
    blocks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    max_length: Positive


class EmbeddingsModel(dg.Model, dg.Resolvable):
    max_length: Positive


class CachesModel(dg.Model, dg.Resolvable):
    """Which caches the recipe has; one that is left out is not made."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    topk: TopkModel | None = None
    hidden_states: HiddenStatesModel | None = None
    embeddings: EmbeddingsModel | None = None

    @model_validator(mode="after")
    def _at_least_one(self) -> "CachesModel":
        if self.topk is None and self.hidden_states is None and self.embeddings is None:
            raise ValueError("name at least one of topk, hidden_states, embeddings")
        return self


class StudentModel(dg.Model, dg.Resolvable):
    steps: Positive = 60
    batch_documents: Positive = 8
    max_length: Positive = 256
    hidden_size: Positive = 128
    n_layers: Positive = 2
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    temperature: Annotated[float, Field(gt=0)] = 2.0
    seed: int = 0


class TasksModel(dg.Model, dg.Resolvable):
    n_tasks: Annotated[int, Field(gt=0, le=100_000)] = 1
    """Array tasks of a job at most; a task works through its share of the partitions, balanced by tokens."""
    concurrency: Positive = 1
    """Tasks that run at once."""
    processes_per_task: Annotated[int, Field(gt=0, le=64)] | None = None
    """Processes that share a task's partitions, each with an equal share of the node's GPUs and a teacher of its own;
    left out: as many as the teacher's size leaves room for, where `gpu_memory_gib` is known, else one."""
    slurm: ResourcesModel = ResourcesModel()
    """What each task asks for; the local scheduler does not look at it."""

    def to_tasks(self) -> Tasks:
        resources = dataclasses.replace(self.slurm.to_resources(), processes_per_task=self.processes_per_task)
        return Tasks(n_tasks=self.n_tasks, concurrency=self.concurrency, resources=resources)


class JobsModel(dg.Model, dg.Resolvable):
    """How each kind of job is split into array tasks, and what they ask for."""

    shards: TasksModel = TasksModel()
    teacher: TasksModel = TasksModel()
    student: TasksModel = TasksModel()


class NightlyModel(dg.Model, dg.Resolvable):
    """Cron lines of the two nightly schedules."""

    plan: str = "30 1 * * *"
    caches: str = "0 2 * * *"


class TeacherCaches(dg.Component, dg.Model, dg.Resolvable):
    """Teacher caches of one recipe: shard plan, tokenised shards, top-k, hidden-state and embedding caches, and a
    student that learns from them."""

    recipe: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
    """First part of every asset key, and the folder in the store."""
    description: str | None = None
    sources: Annotated[list[SourceModel], Field(min_length=1)]
    documents_per_shard: Positive = 10000
    teacher: TeacherModel
    caches: CachesModel
    student: StudentModel | None = None
    """Leave it out for no student_smoke asset."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    part_documents: Positive = 256
    part_tokens: Positive = 131072
    jobs: JobsModel = JobsModel()
    nightly: NightlyModel = NightlyModel()

    @field_validator("sources")
    @classmethod
    def _distinct_names(cls, sources: list[SourceModel]) -> list[SourceModel]:
        names = [s.name for s in sources]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"two sources are called {sorted(twice)[0]!r}")
        return sources

    def to_recipe(self) -> Recipe:
        caches = self.caches
        return Recipe(
            name=self.recipe,
            sources=tuple(
                Source(
                    spec=SourceSpec(file_format=s.format, **s.model_dump(exclude={"format", "made_by"})),
                    made_by=s.made_by,
                )
                for s in self.sources
            ),
            teacher=Teacher(model=self.teacher.model_id, **self.teacher.model_dump(exclude={"model_id"})),
            documents_per_shard=self.documents_per_shard,
            topk=None if caches.topk is None else TopkParams(**caches.topk.model_dump()),
            hidden_states=None
            if caches.hidden_states is None
            else HiddenStateParams(
                blocks=tuple(sorted(set(caches.hidden_states.blocks))), max_length=caches.hidden_states.max_length
            ),
            embeddings=None if caches.embeddings is None else EmbeddingParams(**caches.embeddings.model_dump()),
            student=None if self.student is None else StudentParams(**self.student.model_dump()),
            on_bad_record=self.on_bad_record,
            part_documents=self.part_documents,
            part_tokens=self.part_tokens,
            tasks={
                "shards": self.jobs.shards.to_tasks(),
                "teacher": self.jobs.teacher.to_tasks(),
                "student": self.jobs.student.to_tasks(),
            },
            nightly_plan_cron=self.nightly.plan,
            nightly_caches_cron=self.nightly.caches,
        )

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        return recipe_definitions(self.to_recipe(), self.description)

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        """What Dagster parses the YAML with, with the schema of these models for `dg check yaml`.

        Dagster's own schema lets every field be any string, since it may be a template; so it would find no wrong
        string, and call a wrong number "not valid under any of the given schemas" of the field's parent.
        """
        return _model_with_schema(cls)


@cache
def _model_with_schema(component: type[TeacherCaches]) -> type[BaseModel]:
    schema = component.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        properties = model.get("properties", {})
        model["properties"] = {name: _or_template(of_field) for name, of_field in properties.items()}
    derived: type[BaseModel] = component.model()
    return type(derived.__name__, (derived,), {"model_json_schema": classmethod(lambda *_, **__: schema)})


def _or_template(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field that may also be a `{{ template }}`, and null where it can be None.

    As a condition, and not as alternatives: so a wrong value is reported where it stands, with what is wrong about it.
    """
    allowed: list[dict[str, Any]] = [{"type": "string", "pattern": r"\{\{"}]
    said = {name: value for name, value in schema.items() if name in ("default", "description", "title")}
    asked = {name: value for name, value in schema.items() if name not in said}
    if {"type": "null"} in (alternatives := asked.get("anyOf", [])):
        allowed.append({"type": "null"})
        (asked,) = (a for a in alternatives if a != {"type": "null"})
    return {**said, "if": {"anyOf": allowed}, "else": asked}


def recipe_definitions(recipe: Recipe, description: str | None = None) -> dg.Definitions:
    """All that a recipe is in Dagster. Needs the resource `platform`."""
    assets = [shard_plan_asset(recipe, description), caches_assets(recipe)]
    if recipe.student is not None:
        assets.append(student_asset(recipe))
    return dg.Definitions.merge(
        dg.Definitions(
            assets=assets, schedules=[plan_schedule(recipe), caches_schedule(recipe)], sensors=[orphan_sensor(recipe)]
        ),
        recipe_jobs(recipe),
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
    """One spec a partitioned asset: the shards, then each cache of the recipe."""
    described = {
        SHARDS_MANIFEST: ("Tokenised documents with their loss masks.", {"parquet", "huggingface"}),
        "topk_cache": ("Top-k next-token log-probabilities against the full vocabulary.", {"parquet", "pytorch"}),
        "hidden_state_cache": ("Outputs of decoder blocks, in bfloat16.", {"arrow", "pytorch"}),
        "embedding_cache": ("Final hidden states pooled over each document.", {"parquet", "pytorch"}),
    }
    partitions = recipe.partitions
    specs = []
    for asset in (SHARDS_MANIFEST, *recipe.caches):
        description, kinds = described[asset]
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
    """Shards and caches in one step that any subset can be taken from.

    One step, so that a shard that cannot be tokenised does not keep the other shards of the same run from their caches,
    and a re-execution from failure comes back to both.
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


def recipe_jobs(recipe: Recipe) -> dg.Definitions:
    """`<recipe>_plan`, `<recipe>_caches` and, with a student, `<recipe>_student`."""
    jobs = [
        dg.define_asset_job(
            f"{recipe.name}_plan",
            selection=dg.AssetSelection.assets(recipe.key(SHARD_PLAN)),
            description="Pin the sources and register the shards.",
        ),
        dg.define_asset_job(
            f"{recipe.name}_caches",
            selection=dg.AssetSelection.assets(*(recipe.key(a) for a in (SHARDS_MANIFEST, *recipe.caches))),
            description="Tokenise shards and fill all caches of them in one teacher pass.",
        ),
    ]
    if recipe.student is not None:
        student = dg.define_asset_job(
            f"{recipe.name}_student",
            selection=dg.AssetSelection.assets(recipe.key(STUDENT_SMOKE)),
            description="Train the small student on every complete shard.",
        )
        jobs.append(student)
    return dg.Definitions(jobs=jobs)


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
    def nightly_caches(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        yield from nightly_requests(context.instance, recipe)

    return nightly_caches


def orphan_sensor(recipe: Recipe) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{recipe.name}_orphans",
        target=dg.AssetSelection.groups(recipe.name),
        minimum_interval_seconds=300,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Finds jobs without a run, which get a new run or are cancelled, and runs without a process.",
    )
    def orphans(context: dg.SensorEvaluationContext, platform: Platform) -> Iterator[dg.RunRequest | dg.SkipReason]:
        try:
            yield from settle_orphans(context.instance, recipe, platform.make_scheduler(), platform.jobs_folder)
        except SchedulerUnreachableError as e:
            yield dg.SkipReason(f"the scheduler does not answer, so nobody knows what lives: {e}")

    return orphans
