"""The shard plan: a recipe's partitions, what each is made of, and the sources as they were when it was made.

The invariants: partition keys sort in the order of the shards; a shard stays what it is while its records do, whatever
is added to the sources; the same records give the same hashes wherever their files lie. How a plan lies on disk is in
`kd_assets.store.reading.planned`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kd_assets.contract import RecordRange, decode
from kd_assets.errors import ContractError, CorruptPlanError
from kd_assets.sources.spec import without_later_defaults
from kd_assets.store.reading.planned import (
    BLOCK_SHARDS,
    PLAN_FORMAT,
    PLAN_NAME,
    Block,
    PlanFile,
    PlanHash,
    RawShard,
    block_of,
    key_ranges,
    plan_in_memory,
    read_plan_file,
    write_plan_file,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    """One partition: its records and the hash of all that its documents are made of."""

    partition_key: str
    records: tuple[RecordRange, ...]
    input_hash: str
    n_records: int
    n_bytes: int
    """Of the records as `RawRecord.content` has them, or (columns that are not read) of their values."""
    n_tokens: int = 0
    """About so many; 0 in plans of earlier versions."""

    @property
    def n_documents(self) -> int:
        """Without records that are left out as copies of others."""
        return self.n_records - sum(len(r.dropped) for r in self.records)


@dataclass(frozen=True, kw_only=True, slots=True)
class PinnedFile:
    """A file of a source as it was when the plan was made."""

    name: str
    """Within the source; empty for a source that is one file."""
    path: str
    identity: str
    """SHA-256 of the file, or what `sources.files` has for a large one of columns."""
    n_records: int
    n_bytes: int
    changed: str
    """What its storage said of its version (time of change, or ETag)."""
    seekable_path: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PinnedSource:
    """A source as it was when the plan was made."""

    name: str
    path: str
    """Absolute; a folder's, a pattern or a URL, or a data set's name."""
    sha256: str
    """Of the whole file; of several, over their names and hashes."""
    n_records: int
    n_bytes: int
    """Of all its files."""
    licence: str
    revision: str | None = None
    """The recipe's word, or the commit of a data set."""
    # What follows came later.
    bytes_per_token: float | None = None
    """Of its records, measured on its first ones; None: assumed."""
    files: tuple[PinnedFile, ...] = ()
    """Empty in plans of earlier versions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCounts:
    """What became of a source's records."""

    source: str
    n_documents: int
    n_duplicates: int
    """Left out as exact copies of others."""
    n_left: int
    """Not in any shard: beyond a cap, or left over where another source of the mixture ended."""
    n_tokens: int = 0
    """About so many, of its documents."""


class ShardPlan:
    """A recipe's partitions, and the sources they come from. Its shards are read as they are asked for."""

    def __init__(self, file: PlanFile) -> None:
        """Raises ContractError where the head is not one of ours."""
        self._file = file
        where = str(file.path)
        self.plan_hash = file.plan_hash
        self.sources: tuple[PinnedSource, ...] = decode(
            _Sources, {"sources": file.head.get("sources")}, where=where
        ).sources

    @property
    def keys(self) -> tuple[str, ...]:
        return self._file.keys

    @property
    def n_shards(self) -> int:
        return self._file.n_shards

    @property
    def settings(self) -> Mapping[str, Any] | None:
        """What decides how records are cut, as the recipe had it; None in plans of earlier versions."""
        settings: Mapping[str, Any] | None = self._file.head.get("settings")
        return settings

    @property
    def counts(self) -> tuple[SourceCounts, ...]:
        """None for plans of earlier versions, which used every record."""
        return tuple(decode(SourceCounts, raw, where="counts") for raw in self._file.head.get("counts", ()))

    @property
    def said(self) -> tuple[str, ...]:
        """What people should know of how the sources were found."""
        return tuple(self._file.head.get("said", ()))

    @cached_property
    def totals(self) -> Mapping[str, int]:
        """`n_records`, `n_documents`, `n_bytes`, `n_tokens` (about) of all shards."""
        if "totals" in self._file.head:
            return dict(self._file.head["totals"])
        return totals_of(self)

    def __iter__(self) -> Iterator[PlannedShard]:
        """The shards in order, read block by block."""
        return (self._decoded(raw) for raw in self._file.shards())

    @property
    def shards(self) -> tuple[PlannedShard, ...]:
        """All of them at once."""
        return tuple(self)

    def shard(self, key: str) -> PlannedShard | None:
        """The shard of this key; None where the plan has none."""
        raw = self._file.shard(key)
        return None if raw is None else self._decoded(raw)

    def _decoded(self, raw: RawShard) -> PlannedShard:
        return decode(PlannedShard, raw, where=f"{self._file.path}: {raw.get('partition_key')}")

    def write(self, folder: Path) -> None:
        """Write it as the folder's current plan, and under its own name, by which runs that began with it find it."""
        write_plan_file(self._file, folder, names=(plan_name(self.plan_hash), PLAN_NAME))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sources:
    sources: tuple[PinnedSource, ...]


