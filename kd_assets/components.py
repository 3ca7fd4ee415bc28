"""What a `defs.yaml` can be: the component type of this package; and the recipes of a project, by name.

`type: kd_assets.TeacherCaches` in a recipe names the class below, and so does `kd_assets.components.TeacherCaches`, its
name in recipes of before 0.2.0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import dagster as dg
from pydantic import BaseModel, Field, field_validator

from kd_assets.contract import EmbeddingParams, StudentParams
from kd_assets.errors import RecipeError
from kd_assets.model_files.size import TeacherShape
from kd_assets.orchestration.assets import recipe_definitions
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.cluster_profile import Positive
from kd_assets.recipes.commit_url import commit_url
from kd_assets.recipes.exports import Exports, export_params
from kd_assets.recipes.models import (
    CachesModel,
    JobsModel,
    NightlyModel,
    Owners,
    SourceModel,
    StudentModel,
    Tags,
    TeacherModel,
)
from kd_assets.recipes.parts import Loaded, load_parts
from kd_assets.recipes.project import project_folder
from kd_assets.recipes.recipe import Recipe, Source, TeacherSettings, Tokenising
from kd_assets.recipes.scaffold import RecipeScaffolder
from kd_assets.sources.spec import DatasetSpec, Sharding, SourceSpec


@dg.scaffold_with(RecipeScaffolder)
class TeacherCaches(dg.Component, dg.Model, dg.Resolvable):
    """Teacher caches for LLM distillation, of one recipe.

    A shard plan over the sources, tokenised shards, top-k, hidden-state and embedding caches of them (one teacher load,
    one forward pass), exports, and a small student that learns from them: partitioned assets, computed by jobs.
    """

    recipe: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
    """First part of every asset key, and the folder in the store."""
    description: str | None = None
    """Shown with the recipe's assets, beside what each of them is."""
    owners: Annotated[Owners, Field(default_factory=list)]
    """Of all its assets, as Dagster has them: addresses (`ann@example.org`) and teams (`team:language`)."""
    tags: Annotated[Tags, Field(default_factory=dict)]
    """Of all its assets, to be found by: `{domain: code}`."""
    sources: Annotated[list[SourceModel], Field(min_length=1)]
    documents_per_shard: Positive = 10000
    """Documents of a shard, which is a partition."""
    tokens_per_shard: Positive | None = None
    """Shards of about this many tokens, in the place of so many documents."""
    max_documents: Positive | None = None
    """The plan ends after so many."""
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
    fresh_within_hours: Positive | None = None
    """The web UI shows `shard_plan` as overdue when nobody has looked at the sources for so long; left out: never."""
    teacher: TeacherModel
    caches: CachesModel
    student: StudentModel | None = None
    """Leave it out for no student_smoke asset."""
    exports: Exports
    """Formats that the caches are written in besides, an asset each: names (`hf`), or mappings with a format and its
    options (`{format: specforge, max_length: 2048}`)."""
    recode: bool = True
    """Whether a cache of which a result is there that differs by its codec alone is made of that, on CPUs, in the place
    of asking the teacher again: to the same bytes."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """A record that cannot be a document ends its shard, or is left out and counted."""
    part_documents: Positive = 256
    """Documents of a part file at most: a task that was killed goes on after its last whole part."""
    part_tokens: Positive = 131072
    """Tokens of a part file, about, at most."""
    jobs: JobsModel = JobsModel()
    nightly: NightlyModel = NightlyModel()
    automation: Literal["schedule", "condition"] = "schedule"
    """What asks for partitions that are missing or stale: the schedule `<recipe>_nightly_caches`, or an automation
    condition of each asset, by the sensor `<recipe>_automation`. Both ship stopped."""

    @field_validator("sources")
    @classmethod
    def _distinct_names(cls, sources: list[SourceModel]) -> list[SourceModel]:
        names = [s.name for s in sources]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"two sources are called {sorted(twice)[0]!r}")
        return sources

    def to_recipe(self, project: str | None = None) -> Recipe:
        """The recipe in its frozen form. `project`: the package of the dg project that it stands in."""
        caches = self.caches
        return Recipe(
            name=self.recipe,
            description=self.description,
            owners=tuple(self.owners),
            tags=dict(self.tags),
            project=project,
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
            recode=self.recode,
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
            fresh_within_hours=self.fresh_within_hours,
            tasks={
                "shards": self.jobs.shards.to_tasks(),
                "teacher": self.jobs.teacher.to_tasks(),
                "student": self.jobs.student.to_tasks(),
                "export": (self.jobs.export or self.jobs.shards).to_tasks(),
                "recode": (self.jobs.export or self.jobs.shards).to_tasks(),
            },
            nightly_plan_cron=self.nightly.plan,
            nightly_caches_cron=self.nightly.caches,
            automation=self.automation,
        )

    @classmethod
    def get_code_references_for_yaml(
        cls, yaml_path: Path, source_position: Any, context: dg.ComponentLoadContext
    ) -> Sequence[Any]:
        """The line of the recipe's file; where git has it from GitHub or GitLab, the same line of its commit, too.

        Dagster adds the file's line itself, after `build_defs` and `link_code_references_to_git` could be called.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dg.BetaWarning)
            references = list(super().get_code_references_for_yaml(yaml_path, source_position, context))
            if (url := commit_url(yaml_path, line=source_position.start.line)) is not None:
                references.append(dg.UrlCodeReference(url=url, label="the recipe, as of its commit"))
            return references

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """The recipe with what it needs to run in any project: the resource `kd_assets_platform`, and the executor."""
        with warnings.catch_warnings():
            # Backfill policies and partitioned checks are beta in Dagster 1.13; its version is pinned.
            warnings.simplefilter("ignore", dg.BetaWarning)
            warnings.simplefilter("ignore", dg.PreviewWarning)
            recipe = self.to_recipe(project_name(context.defs_module_name))
            platform = Platform.from_environment(context.project_root)
            return dg.Definitions.merge(
                recipe_definitions(recipe, platform),
                dg.Definitions(
                    resources={"kd_assets_platform": platform.as_resource()},
                    # Each run is one step that waits for a job: a process for the run and another for the step would
                    # only leave the step behind, unwatched, when the run is killed.
                    executor=dg.in_process_executor if _bring_executor.get() else None,
                ),
            )

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        """What Dagster parses the YAML with, with the schema of these models for `dg check yaml`.

        Dagster's own schema lets every field be any string, since it may be a template; so it would find no wrong
        string, and call a wrong number "not valid under any of the given schemas" of the field's parent.
        """
        return _model_with_schema(cls)


