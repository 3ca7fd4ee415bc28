"""A recipe's YAML: the pydantic models that are its schema (`dg check yaml` validates against them).

Right behind them stands the frozen `Recipe`, and nothing else in the project sees pydantic.
"""

import dataclasses
import re
from typing import Annotated, Any, Literal

import dagster as dg
from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from kd_assets.contract import (
    STUDENT_HEAD_SIZE,
    FinalState,
    HiddenStateParams,
    PositionChoice,
    StateCodec,
    TokenIds,
    TopkCodec,
    TopkParams,
)
from kd_assets.recipes.cluster_profile import Positive, ResourcesModel, refused
from kd_assets.recipes.recipe import Tasks

FINAL_STATES: tuple[FinalState, ...] = ("before_norm", "after_norm")

Role = Literal["system", "developer", "user", "assistant", "tool"]


_AN_OWNER = "an address (ann@example.org) or a team (team:language)"
_A_TAG = "a tag: letters, digits, _, - and . (63 at most); before a name may stand another one and a /"
_TAG_VALUE = "letters, digits, _, - and . (63 at most)"
_WORD = "[A-Za-z0-9_.-]"


def _owner(said: str) -> str:
    try:
        dg.AssetSpec("asset", owners=[said])
    except dg.DagsterInvalidDefinitionError as e:
        raise ValueError(f"{said!r} is no owner: expected {_AN_OWNER}") from e
    return said


def _tags(said: dict[str, str]) -> dict[str, str]:
    for name, value in said.items():
        try:
            dg.AssetSpec("asset", tags={name: value})
        except (dg.DagsterInvalidDefinitionError, dg.DagsterInvariantViolationError) as e:
            raise ValueError(f"{name}: {value} is no tag of Dagster's: {e}") from e
    return said


Owners = list[
    Annotated[
        str,
        AfterValidator(_owner),
        Field(
            json_schema_extra=refused(
                {"not": {"pattern": r"^(team:.+|[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,7})$"}}, _AN_OWNER
            )
        ),
    ]
]
Tags = Annotated[
    dict[str, Annotated[str, Field(json_schema_extra=refused({"not": {"pattern": f"^{_WORD}{{0,63}}$"}}, _TAG_VALUE))]],
    AfterValidator(_tags),
    Field(
        json_schema_extra={
            "propertyNames": refused({"not": {"pattern": f"^({_WORD}{{1,63}}/)?{_WORD}{{1,63}}$"}}, _A_TAG)
        }
    ),
]


class DatasetModel(dg.Model, dg.Resolvable):
    """A data set that Hugging Face's `datasets` loads."""

    name: str
    """A hub id, or a folder when it starts with `/`, `.`, `~` or `$`."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    """A branch, a tag or a commit; the plan pins the commit. Left out: the newest."""


class SourceModel(dg.Model, dg.Resolvable):
    """A file, several files or a data set: records with a text, with chat messages, or with fields that stand for
    them."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Of its own among the sources; a part of document ids where records have none."""
    path: str | None = None
    """A file, a folder, a pattern (`data/*.jsonl.gz`) or a URL (`s3://bucket/part-*.parquet`); `$NAME` stands for an
    environment variable, looked up when the shard plan is made."""
    dataset: DatasetModel | None = None
    """In the place of `path`."""
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "arrow"] = "auto"
    """auto: by a file's name (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.arrow`; `.gz` and `.zst` after it)."""
    shape: Literal["auto", "text", "messages", "conversations", "instruction", "completion", "preference"] = "auto"
    """What a record is made of; auto: recognised by its fields."""
    fields: Annotated[dict[str, str], Field(default_factory=dict)]
    """Field of the shape → the source's own name for it: `{instruction: question, output: answer}`."""
    prefer: Literal["chosen", "rejected"] | None = None
    """Of records with two answers: which of them is learned."""
    roles: Annotated[
        dict[str, Literal["system", "developer", "user", "assistant", "tool"]], Field(default_factory=dict)
    ]
    """The source's own words for roles: `{narrator: system}`."""
    text_field: str = "text"
    """The field of texts: a short form of `fields: {text: …}`."""
    messages_field: str = "messages"
    """The field of chats."""
    id_field: str = "id"
    """A record without it is named after the source and its number."""
    ignore_fields: Annotated[list[str], Field(default_factory=list)]
    """Fields that a chat template or a loss may read (`tools`, a message's `weight`) and that are left out; counted."""
    control_tokens: Literal["text", "tokens"] | None = None
    """What control tokens are that plain texts spell out: text (the default), or, in texts that were rendered before,
    those tokens."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Its share of the tokens of every shard, beside the weights of the other sources."""
    licence: str = "unknown"
    """Left out: what the data set's card says."""
    licence_accepted: str | None = None
    """Why it may be used though its licence is unknown or not allowed; recorded in the plan."""
    revision: str | None = None
    """A word of yours for the version of these files, recorded with the plan."""
    made_by: str | None = None
    """Key of the asset that writes this file, for the lineage (`demo/corpus`)."""

    @model_validator(mode="after")
    def _one_place(self) -> "SourceModel":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("name either path or dataset")
        return self


