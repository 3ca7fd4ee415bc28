"""From a selection (assets and partitions) to the exact results that must exist: their identities, folders and inputs.

Everything here is a function of the recipe, the current shard plan, the committed shards and the teacher's files, so
that the same selection always names the same results; whoever asks again finds them committed and computes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.contract import (
    Asset,
    EmbeddingParams,
    HiddenStateParams,
    JobFile,
    JobKind,
    Output,
    ShardsParams,
    StudentParams,
    TeacherParams,
    TokenIds,
    TopkParams,
    WorkUnit,
    parse_json,
)
from kd_assets.durable import prepare_folder, read_if_there, replace_file
from kd_assets.errors import (
    NO_ANSWER,
    ContractError,
    CorruptPlanError,
    InputError,
    MissingInputError,
    RecipeError,
    StorageUnavailableError,
    StoreError,
)
from kd_assets.model_files.digests import DigestCache, Say
from kd_assets.model_files.fingerprints import known_weights_fingerprint, tokenizer_fingerprint, weights_fingerprint
from kd_assets.model_files.folder import model_folder
from kd_assets.model_files.vocabulary import shared_token_ids, teacher_token_ids
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.recipes.recipe import SHARD_PLAN, SHARDS_MANIFEST, STUDENT_SMOKE, Recipe
from kd_assets.sources.planning.make import plan_shards
from kd_assets.sources.planning.plan import PinnedSource, PlannedShard, ShardPlan, plan_name, read_plan
from kd_assets.sources.planning.token_rate import CountTokens, token_counter
from kd_assets.sources.spec import resolve_path
from kd_assets.store import FORMAT_VERSION, Manifest, committed, failed_check, fingerprint, plan_output
from kd_assets.store.computing_versions import computing_versions
from kd_assets.store.fingerprint import INPUT_KEY
from kd_assets.store.params_in_identity import params_in_identity
from kd_assets.store.reading.planned import PLAN_NAME

TEACHER_FILE = "teacher.json"
"""In the recipe's folder: the teacher that its caches were last planned with (see `Planner.planned_weights`)."""

TEACHERS_OWN = "tokenizer"
"""The word of a recipe for the vocabulary of its teacher's tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherIdentity:
    """The teacher's files as they are now."""

    folder: Path
    weights: str
    tokenizer: str


