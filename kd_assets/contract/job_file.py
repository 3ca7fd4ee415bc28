"""The job file: all that a worker is told, written by the control plane before it submits.

Standard library only; imported on both sides. The invariant: one version on both sides, or a clear error.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from kd_assets.contract.decode import decode, parse_json
from kd_assets.contract.token_ids import TokenIds
from kd_assets.durable import read_if_there
from kd_assets.errors import ContractError

CONTRACT_VERSION = 5

JobKind = Literal["shards", "teacher", "student", "export", "recode"]

ExportAsset = Literal[
    "export_axolotl",
    "export_distillkit",
    "export_hf",
    "export_modelopt",
    "export_original",
    "export_safetensors",
    "export_specforge",
    "export_specforge_dflash",
    "export_speculators",
]
"""`export_<format>` of every format in `kd_assets.export.formats`: a format is made an asset by one line here."""

Asset = Literal["shards_manifest", "topk_cache", "hidden_state_cache", "embedding_cache", "student_smoke", ExportAsset]

CACHES: tuple[Asset, ...] = ("topk_cache", "hidden_state_cache", "embedding_cache")

EXPORTS: tuple[ExportAsset, ...] = get_args(ExportAsset)

FinalState = Literal["before_norm", "after_norm"]
"""A state at the decoder's end: before or after its final norm."""

StateCodec = Literal["raw", "split", "fp8", "int8_32", "int8_128"]
"""How a hidden-state cache holds its numbers: as bfloat16; the same ones in fewer bytes; or rounded to 8 bits, with a
scale for each state, or for every 32 or 128 values."""

TopkCodec = Literal["plain", "compact"]
"""How the numbers of a top-k cache lie in its files: as they are, or coded in about two thirds of the bytes."""

FileFormat = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow"]

Compression = Literal["gzip", "zstd"]

