"""Top-k lists of different lengths: as many tokens as have a mass, plain and compact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.errors import CodecRangeError, CorruptPartError
from kd_assets.store import CacheReader, Ragged, coded, encode_topk, part_stats, plain_table, read_manifest, verify
from kd_assets.store.arrays import flat
from kd_assets.store.codecs.topk_schema import compact_topk_schema
from kd_assets.store.comparing import compare
from kd_assets.store.partfile import PartFile, write_table
from kd_assets.store.ragged_topk import fixed_ids, fixed_logprobs, mass_difference, n_kept, with_rows_of_k
from kd_assets.store.reading.columns import column_of
from kd_assets_tests.store import examples
from kd_assets_tests.store.test_codecs import decoder_to_copy

TOP_P = {"top_p": 0.8}
PLAIN = {"k": examples.K, "max_length": examples.MAX_LENGTH, **TOP_P}
COMPACT = examples.COMPACT | TOP_P


def logprobs_of(*rows: list[float]) -> Any:
    return np.log(np.array(rows)).astype(np.float16)


def lists_of(*rows: list[Any], dtype: Any = np.float16) -> Ragged:
    values = np.concatenate([np.array(row) for row in rows]).astype(dtype)
    return Ragged(values=values, offsets=np.cumsum([0, *map(len, rows)]).astype(np.int32))


def part_of(table: pa.Table, path: Path) -> Path:
    with path.open("wb") as file:
        write_table(table, ".parquet", file)
    return path


def test_a_position_keeps_the_fewest_tokens_of_the_mass_and_at_least_one_and_at_most_k() -> None:
    rows = logprobs_of([0.9, 0.05, 0.04], [0.4, 0.3, 0.2], [0.5, 0.25, 0.25], [0.2, 0.1, 0.1])
    assert n_kept(rows, 0.74).tolist() == [1, 3, 2, 3]
    assert n_kept(rows, 0.001).tolist() == [1, 1, 1, 1]
    assert n_kept(rows[:0], 0.5).tolist() == []
    assert n_kept(rows[:, :1], 0.99).tolist() == [1, 1, 1, 1]
    exact = logprobs_of([0.5, 0.25, 0.25])
    assert n_kept(exact, float(np.exp(exact[0, 0].astype(np.float64)))).tolist() == [1], "what reaches it is enough"


def test_rows_of_k_are_filled_up_with_the_first_token_and_no_probability() -> None:
    ids, logprobs = lists_of([7, 8], [9], dtype=np.uint32), lists_of([-0.5, -1.5], [-0.25])
    assert fixed_ids(ids, 3).tolist() == [[7, 8, 7], [9, 9, 9]]
    assert fixed_ids(ids, 2, 5).tolist() == [[7, 8], [9, 5]]
    assert fixed_logprobs(logprobs, 3).tolist() == [[-0.5, -1.5, -np.inf], [-0.25, -np.inf, -np.inf]]
    document = {"topk_ids": ids, "topk_logprobs": logprobs, "n_tokens": 3}
    assert with_rows_of_k(document, 2)["topk_ids"].shape == (2, 2)
    fixed = {"topk_ids": np.zeros((2, 2)), "n_tokens": 3}
    assert with_rows_of_k(fixed, 2)["topk_ids"] is fixed["topk_ids"]
    assert fixed_ids(lists_of([], dtype=np.uint32)[:0], 3).shape == (0, 3)


def test_a_reader_can_tell_whether_a_position_keeps_what_it_should() -> None:
    lists = lists_of([-0.5, -1.5], [-0.1])
    assert mass_difference(lists, 2, 0.8) is None
    assert mass_difference(lists, 2, 0.6) == "a position keeps 2 tokens, and fewer have a mass of top_p, 0.6"
    assert "below top_p, 0.95" in str(mass_difference(lists, 2, 0.95))
    assert mass_difference(lists_of([-0.5, -1.5]), 1, 0.8) == "a position keeps 2 tokens, and it must be 1 to 1"
    assert mass_difference(lists_of([-0.1], []), 1, 0.8) == "a position keeps 0 tokens, and it must be 1 to 1"


def test_what_a_position_keeps_hides_nothing_of_its_neighbours() -> None:
    too_many = [-0.1, -3.0]
    fewer = "a position keeps 2 tokens, and fewer have a mass of top_p, 0.8"
    assert mass_difference(lists_of([100.0], too_many), 2, 0.8) == fewer
    assert mass_difference(lists_of([100.0], [-0.1]), 2, 0.8) is None
    assert mass_difference(lists_of(too_many), 2, 0.8) == fewer
    assert mass_difference(lists_of([])[:0], 2, 0.8) is None


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 60_000.0])
def test_a_kept_log_probability_that_has_no_mass_is_named_first(number: float) -> None:
    for lists in (lists_of([number], [-0.1, -3.0]), lists_of([-0.1], [-0.5, number])):
        found = mass_difference(lists, 2, 0.8)
        assert found == f"a position keeps a token of log-probability {np.float16(number)}, which is no probability's"


@pytest.mark.parametrize("params", [PLAIN, COMPACT, COMPACT | {"draws": 20, "seed": 0}, COMPACT | {"logsumexp": False}])
def test_a_ragged_result_has_the_first_tokens_of_one_that_keeps_k(tmp_path: Path, params: dict[str, Any]) -> None:
    docs = examples.documents((5, 1, 3, 7, 1))
    whole, _ = examples.commit(
        tmp_path / "whole", "topk_cache", docs=docs, params={k: v for k, v in params.items() if k != "top_p"}
    )
    folder, manifest = examples.commit(tmp_path / "ragged", "topk_cache", docs=docs, params=params)
    assert verify(tmp_path / "ragged").problems == ()
    assert manifest.variant != read_manifest(whole).variant
    reader, every = CacheReader.from_folders([folder]), CacheReader.from_folders([whole])
    assert reader.fields == every.fields
    lengths = []
    for found, expected in ((reader[i], every[i]) for i in range(5)):
        ids, logprobs = found["topk_ids"], found["topk_logprobs"]
        assert ids.offsets.tolist() == logprobs.offsets.tolist()
        for at in range(len(ids)):
            assert ids[at].tolist() == expected["topk_ids"][at][: len(ids[at])].tolist()
            np.testing.assert_allclose(
                logprobs[at], expected["topk_logprobs"][at][: len(ids[at])], atol=0.05, rtol=0.05
            )
        lengths += ids.lengths.tolist()
        assert len(found["target_logprob"]) == len(ids)
        for name in ("sampled_ids", "sampled_counts"):
            if name in found:
                np.testing.assert_array_equal(found[name].values, expected[name].values)
    assert set(lengths) == {1, 2, 3, 4}
    assert (manifest.stats["n_kept_ids"], manifest.stats["n_positions"]) == (sum(lengths), len(lengths))
    assert manifest.stats["max_probability_sum"] <= 1 + 4e-3
    if "codec" not in params:
        for found in (reader[i] for i in range(5)):
            assert mass_difference(found["topk_logprobs"], examples.K, 0.8) is None


def test_what_is_coded_reads_back_as_it_was_measured(tmp_path: Path) -> None:
    docs = examples.documents((40, 1, 30))
    plain = examples.table("topk_cache", docs, draws=7, top_p=0.9)
    made = coded(plain, "compact")
    assert made.stored.schema.equals(compact_topk_schema(examples.K, 7, top_p=0.9), check_metadata=True)
    with PartFile(part_of(made.stored, tmp_path / "part-00000.parquet"), vocabulary=examples.VOCABULARY) as part:
        assert part.schema.equals(plain.schema, check_metadata=True)
        for names in (part.names, ["target_logprob"], ["topk_logprobs"], ["sampled_ids"], ["logsumexp"]):
            assert part.read(names).equals(made.decoded.select(names))
    assert made.decoded["topk_ids"].equals(plain["topk_ids"])
    assert 0 < made.error["max_codec_mean_kl"] <= made.error["max_codec_kl"] < 1e-4
    kept = np.frombuffer(b"".join(made.stored["topk_kept"].to_pylist()), np.uint8)
    lists = column_of(plain["topk_ids"]).values
    assert isinstance(lists, Ragged)
    assert kept.tolist() == lists.lengths.tolist()
    assert len(made.stored["topk_codes_2_3"][0].as_py()) == int((lists.lengths[:39] - 2).clip(0, 2).sum())


def require_copied(stored: pa.Table, k: int, draws: int = 0) -> set[int]:
    """FORMAT.md's decoders give what `plain_table` gives; how many tokens positions keep."""
    decode, decode_draws, numbers = decoder_to_copy(), decoder_to_copy("decode_draws"), set()
    for row, plain in zip(stored.to_pylist(), plain_table(stored).to_pylist(), strict=True):
        ids, logprobs, target, sums = decode(row, k)
        assert (ids.dtype, logprobs.dtype, ids.shape) == (np.uint32, np.float16, (len(plain["topk_ids"]), k))
        for at, (of_ids, of_logprobs) in enumerate(zip(plain["topk_ids"], plain["topk_logprobs"], strict=True)):
            n = len(of_ids)
            assert ids[at].tolist() == of_ids + [2**32 - 1] * (k - n)
            assert logprobs[at].tolist() == of_logprobs + [-np.inf] * (k - n)
            numbers.add(n)
        assert (target.tolist(), None if sums is None else sums.tolist()) == (
            plain["target_logprob"],
            plain.get("logsumexp"),
        )
        drawn = decode_draws(row, ids, draws) if draws else []
        assert [(of.tolist(), counts.tolist()) for of, counts in drawn] == list(
            zip(plain.get("sampled_ids", []), plain.get("sampled_counts", []), strict=True)
        )
    return numbers