_bring_executor: ContextVar[bool] = ContextVar("_bring_executor", default=True)


@contextmanager
def without_executor() -> Iterator[None]:
    """Recipes that are loaded inside bring no executor: who loads them gives one to a project that has none.

    Dagster takes one executor of all that is merged, and refuses two.
    """
    token = _bring_executor.set(False)
    try:
        yield
    finally:
        _bring_executor.reset(token)


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


def load_recipe(name: str, project: Path | None = None) -> Recipe:
    """Raises RecipeError, listing the recipes that there are, for a name that none has. What is wrong with others does
    not matter."""
    project = project or project_folder()
    loaded = _load_components(project)
    if named := [component for component in loaded.found if component.recipe == name]:
        return _distinct(named, project)[name]
    known = ", ".join(sorted({component.recipe for component in loaded.found})) or "none"
    not_loaded = "; ".join(f"{part} cannot be loaded ({_said(error)})" for part, error in loaded.left_out.items())
    raise RecipeError(
        f"there is no recipe {name!r}; there are {known} in {project}"
        + (f"; {not_loaded}: `kd-assets check` names file and line" if not_loaded else "")
    )


def load_recipes(project: Path | None = None) -> dict[str, Recipe]:
    """Every recipe of a dg project (default: the one around the working directory), without building its assets.

    Raises MissingInputError where there is no project, and RecipeError for a file with something wrong, for two recipes
    of one name, and for a project that cannot be imported.
    """
    project = project or project_folder()
    loaded = _load_components(project)
    if loaded.as_a_whole is not None:
        raise _not_loaded(project, loaded.as_a_whole) from loaded.as_a_whole
    return _distinct(loaded.found, project)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """A recipe's component, and the package of the dg project that it stands in."""

    component: TeacherCaches
    project: str

    @property
    def recipe(self) -> str:
        return self.component.recipe


def _load_components(project: Path) -> Loaded[list[_Found]]:
    def found(tree: dg.ComponentTree) -> list[_Found]:
        name = project_name(tree.defs_module.__name__)
        return [_Found(component=c, project=name) for c in tree.get_all_components(of_type=TeacherCaches)]

    try:
        return load_parts(project, found)
    except Exception as e:
        raise _not_loaded(project, e) from e


def _distinct(found: Sequence[_Found], project: Path) -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}
    for one in found:
        if one.recipe in recipes:
            raise RecipeError(
                f"two recipes of {project} are called {one.recipe!r}: a recipe's name is the first part of its asset "
                "keys and its folder in the store, so give one of them another"
            )
        recipes[one.recipe] = one.component.to_recipe(one.project)
    return recipes


def project_name(defs_module_name: str) -> str:
    """The package of a dg project, which names it wherever it is checked out: `my_project` of `my_project.defs`."""
    return defs_module_name.partition(".")[0]


def _not_loaded(project: Path, error: Exception) -> RecipeError:
    cause = _innermost(error)
    if isinstance(cause, ModuleNotFoundError):
        remedy = f"install what it lacks, or the project itself: pip install --editable {project}"
    else:
        remedy = "`kd-assets check` names file and line"
    return RecipeError(f"the recipes of {project} cannot be loaded ({_said(error)}): {remedy}")


def _said(error: BaseException) -> str:
    return " ".join(str(_innermost(error)).split())


def _innermost(error: BaseException) -> BaseException:
    """What is really wrong: Dagster wraps it in the tree of everything that was being loaded."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
