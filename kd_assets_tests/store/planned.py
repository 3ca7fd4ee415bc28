"""Small recipes with a plan: results whose inputs are what a plan names, or are not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_assets.contract import CACHES, Asset, RecordRange
from kd_assets.sources.planning.plan import PinnedSource, PlannedShard, ShardPlan, plan_of
from kd_assets.store import Documents, part_stats, plan_output
from kd_assets.store.reading.planned import PLAN_FOLDER
from kd_assets_tests.store import examples


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_plan(recipe_folder: Path, contents: Mapping[str, str]) -> ShardPlan:
    """The plan of these partitions, each of some content, as `shard_plan` writes it."""
    shards = [
        PlannedShard(
            partition_key=key,
            records=(
                RecordRange(
                    source="s",
                    path="/s.jsonl",
                    file_format="jsonl",
                    first_record=0,
                    n_records=4,
                    byte_offset=0,
                    first_line=1,
                    text_field="text",
                    messages_field="messages",
                ),
            ),
            input_hash=hash_of(content),
            n_records=4,
            n_bytes=100,
        )
        for key, content in contents.items()
    ]
    sources = [PinnedSource(name="s", path="/s.jsonl", sha256=hash_of("s"), n_records=4, n_bytes=9, licence="CC0-1.0")]
    plan = plan_of(shards, sources, settings={})
    plan.write(recipe_folder / PLAN_FOLDER)
    return plan


def commit(
    store: Path, asset: Asset, key: str, made_of: str, *, docs: Documents | None = None, passed: bool = True
) -> str:
    """A result made of this input; its data version."""
    identity = {
        "asset": asset,
        "format_version": 1,
        "params": examples.PARAMS[asset],
        "input": made_of,
    }
    out = plan_output(asset, identity, recipe_folder=store / examples.RECIPE, partition_key=key)
    whole = docs or examples.documents()
    kept = whole.slice(0, whole.n_documents, None if asset == "shards_manifest" else examples.MAX_LENGTH)
    rows = examples.table(asset, kept)
    with examples.writer(store, out, partition_key=key) as writer:
        writer.write_part(0, rows, n_tokens=kept.n_tokens, stats=part_stats(asset, rows))
        checks: dict[str, Any] = {"recomputed": examples.RECOMPUTED | {"passed": passed}}
        manifest = writer.commit(parts=1, checks={} if asset == "shards_manifest" else checks, provenance={})
    return manifest.data_version


def commit_partition(store: Path, key: str, content: str, *, assets: Sequence[Asset] = CACHES) -> None:
    """A shard of some content and its caches; other content is other documents."""
    docs = examples.documents(seed=int(hash_of(content)[:6], 16))
    shard = commit(store, "shards_manifest", key, hash_of(content), docs=docs)
    for asset in assets:
        commit(store, asset, key, shard, docs=docs)
