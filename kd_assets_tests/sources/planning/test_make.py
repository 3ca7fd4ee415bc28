"""How sources are cut into shards, and what of them the plan's hashes depend on."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.errors import ContractError, MissingInputError, RecipeError
from kd_assets.sources.planning.make import plan_shards
from kd_assets.sources.planning.plan import ShardPlan, read_plan
from kd_assets.sources.range_hash import ShardHash
from kd_assets.sources.records import Record, read_records
from kd_assets.sources.spec import Sharding, SourceSpec, resolve_path

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")


def spec(path: Path | str, name: str = "web", **fields: Any) -> SourceSpec:
    defaults = {"file_format": "parquet" if str(path).endswith(".parquet") else "jsonl", "licence": "CC0-1.0"}
    return SourceSpec(name=name, path=str(path), **{**defaults, **fields})


def plan(*sources: SourceSpec, documents_per_shard: int = 3, **options: Any) -> ShardPlan:
    return plan_shards(sources, Sharding(documents_per_shard=documents_per_shard), shard_prefix="shard", **options)


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_parquet(path: Path, texts: Sequence[str], **options: Any) -> Path:
    pq.write_table(pa.table({"text": list(texts)}), path, **options)
    return path


def hashes(shard_plan: ShardPlan) -> list[str]:
    return [shard.input_hash for shard in shard_plan.shards]


WRITERS = pytest.mark.parametrize("write", [write_jsonl, write_parquet], ids=["jsonl", "parquet"])


# ---------------------------------------------------------------- shards


def test_sources_are_cut_in_order_and_no_shard_mixes_them(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", list("abcd"))
    two = write_parquet(tmp_path / "two.parquet", list("efg"))
    made = plan(spec(one, "one"), spec(two, "two", revision="v1"))
    assert [(s.partition_key, s.records[0].source, s.records[0].first_record, s.n_records) for s in made.shards] == [
        ("shard-00000", "one", 0, 3),
        ("shard-00001", "one", 3, 1),
        ("shard-00002", "two", 0, 3),
    ]
    assert [(r.byte_offset, r.first_line) for s in made.shards for r in s.records] == [(0, 1), (42, 4), (None, None)]
    assert [(s.name, s.path, s.sha256, s.n_records, s.n_bytes, s.revision) for s in made.sources] == [
        ("one", str(one), hashlib.sha256(one.read_bytes()).hexdigest(), 4, one.stat().st_size, None),
        ("two", str(two), hashlib.sha256(two.read_bytes()).hexdigest(), 3, two.stat().st_size, "v1"),
    ]


def test_partition_keys_sort_in_the_order_of_the_records(tmp_path: Path) -> None:
    made = plan(spec(write_jsonl(tmp_path / "a.jsonl", ["x"] * 1234)), documents_per_shard=1)
    keys = [shard.partition_key for shard in made.shards]
    assert keys == sorted(keys)
    assert keys[-1] == "shard-01233"


def test_a_plan_survives_json(tmp_path: Path) -> None:
    made = plan(spec(write_jsonl(tmp_path / "a.jsonl", list("abcd"))))
    made.write(tmp_path / "plan")
    read = read_plan(tmp_path / "plan/plan.json")
    assert read is not None
    assert (read.plan_hash, read.sources, read.shards) == (made.plan_hash, made.sources, made.shards)
    head = (tmp_path / "plan/plan.json").read_text()
    for junk in ("{", "[]", "{}", head.replace("plan_hash", "planhash")):
        (tmp_path / "plan/plan.json").write_text(junk)
        with pytest.raises(ContractError, match=r"plan\.json"):
            read_plan(tmp_path / "plan/plan.json")


@WRITERS
@pytest.mark.parametrize("seed", range(8))
def test_every_record_is_in_exactly_one_shard_and_hashes_as_planned(tmp_path: Path, write: Any, seed: int) -> None:
    rng = random.Random(seed)
    texts = [
        "".join(rng.choices('aé\n"\\\u2028\U0001f600 ', k=rng.randrange(30))) for _ in range(rng.randrange(1, 200))
    ]
    suffix = "parquet" if write is write_parquet else "jsonl"
    made = plan(spec(write(tmp_path / f"a.{suffix}", texts)), documents_per_shard=rng.randrange(1, 60))
    read = []
    for shard in made.shards:
        shard_hash = ShardHash()
        items = list(read_records(shard.records, shard_hash))
        assert shard_hash.hexdigest() == shard.input_hash
        assert len(items) == shard.n_records
        read += [item.text for item in items if isinstance(item, Record)]
    assert read == texts


# ---------------------------------------------------------------- what hashes depend on


@WRITERS
def test_a_changed_record_changes_the_hash_of_its_own_shard_only(tmp_path: Path, write: Any) -> None:
    texts = [f"text {i}" for i in range(10)]
    suffix = "parquet" if write is write_parquet else "jsonl"
    before = plan(spec(write(tmp_path / f"a.{suffix}", texts)))
    texts[4] = "changed, and longer than it was"
    after = plan(spec(write(tmp_path / f"a.{suffix}", texts)))
    changed = [a != b for a, b in zip(hashes(before), hashes(after), strict=True)]
    assert changed == [False, True, False, False]
    assert before.plan_hash != after.plan_hash


@WRITERS
@pytest.mark.parametrize(("n_before", "changed"), [(9, [False, False, False]), (8, [False, False, True])])
def test_growth_at_the_end_of_the_last_source_changes_at_most_its_last_shard(
    tmp_path: Path, write: Any, n_before: int, changed: list[bool]
) -> None:
    texts = [f"text {i}" for i in range(14)]
    suffix = "parquet" if write is write_parquet else "jsonl"
    first = spec(write_jsonl(tmp_path / "first.jsonl", list("abcd")), "first")
    before = plan(first, spec(write(tmp_path / f"a.{suffix}", texts[:n_before])))
    after = plan(first, spec(write(tmp_path / f"a.{suffix}", texts)))
    assert [a != b for a, b in zip(hashes(before), hashes(after), strict=False)] == [False, False, *changed]
    assert len(after.shards) == 2 + 5
    assert [s.partition_key for s in after.shards[:5]] == [s.partition_key for s in before.shards]


@WRITERS
def test_place_and_time_of_a_file_do_not_count(tmp_path: Path, write: Any) -> None:
    suffix = "parquet" if write is write_parquet else "jsonl"
    one = write(tmp_path / f"a.{suffix}", list("abcd"))
    (tmp_path / "else where").mkdir()
    two = write(tmp_path / "else where" / f"b.{suffix}", list("abcd"))
    os.utime(two, (0, 0))
    assert hashes(plan(spec(one))) == hashes(plan(spec(two)))
    assert plan(spec(one)).plan_hash == plan(spec(two)).plan_hash


def test_line_ends_blank_lines_and_a_byte_order_mark_do_not_count(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", list("abcd"))
    dressed = tmp_path / "b.jsonl"
    dressed.write_bytes(b"\xef\xbb\xbf\r\n" + plain.read_bytes().replace(b"\n", b" \r\n\n").rstrip())
    assert hashes(plan(spec(plain))) == hashes(plan(spec(dressed)))


def test_layout_and_unread_columns_of_a_parquet_file_do_not_count(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(100)]
    plain = write_parquet(tmp_path / "a.parquet", texts)
    other = tmp_path / "b.parquet"
    table = pa.table({"score": range(100), "text": pa.array(texts, pa.large_string())})
    pq.write_table(table, other, row_group_size=7, compression="zstd", use_dictionary=False)
    assert hashes(plan(spec(plain))) == hashes(plan(spec(other)))


def test_everything_that_names_documents_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "body": "y"}\n')
    sources = [
        spec(path),
        spec(path, name="other"),
        spec(path, text_field="body"),
        spec(path, messages_field="chat"),
    ]
    assert len({hashes(plan(source))[0] for source in sources}) == 4


def test_two_cuts_of_the_same_bytes_into_records_have_different_hashes(tmp_path: Path) -> None:
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text('{"text": "a"}{"text": "b"}\n')
    two.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert hashes(plan(spec(one))) != hashes(plan(spec(two)))


def test_licence_and_revision_are_part_of_the_plan_but_of_no_shard(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", list("abcd"))
    one, two = plan(spec(path)), plan(spec(path, licence="MIT"))
    assert hashes(one) == hashes(two)
    assert one.plan_hash != two.plan_hash


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory; create it, or correct its path"),
        (b"", "is empty"),
        (b"\n \r\n\t\n", "holds no records"),
        (b"\xef\xbb\xbf", "holds no records"),
    ],
)
def test_a_missing_or_empty_source_is_named_with_what_to_do(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MissingInputError, match=rf"^source 'web': .*{reason}") as e:
        plan(spec(path))
    assert str(path) in str(e.value)
    assert e.value.exit_code == 2


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="holds no records"):
        plan(spec(write_parquet(tmp_path / "a.parquet", pa.array([], pa.string()))))


def test_a_path_with_a_null_byte_or_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (f"{tmp_path}/a\0b", f"{tmp_path}/file/a.jsonl", f"{tmp_path}/{'x' * 300}"):
        with pytest.raises(MissingInputError, match="cannot be read"):
            plan(spec(path))


@needs_permissions
def test_a_source_without_read_permission_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    path.chmod(0)
    with pytest.raises(MissingInputError, match="Permission denied"):
        plan(spec(path))


@pytest.mark.parametrize(
    ("sources", "options", "reason"),
    [
        ((), {}, "names no source"),
        (("a", "a"), {}, "two sources are named 'a'"),
        (("a b",), {}, "source name 'a b'"),
        (("../a",), {}, "source name '../a'"),
        (("a",), {"documents_per_shard": 0}, "documents_per_shard is 0"),
        (("a",), {"shard_prefix": "a/b"}, "shard_prefix 'a/b'"),
        (("a",), {"shard_prefix": "a..b"}, "shard_prefix"),
        (("a",), {"shard_prefix": ""}, "shard_prefix"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    tmp_path: Path, sources: tuple[str, ...], options: dict[str, Any], reason: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(RecipeError, match=reason):
        plan_shards(
            [spec(path, name) for name in sources],
            Sharding(documents_per_shard=options.get("documents_per_shard", 1)),
            shard_prefix=options.get("shard_prefix", "shard"),
        )


def test_fields_that_coincide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="three different fields"):
        plan(spec(write_jsonl(tmp_path / "a.jsonl", ["x"]), text_field="id"))


def test_too_many_shards_are_refused_as_soon_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_assets.sources.planning.make.MAX_SHARDS", 5)
    with pytest.raises(RecipeError, match="more than 5 shards: raise documents_per_shard"):
        plan(spec(write_jsonl(tmp_path / "a.jsonl", ["x"] * 6)), documents_per_shard=1)


# ---------------------------------------------------------------- paths


def test_variables_home_and_relative_paths_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"DATA": "/data", "N_1": "x"}
    monkeypatch.setenv("HOME", "/home/me")
    for path, resolved in {
        "$DATA/a.jsonl": "/data/a.jsonl",
        "${DATA}x/$N_1/a": "/datax/x/a",
        "a.jsonl": f"{tmp_path}/a.jsonl",
        "../a.jsonl": f"{tmp_path.parent}/a.jsonl",
        "~/a.jsonl": "/home/me/a.jsonl",
        "~nobody-here/a": f"{tmp_path}/~nobody-here/a",
        "cost$/a b": f"{tmp_path}/cost$/a b",
    }.items():
        assert resolve_path(path, tmp_path, environment=environment) == Path(resolved)


@pytest.mark.parametrize("path", ["$KD_NOT_SET/a.jsonl", "${KD_NOT_SET}/a.jsonl", "/data/$KD_NOT_SET"])
@pytest.mark.parametrize("environment", [{}, {"KD_NOT_SET": ""}])
def test_an_unset_variable_is_named_with_its_source(tmp_path: Path, path: str, environment: dict[str, str]) -> None:
    with pytest.raises(
        MissingInputError, match=r"source 'web': the environment variable KD_NOT_SET of its path .* is not"
    ):
        resolve_path(path, tmp_path, what="source 'web'", environment=environment)


def test_a_plan_resolves_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    monkeypatch.setenv("KD_DATA", str(tmp_path))
    assert plan(spec("$KD_DATA/a.jsonl")).sources[0].path == str(tmp_path / "a.jsonl")
    assert plan(spec("a.jsonl"), base_folder=tmp_path).sources[0].path == str(tmp_path / "a.jsonl")
    monkeypatch.delenv("KD_DATA")
    with pytest.raises(MissingInputError, match=r"^source 'web': the environment variable KD_DATA"):
        plan(spec("$KD_DATA/a.jsonl"))


# ---------------------------------------------------------------- cost


def test_planning_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 1000}) + "\n"
    with (tmp_path / "a.jsonl").open("w") as f:
        for _ in range(20):
            f.write(line * 2_000)
    tracemalloc.start()
    try:
        made = plan(spec(tmp_path / "a.jsonl"), documents_per_shard=5_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(made.shards) == 8
    assert peak < 8 << 20, "a 40 MB file must not be held in memory"


def test_planning_imports_neither_torch_nor_transformers_nor_dagster(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    code = f"""
import sys
from kd_assets.sources.planning.make import plan_shards
from kd_assets.sources.spec import Sharding, SourceSpec
plan_shards([SourceSpec(name='a', path={str(path)!r}, licence='x')], Sharding(), shard_prefix='s')
print(*sorted({{'torch', 'transformers', 'tokenizers', 'dagster'}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == ""
