"""A recipe's shard plan as files: its head, which is small however many shards there are, and its shards in blocks.

`kd_assets.sources.planning` makes plans; readers ask what should be there. The invariant: nobody reads more of a plan
than what is asked for takes, and what is read is what was made (each block's hash stands in the head, the head's in
itself).

`plan.json` is the head of the current plan, `<hash>.json` that of each plan; blocks lie in `blocks/`, named after their
content, so that plans that differ at the end share the others. Plans of earlier versions were one file with all shards,
and are read as a head with one block.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kd_assets.contract import parse_json
from kd_assets.durable import mode_if_there, prepare_folder, read_if_there, replace_file
from kd_assets.errors import CorruptPlanError
from kd_assets.store.fingerprint import canonical_json, fingerprint

PLAN_FOLDER = "shard_plan"
PLAN_NAME = "plan.json"
SELF_HASH = "plan_sha256"
PLAN_FORMAT = 2
"""Of a head; a plan without it is of one file."""

BLOCK_SHARDS = 500
"""Shards of a block."""
BLOCKS_KEPT = 4
"""Blocks held at a time, so that who walks through a plan holds little of it."""

RawShard = dict[str, Any]
"""A shard as JSON: `partition_key`, `input_hash`, `records`, `n_records`, `n_bytes`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Consecutive shards of a plan, in a file of their own."""

    name: str
    """Of the file, after its content."""
    sha256: str
    n_shards: int


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """A plan on disk (or just made): its head, and its shards as they are asked for."""

    path: Path
    """Of the head."""
    head: Mapping[str, Any]
    """Without its hash of itself."""
    blocks: tuple[Block, ...]
    held: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Blocks that lie nowhere yet, by their names, packed (zlib): of a plan that was just made, or was one file. Of
    100,000 shards they are a few MB then, and not 60."""
    _read: dict[int, list[RawShard]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def plan_hash(self) -> str:
        return str(self.head["plan_hash"])

    @property
    def n_shards(self) -> int:
        return sum(block.n_shards for block in self.blocks)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Partition keys in the plan's order."""
        return tuple(key for first, n in self.head["keys"] for key in _consecutive(first, n))

    def shard(self, key: str) -> RawShard | None:
        """The shard of this key; None where the plan has none. Reads one block at most."""
        if (position := self.positions.get(key)) is None:
            return None
        at = bisect.bisect_right(self._starts, position) - 1
        shard = self._block(at)[position - self._starts[at]]
        if shard["partition_key"] != key:
            raise _corrupt(self.path, f"its block {self.blocks[at].name} has other shards than it says")
        return shard

    @cached_property
    def positions(self) -> dict[str, int]:
        """Partition key → its place in the plan's order."""
        return {key: position for position, key in enumerate(self.keys)}

    @cached_property
    def _starts(self) -> list[int]:
        """The position of each block's first shard."""
        return list(itertools.accumulate((block.n_shards for block in self.blocks), initial=0))[:-1]

    def shards(self) -> Iterator[RawShard]:
        """All of them, block by block."""
        for at in range(len(self.blocks)):
            yield from self._block(at)

    def _block(self, at: int) -> list[RawShard]:
        if at not in self._read:
            while len(self._read) >= BLOCKS_KEPT:
                del self._read[next(iter(self._read))]
            shards = json.loads(self._data(self.blocks[at]))
            if len(shards) != self.blocks[at].n_shards:
                raise _corrupt(self.path, f"its block {self.blocks[at].name} has {len(shards)} shards")
            self._read[at] = shards
        return self._read[at]

    def _data(self, block: Block) -> bytes:
        if block.name in self.held:
            return zlib.decompress(self.held[block.name])
        path = self.path.parent / "blocks" / block.name
        data = read_if_there(path)
        if data is None:
            raise _corrupt(path, "it is missing")
        if hashlib.sha256(data).hexdigest() != block.sha256:
            raise _corrupt(path, "its hash is not that which the plan has of it")
        return data


class InputHashes(Mapping[str, str]):
    """Partition key → hash of the records that its shard is made of, in the plan's order; read block by block."""

    def __init__(self, plan: PlanFile) -> None:
        self._plan = plan

    def __getitem__(self, key: str) -> str:
        shard = self._plan.shard(key)
        if shard is None:
            raise KeyError(key)
        return str(shard["input_hash"])

    def __contains__(self, key: object) -> bool:
        return key in self._plan.positions

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.keys)

    def __len__(self) -> int:
        return self._plan.n_shards


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedPartitions:
    """The partitions of the current plan."""

    path: Path
    plan_hash: str
    input_hashes: Mapping[str, str]
    """Partition key → hash of the records that its shard is made of, in the plan's order."""


def planned_partitions(recipe_folder: Path) -> PlannedPartitions | None:
    """What the recipe's current plan names; None where there is no plan: then what is committed is all that is known.

    Raises CorruptPlanError, also while hashes are looked up, for a plan that is not the one that was made,
    StorageUnreachableError where the file system does not let us look.
    """
    plan = read_plan_file(recipe_folder / PLAN_FOLDER / PLAN_NAME)
    if plan is None:
        return None
    return PlannedPartitions(path=plan.path, plan_hash=plan.plan_hash, input_hashes=InputHashes(plan))


def read_plan_file(path: Path) -> PlanFile | None:
    """The plan whose head lies at `path`; None where there is none. Raises as `planned_partitions` does."""
    mode = mode_if_there(path)
    if mode is not None and not stat.S_ISREG(mode):
        raise _corrupt(path, "it is no file")
    data = read_if_there(path)
    return None if data is None else parse_plan_file(data, path)


