"""The seam between the planes: the job file, the events of its tasks, and the names both sides use.

Anyone may import it; it imports only the standard library and our errors, so that a cluster node needs nothing of the
control plane. The control plane writes one job file for each submission; a worker reads it, and appends one JSON line
to its task's event file for everything worth knowing. Both carry `CONTRACT_VERSION`; a reader of another version
refuses. Events inform: a result exists when its manifest does (see `kd_assets.store`), never because an event says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from kd_assets.errors import ContractError

CONTRACT_VERSION = 1

JobKind = Literal["shards", "teacher", "student"]
Asset = Literal["shards_manifest", "topk_cache", "hidden_state_cache", "embedding_cache", "student_smoke"]
CACHES: tuple[Asset, ...] = ("topk_cache", "hidden_state_cache", "embedding_cache")

EventType = Literal[
    "task_started", "teacher_loaded", "progress", "committed", "partition_failed", "warning", "task_finished"
]
"""What an event's `data` holds. A reader must do without any of it, and without knowing more.

task_started      kind, n_partitions (of this process), n_parts_on_disk (files of its results that a kill does not
                  undo), host, pid, rank, n_ranks, slurm_job_id, slurm_array_job_id, slurm_array_task_id,
                  slurm_restart_count, slurm_nodelist, slurm_partition, slurm_cluster (None where SLURM says nothing)
teacher_loaded    load_s, device, gpu, n_parameters, head, attention, placement, n_devices, compiled, warm_up_s,
                  token_budget, quantization
progress          partition_key, n_documents, done_documents, n_tokens, done_tokens, tokens_per_s
committed         partition_key, asset, path, fingerprint, data_version, reused, usage
partition_failed  partition_key, assets, error (the class: of `kd_assets.errors` where we foresaw it), message,
                  during ("load" where the teacher or tokenizer could not be loaded, else "run")
warning           message; partition_key where it is about one; token_budget where that was made smaller
task_finished     status ("done", "failed", "resumable", "duplicate"), signal, n_committed, n_reused, n_failed, n_loads,
                  wall_s, usage, rank, slurm_job_id; of a duplicate also holder, as that task_started has it

`usage` is what this attempt has used so far: wall_s, cpu_s, n_cpus, cpu_efficiency, max_rss_gib; of jobs that run a
model also cpu_utilisation_percent and host_memory_gib (of the process and its children) and, where RAPL can be read,
cpu_joules (of all processors of the whole node, whoever uses them); where NVML is there also n_gpus, joules,
gpu_utilisation_percent, gpu_memory_gib, gpu_power_watts, gpu_temperature_celsius, gpu_sm_clock_mhz,
gpu_memory_clock_mhz, gpu_throttle_reasons (see `kd_assets.teacher.telemetry.Usage`). What one partition used stands in
its manifest's facts, as a series over time in `telemetry`.

A file holds the events of all attempts in the order of their starts; a duplicate, which leaves the task to another
process, writes a warning and a task_finished in between, which do not end the other's attempt.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordRange:
    """A run of consecutive records of one source file: part of a shard."""

    source: str
    """Name of the source in the recipe."""
    path: str
    """Absolute path of the file."""
    file_format: Literal["jsonl", "parquet"]
    first_record: int
    """0-based, counting every record of the file (blank lines of a JSONL file are no records)."""
    n_records: int
    byte_offset: int | None = None
    """Where the first record starts in a JSONL file; None for Parquet."""
    first_line: int | None = None
    """1-based line of the first record in a JSONL file, for error messages; None for Parquet."""
    text_field: str = "text"
    messages_field: str = "messages"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardsParams:
    """How a shard's records become tokenised documents."""

    tokenizer: str
    """A folder or hub id that `AutoTokenizer.from_pretrained` accepts."""
    revision: str | None = None
    tokenizer_fingerprint: str
    """What `kd_assets.identity.tokenizer_fingerprint` gave when the job was planned."""
    max_length: int
    """Documents are cut after this many tokens."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    part_documents: int = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class TopkParams:
    """The response-based cache: top-k next-token log-probabilities of every position."""

    k: int
    max_length: int
    draws: int = 0
    """Random-sampling KD: token ids drawn from each whole distribution besides (with replacement); 0: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenStateParams:
    """The feature-based cache: outputs of decoder blocks (0-based)."""

    blocks: tuple[int, ...]
    max_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingParams:
    """The relation-based cache: the final hidden states pooled over a document."""

    max_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherParams:
    """Which teacher runs, how, and what each cache keeps. A cache that is None is not of this recipe."""

    model: str
    """A folder or hub id that `AutoModelForCausalLM.from_pretrained` accepts."""
    revision: str | None = None
    weights_fingerprint: str
    """What `kd_assets.identity.weights_fingerprint` gave when the job was planned; checked again on loading."""
    tokenizer_fingerprint: str
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
    """How the teacher lies on the GPUs of its process (see `kd_assets.placement`)."""
    n_devices: int | None = None
    """Devices that one teacher is spread over; None: as `kd_assets.placement` decides."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Whether decoder blocks are compiled (`torch.compile`); auto: on a GPU, once proved equal."""
    part_documents: int = 256
    """Most documents of a part file, and so of the window that is sorted by length."""
    part_tokens: int = 131072
    """A part is closed once it holds this many tokens."""
    recompute_documents: int = 2
    """Documents of each partition that are computed again by the plain reference path."""
    seed: int = 0
    topk: TopkParams | None = None
    hidden_states: HiddenStateParams | None = None
    embeddings: EmbeddingParams | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentParams:
    """A small student trained for a few steps, to prove that the caches teach."""

    steps: int = 60
    batch_documents: int = 8
    max_length: int = 256
    """Tokens of a document that the student sees."""
    hidden_size: int = 128
    n_layers: int = 2
    learning_rate: float = 2e-3
    temperature: float = 2.0
    seed: int = 0


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
    cache of every shard, the folders of all assets in the same shard order."""
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
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One line of a task's event file."""

    type: EventType
    time: float
    """Seconds since the epoch."""
    task: int
    attempt: int
    """SLURM_RESTART_COUNT: 0 for the first start of the task."""
    data: dict[str, Any]

    def to_line(self) -> str:
        """One line of JSON with its newline; NaN and infinity become null, since JSON has neither."""
        record = {"v": CONTRACT_VERSION} | dataclasses.asdict(self)
        try:
            return json.dumps(record, allow_nan=False, default=str) + "\n"
        except ValueError:
            return json.dumps(_without_non_finite(record), allow_nan=False, default=str) + "\n"