@pytest.mark.parametrize("draws", [0, 20, 300])
@pytest.mark.parametrize("top_p", [0.5, 0.8, 0.99])
def test_the_decoders_to_copy_read_what_positions_keep(draws: int, top_p: float) -> None:
    plain = examples.table("topk_cache", examples.documents((40, 1, 2, 30)), draws=draws, top_p=top_p)
    made = coded(plain, "compact")
    assert len(require_copied(made.stored, examples.K, draws)) > 2
    without = coded(plain.drop_columns(["logsumexp"]), "compact")
    assert len(require_copied(without.stored, examples.K, draws)) > 2


def test_more_tokens_than_a_byte_can_count_have_a_second_one() -> None:
    k, docs = 300, examples.documents((3,))
    rows = np.full((2, k), np.log(1 / 400), np.float16)
    rows[1, 0] = np.log(0.5)
    plain = encode_topk(
        docs,
        topk_ids_Mk=np.tile(np.arange(k, dtype=np.uint32), (2, 1)),
        topk_logprobs_Mk=rows,
        logsumexp_M=np.zeros(2, np.float32),
        target_logprob_M=np.full(2, -3, np.float32),
        top_p=0.7,
    )
    made = coded(plain, "compact")
    assert np.frombuffer(made.stored["topk_kept"][0].as_py(), "<u2").tolist() == [281, 82]
    assert made.decoded["topk_ids"].equals(plain["topk_ids"])
    assert part_stats("topk_cache", made.decoded)["n_kept_ids"] == 363
    assert require_copied(made.stored, k) == {281, 82}


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("topk_kept", b"\x01\x00", "row 1 of document 0 of the rows keeps 0 tokens, and it must be 1 to 4"),
        ("topk_kept", b"\x01\x05", "row 1 of document 0 of the rows keeps 5 tokens, and it must be 1 to 4"),
        ("topk_kept", b"\x01", "topk_kept of document 0 of the rows has 1 bytes, expected 2"),
        ("topk_kept", b"\x04\x04", "topk_ids_byte_0 of document 0 of the rows has"),
        ("topk_codes_0", b"\x00\x00", "row 0 of document 0 of the rows has a code below 1"),
        ("topk_ids_byte_2", b"\xff" * 3, "row 0 of document 0 of the rows has token id"),
    ],
)
def test_bytes_that_no_encoder_writes_are_damage(column: str, value: bytes, words: str, tmp_path: Path) -> None:
    docs = examples.documents((3,))
    plain = encode_topk(
        docs,
        topk_ids_Mk=np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.uint32),
        topk_logprobs_Mk=logprobs_of([0.9, 0.05, 0.01, 0.01], [0.6, 0.3, 0.05, 0.01]),
        logsumexp_M=np.zeros(2, np.float32),
        target_logprob_M=np.full(2, -3, np.float32),
        top_p=0.8,
    )
    stored = coded(plain, "compact").stored
    assert stored["topk_kept"].to_pylist() == [b"\x01\x02"]
    at = stored.schema.get_field_index(column)
    changed = stored.set_column(at, stored.schema.field(column), pa.array([value], pa.binary()))
    with (
        PartFile(part_of(changed, tmp_path / "part-00000.parquet"), vocabulary=11) as part,
        pytest.raises(CorruptPartError, match=re.escape(words)),
    ):
        part.read(["topk_ids", "topk_logprobs"])


