"""Sources in proportions, caps, copies, drawn order, and shards of about equal tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.contract import RecordRange
from kd_assets.errors import InputError, RecipeError
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.read import iter_raw
from kd_assets.sources.planning import cut_source
from kd_assets.sources.planning.make import plan_shards
from kd_assets.sources.planning.plan import PlannedShard, ShardPlan
from kd_assets.sources.planning.token_rate import MEASURED_RECORDS
from kd_assets.sources.spec import Sharding, SourceSpec
from kd_assets_tests.sources.planning.test_growth import named, spec, texts_of, write


def plan(*sources: SourceSpec, previous: ShardPlan | None = None, **options: Any) -> ShardPlan:
    count = options.pop("count_tokens", None)
    return plan_shards(sources, Sharding(**options), shard_prefix="s", previous=previous, count_tokens=count)


def of_length(n: int, length: int, word: str = "x") -> list[str]:
    return [f"{word}{i:06d}" + word * (length - 7) for i in range(n)]


def documents_of(shards: Sequence[PlannedShard]) -> Counter[str]:
    return Counter(text[0] for shard in shards for text in texts_of(shard))


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    return {
        "a": write(tmp_path / "a.jsonl", of_length(400, 50, "a")),
        "b": write(tmp_path / "b.parquet", of_length(300, 100, "b")),
        "c": write(tmp_path / "c.jsonl", of_length(1000, 30, "c")),
    }


def weighted(sources: dict[str, Path], **weights: float) -> list[SourceSpec]:
    return [spec(sources[name], name, weight=weight) for name, weight in weights.items()]


@pytest.mark.parametrize("seed", [None, 1])
def test_every_prefix_of_a_mixture_has_its_sources_in_their_proportions(
    sources: dict[str, Path], seed: int | None
) -> None:
    made = plan(*weighted(sources, a=2, b=1, c=1), documents_per_shard=40, seed=seed)
    for n in range(1, made.n_shards + 1):
        found = documents_of(made.shards[:n])
        total = sum(found.values())
        assert abs(found["a"] - total / 2) <= 2
        assert abs(found["b"] - total / 4) <= 2
        assert abs(found["c"] - total / 4) <= 2
    assert total == 800, "until the first source ends: 400 of a"
    left = {c.source: c.n_left for c in made.counts}
    assert left == {"a": 0, "b": 100, "c": 800}


@pytest.mark.parametrize("seed", range(8))
def test_the_rest_of_a_source_is_drawn_last_so_that_no_shard_before_lacks_its_part(tmp_path: Path, seed: int) -> None:
    sources = {
        "a": write(tmp_path / "a.jsonl", of_length(70, 50, "a")),
        "c": write(tmp_path / "c.jsonl", of_length(1000, 30, "c")),
    }
    made = plan(*weighted(sources, a=1, c=1), documents_per_shard=40, seed=seed)
    assert [(f["a"], f["c"]) for f in map(documents_of, ([s] for s in made))] == [(20, 20)] * 3 + [(10, 10)]


def test_weights_are_shares_of_tokens_where_shards_are_cut_by_tokens(sources: dict[str, Path]) -> None:
    made = plan(*weighted(sources, a=1, b=1), tokens_per_shard=1000, max_tokens=6000)
    for n in range(1, made.n_shards + 1):
        found = documents_of(made.shards[:n])
        assert 1.6 < found["a"] / found["b"] < 2.1, "documents of b are about twice as long"
    assert 5500 < made.totals["n_tokens"] <= 6000


def test_the_last_shard_of_a_mixture_is_as_small_as_what_a_source_has_left(sources: dict[str, Path]) -> None:
    made = plan(*weighted(sources, a=1, c=1), documents_per_shard=300)
    assert [(f["a"], f["c"]) for f in map(documents_of, ([s] for s in made))] == [(150, 150), (150, 150), (100, 100)]


def test_a_mixture_of_less_than_a_shard_keeps_its_proportions(sources: dict[str, Path]) -> None:
    made = plan(*weighted(sources, a=1, c=3), documents_per_shard=10_000)
    (found,) = (documents_of([shard]) for shard in made)
    assert found["c"] == 1000
    assert abs(found["a"] - 333) <= 1


def test_new_data_goes_on_with_the_mixture_and_touches_no_shard(sources: dict[str, Path]) -> None:
    mixture = weighted(sources, a=1, b=1)
    before = plan(*mixture, documents_per_shard=80)
    write(sources["b"], of_length(500, 100, "b"))
    after = plan(*mixture, documents_per_shard=80, previous=before)
    # b was rewritten with more rows: what was there keeps its hash, since it is read.
    assert named(before).items() <= named(after).items()
    assert documents_of(after.shards) == {"a": 400, "b": 400}


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": None}, {"a": None, "b": 2.0}])
def test_a_weight_for_some_sources_only_is_refused(sources: dict[str, Path], weights: dict[str, float | None]) -> None:
    with pytest.raises(RecipeError, match=r"has no weight, and others have one"):
        plan(*(spec(sources[name], name, weight=weight) for name, weight in weights.items()))


def test_caps_hold_to_the_document(sources: dict[str, Path]) -> None:
    made = plan(spec(sources["a"], "a"), spec(sources["c"], "c"), documents_per_shard=300, max_documents=501)
    assert [s.n_documents for s in made] == [300, 100, 101]
    assert made.totals["n_documents"] == 501
    mixture = plan(*weighted(sources, a=1, c=1), documents_per_shard=100, max_documents=150)
    assert [s.n_documents for s in mixture] == [100, 50]


def test_a_drawn_order_is_the_same_for_the_same_seed_and_holds_every_record(sources: dict[str, Path]) -> None:
    source = spec(sources["c"], "c")
    one, again, other, plain = (plan(source, documents_per_shard=50, seed=seed) for seed in (1, 1, 2, None))
    assert named(one) == named(again) != named(other)
    assert {*named(one).values()} == {*named(other).values()} == {*named(plain).values()}
    assert [s.records[0].first_record for s in one] != sorted(s.records[0].first_record for s in one)
    some = plan(source, documents_per_shard=50, seed=1, max_documents=200)
    assert named(some).items() <= named(one).items(), "a cap takes the first of the drawn"
    more = plan(source, documents_per_shard=50, seed=1, max_documents=500, previous=some)
    assert named(some).items() <= named(more).items()
    assert len({text for shard in more for text in texts_of(shard)}) == 500


# ---------------------------------------------------------------- copies


def test_exact_copies_are_left_out_and_counted_across_files_and_formats(tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    lines = [{"id": 1, "text": "a"}, {"text": "b"}, {"id": 2, "text": "a"}, {"text": "c"}, {"text": "b"}]
    one.write_text("".join(json.dumps(line) + "\n" for line in lines))
    two = tmp_path / "two.parquet"
    pq.write_table(pa.table({"text": ["c", "d", "d"]}), two)
    made = plan(spec(one, "one"), spec(two, "two"), documents_per_shard=2, drop_duplicates=True)
    assert [texts_of(s) for s in made] == [["a", "b"], ["c"], ["d"]]
    assert {c.source: (c.n_documents, c.n_duplicates) for c in made.counts} == {"one": (3, 2), "two": (1, 2)}
    kept = plan(spec(one, "one"), spec(two, "two"), documents_per_shard=2)
    assert kept.totals["n_documents"] == 8


def test_a_copy_that_is_appended_is_the_one_that_is_left_out(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.jsonl", ["a", "b"]), write(tmp_path / "two.jsonl", ["c"])
    options: dict[str, Any] = {"documents_per_shard": 2, "drop_duplicates": True}
    before = plan(spec(one, "one"), spec(two, "two"), **options)
    write(one, ["a", "b", "c", "a", "e"])
    after = plan(spec(one, "one"), spec(two, "two"), previous=before, **options)
    assert named(before).items() <= named(after).items()
    assert [texts_of(s) for s in after] == [["a", "b"], ["c"], ["e"]]


def test_what_is_left_out_is_part_of_the_shards_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "a", "b"])
    one, two = (plan(spec(path), drop_duplicates=drop) for drop in (True, False))
    assert named(one) != named(two)


# ---------------------------------------------------------------- equal tokens, and files that are not read


def test_shards_of_tokens_are_about_equal(tmp_path: Path) -> None:
    lengths = [5, 2000, 40, 300, 7] * 200
    write(tmp_path / "a.jsonl", [f"{i} " + "x" * n for i, n in enumerate(lengths)])
    made = plan(spec(tmp_path / "a.jsonl"), tokens_per_shard=10_000)
    sizes = [s.n_tokens for s in made]
    assert len(sizes) == 12
    assert max(sizes) / min(sizes) < 1.12
    assert sum(s.n_documents for s in made) == 1000


def test_tokens_are_measured_with_the_tokenizer_and_the_measurement_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["ab " * 100] * 50)
    made = plan(spec(path), tokens_per_shard=1000, count_tokens=lambda texts: sum(len(t.split()) for t in texts))
    rate = made.sources[0].bytes_per_token
    assert rate == pytest.approx(314 / 100, rel=0.02)
    assert made.totals["n_tokens"] == pytest.approx(5000, rel=0.01)
    again = plan(spec(path), tokens_per_shard=1000, previous=made, count_tokens=lambda texts: 1)
    assert (again.sources[0].bytes_per_token, named(again)) == (rate, named(made))


def test_large_files_of_columns_are_cut_by_their_footers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_source, "ROWS_READ_BYTES", 0)
    rows = of_length(1000, 80)
    path = tmp_path / "data/a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"text": rows}), path, row_group_size=130)

    def some(records: RecordRange) -> Iterator[RawRecord]:
        assert records.n_records <= MEASURED_RECORDS, "all rows were read"
        return iter_raw(records)

    with monkeypatch.context() as patched:
        patched.setattr(cut_source, "iter_raw", some)
        made = plan(spec(tmp_path / "data"), tokens_per_shard=2000)
        by_documents = plan(spec(tmp_path / "data"), documents_per_shard=300)
        capped = plan(spec(tmp_path / "data"), documents_per_shard=300, max_documents=450)
    assert [s.n_documents for s in by_documents] == [300, 300, 300, 100]
    assert [s.n_documents for s in capped] == [300, 150]
    assert max(s.n_tokens for s in made) / min(s.n_tokens for s in made) < 1.1
    for found in (made, by_documents):
        assert [text for shard in found for text in texts_of(shard)] == rows
    # A new file makes new shards; the first keeps its own.
    pq.write_table(pa.table({"text": of_length(10, 20, "y")}), tmp_path / "data/b.parquet")
    after = plan(spec(tmp_path / "data"), documents_per_shard=300, previous=by_documents)
    before_keys = named(by_documents)
    assert len(after.keys) == 5
    assert before_keys.items() <= named(after).items()


def test_a_plan_without_a_shard_is_refused_with_its_reason(tmp_path: Path) -> None:
    texts = of_length(20, 50)
    mixture = [spec(write(tmp_path / f"{name}.jsonl", texts), name, weight=1) for name in "ab"]
    with pytest.raises(
        InputError, match=r"every record of source 'b' is a copy of another one .*leave drop_duplicates"
    ):
        plan(*mixture, documents_per_shard=10, drop_duplicates=True)
    with pytest.raises(InputError, match=r"max_documents or max_tokens leaves room for less than a document.*raise"):
        plan(spec(tmp_path / "a.jsonl", "a"), documents_per_shard=10, max_tokens=1)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"fields": {"promt": "q"}}, r"fields has 'promt', which is of no shape: it takes id, text, messages"),
        ({"fields": {"prompt": "q", "completion": "q"}}, r"'q' is both its completion and its prompt"),
        ({"fields": {"text": "body"}, "ignore_fields": ("body",)}, r"ignore_fields that it is left out"),
        ({"prefer": "chosen", "shape": "text"}, r"prefer is of shape preference, and its shape is text"),
    ],
)
def test_fields_that_no_record_could_have_are_refused(tmp_path: Path, said: dict[str, Any], why: str) -> None:
    path = write(tmp_path / "a.jsonl", of_length(2, 50))
    with pytest.raises(RecipeError, match=f"source 'a': .*{why}"):
        plan(spec(path, "a", **said))


def test_a_source_of_nothing_but_copies_is_counted_as_copies_and_not_as_left_over(tmp_path: Path) -> None:
    texts = of_length(20, 50)
    sources = [spec(write(tmp_path / f"{name}.jsonl", texts), name) for name in "ab"]
    for previous in (None, plan(*sources, documents_per_shard=10, drop_duplicates=True)):
        made = plan(*sources, documents_per_shard=10, drop_duplicates=True, previous=previous)
        counts = [(c.source, c.n_documents, c.n_duplicates, c.n_left) for c in made.counts]
        assert counts == [("a", 20, 0, 0), ("b", 0, 20, 0)]