RecordShape = Literal["auto", "text", "messages", "conversations", "instruction", "completion", "preference"]
"""What a record is made of; auto: recognised by the fields of each record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordRange:
    """A run of consecutive records of one source file: part of a shard. Where each record lies, and how it is read."""

    source: str
    """Name of the source in the recipe."""
    path: str
    """Absolute path of the file, or its URL."""
    file_format: FileFormat
    first_record: int
    """0-based, counting every record of the file (blank lines of a JSONL file are no records)."""
    n_records: int
    byte_offset: int | None = None
    """Where the first record starts in a file of text (of a compressed one: in its text); None for columns."""
    first_line: int | None = None
    """1-based line of the first record in a file of lines, for error messages; None for others."""
    text_field: str = "text"
    messages_field: str = "messages"
    id_field: str = "id"
    ignore_fields: tuple[str, ...] = ()
    """Fields that a chat template or a loss may read, and that are left out all the same."""
    # What follows came later: `without_later_defaults` of a plan leaves out what is not used.
    file_name: str = ""
    """Of a source of several files: the file's path within the source, part of its documents' names; else empty."""
    compression: Compression | None = None
    seekable_path: str | None = None
    """The copy of a compressed file that can be entered anywhere; written while it was planned."""
    batch_offset: int | None = None
    """Where the record batch with the first record starts in an Arrow stream."""
    batch_first_record: int | None = None
    """The number of that batch's first record."""
    file_identity: str | None = None
    """Of a file of columns: what it was when it was planned (see `sources.files`); None in plans of the first versions,
    which read fewer columns."""
    hashed: Literal["records", "file"] = "records"
    """What the range's hash is over: each record, or (a large file of columns, which a plan does not read) the file."""
    dropped: tuple[int, ...] = ()
    """Numbers of records in the range that are left out: exact copies of earlier ones."""
    shape: RecordShape = "auto"
    fields: dict[str, str] = field(default_factory=dict)
    """Field of the shape (`instruction`, `prompt`, `conversations`, `tools` …) → the field or column that has it."""
    prefer: Literal["chosen", "rejected"] | None = None
    """Which of a preference's two answers is the document."""
    roles: dict[str, str] = field(default_factory=dict)
    """The source's own words for roles → system, developer, user, assistant, tool."""
    control_tokens: Literal["tokens", "text"] = "tokens"
    """What control tokens that a plain text spells out are: those tokens (texts rendered before), or text."""
    records_hash: str | None = None
    """Of a range of a shard of several: the hash of its own records; None: the shard's is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardsParams:
    """How a shard's records become tokenised documents."""

    tokenizer: str
    """A folder or hub id that `AutoTokenizer.from_pretrained` accepts."""
    revision: str | None = None
    tokenizer_fingerprint: str
    """What `model_files.fingerprints.tokenizer_fingerprint` gave when the job was planned."""
    max_length: int
    """Most tokens of a document."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    part_documents: int = 4096
    on_long: Literal["truncate", "split", "drop"] = "truncate"
    """What becomes of a document of more tokens: it is cut, becomes several windows, or is left out."""
    overlap: int = 0
    """Tokens that a window has in common with the one before."""
    chat_template: str | None = None
    """A chat template's text, in the place of the tokenizer's own."""
    chat_template_name: str | None = None
    """Of several that the tokenizer has: which."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables that the template is given besides; a record's own go before."""
    tools: list[Any] | None = None
    """Tools of every chat that brings none of its own."""
    turns: Literal["all", "last", "refuse"] = "all"
    """Chats under a template that renders earlier turns differently once others follow: a document a turn, one of the
    last turn, or none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionChoice:
    """Which positions of a document a cache keeps. Position i predicts token i + 1."""

    kept: Literal["all", "learned", "share"] = "all"
    """learned: those whose next token the loss mask asks for; share: each with the probability `share`."""
    share: float | None = None
    """Above 0 and below 1; only of `share`."""
    seed: int = 0
    """Of `share`: equal seeds choose equal positions in every cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TopkParams:
    """The response-based cache: top-k next-token log-probabilities of every position."""

    k: int
    max_length: int
    draws: int = 0
    """Random-sampling KD: token ids drawn from each distribution besides (with replacement); 0: none."""
    positions: PositionChoice = field(default_factory=PositionChoice)
    vocabulary: str | None = None
    """Where `token_ids` are to be looked up when the job is planned: `tokenizer` (the teacher's own), or a folder, a
    file or a hub id of the student's tokenizer."""
    token_ids: TokenIds | None = None
    """The ids that a student can have: what is kept of a distribution is cut to them, and normalised over them. None:
    all that the teacher's head has."""
    codec: TopkCodec = "plain"
    logsumexp: bool = True
    """Whether the logits' normaliser is kept; only a compact cache can do without, and logits cannot be had then."""
    top_p: float | None = None
    """Above 0 and below 1: each position keeps as many of its most likely tokens as have this mass, up to `k`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenStateParams:
    """The feature-based cache: outputs of decoder blocks (0-based), and the states at the decoder's end."""

    blocks: tuple[int, ...]
    max_length: int
    final: tuple[FinalState, ...] = ()
    """Which states at the decoder's end are kept: what goes into the final norm, what comes out of it and goes into the
    head, or both."""
    positions: PositionChoice = field(default_factory=PositionChoice)
    codec: StateCodec = "raw"


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingParams:
    """The relation-based cache: the final hidden states pooled over a document."""

    max_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherOptions:
    """Which teacher runs, and how: the options of a recipe that reach the worker as they are, with their defaults."""

    model: str
    """A folder or hub id; for the worker one that `AutoModelForCausalLM.from_pretrained` accepts."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the forward pass. Logits are always reduced in float32."""
    token_budget: int | None = None
    """Most tokens of one batch, padding included (a longer document is a batch of its own); None: found from the memory
    that is free once the teacher is loaded."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    quantization: dict[str, Any] | None = None
    """A quantisation of the weights on loading, as the dict of a transformers quantisation configuration (its
    `quant_method` and parameters); None: the weights as they are (which may be quantised themselves)."""
    placement: Literal["auto", "one_device", "tensor_parallel", "device_map"] = "auto"
    """How the teacher lies on the GPUs of its process (see `kd_assets.model_files.placement`)."""
    n_devices: int | None = None
    """Devices that one teacher is spread over; None: as `kd_assets.model_files.placement` decides."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Whether decoder blocks are compiled (`torch.compile`); auto: on a GPU, once proved equal."""
    recompute_documents: int = 2
    """Documents of each partition that are computed again by the plain reference path."""
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Name → value of each of these options, also of a dataclass that has more fields."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(TeacherOptions)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherParams(TeacherOptions):
    """What a worker is told of its teacher, and what each cache keeps. A cache that is None is not of this recipe."""

    weights_fingerprint: str
    """What `model_files.fingerprints.weights_fingerprint` gave when the job was planned; checked again on loading."""
    tokenizer_fingerprint: str
    part_documents: int = 256
    """Most documents of a part file, and so of the window that is sorted by length."""
    part_tokens: int = 131072
    """A part is closed once it holds this many tokens."""
    topk: TopkParams | None = None
    hidden_states: HiddenStateParams | None = None
    embeddings: EmbeddingParams | None = None

    def codec_of(self, asset: Asset) -> str:
        """The codec of a cache's files; `plain` of those that have none."""
        if asset == "topk_cache" and self.topk is not None:
            return self.topk.codec
        if asset == "hidden_state_cache" and self.hidden_states is not None and self.hidden_states.codec != "raw":
            return self.hidden_states.codec
        return "plain"