def test_a_part_of_the_first_form_has_no_numbers_of_kept_tokens(tmp_path: Path) -> None:
    stored = coded(examples.table("topk_cache", examples.documents(), top_p=0.8), "compact").stored
    said = stored.replace_schema_metadata({**stored.schema.metadata, b"kd_assets.codec": b"compact"})
    with pytest.raises(CorruptPartError, match="its columns are"):
        PartFile(part_of(said, tmp_path / "part-00000.parquet"))


@pytest.mark.parametrize("said", ["0", "1.5", "x", "nan"])
def test_metadata_that_say_no_mass_are_damage(said: str, tmp_path: Path) -> None:
    stored = coded(examples.table("topk_cache", examples.documents(), top_p=0.8), "compact").stored
    field = stored.schema.field("topk_kept").with_metadata({b"k": b"4", b"top_p": said.encode()})
    changed = stored.set_column(stored.schema.get_field_index("topk_kept"), field, stored["topk_kept"])
    with pytest.raises(CorruptPartError, match=r"top_p|float"):
        PartFile(part_of(changed, tmp_path / "part-00000.parquet"))


def test_numbers_that_cannot_be_held_are_refused_with_document_and_row() -> None:
    plain = encode_topk(
        examples.documents((2, 3)),
        topk_ids_Mk=np.array([[1, 2], [3, 4], [5, 5]], np.uint32),
        topk_logprobs_Mk=logprobs_of([0.9, 0.05], [0.7, 0.2], [0.5, 0.4]),
        logsumexp_M=np.zeros(3, np.float32),
        target_logprob_M=np.full(3, -3, np.float32),
        top_p=0.8,
    )
    with pytest.raises(CodecRangeError, match="row 1 of document 'document-1' has a token id twice"):
        coded(plain, "compact")


