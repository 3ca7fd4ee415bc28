"""A recipe: one teacher, its sources, and what to cache. The frozen form that everything after the YAML works with.

Imported by components and orchestration. Pure data and names: no file is touched here, so definitions load on a machine
that has neither the weights nor the sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import dagster as dg

from kd_assets.contract import (
    CACHES,
    Asset,
    EmbeddingParams,
    ExportParams,
    HiddenStateParams,
    JobKind,
    StudentParams,
    TeacherOptions,
    TopkParams,
)
from kd_assets.errors import RecipeError
from kd_assets.model_files.size import TeacherShape
from kd_assets.recipes.exports import caches_of_export, check_exports
from kd_assets.scheduler.job import Resources
from kd_assets.sources.records.beside import OURS
from kd_assets.sources.spec import Sharding, SourceSpec, without_later_defaults
from kd_assets.store import FORMAT_VERSION, fingerprint
from kd_assets.store.codecs.codec import PLAIN
from kd_assets.store.codecs.state_codec import RAW
from kd_assets.store.computing_versions import computing_versions
from kd_assets.store.params_in_identity import params_in_identity

SHARD_PLAN = "shard_plan"
SHARDS_MANIFEST: Asset = "shards_manifest"
STUDENT_SMOKE: Asset = "student_smoke"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file of documents. Its path is resolved when a shard plan is made."""

    spec: SourceSpec
    made_by: str | None = None
    """Key of the asset that writes the file, where one does (`demo/corpus`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSettings(TeacherOptions):
    """Which model runs and how. `model` is a hub id, or a folder (may hold `$NAME`)."""

    made_by: str | None = None
    """Key of the asset that makes the model, where one does."""
    size: TeacherShape | None = None
    """For the bill, where the model's files are not on the machine that plans; it decides nothing else."""

    @property
    def changes_to_the_model(self) -> dict[str, object]:
        """What makes another model of the same weights: part of a cache's identity, where a recipe asks for it."""
        changes: dict[str, object] = {}
        if self.quantization is not None:
            changes["quantization"] = dict(self.quantization)
        if self.trust_remote_code:
            changes["trust_remote_code"] = True
        return changes