class Planner:
    """Names the results of one recipe in one deployment, by the plan that is current when it is first asked.

    One run has one planner, and so one plan, whatever a nightly plan writes meanwhile.
    """

    def __init__(
        self,
        recipe: Recipe,
        recipe_folder: Path,
        digests: DigestCache,
        variables: Mapping[str, str],
        *,
        say: Say = lambda line: None,
    ) -> None:
        """`say` is told how far a long hashing of weights is."""
        self._recipe, self._folder, self._digests, self._variables = recipe, recipe_folder, digests, variables
        self._say = say
        self._plan: ShardPlan | None = None
        self._teacher: TeacherIdentity | None = None
        self._tokenizer: tuple[Path, str] | None = None
        self._shards_params: ShardsParams | None = None
        self._token_ids: TokenIds | None = None
        self._in_common: dict[str, dict[str, Any]] = {}
        """What all results of a variant have in their identities, by the text that it is made of."""

    @property
    def recipe_folder(self) -> Path:
        return self._folder

    # ------------------------------------------------------------------ the plan

    def make_plan(self) -> ShardPlan:
        """Look at every source, and make its shards the current plan: those that there are, and those of what is new.
        Nothing is written when a source is bad, but for copies of compressed files."""
        plan = self.draft_plan(keeps_copies=True)
        self.adopt_plan(plan)
        return plan

    def draft_plan(self, *, keeps_copies: bool = False) -> ShardPlan:
        """The plan that `make_plan` would make now, not written. `keeps_copies`: of compressed files, which jobs need
        and who only looks does not. A current plan that is damaged is begun anew, which mends it, and is said."""
        try:
            return self._draft_after(self._read_plan(PLAN_NAME), keeps_copies=keeps_copies)
        except (ContractError, CorruptPlanError) as e:  # the head's, or that of a block when it is looked into
            self._say(f"the current shard plan is damaged, and is made anew: {e}")
            return self._draft_after(None, keeps_copies=keeps_copies)

    def _draft_after(self, previous: ShardPlan | None, *, keeps_copies: bool) -> ShardPlan:
        return plan_shards(
            [s.spec for s in self._recipe.sources],
            self._recipe.sharding,
            shard_prefix=self._recipe.name,
            base_folder=Path(self._variables["KD_HOME"]),
            environment=self._variables,
            previous=previous,
            seekable_folder=self._folder / SHARD_PLAN / "seekable" if keeps_copies else None,
            digests=self._digests,
            count_tokens=self._token_counter(),
            allowed_licences=self._recipe.allowed_licences,
        )

    def adopt_plan(self, plan: ShardPlan) -> None:
        """Make a draft the current plan."""
        folder = self._folder / SHARD_PLAN
        prepare_folder(folder)
        plan.write(folder)
        self._plan = plan

    def _token_counter(self) -> CountTokens | None:
        """None where the tokenizer is not here yet: a plan can be made before the teacher is."""
        try:
            return token_counter(self.teacher_folder)
        except (InputError, StorageUnavailableError):
            return None

    def _resolve(self, path: str, *, what: str) -> Path:
        """An absolute path; a relative one starts from KD_HOME."""
        return resolve_path(path, Path(self._variables["KD_HOME"]), what=what, environment=self._variables)

    def current_plan(self) -> ShardPlan:
        """The plan made last, read once. Raises MissingInputError when there is none."""
        if self._plan is None:
            self._plan = self._read_plan(PLAN_NAME)
            if self._plan is None:
                raise MissingInputError(
                    f"no shard plan at {self._folder / SHARD_PLAN / PLAN_NAME}: "
                    f"materialize {self._recipe.name}/{SHARD_PLAN} first"
                )
        return self._plan

    def use_plan(self, plan_hash: str) -> None:
        """Work from this plan, though another may have been made since. Without its file, from the current one."""
        self._plan = self._read_plan(plan_name(plan_hash))

    def _read_plan(self, name: str) -> ShardPlan | None:
        return read_plan(self._folder / SHARD_PLAN / name)

    # ------------------------------------------------------------------ the teacher's files

    def teacher(self) -> TeacherIdentity:
        """Fingerprints of weights and tokenizer. Hashes each file once for as long as it does not change."""
        if self._teacher is None:
            folder, tokenizer = self._tokenizer_identity()
            remote_code = self._recipe.teacher.trust_remote_code
            weights = weights_fingerprint(folder, self._digests, remote_code=remote_code, say=self._say)
            self._teacher = TeacherIdentity(folder=folder, weights=weights, tokenizer=tokenizer)
            if self.planned_weights() != weights:
                prepare_folder(self._folder)
                record = json.dumps(self._teacher_record(weights), indent=1, sort_keys=True)
                replace_file(self._folder / TEACHER_FILE, record.encode())
        return self._teacher

    def known_weights(self) -> str | None:
        """The fingerprint of the weights on disk; None where some of them would have to be hashed for it."""
        remote_code = self._recipe.teacher.trust_remote_code
        return known_weights_fingerprint(self.teacher_folder, self._digests, remote_code=remote_code)

    def planned_weights(self) -> str | None:
        """The fingerprint of the weights that a run planned caches with last; None where there was no such run.

        For who asks what is there and makes no caches: the weights themselves need not be there, nor be hashed.
        """
        try:
            record = parse_json(read_if_there(self._folder / TEACHER_FILE) or b"")
            weights = str(record["weights_fingerprint"])
        except (StoreError, ValueError, LookupError, TypeError):
            return None
        return weights if record == self._teacher_record(weights) else None

    def _teacher_record(self, weights: str) -> dict[str, Any]:
        return {
            "folder": str(self.teacher_folder),
            "trust_remote_code": self._recipe.teacher.trust_remote_code,
            "weights_fingerprint": weights,
        }

    @property
    def teacher_folder(self) -> Path:
        """Where the teacher's files lie here."""
        return self._tokenizer_identity()[0]

    def _tokenizer_identity(self) -> tuple[Path, str]:
        if self._tokenizer is None:
            teacher = self._recipe.teacher
            model = teacher.model
            if model.startswith((".", "/", "~", "$")):
                model = str(self._resolve(model, what="teacher"))
            folder = model_folder(model, teacher.revision)
            self._tokenizer = folder, tokenizer_fingerprint(folder, self._digests)
        return self._tokenizer

    # ------------------------------------------------------------------ results

    def shards_output(self, shard: PlannedShard) -> Output:
        """The tokenised shard that the current plan and recipe name."""
        params = self.shards_params()
        variant = {
            "tokenizer_fingerprint": params.tokenizer_fingerprint,
            "max_length": params.max_length,
            "on_bad_record": params.on_bad_record,
            "part_documents": params.part_documents,
            **used_of(params),
        }
        return self.output(SHARDS_MANIFEST, shard.partition_key, variant, shard.input_hash)

    def cache_output(self, asset: Asset, partition_key: str, shard: Manifest, weights: str | None = None) -> Output:
        """The cache of one committed shard. `weights`: see `teacher_work`."""
        variant = {
            "weights_fingerprint": weights or self.teacher().weights,
            "tokenizer_fingerprint": self._tokenizer_identity()[1],
            "dtype": self._recipe.teacher.dtype,
            **self._recipe.teacher.changes_to_the_model,
            "params": params_in_identity(self._cache_params(asset), seed=self._recipe.teacher.seed),
            "part_documents": self._recipe.part_documents,
            "part_tokens": self._recipe.part_tokens,
        }
        return self.output(asset, partition_key, variant, shard.data_version)

    def require_vocabulary(self) -> None:
        """Look the student's vocabulary up, where the recipe names one. Raises RecipeError for one that cannot be the
        student's, MissingInputError for one that is not here."""
        if self._recipe.topk is not None:
            self._topk_params(self._recipe.topk)

    def _cache_params(self, asset: Asset) -> TopkParams | HiddenStateParams | EmbeddingParams:
        """The parameters of a cache, with the student's vocabulary looked up."""
        params = self._recipe.cache_params[asset]
        return self._topk_params(params) if isinstance(params, TopkParams) else params

    def _topk_params(self, params: TopkParams) -> TopkParams:
        """Raises RecipeError for a vocabulary that cannot be the student's, MissingInputError for one that is not here.

        Found once: reading a large tokenizer takes a second.
        """
        if params.vocabulary is None:
            return params
        if self._token_ids is None:
            self._token_ids = self._look_up(params.vocabulary)
        if params.k > len(self._token_ids):
            raise RecipeError(
                f"topk.k is {params.k}, and vocabulary {params.vocabulary!r} leaves {len(self._token_ids):,} token ids"
            )
        return dataclasses.replace(params, token_ids=self._token_ids)

    def _look_up(self, vocabulary: str) -> TokenIds:
        if vocabulary == TEACHERS_OWN:
            return teacher_token_ids(self.teacher_folder)
        place = vocabulary
        if place.startswith((".", "/", "~", "$")):
            place = str(self._resolve(place, what="caches.topk.vocabulary"))
        try:
            student = Path(place) if Path(place).is_file() else model_folder(place, None)
        except MissingInputError as e:
            raise MissingInputError(f"caches.topk.vocabulary names no tokenizer that is here: {e}") from e
        return shared_token_ids(self.teacher_folder, student)

    def output(self, asset: Asset, partition_key: str, variant: Mapping[str, Any], made_of: object) -> Output:
        """The result of a partition: `variant` is how it is made, `made_of` the hash of its input (of an export JSON
        that names its caches)."""
        versions = {"format_version": FORMAT_VERSION, **computing_versions(asset, variant.get("params", {}))}
        # Through JSON, so that what the worker reads back is what was hashed. What all partitions have in common is
        # held once: of 10,000 partitions of three caches it would be 30 MB.
        text = json.dumps({"asset": asset, **versions, **variant})
        if (in_common := self._in_common.get(text)) is None:
            in_common = self._in_common[text] = json.loads(text)
        identity = {**in_common, INPUT_KEY: json.loads(json.dumps(made_of))}
        return plan_output(asset, identity, recipe_folder=self._folder, partition_key=partition_key)

    # ------------------------------------------------------------------ work

    def shards_work(self, partition_keys: Sequence[str]) -> PlannedWork:
        """Tokenising of these partitions."""
        plan = self.current_plan()
        units, impossible = [], {}
        for key in partition_keys:
            if (shard := plan.shard(key)) is None:
                impossible[key] = self._not_in_plan(key)
                continue
            units.append(
                WorkUnit(
                    partition_key=key,
                    n_tokens=shard.n_tokens or shard.n_bytes // 4,  # of an earlier version's plan, as of English
                    records=shard.records,
                    outputs=(self.shards_output(shard),),
                )
            )
        return PlannedWork(kind="shards", units=tuple(units), impossible=impossible)

    def teacher_work(
        self, partition_keys: Sequence[str], assets: Sequence[Asset], *, weights: str | None = None
    ) -> PlannedWork:
        """One teacher pass over these partitions that feeds these caches. A partition whose shard is not committed is
        impossible: content of an older plan is never cached as if it were today's.

        `weights`: their fingerprint; None: of those on disk now, which takes hashing them where that is not known.
        """
        plan = self.current_plan()
        units, impossible, unreachable = [], {}, {}
        # Of two caches that are checked against each other, a job that makes one reads the other where it is there.
        compared = self._recipe.rebuilt_from if set(assets) & set(self._recipe.rebuilt_from) else ()
        for key in partition_keys:
            if (planned := plan.shard(key)) is None:
                impossible[key] = self._not_in_plan(key)
                continue
            output = self.shards_output(planned)
            try:
                shard = committed(Path(output.path), output.fingerprint)
            except NO_ANSWER as e:
                unreachable[key] = str(e)
                continue
            except StoreError as e:
                impossible[key] = f"{e}. Move {output.path} away and materialize {SHARDS_MANIFEST} again"
                continue
            if shard is None:
                impossible[key] = (
                    f"{self._recipe.name}/{SHARDS_MANIFEST} has no partition {key} for the current plan and recipe: "
                    "materialize it, or select it in the same run"
                )
                continue
            units.append(
                WorkUnit(
                    partition_key=key,
                    n_tokens=shard.n_tokens,
                    inputs={
                        SHARDS_MANIFEST: (output.path,),
                        **{a: (self.cache_output(a, key, shard, weights).path,) for a in compared},
                    },
                    outputs=tuple(self.cache_output(asset, key, shard, weights) for asset in assets),
                )
            )
        return PlannedWork(kind="teacher", units=tuple(units), impossible=impossible, unreachable=unreachable)

    def student_work(self) -> tuple[PlannedWork, tuple[str, ...]]:
        """Training on every partition of the plan all of whose caches are committed and have failed no check; and those
        partitions."""
        versions: dict[str, str] = {}

        def remember(unit: WorkUnit, output: Output, manifest: Manifest) -> None:
            if failed_check(manifest) is None:
                versions[output.path] = manifest.data_version

        keys = self.current_plan().keys
        work = self.teacher_work(keys, self._recipe.caches, weights=self.planned_weights())
        survey = work.survey(remember)
        # Which partitions are complete decides what the student is: not to know it is no answer.
        for why in (*work.unreachable.values(), *survey.unreachable.values()):
            raise StorageUnavailableError(why)
        there: dict[str, list[tuple[WorkUnit, Output]]] = {}
        for unit, output in survey.committed:
            if output.path in versions:
                there.setdefault(unit.partition_key, []).append((unit, output))
        units = [found[0][0] for found in there.values() if len(found) == len(self._recipe.caches)]
        if not units:
            raise MissingInputError(
                f"no partition of {self._recipe.name} has all its caches ({', '.join(self._recipe.caches)}) for the "
                "current plan and recipe: materialize some first"
            )
        inputs: dict[str, tuple[str, ...]] = {
            asset: tuple(o.path for u in units for o in u.outputs if o.asset == asset) for asset in self._recipe.caches
        }
        content = {asset: [versions[folder] for folder in folders] for asset, folders in inputs.items()}
        variant = {"student": dataclasses.asdict(self.student_params())}
        output = self.output(STUDENT_SMOKE, "all", variant, fingerprint(content))
        unit = WorkUnit(partition_key="all", n_tokens=sum(u.n_tokens for u in units), inputs=inputs, outputs=(output,))
        return PlannedWork(kind="student", units=(unit,)), tuple(u.partition_key for u in units)

    # ------------------------------------------------------------------ what the worker is told

    def shards_params(self) -> ShardsParams:
        if self._shards_params is None:
            folder, tokenizer = self._tokenizer_identity()
            asked = self._recipe.tokenising
            template, name = self._chat_template()
            self._shards_params = ShardsParams(
                tokenizer=str(folder),
                revision=self._recipe.teacher.revision,
                tokenizer_fingerprint=tokenizer,
                max_length=self._recipe.max_length,
                on_bad_record=self._recipe.on_bad_record,
                on_long=asked.on_long,
                overlap=asked.overlap,
                chat_template=template,
                chat_template_name=name,
                chat_template_kwargs=dict(asked.chat_template_kwargs),
                tools=None if asked.tools is None else list(asked.tools),
                turns=asked.turns,
            )
        return self._shards_params

    def _chat_template(self) -> tuple[str | None, str | None]:
        """The text of the template's file that the recipe names, or the name that the tokenizer has for it."""
        asked = self._recipe.tokenising.chat_template
        if asked is None:
            return None, None
        if re.fullmatch(r"[A-Za-z0-9_]+", asked):
            return None, asked
        path = self._resolve(asked, what="chat_template")
        text = read_if_there(path)
        if text is None:
            raise MissingInputError(f"the chat template {path} is not there: write it, or correct chat_template")
        try:
            return text.decode(), None
        except UnicodeDecodeError as e:
            raise InputError(f"the chat template {path} is not UTF-8: {e}") from e

    def teacher_params(self) -> TeacherParams:
        recipe, files = self._recipe, self.teacher()
        return TeacherParams(
            **recipe.teacher.options() | {"model": str(files.folder)},
            weights_fingerprint=files.weights,
            tokenizer_fingerprint=files.tokenizer,
            part_documents=recipe.part_documents,
            part_tokens=recipe.part_tokens,
            topk=None if recipe.topk is None else self._topk_params(recipe.topk),
            hidden_states=recipe.hidden_states,
            embeddings=recipe.embeddings,
        )

    def student_params(self) -> StudentParams:
        return self._recipe.student or StudentParams()

    def job_file(
        self,
        work: PlannedWork,
        *,
        key: str,
        tasks: tuple[tuple[int, ...], ...],
        events_folder: Path,
        token_budget: int | None,
        provenance: Mapping[str, Any],
    ) -> JobFile:
        """All that the tasks of a job are told. `token_budget` replaces the recipe's, `provenance` adds to what is
        known here."""
        kind = work.kind
        teacher = self.teacher_params() if kind == "teacher" else None
        if teacher is not None and token_budget is not None:
            teacher = dataclasses.replace(teacher, token_budget=token_budget)
        return JobFile(
            kind=kind,
            recipe=self._recipe.name,
            key=key,
            recipe_folder=str(self._folder),
            events_folder=str(events_folder),
            tasks=tasks,
            units=work.units,
            shards=self.shards_params() if kind == "shards" else None,
            teacher=teacher,
            student=self.student_params() if kind == "student" else None,
            exports=self._recipe.exports if kind == "export" else (),
            provenance=self.provenance(kind) | dict(provenance),
        )

    def provenance(self, kind: JobKind) -> dict[str, Any]:
        """What a task cannot know itself: where its input and its teacher come from, and under which licences."""
        plan, (folder, tokenizer) = self.current_plan(), self._tokenizer_identity()
        facts: dict[str, Any] = {
            "plan_hash": plan.plan_hash,
            "sources": [source_in_provenance(s) for s in plan.sources],
            "tokenizer": str(folder),
            "tokenizer_fingerprint": tokenizer,
        }
        if kind != "shards":
            planned = self.planned_weights() if kind != "teacher" else None
            facts |= {
                "teacher": self._recipe.teacher.model,
                "teacher_folder": str(folder),
                "teacher_revision": self._recipe.teacher.revision,
                "weights_fingerprint": planned or self.teacher().weights,
            }
            if self._recipe.topk is not None and self._recipe.topk.vocabulary is not None:
                facts["vocabulary"] = self._recipe.topk.vocabulary
        return facts

    def _not_in_plan(self, partition_key: str) -> str:
        return (
            f"the current shard plan of {self._recipe.name} has no shard {partition_key}: "
            f"materialize {self._recipe.name}/{SHARD_PLAN} again, or choose another partition"
        )


def source_in_provenance(source: PinnedSource) -> dict[str, Any]:
    """A source as each manifest has it: without its files, of which a shard names its own."""
    raw = {name: value for name, value in dataclasses.asdict(source).items() if name != "files"}
    return {name: value for name, value in raw.items() if value is not None or name == "revision"}


def used_of(params: ShardsParams) -> dict[str, Any]:
    """Of what came later, what is used: part of a shard's identity."""
    later = ("on_long", "overlap", "chat_template", "chat_template_name", "chat_template_kwargs", "tools", "turns")
    plain = ShardsParams(tokenizer="", tokenizer_fingerprint="", max_length=1)
    return {name: value for name in later if (value := getattr(params, name)) != getattr(plain, name)}