def plan_name(plan_hash: str) -> str:
    """The name that a plan keeps; the current one also lies under PLAN_NAME."""
    return f"{plan_hash[:16]}.json"


def read_plan(path: Path) -> ShardPlan | None:
    """The plan at `path`; None where there is none. Raises ContractError, naming it, for anything else."""
    try:
        file = read_plan_file(path)
        return None if file is None else ShardPlan(file)
    except CorruptPlanError as e:
        raise ContractError(str(e)) from e


def plan_of(
    shards: Iterable[PlannedShard],
    sources: Sequence[PinnedSource],
    *,
    settings: Mapping[str, Any],
    counts: Iterable[SourceCounts] = (),
    said: Sequence[str] = (),
) -> ShardPlan:
    """A plan of these shards, in memory. `counts` are asked for after the last shard."""
    digest, keys, blocks = PlanHash(), list[str](), list[tuple[Block, bytes]]()
    totals = dict.fromkeys(("n_records", "n_documents", "n_bytes", "n_tokens"), 0)
    for group in _blocks(_counted(shards, digest, keys, totals)):
        blocks.append(block_of([raw_shard(shard) for shard in group]))
    named = [dataclasses.asdict(source) for source in sources]
    head = {
        "plan_format": PLAN_FORMAT,
        "plan_hash": digest.hexdigest(named),
        "keys": key_ranges(keys),
        "blocks": [dataclasses.asdict(block) for block, _ in blocks],
        "sources": named,
        "settings": dict(settings),
        "counts": [dataclasses.asdict(c) for c in counts],
        "said": list(said),
        "totals": totals,
    }
    return ShardPlan(plan_in_memory(head, blocks))


def raw_shard(shard: PlannedShard) -> RawShard:
    """A shard as JSON, without fields that are not used."""
    raw = {name: getattr(shard, name) for name in ("partition_key", "input_hash", "n_records", "n_bytes", "n_tokens")}
    return raw | {"records": [raw_range(records) for records in shard.records]}


def raw_range(records: RecordRange) -> dict[str, Any]:
    return without_later_defaults(RecordRange, {name: getattr(records, name) for name in RecordRange.__slots__})


def totals_of(shards: Iterable[PlannedShard]) -> dict[str, int]:
    totals = dict.fromkeys(("n_records", "n_documents", "n_bytes", "n_tokens"), 0)
    for _ in _counted(shards, PlanHash(), [], totals):
        pass
    return totals


def _counted(
    shards: Iterable[PlannedShard], digest: PlanHash, keys: list[str], totals: dict[str, int]
) -> Iterator[PlannedShard]:
    for shard in shards:
        digest.add(shard.partition_key, shard.input_hash)
        keys.append(shard.partition_key)
        for name in totals:
            totals[name] += getattr(shard, name)
        yield shard


def _blocks(shards: Iterable[Any]) -> Iterator[list[Any]]:
    block: list[Any] = []
    for shard in shards:
        block.append(shard)
        if len(block) == BLOCK_SHARDS:
            yield block
            block = []
    if block:
        yield block