@dataclass(frozen=True, kw_only=True, slots=True)
class Tasks:
    """Into how many array tasks a job of a kind is split, how many run at once, and what each of them asks for.

    It decides nothing about the bytes: it is in no fingerprint and no code version.
    """

    n_tasks: int = 1
    concurrency: int = 1
    resources: Resources = field(default_factory=Resources)
    """Of SLURM; what is None is the cluster profile's word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenising:
    """How records become tokens: what `ShardsParams` says of the same names. Its fields came later, as above."""

    on_long: Literal["truncate", "split", "drop"] = "truncate"
    overlap: int = 0
    chat_template: str | None = None
    """A file, or the name of one of the tokenizer's templates; may hold `$NAME`."""
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    tools: tuple[Mapping[str, object], ...] | None = None
    turns: Literal["all", "last", "refuse"] = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    name: str
    sources: tuple[Source, ...]
    teacher: TeacherSettings
    topk: TopkParams | None = None
    hidden_states: HiddenStateParams | None = None
    embeddings: EmbeddingParams | None = None
    student: StudentParams | None = None
    exports: tuple[ExportParams, ...] = ()
    recode: bool = True
    """Whether results of another codec are made into those of this one. In no code version: the bytes are the same."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    part_documents: int = 256
    part_tokens: int = 131072
    sharding: Sharding = field(default_factory=Sharding)
    tokenising: Tokenising = field(default_factory=Tokenising)
    allowed_licences: tuple[str, ...] | None = None
    """Licences of sources that may be used; None: every one that is known."""
    when_space_is_short: Literal["refuse", "warn"] = "refuse"
    """What becomes of a plan whose caches do not fit on the disk. In no code version: it decides nothing about them."""
    fresh_within_hours: int | None = None
    """How old the last look at the sources may be; None: of any age. In no code version."""
    tasks: Mapping[JobKind, Tasks] = field(default_factory=dict)
    nightly_plan_cron: str = "30 1 * * *"
    nightly_caches_cron: str = "0 2 * * *"
    automation: Literal["schedule", "condition"] = "schedule"
    """What asks for partitions that are missing or stale."""
    description: str | None = None
    """Shown with the recipe; nothing depends on it."""
    owners: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    """Shown with each asset, and found by; in no identity, like the owners."""
    project: str | None = None
    """The package of the dg project that it stands in, where somebody said so. In no identity."""

    def __post_init__(self) -> None:
        if not self.caches:
            raise RecipeError(
                f"recipe {self.name} caches nothing: name at least one of topk, hidden_states, embeddings"
            )
        check_exports(self.name, self.exports, self.caches, self.topk, self.hidden_states)
        overlap, on_long = self.tokenising.overlap, self.tokenising.on_long
        if overlap and on_long != "split":
            raise RecipeError(
                f"recipe {self.name}: overlap is of windows, and long documents are {on_long}: set long_documents: "
                "split, or leave overlap out"
            )
        if overlap >= self.max_length:
            raise RecipeError(
                f"recipe {self.name}: overlap is {overlap}, and a window has {self.max_length} tokens, the longest "
                "max_length of its caches: make overlap smaller"
            )
        if ours := sorted(set(OURS) & self.tokenising.chat_template_kwargs.keys()):
            raise RecipeError(
                f"recipe {self.name}: chat_template_kwargs has {ours[0]!r}, which is not its to say: "
                + ("set tools of the recipe" if ours[0] == "tools" else "it comes from each record")
            )
        for field_name, line in (("plan", self.nightly_plan_cron), ("caches", self.nightly_caches_cron)):
            try:
                dg.ScheduleDefinition(name="any", job_name="any", cron_schedule=line)
            except dg.DagsterInvalidDefinitionError as e:
                raise RecipeError(
                    f"recipe {self.name}: nightly.{field_name} is {line!r}, which is no cron line: say minute, hour, "
                    "day, month and weekday, as in '30 1 * * *'"
                ) from e

    @property
    def rebuilt_from(self) -> tuple[Asset, ...]:
        """The caches that the check `rebuilt` compares; none where the recipe has not both."""
        if self.topk is None or self.hidden_states is None or not self.hidden_states.final:
            return ()
        return ("topk_cache", "hidden_state_cache")

    @property
    def coded(self) -> tuple[Asset, ...]:
        """The caches whose files are of a codec."""
        codecs = {"topk_cache": self.topk, "hidden_state_cache": self.hidden_states}
        return tuple(a for a in self.caches if (p := codecs.get(a)) is not None and p.codec not in (PLAIN, RAW))

    @property
    def cache_params(self) -> dict[Asset, TopkParams | HiddenStateParams | EmbeddingParams]:
        """The parameters of each cache this recipe has, in the order of `CACHES`."""
        params = {
            "topk_cache": self.topk,
            "hidden_state_cache": self.hidden_states,
            "embedding_cache": self.embeddings,
        }
        return {asset: p for asset in CACHES if (p := params[asset]) is not None}

    @property
    def caches(self) -> tuple[Asset, ...]:
        return tuple(self.cache_params)

    @property
    def export_params(self) -> dict[Asset, ExportParams]:
        """The parameters of each export this recipe has."""
        return {params.asset: params for params in self.exports}

    @property
    def partitioned(self) -> tuple[Asset, ...]:
        """All assets with the shards as partitions, in the order they are made."""
        return (SHARDS_MANIFEST, *self.caches, *self.export_params)

    def caches_of(self, exports: Iterable[Asset]) -> tuple[Asset, ...]:
        """The caches that these exports are made of, all together, in the order of `CACHES`."""
        taken = {cache for asset in exports for cache in caches_of_export(self.export_params[asset], self.caches)}
        return tuple(asset for asset in self.caches if asset in taken)

    @property
    def max_length(self) -> int:
        """Tokens after which a document is cut on tokenising: the most any cache keeps."""
        return max(p.max_length for p in self.cache_params.values())

    def key(self, asset: str) -> dg.AssetKey:
        return dg.AssetKey([self.name, asset])

    @property
    def partitions(self) -> dg.DynamicPartitionsDefinition:
        return dg.DynamicPartitionsDefinition(name=f"{self.name}_shards")

    @property
    def teacher_asset(self) -> dg.AssetKey | None:
        """The asset that makes the teacher: caches are stale when its data version changes."""
        made_by = self.teacher.made_by
        return None if made_by is None else dg.AssetKey.from_user_string(made_by)

    def tasks_of(self, kind: JobKind) -> Tasks:
        return self.tasks.get(kind, Tasks())

    def code_version(self, asset: str) -> str:
        """Changes exactly when the recipe, the format or the code that computes asks for other content, never with a
        file's."""
        return f"{FORMAT_VERSION}-{fingerprint(self._content_settings(asset))[:8]}"

    def _content_settings(self, asset: str) -> dict[str, object]:
        sources = [dataclasses.asdict(s) for s in self.sources]
        for source in sources:
            without_later_defaults(SourceSpec, source["spec"])
        tokenising: dict[str, object] = {
            "tokenizer": self.teacher.model,
            "revision": self.teacher.revision,
            "max_length": self.max_length,
            "on_bad_record": self.on_bad_record,
        }
        if asset == SHARD_PLAN:
            cut = {"documents_per_shard": self.sharding.documents_per_shard, **used(self.sharding)}
            return {"sources": sources, **cut}
        if asset == SHARDS_MANIFEST:
            return tokenising | used(self.tokenising) | computing_versions(asset, {})
        if asset == STUDENT_SMOKE:
            return {"student": None if self.student is None else dataclasses.asdict(self.student)}
        if (exported := {str(a): p for a, p in self.export_params.items()}.get(asset)) is not None:
            made_of = self.caches_of([exported.asset])
            return {"params": exported.content(), "caches": made_of, **computing_versions(asset, {})}
        params = params_in_identity({str(a): p for a, p in self.cache_params.items()}[asset], seed=self.teacher.seed)
        return {
            **computing_versions(asset, params),
            "model": self.teacher.model,
            "revision": self.teacher.revision,
            "dtype": self.teacher.dtype,
            **self.teacher.changes_to_the_model,
            "params": params,
            "parts": [self.part_documents, self.part_tokens],
        }


def used(settings: Sharding | Tokenising) -> dict[str, object]:
    """The settings that are not their defaults."""
    defaults = dataclasses.asdict(type(settings)())
    return {name: value for name, value in dataclasses.asdict(settings).items() if value != defaults[name]}
