"""A plan goes on from the one before: what is there stays, what is new comes after it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.errors import MissingInputError
from kd_assets.model_files.digests import DigestCache
from kd_assets.sources.planning import cut_source
from kd_assets.sources.planning.make import plan_shards
from kd_assets.sources.planning.plan import PlannedShard, ShardPlan, read_plan
from kd_assets.sources.range_hash import ShardHash
from kd_assets.sources.records import Record, read_records
from kd_assets.sources.spec import Sharding, SourceSpec


def spec(path: Path, name: str = "web", **fields: Any) -> SourceSpec:
    return SourceSpec(name=name, path=str(path), licence="CC0-1.0", **fields)


def plan(*sources: SourceSpec, previous: ShardPlan | None = None, **sharding: Any) -> ShardPlan:
    settings = Sharding(**{"documents_per_shard": 3, **sharding})
    return plan_shards(sources, settings, shard_prefix="s", previous=previous)


def write(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(texts)}), path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(shard: PlannedShard) -> list[str]:
    """What a job reads of a shard; its hash is the planned one."""
    found = ShardHash()
    records = list(read_records(shard.records, found))
    assert found.hexdigest() == shard.input_hash
    assert len(records) == shard.n_documents
    return [record.text or "" for record in records if isinstance(record, Record)]


def named(made: ShardPlan) -> dict[str, str]:
    return {shard.partition_key: shard.input_hash for shard in made}


def numbered(first: int, stop: int) -> list[str]:
    return [f"text {i}" for i in range(first, stop)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_appended_records_make_new_shards_and_leave_every_shard_as_it_is(tmp_path: Path, suffix: str) -> None:
    grows, other = tmp_path / f"a.{suffix}", write(tmp_path / "b.jsonl", numbered(100, 104))
    before = plan(spec(write(grows, numbered(0, 8))), spec(other, "other"))
    after = plan(spec(write(grows, numbered(0, 13))), spec(other, "other"), previous=before)
    assert named(before).items() <= named(after).items()
    assert [(s.partition_key, texts_of(s)) for s in after] == [
        ("s-00000", numbered(0, 3)),
        ("s-00001", numbered(3, 6)),
        ("s-00002", numbered(6, 8)),
        ("s-00003", numbered(100, 103)),
        ("s-00004", numbered(103, 104)),
        ("s-00005", numbered(8, 11)),
        ("s-00006", numbered(11, 13)),
    ]


def test_a_new_file_of_a_folder_makes_new_shards_wherever_its_name_sorts(tmp_path: Path) -> None:
    write(tmp_path / "data/b.jsonl", numbered(0, 4))
    before = plan(spec(tmp_path / "data"))
    write(tmp_path / "data/a.jsonl", numbered(10, 15))
    after = plan(spec(tmp_path / "data"), previous=before)
    assert named(before).items() <= named(after).items()
    assert [texts_of(s) for s in after][len(before.keys) :] == [numbered(10, 13), numbered(13, 15)]


def test_a_new_source_before_the_others_makes_new_shards_after_theirs(tmp_path: Path) -> None:
    old = spec(write(tmp_path / "b.jsonl", numbered(0, 4)), "old")
    before = plan(old)
    after = plan(spec(write(tmp_path / "a.jsonl", ["x"]), "new"), old, previous=before)
    assert named(before).items() <= named(after).items()
    assert [texts_of(s) for s in after][-1] == ["x"]


def test_a_changed_record_changes_its_own_shard_and_moves_none(tmp_path: Path) -> None:
    texts = numbered(0, 8)
    before = plan(spec(write(tmp_path / "a.jsonl", texts)))
    texts[4] = "changed, and longer than it was"
    after = plan(spec(write(tmp_path / "a.jsonl", [*texts, "one more"])), previous=before)
    assert [named(before)[key] == named(after)[key] for key in before.keys] == [True, False, True]
    assert [texts_of(s) for s in after] == [texts[:3], texts[3:6], texts[6:8], ["one more"]]


def test_a_file_that_shrank_loses_what_it_lost_and_the_others_keep_their_names(tmp_path: Path) -> None:
    shrinks, other = tmp_path / "a.jsonl", write(tmp_path / "b.jsonl", numbered(100, 102))
    before = plan(spec(write(shrinks, numbered(0, 9))), spec(other, "other"))
    after = plan(spec(write(shrinks, numbered(0, 4))), spec(other, "other"), previous=before)
    assert [(s.partition_key, texts_of(s)) for s in after] == [
        ("s-00000", numbered(0, 3)),
        ("s-00001", ["text 3"]),
        ("s-00003", numbered(100, 102)),
    ]
    regrown = plan(spec(write(shrinks, numbered(0, 9))), spec(other, "other"), previous=after)
    assert regrown.keys[-2:] == ("s-00004", "s-00005"), "a number that was taken is not given again"


def test_a_file_that_vanished_stops_the_plan_and_another_path_takes_it_out(tmp_path: Path) -> None:
    gone = write(tmp_path / "data/a.jsonl", numbered(0, 3))
    write(tmp_path / "data/b.jsonl", numbered(4, 6))
    before = plan(spec(tmp_path / "data"))
    gone.unlink()
    with pytest.raises(MissingInputError, match=r"source 'web': .*/a\.jsonl, of which the current plan has 3 records"):
        plan(spec(tmp_path / "data"), previous=before)
    after = plan(spec(tmp_path / "data/*.jsonl"), previous=before)
    assert [(s.partition_key, texts_of(s)) for s in after] == [("s-00001", numbered(4, 6))]
    assert named(after).items() <= named(before).items()


def test_other_settings_begin_a_plan_anew(tmp_path: Path) -> None:
    source = spec(write(tmp_path / "a.jsonl", numbered(0, 6)))
    before = plan(source)
    assert [texts_of(s) for s in plan(source, previous=before, documents_per_shard=4)] == [
        numbered(0, 4),
        numbered(4, 6),
    ]


def test_a_cap_that_is_raised_goes_on_where_the_plan_ended(tmp_path: Path) -> None:
    source = spec(write(tmp_path / "a.jsonl", numbered(0, 12)))
    before = plan(source, max_documents=5)
    assert [texts_of(s) for s in before] == [numbered(0, 3), numbered(3, 5)]
    assert (before.counts[0].n_documents, before.counts[0].n_left) == (5, 7)
    after = plan(source, max_documents=9, previous=before)
    assert named(before).items() <= named(after).items()
    assert [texts_of(s) for s in after] == [numbered(0, 3), numbered(3, 5), numbered(5, 8), numbered(8, 9)]
    lowered = plan(source, max_documents=2, previous=after)
    assert [(s.partition_key, texts_of(s)) for s in lowered] == [("s-00000", numbered(0, 2))]


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_source, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr("kd_assets.model_files.digests.SETTLED_NS", -1)
    digests = DigestCache(tmp_path / "digests.json")
    source = spec(write(tmp_path / "a.jsonl", numbered(0, 7)))

    def made(previous: ShardPlan | None) -> ShardPlan:
        sharding = Sharding(documents_per_shard=3)
        return plan_shards([source], sharding, shard_prefix="s", previous=previous, digests=digests)

    before = made(None)

    class Unread:
        def __init__(self, file: object, **options: object) -> None:
            raise AssertionError("the file was read")

    monkeypatch.setattr(cut_source, "TextScan", Unread)
    after = made(before)
    assert (after.plan_hash, after.shards) == (before.plan_hash, before.shards)
    write(tmp_path / "a.jsonl", numbered(0, 8))
    with pytest.raises(AssertionError, match="the file was read"):
        made(before)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_grows_every_record_is_in_one_shard_and_old_shards_stay(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    files = {tmp_path / f"data/{name}.{suffix}": 0 for name in "abc" for suffix in ("jsonl", "parquet")}
    made: ShardPlan | None = None
    sharding = rng.choice([{"documents_per_shard": 4}, {"tokens_per_shard": 10}])
    for _ in range(4):
        files = {path: n + rng.choice([0, 0, 1, 3, 9]) for path, n in files.items()}
        for path, n in files.items():
            if n:
                write(path, [f"{path.name} {i} {'x' * (i % 7)}" for i in range(n)])
        if not any(files.values()):
            continue
        before, made = made, plan(spec(tmp_path / "data"), previous=made, **sharding)
        if before is not None:
            assert named(before).items() <= named(made).items()
        # Through its files, as the next plan and the job will have it.
        made.write(tmp_path / "plan")
        made = read_plan(tmp_path / "plan/plan.json")
        assert made is not None
        found = [text for shard in made for text in texts_of(shard)]
        assert len(found) == len(set(found)) == sum(files.values()) == made.totals["n_documents"]