def test_verify_finds_positions_that_keep_too_few(tmp_path: Path) -> None:
    out = examples.output(tmp_path, "topk_cache", params=PLAIN)
    docs = examples.documents().slice(0, 4, examples.MAX_LENGTH)
    rows = examples.table("topk_cache", docs, top_p=0.5)
    metadata = {**rows.schema.field("topk_ids").metadata, b"top_p": b"0.8"}
    for name in ("topk_ids", "topk_logprobs"):
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(name).with_metadata(metadata), rows[name])
    with examples.writer(tmp_path, out) as result:
        result.write_part(0, rows, n_tokens=docs.n_tokens, stats=part_stats("topk_cache", rows))
        result.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    report = verify(tmp_path)
    assert [problem.kind for problem in report.problems] == ["wrong_kept"]
    assert "below top_p, 0.8" in report.problems[0].message


@pytest.mark.parametrize(
    ("names", "change", "words"),
    [
        (("topk_ids", "topk_logprobs"), lambda of: of + of[-1:] * 4, "topk_ids of a position has 1 to [5-8] elements"),
        (("topk_ids",), lambda of: of + of[-1:] * 4, "topk_ids of a position has 1 to [5-8] elements"),
        (("topk_ids", "topk_logprobs"), lambda of: [], "topk_ids of a position has 0 to [1-4] elements"),
        (("topk_logprobs",), lambda of: [], "topk_logprobs of a position has 0 to [1-4] elements"),
        (("topk_logprobs",), lambda of: of[:1] if len(of) > 1 else of * 2, "have lists of different lengths"),
    ],
)
def test_lists_that_no_position_keeps_are_refused_by_name_before_rows_are_made_of_them(
    names: tuple[str, ...], change: Any, words: str, tmp_path: Path
) -> None:
    """[F56] [F99]"""
    docs = examples.documents((20, 5)).slice(0, 2, examples.MAX_LENGTH)
    rows = examples.table("topk_cache", docs, top_p=0.8)
    for name in names:
        at, lists = rows.schema.get_field_index(name), rows[name].to_pylist()
        lists[-1][-1] = change(lists[-1][-1])
        rows = rows.set_column(at, rows.schema.field(name), pa.array(lists, type=rows.schema.field(name).type))
    folder = commit_rows(tmp_path, rows, docs)
    with pytest.raises(CorruptPartError, match=f"part-00000.*{words}"):
        CacheReader.from_folders([folder])[0]
    assert [problem.kind for problem in verify(tmp_path).problems] == ["wrong_kept"]


