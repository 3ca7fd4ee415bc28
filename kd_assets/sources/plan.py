"""Which records make which shard: the plan that names a recipe's partitions and pins what they are made of.

Runs inside Dagster, so it imports neither torch nor transformers, and reads each source once in constant memory. The
invariants: a shard holds records of one source, in the file's order; partition keys sort in that order and stay what
they were when the last source grows at its end; a changed record changes the `input_hash` of its own shard only; the
same records give the same plan wherever their files lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_assets.contract import RecordRange, decode, parse_json
from kd_assets.errors import ContractError, InputError, MissingInputError, RecipeError
from kd_assets.sources.fields import fields_of
from kd_assets.sources.record_files import RawRecord, iter_columns, iter_jsonl, open_source
from kd_assets.sources.records import ShardHash
from kd_assets.sources.spec import SourceSpec, resolve_path, without_later_defaults
from kd_assets.store.fingerprint import fingerprint
from kd_assets.store.reading.planned import SELF_HASH, plan_hash_of

MAX_SHARDS = 100_000
"""Five digits of a partition key: beyond them, sorted keys would no longer be in order."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    """One partition: its records and the hash of all that its documents are made of."""

    partition_key: str
    records: tuple[RecordRange, ...]
    input_hash: str
    n_records: int
    n_bytes: int
    """Of the records as `RawRecord.content` has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PinnedSource:
    """A source as it was when the plan was made."""

    name: str
    path: str
    """Absolute."""
    sha256: str
    """Of the whole file."""
    n_records: int
    n_bytes: int
    """Of the whole file."""
    licence: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """A recipe's partitions, in sorted order of their keys, and the sources they come from."""

    shards: tuple[PlannedShard, ...]
    sources: tuple[PinnedSource, ...]
    plan_hash: str
    """SHA-256 over keys, input hashes and pinned sources; not over paths."""

    def to_json(self) -> str:
        """With the hash of itself: a plan that was changed by a failing disk must not name other records."""
        raw = dataclasses.asdict(self)
        for shard in raw["shards"]:
            for records in shard["records"]:
                without_later_defaults(RecordRange, records)
        return json.dumps(raw | {SELF_HASH: fingerprint(raw)}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = "shard plan") -> ShardPlan:
        """The plan that `to_json` wrote, now or before plans had a hash of themselves. Raises ContractError, naming
        `where`, for anything else."""
        try:
            raw = parse_json(text)
        except ValueError as e:
            raise ContractError(f"{where} is not JSON ({e}): materialize shard_plan again") from e
        claimed = raw.pop(SELF_HASH, None) if isinstance(raw, dict) else None
        plan = decode(cls, raw, where=where)
        if claimed not in (None, fingerprint(raw)) or plan.plan_hash != _plan_hash(plan.shards, plan.sources):
            raise ContractError(f"{where} was changed after it was written: materialize shard_plan again")
        return plan


