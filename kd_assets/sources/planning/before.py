"""What the plan before had of each file: the ranges that stay shards, whatever is added."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kd_assets.contract import RecordRange
from kd_assets.sources.planning.plan import PinnedFile, PinnedSource, PlannedShard, ShardPlan
from kd_assets.sources.spec import Sharding

HASHED_WHOLE = ""
"""What an earlier version's plan says of a file's version: nothing; its identity is the hash of all its bytes."""

FileKey = tuple[str, str]
"""A source, and a file's name within it."""
RangeKey = tuple[str, str, int]
"""Those two, and the first record of a range."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Before:
    """Of the plan before; empty where there was none, or where records were cut by other settings."""

    ranges: Mapping[FileKey, Sequence[RecordRange]] = field(default_factory=dict)
    """In the order of the file, each with its hash."""
    places: Mapping[RangeKey, tuple[str, int]] = field(default_factory=dict)
    """A range → its shard and its position in it."""
    sizes: Mapping[RangeKey, int] = field(default_factory=dict)
    """A range → bytes of its records (of a shard of several about its part)."""
    sources: Mapping[str, PinnedSource] = field(default_factory=dict)
    control_tokens: Mapping[str, Literal["tokens", "text"]] = field(default_factory=dict)
    """Source → what control tokens that its texts spell out were; it stays that unless the recipe says otherwise."""
    n_numbers: int = 0
    """Numbers of partition keys that are taken."""

    def file(self, source: str, name: str) -> PinnedFile | None:
        pinned = self.sources.get(source)
        return None if pinned is None else next((f for f in pinned.files if f.name == name), None)


def before_of(previous: ShardPlan | None, settings: Mapping[str, Any], sharding: Sharding) -> Before:
    """What the new plan goes on from."""
    if previous is None or not _cut_alike(previous, settings, sharding):
        return Before()
    ranges: dict[FileKey, list[RecordRange]] = {}
    places: dict[RangeKey, tuple[str, int]] = {}
    sizes: dict[RangeKey, int] = {}
    for shard in previous:
        n_bytes = _sizes(shard)
        for i, planned in enumerate(shard.records):
            records = dataclasses.replace(planned, records_hash=planned.records_hash or shard.input_hash)
            ranges.setdefault((records.source, records.file_name), []).append(records)
            key = key_of(records)
            places[key], sizes[key] = (shard.partition_key, i), n_bytes[i]
    control_tokens = {source: of_file[-1].control_tokens for (source, _), of_file in ranges.items()}
    for of_file in ranges.values():
        of_file.sort(key=lambda r: r.first_record)
    return Before(
        ranges=ranges,
        places=places,
        sizes=sizes,
        control_tokens=control_tokens,
        sources={source.name: _with_files(source) for source in previous.sources},
        n_numbers=int(previous.keys[-1].rpartition("-")[2]) + 1 if previous.keys else 0,
    )


def key_of(records: RecordRange) -> RangeKey:
    return records.source, records.file_name, records.first_record


def _sizes(shard: PlannedShard) -> list[int]:
    """The bytes of a shard's ranges, in proportion to their records; their sum is the shard's."""
    sizes = [shard.n_bytes * r.n_records // max(shard.n_records, 1) for r in shard.records]
    sizes[0] += shard.n_bytes - sum(sizes)
    return sizes


def _with_files(source: PinnedSource) -> PinnedSource:
    """A source of an earlier version's plan, which was one file and had its hash."""
    if source.files:
        return source
    file = PinnedFile(
        name="",
        path=source.path,
        identity=source.sha256,
        n_records=source.n_records,
        n_bytes=source.n_bytes,
        changed=HASHED_WHOLE,
    )
    return dataclasses.replace(source, files=(file,))


def _cut_alike(previous: ShardPlan, settings: Mapping[str, Any], sharding: Sharding) -> bool:
    if previous.settings is not None:
        return previous.settings == settings
    # A plan of an earlier version does not say. Its shards do: all but the last of a source were full.
    if sharding.tokens_per_shard is not None or sharding.drop_duplicates or sharding.seed is not None:
        return False
    if settings["weights"]:
        return False
    shards = list(previous)
    return all(
        shard.n_records == sharding.documents_per_shard
        or (
            shard.n_records < sharding.documents_per_shard
            and (at + 1 == len(shards) or shards[at + 1].records[0].source != shard.records[0].source)
        )
        for at, shard in enumerate(shards)
    )