def _n_devices_refused(placements: list[str], when: dict[str, Any], because: str) -> dict[str, Any]:
    """JSON schema of a teacher: numbers of devices that these placements cannot have."""
    return {
        "if": {"properties": {"placement": {"enum": placements}}, "required": ["placement"]},
        "then": {"properties": {"n_devices": refused({"type": "integer", **when}, because)}},
    }


_ONE_IS_ONE = "1, or left out, beside placement one_device"

_SPLIT_IS_SEVERAL = "2 or more, or left out, beside a placement over several devices"

_NAMES_ITS_METHOD = "name the method: quant_method, as the to_dict() of its transformers configuration does"


class TeacherSizeModel(dg.Model, dg.Resolvable):
    """How large a teacher is, for the bill of a plan that is made where its files are not."""

    parameters: Annotated[float, Field(gt=0)]
    """All of them: `70_600_000_000` or `7.06e+10` (YAML takes `70.6e9` for a word)."""
    hidden_size: Positive
    n_blocks: Positive
    """Decoder blocks."""
    vocabulary: Positive
    """Rows of the head."""
    tied_embeddings: bool = False
    """Whether the head is the table of embeddings."""


class TeacherModel(dg.Model, dg.Resolvable):
    """The model that is run."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                _n_devices_refused(["one_device"], {"minimum": 2}, _ONE_IS_ONE),
                _n_devices_refused(["tensor_parallel", "device_map"], {"maximum": 1}, _SPLIT_IS_SEVERAL),
            ]
        }
    )

    model_id: str  # not `model`: dagster's Resolvable has a method of that name
    """A hub id, or a folder when it starts with `/`, `.`, `~` or `$`."""
    revision: str | None = None
    """Of the hub's model: a branch, a tag or a commit, which must be in the local cache; left out: `main`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the pass; logits are always reduced in float32."""
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
    """Whether blocks go through `torch.compile`; auto: on a GPU, where that is proved to compute the same."""
    recompute_documents: Annotated[int, Field(ge=1)] = 2
    """Documents of each partition that the check `recomputed` computes again."""
    seed: int = 0
    """Chooses these documents, and draws where there are draws."""
    made_by: str | None = None
    """Key of the asset that writes the model's folder, for the lineage (`demo/teacher`)."""
    size: TeacherSizeModel | None = None
    """Where the teacher's files are not on the machine that plans: what its bill is made from."""

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


class PositionShareModel(dg.Model, dg.Resolvable):
    """A random share of the positions, the same ones in every cache with this seed."""

    share: Annotated[float, Field(gt=0, lt=1)]
    seed: int = 0


Positions = Literal["all", "learned"] | PositionShareModel


def position_choice(said: Positions) -> PositionChoice:
    if isinstance(said, PositionShareModel):
        return PositionChoice(kept="share", share=said.share, seed=said.seed)
    return PositionChoice(kept=said)


_ONLY_COMPACT = "only a compact cache can leave logsumexp out: set codec: compact, or leave logsumexp as it is"


def _one_schema(schema: dict[str, Any]) -> None:
    """A number or words, as one alternative: a wrong value is reported with what is wrong about it."""
    schema["anyOf"] = [{"type": ["integer", "string"], "minimum": 1, "pattern": r"\S"}, {"type": "null"}]