def plan_shards(
    sources: Sequence[SourceSpec],
    *,
    documents_per_shard: int,
    shard_prefix: str,
    base_folder: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> ShardPlan:
    """Read every source once and cut it into shards of `documents_per_shard` records (a source's last has the rest).

    Relative paths start from `base_folder` (default: the working folder); `environment` says what `$NAME` stands for.
    Raises MissingInputError for a source that is missing, unreadable or without records, InputError for one of another
    format or that changes meanwhile, RecipeError for names and sizes that cannot be, StorageUnreachableError where its
    file system does not answer.
    """
    _check_recipe(sources, documents_per_shard=documents_per_shard, shard_prefix=shard_prefix)
    shards: list[PlannedShard] = []
    pinned: list[PinnedSource] = []

    def next_key() -> str:
        if len(shards) >= MAX_SHARDS:
            raise RecipeError(f"more than {MAX_SHARDS:,} shards: raise documents_per_shard ({documents_per_shard:,})")
        return f"{shard_prefix}-{len(shards):05d}"

    for spec in sources:
        assert spec.path is not None
        path = resolve_path(spec.path, base_folder or Path.cwd(), what=f"source {spec.name!r}", environment=environment)
        try:
            pinned.append(_plan_source(spec, path, documents_per_shard, next_key, shards))
        except InputError as e:
            raise type(e)(f"source {spec.name!r}: {e}") from e
    return ShardPlan(shards=tuple(shards), sources=tuple(pinned), plan_hash=_plan_hash(shards, pinned))


def _plan_source(
    spec: SourceSpec, path: Path, documents_per_shard: int, next_key: Callable[[], str], shards: list[PlannedShard]
) -> PinnedSource:
    """Append the shards of one source to `shards`; returns the source, pinned."""
    file_hash = hashlib.sha256()
    with open_source(path) as f:
        before = os.fstat(f.fileno())
        if before.st_size == 0:
            raise MissingInputError(f"{path} is empty: write its records, or take the source out of the recipe")
        if spec.file_format in ("jsonl", "auto"):
            records = iter_jsonl(f, path, file_hash=file_hash)
        else:
            while chunk := f.read(1 << 22):
                file_hash.update(chunk)
            records = iter_columns(path, spec.file_format, fields=fields_of(spec))
        n_records = 0
        while (shard := _take_shard(records, spec, path, documents_per_shard, next_key)) is not None:
            shards.append(shard)
            n_records += shard.n_records
        after = os.fstat(f.fileno())
    if n_records == 0:
        raise MissingInputError(f"{path} holds no records: write some, or take the source out of the recipe")
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(f"{path} changed while it was being planned: plan again once nothing writes to it")
    return PinnedSource(
        name=spec.name,
        path=str(path),
        sha256=file_hash.hexdigest(),
        n_records=n_records,
        n_bytes=before.st_size,
        licence=spec.licence,
        revision=spec.revision,
    )


def _take_shard(
    records: Iterator[RawRecord], spec: SourceSpec, path: Path, n_most: int, next_key: Callable[[], str]
) -> PlannedShard | None:
    """The shard of the next `n_most` records, or of what is left; None when nothing is."""
    first = next(records, None)
    if first is None:
        return None
    partition_key = next_key()
    shard_hash = ShardHash()
    shard_hash.begin_range(spec, source=spec.name, first_record=first.number)
    shard_hash.add(first)
    n_records, n_bytes = 1, len(first.content)
    while n_records < n_most and (record := next(records, None)) is not None:
        shard_hash.add(record)
        n_records += 1
        n_bytes += len(record.content)
    return PlannedShard(
        partition_key=partition_key,
        records=(
            RecordRange(
                source=spec.name,
                path=str(path),
                file_format="jsonl" if spec.file_format == "auto" else spec.file_format,
                first_record=first.number,
                n_records=n_records,
                byte_offset=first.byte_offset,
                first_line=first.line,
                text_field=spec.text_field,
                messages_field=spec.messages_field,
                id_field=spec.id_field,
                ignore_fields=spec.ignore_fields,
            ),
        ),
        input_hash=shard_hash.hexdigest(),
        n_records=n_records,
        n_bytes=n_bytes,
    )


def _check_recipe(sources: Sequence[SourceSpec], *, documents_per_shard: int, shard_prefix: str) -> None:
    if not sources:
        raise RecipeError("the recipe names no source: give at least one")
    if documents_per_shard < 1:
        raise RecipeError(f"documents_per_shard is {documents_per_shard}: a shard holds at least one document")
    if not _NAME.fullmatch(shard_prefix):
        raise RecipeError(f"shard_prefix {shard_prefix!r}: use letters, digits, '_', '.' and '-' (it names folders)")
    names: set[str] = set()
    for spec in sources:
        if not _NAME.fullmatch(spec.name):
            raise RecipeError(f"source name {spec.name!r}: use letters, digits, '_', '.' and '-' (it names documents)")
        if spec.name in names:
            raise RecipeError(f"two sources are named {spec.name!r}: their documents would have the same ids")
        names.add(spec.name)
        read = {spec.id_field, spec.text_field, spec.messages_field}
        if len(read) < 3:
            raise RecipeError(
                f"source {spec.name!r}: text_field {spec.text_field!r}, messages_field {spec.messages_field!r} and "
                f"id_field {spec.id_field!r} must be three different fields"
            )
        if used := sorted({*read, "role", "content"} & set(spec.ignore_fields)):
            raise RecipeError(
                f"source {spec.name!r}: ignore_fields has {used[0]!r}, which is what documents are made of"
            )


def _plan_hash(shards: Sequence[PlannedShard], sources: Sequence[PinnedSource]) -> str:
    named = [{"partition_key": shard.partition_key, "input_hash": shard.input_hash} for shard in shards]
    return plan_hash_of({"shards": named, "sources": [dataclasses.asdict(source) for source in sources]})