def test_a_part_that_says_another_k_than_its_manifest_is_refused_by_name(tmp_path: Path) -> None:
    docs = examples.documents().slice(0, 4, examples.MAX_LENGTH)
    rows = examples.table("topk_cache", docs, top_p=0.8)
    at, field = rows.schema.get_field_index("topk_ids"), rows.schema.field("topk_ids")
    said = field.with_metadata({**field.metadata, b"k": b"many"})
    folder = commit_rows(tmp_path, rows.set_column(at, said, rows["topk_ids"]), docs)
    with pytest.raises(CorruptPartError, match="has 'many' as k, its manifest 4"):
        CacheReader.from_folders([folder])[0]
    assert [problem.kind for problem in verify(tmp_path).problems] == ["wrong_schema"]


def commit_rows(store: Path, rows: pa.Table, docs: Any) -> Path:
    """A result of one part, which has these rows."""
    out = examples.output(store, "topk_cache", params=PLAIN)
    with examples.writer(store, out) as result:
        stats = {"n_non_finite": 0, "max_probability_sum": 1}
        result.write_part(0, rows, n_tokens=docs.n_tokens, stats=stats)
        result.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    return Path(out.path)


def test_ragged_caches_are_compared_with_each_other_and_with_those_that_keep_k(tmp_path: Path) -> None:
    readers = [
        CacheReader.from_folders([examples.commit(tmp_path / str(at), "topk_cache", params=params)[0]])
        for at, params in enumerate((PLAIN, examples.PARAMS["topk_cache"], COMPACT))
    ]
    for one in readers:
        for other in readers:
            found = compare(one, other)
            assert found.measures["ids_differ"].largest == 0
            assert found.measures["top1_differs"].largest == 0
            assert found.measures["kl"].largest < 1e-3
            assert found.measures["logprob"].largest < 0.1


def test_plain_ragged_parts_are_lists_in_pyarrow(tmp_path: Path) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache", params=PLAIN)
    table = pq.read_table(folder / "part-00000.parquet")
    assert {len(ids) for ids in table["topk_ids"][0].as_py()} <= {1, 2, 3, 4}
    assert flat(table["topk_ids"]).dtype == np.uint32
    assert table.schema.field("topk_ids").metadata[b"top_p"] == b"0.8"