def _a_share(schema: dict[str, Any]) -> None:
    """One alternative, as of `_one_schema`."""
    schema["anyOf"] = [{"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, {"type": "null"}]


class TopkModel(dg.Model, dg.Resolvable):
    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"logsumexp": {"const": False}}, "required": ["logsumexp"]},
            "then": {"properties": {"codec": {"const": "compact"}}, "required": ["codec"]},
        }
    )

    k: Positive
    max_length: Positive
    draws: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Token ids drawn at random from each whole distribution besides (random-sampling KD)."""
    positions: Positions = "all"
    """Which are kept: all, those whose next token is learned, or a random share (`{share: 0.1, seed: 0}`)."""
    vocabulary: Annotated[int | str | None, Field(json_schema_extra=_one_schema)] = None
    """The token ids that a student can have: those below a number, those of the teacher's `tokenizer` (a head may have
    more), or those of the student's tokenizer (a folder, its file, or a hub id). What is kept is cut to them, and
    normalised over them."""

    codec: TopkCodec = "plain"
    """plain: columns that every reader understands; compact: about two thirds of the bytes, decoded by kd_assets."""
    logsumexp: bool = True
    """Left out of a compact cache where false: it saves a byte and more a token, and logits can then not be had."""
    top_p: Annotated[float | None, Field(json_schema_extra=_a_share)] = None
    """Each position keeps the fewest most likely tokens whose probabilities add up to this: at least 1, at most k."""

    @field_validator("vocabulary", mode="before")
    @classmethod
    def _number_or_words(cls, said: Any) -> Any:
        if isinstance(said, bool | float):  # YAML's yes and 1.5e5, which pydantic would take for a number of ids
            raise ValueError("it is a number of token ids, `tokenizer`, or the student's tokenizer")
        if isinstance(said, str) and re.fullmatch(r"\s*[-+]?[0-9]+\s*", said):
            said = int(said)
        if isinstance(said, int) and said < 1:
            raise ValueError(f"it is {said}: a vocabulary has at least one token id")
        if isinstance(said, str) and not said.strip():
            raise ValueError("it is empty: name a tokenizer, or leave vocabulary out")
        return said

    @field_validator("top_p")
    @classmethod
    def _is_a_share(cls, said: float | None) -> float | None:
        if said is not None and not 0 < said < 1:
            raise ValueError(f"it is {said}: give a mass above 0 and below 1, or leave top_p out to keep k tokens")
        return said

    @model_validator(mode="after")
    def _k_ids(self) -> "TopkModel":
        if isinstance(self.vocabulary, int) and self.k > self.vocabulary:
            raise ValueError(f"k is {self.k}, and vocabulary leaves {self.vocabulary} token ids: lower k, or raise it")
        return self

    @model_validator(mode="after")
    def _only_compact_leaves_out(self) -> "TopkModel":
        if not self.logsumexp and self.codec != "compact":
            raise ValueError(_ONLY_COMPACT)
        return self

    @model_validator(mode="after")
    def _counted_by_two_bytes(self) -> "TopkModel":
        if self.top_p is not None and self.k > 65_535:
            raise ValueError(f"k is {self.k}, and with top_p it is 65,535 at most: lower k, or leave top_p out")
        return self

    def to_params(self) -> TopkParams:
        """The ids of a tokenizer are looked up when a job is planned."""
        said = self.vocabulary
        return TopkParams(
            k=self.k,
            max_length=self.max_length,
            draws=self.draws,
            positions=position_choice(self.positions),
            vocabulary=said if isinstance(said, str) else None,
            token_ids=TokenIds.below(said) if isinstance(said, int) else None,
            codec=self.codec,
            logsumexp=self.logsumexp,
            top_p=self.top_p,
        )


class HiddenStatesModel(dg.Model, dg.Resolvable):
    """Hidden states of every token of a document."""

    blocks: list[Annotated[int, Field(ge=0)]]
    """Decoder blocks, counted from 0; may be empty where `final` is given."""
    max_length: Positive
    """Tokens of a document at most."""
    final: Literal["before_norm", "after_norm", "both"] | None = None
    """States at the decoder's end besides: what goes into its final norm, what comes out of it and goes into the head,
    or both."""
    positions: Positions = "all"
    """As of the top-k: position i is that of token i, whose state predicts token i + 1."""
    codec: StateCodec = "raw"
    """How the numbers are held: raw (bfloat16, 2 bytes a value), split (the same ones in about 1.35), fp8 (1 byte, off
    by 2.6 % of a state), int8_32 or int8_128 (1.06 or 1.02 bytes, off by 0.6 or 0.7 %)."""

    @model_validator(mode="after")
    def _at_least_one_state(self) -> "HiddenStatesModel":
        if not self.blocks and self.final is None:
            raise ValueError("blocks is empty: name at least one decoder block (0-based), or give final")
        return self

    def to_params(self) -> HiddenStateParams:
        return HiddenStateParams(
            blocks=tuple(sorted(set(self.blocks))),
            max_length=self.max_length,
            final=tuple(name for name in FINAL_STATES if self.final in (name, "both")),
            positions=position_choice(self.positions),
            codec=self.codec,
        )


class EmbeddingsModel(dg.Model, dg.Resolvable):
    """The final hidden states of a document, pooled: their mean, and that of its last token."""

    max_length: Positive
    """Tokens of a document at most."""


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
    """A small student that is trained from the caches to show that they teach: `student_smoke`."""

    steps: Positive = 60
    batch_documents: Positive = 8
    max_length: Positive = 256
    """Tokens of a document at most."""
    hidden_size: Annotated[int, Field(gt=0, le=65_536, multiple_of=STUDENT_HEAD_SIZE)] = 128
    n_layers: Positive = 2
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Of the response loss."""
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
    export: TasksModel | None = None
    """Left out: as shards, which need no GPU either."""


class NightlyModel(dg.Model, dg.Resolvable):
    """Cron lines of the two nightly schedules."""

    plan: str = "30 1 * * *"
    """When the sources are looked at."""
    caches: str = "0 2 * * *"
    """When what is missing or stale is made."""