def read_job(path: Path) -> JobFile:
    """The job file at `path`. Raises ContractError when it is not one, or of another contract version."""
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise ContractError(f"no job file at {path}: it is written by the control plane before it submits") from e
    except OSError as e:
        raise ContractError(f"{path} cannot be read as a job file: {e}") from e
    except ValueError as e:
        raise ContractError(f"{path} is not JSON: {e}") from e
    version = raw.get("contract_version") if isinstance(raw, dict) else None
    if version != CONTRACT_VERSION:
        raise ContractError(
            f"{path} is of contract version {version!r}, this worker reads version {CONTRACT_VERSION}: install the "
            "same kd_assets on the cluster nodes and in the Dagster deployment"
        )
    return decode(JobFile, raw, where=str(path))


def parse_event(line: str) -> Event:
    """The event on one complete line. Raises ContractError for anything else, another version included."""
    try:
        raw = json.loads(line)
    except ValueError as e:
        raise ContractError(f"not an event line ({e}): {line[:200]!r}") from e
    if not isinstance(raw, dict) or raw.pop("v", None) != CONTRACT_VERSION:
        raise ContractError(f"not an event of contract version {CONTRACT_VERSION}: {line[:200]!r}")
    return decode(Event, raw, where="event")


def event_file(events_folder: Path, task_index: int, rank: int = 0) -> Path:
    """Of one process of a task: where several share it (KD_RANKS), each writes its own."""
    return events_folder / f"{task_name(task_index, rank)}.jsonl"


def lease_file(events_folder: Path, task_index: int, rank: int = 0) -> Path:
    """Locked as long as a process is at this task: see `kd_assets.attempt`."""
    return events_folder.parent / "leases" / f"{task_name(task_index, rank)}.lease"


def task_name(task_index: int, rank: int = 0) -> str:
    return f"task-{task_index:05d}" + (f".rank-{rank}" if rank else "")


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[int, Event | str]]:
    """Events of complete lines from byte `offset` on, each with the offset to go on from.

    A last line without its newline is left for the next call: its writer is still at it, or was killed and its next
    attempt begins a new line (see `Reporter`). A complete line that is no event comes back as its text, so that the
    caller can say so and go on.
    """
    try:
        with path.open("rb") as f:
            f.seek(offset)
            for line in f:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                text = line.decode("utf-8", "replace").strip()
                if not text:
                    continue
                try:
                    yield offset, parse_event(text)
                except ContractError:
                    yield offset, text
    except FileNotFoundError:
        return


T = TypeVar("T")
_MISFIT = object()


def decode(cls: type[T], raw: Any, where: str) -> T:
    """`raw` (parsed JSON) as the dataclass `cls`, checked field by field. Raises ContractError naming the field."""
    return typing.cast(T, _decode(cls, raw, where))


def _decode(expected: Any, raw: Any, where: str) -> Any:
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    decoded: Any = _MISFIT
    if expected is Any or (origin is Literal and raw in args):
        decoded = raw
    elif origin in (typing.Union, types.UnionType):  # only `X | None` occurs here
        (inner,) = (a for a in args if a is not type(None))
        decoded = None if raw is None else _decode(inner, raw, where)
    elif origin is tuple and isinstance(raw, list):
        decoded = tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
    elif origin is dict and isinstance(raw, dict):
        decoded = {k: _decode(args[1], v, f"{where}.{k}") for k, v in raw.items()}
    elif dataclasses.is_dataclass(expected) and isinstance(raw, Mapping):
        decoded = _decode_dataclass(typing.cast(type, expected), raw, where)
    elif expected is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        decoded = float(raw)
    elif expected in (int, str, bool) and type(raw) is expected:
        decoded = raw
    if decoded is _MISFIT:
        raise ContractError(f"{where}: expected {getattr(expected, '__name__', expected)}, found {raw!r:.200}")
    return decoded


def _decode_dataclass(cls: type, raw: Mapping[str, Any], where: str) -> Any:
    hints = _type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(raw) - set(known)):
        raise ContractError(f"{where}: unknown field {unknown[0]!r} for {cls.__name__}; it has {', '.join(known)}")
    missing = [
        n
        for n, f in known.items()
        if n not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ContractError(f"{where}: {cls.__name__} lacks field {missing[0]!r}")
    return cls(**{name: _decode(hints[name], value, f"{where}.{name}") for name, value in raw.items()})


@cache
def _type_hints(cls: type) -> dict[str, Any]:
    """Evaluated once for each class: doing it for each record took three quarters of the time of reading."""
    return typing.get_type_hints(cls)


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _without_non_finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(v) for v in value]
    return value
