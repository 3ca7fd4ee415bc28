"""What a `defs.yaml` can be: the component types of this project; and the recipes they make, by name.

`type: kd_assets.components.TeacherCaches` in a recipe names the class below.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import dagster as dg
from pydantic import BaseModel, Field, field_validator

from kd_assets.contract import EmbeddingParams, StudentParams
from kd_assets.errors import RecipeError
from kd_assets.model_files.size import TeacherShape
from kd_assets.orchestration.assets import recipe_definitions
from kd_assets.orchestration.platform import PROJECT_FOLDER
from kd_assets.recipes.cluster_profile import Positive
from kd_assets.recipes.exports import Exports, export_params
from kd_assets.recipes.models import CachesModel, JobsModel, NightlyModel, SourceModel, StudentModel, TeacherModel
from kd_assets.recipes.recipe import Recipe, Source, TeacherSettings, Tokenising
from kd_assets.sources.spec import DatasetSpec, Sharding, SourceSpec


class TeacherCaches(dg.Component, dg.Model, dg.Resolvable):
    """Teacher caches of one recipe: shard plan, tokenised shards, top-k, hidden-state and embedding caches, and a
    student that learns from them."""

    recipe: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
    """First part of every asset key, and the folder in the store."""
    description: str | None = None
    sources: Annotated[list[SourceModel], Field(min_length=1)]
    documents_per_shard: Positive = 10000
    tokens_per_shard: Positive | None = None
    """Shards of about this many tokens, in the place of so many documents."""
    max_documents: Positive | None = None
    max_tokens: Positive | None = None
    """About so many tokens in all, counted as the plan estimates them."""
    drop_duplicates: bool = False
    """Whether exact copies of a record are left out."""
    seed: int | None = None
    """Take sources in stretches drawn with this seed; left out: in the order of their records."""
    long_documents: Literal["truncate", "split", "drop"] = "truncate"
    """What becomes of a document of more tokens than the longest max_length."""
    overlap: Annotated[int, Field(ge=0)] = 0
    """Tokens that a window of a split document has in common with the one before."""
    chat_template: str | None = None
    """A file (`$KD_HOME/mine.jinja`), or the name of one of the tokenizer's templates; left out: its default."""
    chat_template_kwargs: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Variables for the chat template (`{enable_thinking: false}`)."""
    tools: list[dict[str, Any]] | None = None
    """Tools of every chat that brings none of its own, as JSON schemas."""
    turns: Literal["all", "last", "refuse"] = "all"
    """Chats under a template that rewrites earlier turns: a document a turn, one of the last turn, or an error."""
    allowed_licences: list[str] | None = None
    """Of sources; left out: every licence that is known."""
    when_space_is_short: Literal["refuse", "warn"] = "refuse"
    """What becomes of a plan whose caches do not fit where they will lie."""
    teacher: TeacherModel
    caches: CachesModel
    student: StudentModel | None = None
    """Leave it out for no student_smoke asset."""
    exports: Exports
    """Formats that the caches are written in besides, an asset each: names (`hf`), or mappings with a format and its
    options (`{format: specforge, max_length: 2048}`)."""
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
                    spec=SourceSpec(
                        file_format=s.format,
                        ignore_fields=tuple(sorted(set(s.ignore_fields))),
                        dataset=None if s.dataset is None else DatasetSpec(**s.dataset.model_dump()),
                        **s.model_dump(exclude={"format", "made_by", "ignore_fields", "dataset"}),
                    ),
                    made_by=s.made_by,
                )
                for s in self.sources
            ),
            teacher=TeacherSettings(
                model=self.teacher.model_id,
                size=None if self.teacher.size is None else TeacherShape(**self.teacher.size.model_dump()),
                **self.teacher.model_dump(exclude={"model_id", "size"}),
            ),
            topk=None if caches.topk is None else caches.topk.to_params(),
            hidden_states=None if caches.hidden_states is None else caches.hidden_states.to_params(),
            embeddings=None if caches.embeddings is None else EmbeddingParams(**caches.embeddings.model_dump()),
            student=None if self.student is None else StudentParams(**self.student.model_dump()),
            exports=export_params(self.exports),
            on_bad_record=self.on_bad_record,
            part_documents=self.part_documents,
            part_tokens=self.part_tokens,
            sharding=Sharding(
                documents_per_shard=self.documents_per_shard,
                tokens_per_shard=self.tokens_per_shard,
                max_documents=self.max_documents,
                max_tokens=self.max_tokens,
                drop_duplicates=self.drop_duplicates,
                seed=self.seed,
            ),
            tokenising=Tokenising(
                on_long=self.long_documents,
                overlap=self.overlap,
                chat_template=self.chat_template,
                chat_template_kwargs=self.chat_template_kwargs,
                tools=None if self.tools is None else tuple(self.tools),
                turns=self.turns,
            ),
            allowed_licences=None if self.allowed_licences is None else tuple(self.allowed_licences),
            when_space_is_short=self.when_space_is_short,
            tasks={
                "shards": self.jobs.shards.to_tasks(),
                "teacher": self.jobs.teacher.to_tasks(),
                "student": self.jobs.student.to_tasks(),
                "export": (self.jobs.export or self.jobs.shards).to_tasks(),
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


def load_recipe(name: str, project: Path = PROJECT_FOLDER) -> Recipe:
    """Raises RecipeError, listing the recipes that there are, for a name that none has."""
    recipes = load_recipes(project)
    if name not in recipes:
        raise RecipeError(f"there is no recipe {name!r}; there are {', '.join(sorted(recipes)) or 'none'}")
    return recipes[name]


def load_recipes(project: Path = PROJECT_FOLDER) -> dict[str, Recipe]:
    """Every recipe under `defs/`, without building its assets. Raises RecipeError for a file with something wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        try:
            found = dg.ComponentTree.for_project(project).get_all_components(of_type=TeacherCaches)
        except Exception as e:
            raise RecipeError(
                f"the recipes of {project} cannot be loaded ({_innermost(e)}): "
                "`dg check yaml kd_assets/defs/<recipe>` names file and line"
            ) from e
        return {component.recipe: component.to_recipe() for component in found}


def _innermost(error: BaseException) -> str:
    """What is really wrong: Dagster wraps it in the tree of everything that was being loaded."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())