STUDENT_HEAD_SIZE = 32
"""Numbers of a student's state that each of its attention heads takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentParams:
    """A small student trained for a few steps, to prove that the caches teach."""

    steps: int = 60
    batch_documents: int = 8
    max_length: int = 256
    """Tokens of a document that the student sees."""
    hidden_size: int = 128
    """A multiple of `STUDENT_HEAD_SIZE`."""
    n_layers: int = 2
    learning_rate: float = 2e-3
    temperature: float = 2.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportParams:
    """An export of each partition's caches: the options of `kd_assets.export.format.ExportOptions` that one partition
    can have."""

    asset: ExportAsset
    max_length: int | None = None
    validation_share: float = 0.0
    learned_only: bool = False
    seed: int = 0
    assets: tuple[Asset, ...] | None = None
    states: tuple[int | FinalState, ...] | None = None
    pack_to: int | None = None

    @property
    def format_name(self) -> str:
        return self.asset.removeprefix("export_")

    def content(self) -> dict[str, Any]:
        """The format and the options that are not left to their defaults: what enters an identity."""
        plain = ExportParams(asset=self.asset)
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        used = {name: value for name, value in named.items() if value != getattr(plain, name)}
        return {"format": self.format_name} | used


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """One result a unit must leave behind: an asset's partition with the identity that names it."""

    asset: Asset
    path: str
    """Absolute folder of the result; see FORMAT.md for its name."""
    variant: str
    fingerprint: str
    identity: dict[str, Any]
    """Everything that determines the bytes; `fingerprint` is its hash."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkUnit:
    """One partition's share of a job: what it reads and what it must commit."""

    partition_key: str
    n_tokens: int = 0
    """Estimated size, for balancing; 0 where unknown."""
    records: tuple[RecordRange, ...] = ()
    """Kind `shards`: the records that make the shard."""
    inputs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Asset name → committed result folders. Kind `teacher`: {"shards_manifest": (folder,)}; kind `student`: every
    cache of every shard, the folders of all assets in the same shard order; kind `export`: the caches of the
    partition; kind `recode`: of each cache that is to be made the result that it is made of, and the shard."""
    outputs: tuple[Output, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFile:
    """All that a worker is told. `tasks[i]` lists the indexes into `units` that array task i works through."""

    contract_version: int = CONTRACT_VERSION
    kind: JobKind
    recipe: str
    key: str
    """The submission key: equal work has an equal key (see `kd_assets.scheduler`)."""
    recipe_folder: str
    """`<store>/<recipe>`: where `audit.jsonl` lives."""
    events_folder: str
    tasks: tuple[tuple[int, ...], ...]
    units: tuple[WorkUnit, ...]
    shards: ShardsParams | None = None
    teacher: TeacherParams | None = None
    student: StudentParams | None = None
    exports: tuple[ExportParams, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    """What only the control plane knows (run id, code commit, source revisions and licences); copied to manifests."""

    def units_of_task(self, task_index: int) -> tuple[WorkUnit, ...]:
        """The units of one array task, in order. Raises ContractError for a task this job does not have."""
        if not 0 <= task_index < len(self.tasks):
            raise ContractError(
                f"job {self.key} has tasks 0 to {len(self.tasks) - 1}, and was started as task {task_index}: "
                "check SLURM_ARRAY_TASK_ID"
            )
        return tuple(self.units[i] for i in self.tasks[task_index])

    def to_json(self) -> str:
        """Its version comes first, for `contract_version_of`."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)


def read_job(path: Path) -> JobFile:
    """The job file at `path`. Raises ContractError when it is not one, or of another contract version, and
    StorageUnavailableError where the file system does not let us read it."""
    data = read_if_there(path, known=path.parent)
    if data is None:
        raise ContractError(f"no job file at {path}: it is written by the control plane before it submits")
    try:
        raw = parse_json(data)
    except ValueError as e:
        raise ContractError(f"{path} is not JSON: {e}") from e
    version = raw.get("contract_version") if isinstance(raw, dict) else None
    if version != CONTRACT_VERSION:
        raise ContractError(
            f"{path} is of contract version {version!r}, this worker reads version {CONTRACT_VERSION}: install the "
            "same kd_assets on the cluster nodes and in the Dagster deployment"
        )
    return decode(JobFile, raw, where=str(path))


def contract_version_of(path: Path) -> int | None:
    """What the first bytes of a job file say of its version, however large the file is; None where they say nothing.

    Raises OSError where it cannot be read.
    """
    with path.open("rb") as file:
        match = re.match(rb'\s*\{\s*"contract_version":\s*(\d+)', file.read(64))
    return int(match[1]) if match else None
