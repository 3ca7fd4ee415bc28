"""What a recipe's shard plan says should be there, as far as readers ask: the partitions, and what each is made of.

`kd_assets.sources.plan` makes plans and reads all of them; this is for who has the store alone.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.contract import parse_json
from kd_assets.durable import mode_if_there, read_if_there
from kd_assets.errors import CorruptPlanError
from kd_assets.store.fingerprint import fingerprint

PLAN_FOLDER = "shard_plan"
PLAN_NAME = "plan.json"
SELF_HASH = "plan_sha256"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedPartitions:
    """The partitions of the current plan."""

    path: Path
    plan_hash: str
    input_hashes: Mapping[str, str]
    """Partition key → hash of the records that its shard is made of, in the plan's order."""


def planned_partitions(recipe_folder: Path) -> PlannedPartitions | None:
    """What the recipe's current plan names; None where there is no plan: then what is committed is all that is known.

    Raises CorruptPlanError for a plan that is not the one that was made, StorageUnavailableError where the file system
    does not let us look.
    """
    path = recipe_folder / PLAN_FOLDER / PLAN_NAME
    mode = mode_if_there(path)
    if mode is not None and not stat.S_ISREG(mode):
        raise _corrupt(path, "it is no file")
    data = read_if_there(path)
    if data is None:
        return None
    try:
        raw = parse_json(data)
        input_hashes = {shard["partition_key"]: shard["input_hash"] for shard in raw["shards"]}
        claimed = raw.pop(SELF_HASH, None)  # plans of earlier versions have none
        is_itself = raw["plan_hash"] == plan_hash_of(raw) and claimed in (None, fingerprint(raw))
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise _corrupt(path, f"{type(e).__name__}: {e}") from e
    if not is_itself or len(input_hashes) != len(raw["shards"]):
        raise _corrupt(path, "its hashes are not those of its shards and sources")
    return PlannedPartitions(path=path, plan_hash=raw["plan_hash"], input_hashes=input_hashes)


def plan_hash_of(raw: Mapping[str, Any]) -> str:
    """Over a plan's keys, input hashes and pinned sources, and not over paths: what decides content."""
    return fingerprint(
        {
            "shards": [[shard["partition_key"], shard["input_hash"]] for shard in raw["shards"]],
            "sources": [[s["name"], s["sha256"], s["licence"], s["revision"]] for s in raw["sources"]],
        }
    )


def _corrupt(path: Path, why: str) -> CorruptPlanError:
    return CorruptPlanError(f"{path} is not the plan that was made ({why:.200}): materialize shard_plan again")