def parse_plan_file(data: bytes, path: Path) -> PlanFile:
    """The plan of this head, or of one file of an earlier version. Raises CorruptPlanError, which names `path`."""
    try:
        raw = parse_json(data)
        claimed = raw.pop(SELF_HASH, None)  # plans of the first versions have none
        is_itself = claimed == fingerprint(raw) or (claimed is None and "plan_format" not in raw)
        if raw.get("plan_format", PLAN_FORMAT) != PLAN_FORMAT:
            raise _corrupt(path, f"it is of plan format {raw['plan_format']!r:.40}, this version reads {PLAN_FORMAT}")
        plan = _of_one_file(raw, path) if "plan_format" not in raw else _of_head(raw, path)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise _corrupt(path, f"{type(e).__name__}: {e}") from e
    if not is_itself:
        raise _corrupt(path, "its hashes are not those of its shards and sources")
    return plan


def write_plan_file(plan: PlanFile, folder: Path, *, names: Sequence[str]) -> None:
    """Write the blocks that lie nowhere yet, then the head under each of `names`: a plan that is found is whole."""
    prepare_folder(folder / "blocks")
    for name, packed in plan.held.items():
        data = zlib.decompress(packed)
        if read_if_there(folder / "blocks" / name) != data:
            replace_file(folder / "blocks" / name, data)
    head = json.dumps(dict(plan.head) | {SELF_HASH: fingerprint(plan.head)}, indent=1, sort_keys=True).encode()
    for name in names:
        replace_file(folder / name, head)


def block_of(shards: Sequence[RawShard]) -> tuple[Block, bytes]:
    """The block of these shards, and its file's bytes, packed: one shard a line."""
    lines = ",\n".join(canonical_json(shard) for shard in shards)
    data = f"[\n{lines}\n]\n".encode()
    sha256 = hashlib.sha256(data).hexdigest()
    return Block(name=f"{sha256[:16]}.json", sha256=sha256, n_shards=len(shards)), zlib.compress(data, 1)


def key_ranges(keys: Sequence[str]) -> list[tuple[str, int]]:
    """Consecutive keys as the first one and their number."""
    ranges: list[tuple[str, int]] = []
    for key in keys:
        if ranges and _consecutive(*ranges[-1], at=ranges[-1][1]) == key:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        else:
            ranges.append((key, 1))
    return ranges


class PlanHash:
    """The hash over a plan's keys, input hashes and pinned sources, and not over paths: what decides content.

    It is the fingerprint of `{"shards": [[key, input hash], ...], "sources": [[name, hash, licence, revision], ...]}`,
    taken in shard by shard.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256(b'{"shards":[')
        self._separator = b""

    def add(self, partition_key: str, input_hash: str) -> None:
        self._digest.update(self._separator + json.dumps([partition_key, input_hash], separators=(",", ":")).encode())
        self._separator = b","

    def hexdigest(self, sources: Sequence[Mapping[str, Any]]) -> str:
        named = [[s["name"], s["sha256"], s["licence"], s["revision"]] for s in sources]
        digest = self._digest.copy()
        digest.update(b'],"sources":' + json.dumps(named, separators=(",", ":")).encode() + b"}")
        return digest.hexdigest()


def plan_hash_of(raw: Mapping[str, Any]) -> str:
    """Of a plan's shards and sources, all in memory."""
    digest = PlanHash()
    for shard in raw["shards"]:
        digest.add(shard["partition_key"], shard["input_hash"])
    return digest.hexdigest(raw["sources"])


def _of_head(raw: Mapping[str, Any], path: Path) -> PlanFile:
    blocks = tuple(Block(**block) for block in raw["blocks"])
    plan = PlanFile(path=path, head=raw, blocks=blocks)
    if len(set(plan.keys)) != plan.n_shards or not isinstance(raw["plan_hash"], str):
        raise _corrupt(path, "it names other shards than its blocks hold")
    return plan


def _of_one_file(raw: dict[str, Any], path: Path) -> PlanFile:
    shards: list[RawShard] = raw.pop("shards")
    hashes = {shard["partition_key"]: shard["input_hash"] for shard in shards}
    if len(hashes) != len(shards) or raw["plan_hash"] != plan_hash_of({**raw, "shards": shards}):
        raise _corrupt(path, "its hashes are not those of its shards and sources")
    blocks = [block_of(shards[at : at + BLOCK_SHARDS]) for at in range(0, len(shards), BLOCK_SHARDS)]
    head = {**raw, "keys": key_ranges(list(hashes))}
    return plan_in_memory(head, blocks, path=path)


def plan_in_memory(
    head: Mapping[str, Any], blocks: Sequence[tuple[Block, bytes]], *, path: Path = Path(PLAN_NAME)
) -> PlanFile:
    """A plan whose blocks lie nowhere yet."""
    held = {block.name: data for block, data in blocks}
    return PlanFile(path=path, head=json.loads(json.dumps(head)), blocks=tuple(block for block, _ in blocks), held=held)


def _consecutive(first: str, n: int, at: int | None = None) -> Any:
    """`n` keys that count up from `first`, or the one at a position."""
    stem, _, number = first.rpartition("-")
    if at is not None:
        return f"{stem}-{int(number) + at:0{len(number)}d}" if number.isdigit() else None
    if n == 1:
        return [first]
    return [f"{stem}-{int(number) + i:0{len(number)}d}" for i in range(n)]


def _corrupt(path: Path, why: str) -> CorruptPlanError:
    return CorruptPlanError(f"{path} is not the plan that was made ({why:.200}): materialize shard_plan again", path)
