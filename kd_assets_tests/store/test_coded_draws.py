"""Random draws in a compact cache: what comes back is what was drawn, and all else is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.errors import CodecRangeError, ContractError, CorruptPartError, UnknownCodecError
from kd_assets.store import CacheReader, coded, encode_topk, part_stats, plain_table, plan_output, read_manifest, verify
from kd_assets.store.arrays import flat
from kd_assets.store.codecs import codec
from kd_assets.store.codecs.topk_columns import CompactTopk
from kd_assets.store.codecs.topk_schema import compact_topk_schema
from kd_assets.store.computing_versions import require_same_versions
from kd_assets.store.partfile import PartFile, write_table
from kd_assets_tests.store import examples
from kd_assets_tests.store.test_codecs import decoder_to_copy

PARAMS = examples.COMPACT | {"draws": examples.DRAWS, "seed": 0}
NO_DRAWS = examples.COMPACT
TOP_P = {"top_p": 0.8}
DOCS = examples.documents().slice(0, 4, examples.MAX_LENGTH)


def table_of(
    topk: npt.ArrayLike, drawn: npt.ArrayLike, lengths: tuple[int, ...], *, vocabulary: int = 1 << 17
) -> pa.Table:
    """A plain table of positions that keep these ids, all equally likely, and drew those."""
    ids_Mk = np.array(topk, np.uint32)
    docs = dataclasses.replace(
        examples.documents(lengths), input_ids=np.arange(sum(lengths), dtype=np.uint32) % vocabulary
    )
    return encode_topk(
        docs,
        topk_ids_Mk=ids_Mk,
        topk_logprobs_Mk=np.full(ids_Mk.shape, np.log(0.9 / ids_Mk.shape[1]), np.float16),
        logsumexp_M=np.zeros(len(ids_Mk), np.float32),
        target_logprob_M=np.full(len(ids_Mk), -2, np.float32),
        sampled_ids_Md=np.array(drawn, np.uint32),
    )


def random_table(k: int, draws: int, vocabulary: int, *, m: int = 300, seed: int = 0) -> pa.Table:
    """Draws by a power law, over ids of which any k are kept."""
    rng = np.random.default_rng(seed)
    topk = np.stack([rng.choice(min(vocabulary, 4 * k + 4), k, replace=False) for _ in range(m)])
    drawn = (vocabulary * rng.random((m, draws)) ** rng.integers(1, 12, (m, 1))).astype(np.uint32)
    return table_of(topk, drawn, (m - 1, 1, 2, 1, 2))


def part_of(table: pa.Table, path: Path) -> Path:
    with path.open("wb") as file:
        write_table(table, ".parquet", file)
    return path


def in_the_old_dress(plain: pa.Table) -> pa.Table:
    """As parts were before draws were coded: the two columns as they are, behind those of the codec."""
    without = coded(plain.drop_columns(["sampled_ids", "sampled_counts"]), "compact").stored
    k = plain.schema.field("topk_ids").type.value_type.list_size
    schema = compact_topk_schema(k, examples.DRAWS, coded_draws=False)
    columns = [(without if name in without.schema.names else plain)[name] for name in schema.names]
    return pa.Table.from_arrays(columns, schema=schema)


@pytest.mark.parametrize("draws", [1, 50, 255, 256, 1000])
@pytest.mark.parametrize(("k", "vocabulary"), [(1, 1), (1, 50), (2, 2), (5, 128_256), (16, 1 << 24), (40, 60)])
def test_draws_come_back_as_they_were(k: int, vocabulary: int, draws: int, tmp_path: Path) -> None:
    plain = random_table(k, draws, vocabulary)
    made = coded(plain, "compact")
    assert made.stored.schema.names == compact_topk_schema(k, draws).names
    names = ["sampled_ids", "sampled_counts"]
    with PartFile(part_of(made.stored, tmp_path / "part-00000.parquet"), vocabulary=1 << 24) as part:
        assert part.schema.equals(plain.schema, check_metadata=True)
        for chosen in (names, names[1:], plain.schema.names):
            assert part.read(chosen).equals(made.decoded.select(chosen))
    assert made.decoded.select(names).equals(plain.select(names))
    ids_of, draws_of = decoder_to_copy(), decoder_to_copy("decode_draws")
    for of_plain, row in zip(plain.select(names).to_pylist(), made.stored.to_pylist(), strict=True):
        found = draws_of(row, ids_of(row, k)[0], draws)
        assert [(ids.tolist(), counts.tolist()) for ids, counts in found] == list(
            zip(of_plain["sampled_ids"], of_plain["sampled_counts"], strict=True)
        )


def test_a_small_table_of_draws_has_these_bytes() -> None:
    drawn = [[70_000, 3, 70_000, 258, 9, 9, 66_000], [1, 2, 3, 5, 5, 5, 5]]
    made = coded(table_of([[70_000, 258, 3], [5, 6, 7]], drawn, (3, 1)), "compact").stored
    stored = {name: made[name].to_pylist() for name in made.schema.names if name.startswith("sampled")}
    assert {name: [value.hex() for value in values] for name, values in stored.items()} == {
        "sampled_slots_0": ["0204", ""],
        "sampled_slots_1": ["0100", ""],
        "sampled_slots_2": ["0100", ""],
        "sampled_outside_byte_0": ["0900c7" + "010101", ""],
        "sampled_outside_byte_1": ["000001" + "000000", ""],
        "sampled_outside_byte_2": ["000001" + "000000", ""],
    }


def test_draws_that_all_have_slots_leave_empty_planes_of_the_others() -> None:
    made = coded(table_of([[4, 9]], [[9, 9, 4]], (2,)), "compact")
    assert made.stored["sampled_outside_byte_0"].to_pylist() == [b""]
    assert made.decoded["sampled_ids"].to_pylist() == [[[4, 9]]]


def test_rows_beyond_one_run_of_positions_are_coded_alike() -> None:
    plain = random_table(2, 5, 40, m=20_000)
    made = coded(plain, "compact")
    assert plain_table(made.stored)["sampled_ids"].equals(plain["sampled_ids"])
    tail = coded(plain.slice(len(plain) - 3), "compact").stored
    for name in tail.schema.names:
        assert tail[name].to_pylist() == made.stored[name].to_pylist()[-3:]


def test_coded_draws_have_another_name_than_those_before_and_both_are_read(tmp_path: Path) -> None:
    folder, manifest = examples.commit(tmp_path / "new", "topk_cache", params=PARAMS)
    schema = pq.read_schema(folder / "part-00000.parquet")
    assert manifest.identity["draws_codec_version"] == 2
    assert schema.metadata[b"kd_assets.codec"] == b"compact_2"
    assert schema.metadata[b"kd_assets.codec_since"] == b"0.2.0", "0.1.0 reads compact, and not this"
    of_draws = [field for field in schema if field.name.startswith("sampled_")]
    assert {(field.type, tuple(field.metadata.items())) for field in of_draws} == {
        (pa.binary(), ((b"k", b"4"), (b"draws", b"20")))
    }

    out = examples.output(tmp_path / "old", "topk_cache", params=PARAMS)
    identity = {k: v for k, v in out.identity.items() if k != "draws_codec_version"}
    before = plan_output("topk_cache", identity, recipe_folder=tmp_path / "old" / "tiny", partition_key="tiny-00000")
    assert before.fingerprint != out.fingerprint
    docs = examples.documents().slice(0, 4, examples.MAX_LENGTH)
    rows = examples.table("topk_cache", docs, draws=examples.DRAWS)
    with examples.writer(tmp_path / "old", before) as result:
        made = coded(rows, "compact")
        stats = part_stats("topk_cache", made.decoded) | made.error
        result.write_part(0, in_the_old_dress(rows), n_tokens=docs.n_tokens, stats=stats)
        result.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    assert verify(tmp_path / "old").problems == verify(tmp_path / "new").problems == ()
    of_before = pq.read_schema(Path(before.path) / "part-00000.parquet").metadata
    assert (of_before[b"kd_assets.codec"], of_before[b"kd_assets.codec_since"]) == (b"compact", b"0.1.0")
    old = CacheReader.from_folders([Path(before.path)])
    np.testing.assert_array_equal(old[3]["sampled_ids"].values, flat(rows.slice(3, 1)["sampled_ids"]))
    with pytest.raises(ContractError, match="install the same kd_assets"):
        require_same_versions(before)


def test_more_draws_than_a_byte_can_count_have_a_second_one() -> None:
    drawn = [[7] * 299 + [8]]
    made = coded(table_of([[7, 1]], drawn, (2,)), "compact").stored
    assert made["sampled_slots_0"].to_pylist() == [b"\x2b"]
    assert made["sampled_slots_0_high"].to_pylist() == [b"\x01"]
    assert made["sampled_outside_byte_0"].to_pylist() == [b"\x08"]


def test_a_reader_without_coded_draws_refuses_them_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the version before did: its codecs are those in recipes."""
    path = part_of(coded(table_of([[4, 9]], [[9, 9, 4]], (2,)), "compact").stored, tmp_path / "part-00000.parquet")
    monkeypatch.setattr(codec, "LATER_FORMS", {})
    with pytest.raises(UnknownCodecError, match="'compact_2'"):
        PartFile(path)
    with pytest.raises(ValueError, match="its columns are"):
        CompactTopk().plain_schema(pq.read_schema(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"counts": [2, 2]}, "has 4 draws, not 3"),
        ({"counts": [0, 3]}, "a drawn id with a count of 0"),
        ({"ids": [9, 4]}, "drawn ids that do not ascend"),
        ({"ids": [4, 4]}, "drawn ids that do not ascend"),
        ({"ids": [4, 1 << 24]}, "has 16777216 as a drawn id, and 16777215 is the largest"),
    ],
)
def test_draws_that_cannot_be_held_are_refused_with_document_and_row(change: dict[str, list[int]], words: str) -> None:
    plain = table_of([[4, 9]] * 3, [[9, 9, 4]] * 3, (2, 3))
    for name, column, kind in (("ids", "sampled_ids", np.uint32), ("counts", "sampled_counts", np.uint16)):
        numbers = flat(plain[column]).copy()
        numbers[2:4] = np.array(change.get(name, numbers[2:4]), kind)
        lists = pa.ListArray.from_arrays(pa.array([0, 2, 4, 6], pa.int32()), pa.array(numbers))
        whole = pa.ListArray.from_arrays(pa.array([0, 1, 3], pa.int32()), lists)
        field = plain.schema.field(column)
        plain = plain.set_column(plain.schema.get_field_index(column), field, whole.cast(field.type))
    with pytest.raises(CodecRangeError, match=re.escape(words)) as refused:
        coded(plain, "compact")
    assert "row 0 of document 'document-1'" in str(refused.value)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("sampled_slots_0", b"\x09\x02", "row 0 of document 0 of the rows has counts of its slots that add up to 10"),
        ("sampled_slots_0", b"\x00\x02", "sampled_outside_byte_0 of document 0 of the rows has 2 bytes, expected 4"),
        ("sampled_slots_1", b"\x01", "sampled_slots_1 of document 0 of the rows has 1 bytes, expected 2"),
        ("sampled_outside_byte_1", b"", "sampled_outside_byte_1 of document 0 of the rows has 0 bytes, expected 2"),
        ("sampled_outside_byte_2", b"\x00\xff", "row 1 of document 0 of the rows has 16711682 as a drawn id"),
        ("sampled_outside_byte_0", b"\x01\x09", "has 9 as a drawn id without a slot, which has one"),
        ("topk_ids_byte_0", b"\x04\x04\x04\x09", "row 0 of document 0 of the rows has a token id twice"),
    ],
)
def test_bytes_of_draws_that_no_encoder_writes_are_damage(
    column: str, value: bytes, words: str, tmp_path: Path
) -> None:
    stored = coded(table_of([[4, 9]] * 2, [[9, 4, 4, 1], [4, 4, 9, 2]], (3,)), "compact").stored
    at = stored.schema.get_field_index(column)
    changed = stored.set_column(at, stored.schema.field(column), pa.array([value], pa.binary()))
    path = part_of(changed, tmp_path / "part-00000.parquet")
    with PartFile(path, vocabulary=1 << 17) as part:
        with pytest.raises(CorruptPartError, match=re.escape(words)) as damage:
            part.read(["sampled_ids", "sampled_counts"])
        if not column.startswith("topk"):
            assert part.read(["topk_ids", "target_logprob"]).num_rows == 1, "the others can be read"
    assert str(path) in str(damage.value)


@pytest.mark.parametrize("name", ["sampled_outside_byte_0", "sampled_slots_0"])
@pytest.mark.parametrize("said", [{b"k": b"4"}, {b"draws": b"0", b"k": b"4"}, {b"draws": b"x", b"k": b"4"}])
def test_metadata_that_say_no_number_of_draws_are_damage(name: str, said: dict[bytes, bytes], tmp_path: Path) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache", params=PARAMS)
    table: Any = pq.read_table(folder / "part-00000.parquet")
    at = table.schema.get_field_index(name)
    changed = table.set_column(at, table.schema.field(name).with_metadata(said), table[name])
    path = part_of(changed, tmp_path / "part-00009.parquet")
    if name == "sampled_outside_byte_0":
        with pytest.raises(CorruptPartError, match="draws"):
            PartFile(path)
    else:  # one column says it for all, and verify compares them all with what they should be
        with PartFile(path) as part:
            assert part.read(["sampled_ids"]).num_rows == 2


def test_verify_reads_the_coded_draws(tmp_path: Path) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache", params=PARAMS)
    assert verify(tmp_path).problems == ()
    assert read_manifest(folder).stats["n_draws"] == examples.DRAWS * read_manifest(folder).stats["n_positions"]


@pytest.mark.parametrize(
    ("params", "wrong", "words"),
    [
        (NO_DRAWS, {"codec": b"compact_2"}, "schema metadata: expected .*b'compact'.* found .*b'compact_2'"),
        (PARAMS, {"codec": b"compact"}, "its columns are"),
        (NO_DRAWS | TOP_P, {"codec": b"compact"}, "its columns are"),
        (PARAMS | TOP_P, {"codec": b"compact"}, "its columns are"),
        (PARAMS, {"codec_since": b"0.1.0"}, "schema metadata: expected .*0.2.0.*found .*0.1.0"),
    ],
)
def test_verify_names_a_part_whose_schema_names_another_form_than_its_columns_have(
    params: dict[str, Any], wrong: dict[str, bytes], words: str, tmp_path: Path
) -> None:
    rows = examples.table("topk_cache", DOCS, draws=params.get("draws", 0), top_p=params.get("top_p"))
    made = coded(rows, "compact").stored
    named = {f"kd_assets.{key}".encode(): value for key, value in wrong.items()}
    commit_stored(tmp_path, params, made.replace_schema_metadata({**made.schema.metadata, **named}))
    (problem,) = verify(tmp_path).problems
    assert problem.kind in ("wrong_schema", "unreadable_part")
    assert re.search(words, problem.message)


@pytest.mark.parametrize(
    ("params", "is_old", "top_p", "words"),
    [
        (PARAMS, True, None, "column sampled_ids is missing"),
        (PARAMS | TOP_P, True, 0.8, "column sampled_ids is missing"),
        (NO_DRAWS, False, 0.8, "column topk_kept is not of this format"),
        (PARAMS, False, 0.8, "column topk_kept is not of this format"),
        (NO_DRAWS | TOP_P, False, None, "column topk_kept is missing"),
    ],
)
def test_verify_names_a_part_of_the_second_form_whose_identity_says_the_first_and_the_other_way_round(
    params: dict[str, Any], is_old: bool, top_p: float | None, words: str, tmp_path: Path
) -> None:
    """`is_old`: the identity lacks the version of coded draws."""
    made = coded(examples.table("topk_cache", DOCS, draws=params.get("draws", 0), top_p=top_p), "compact").stored
    commit_stored(tmp_path, params, made, is_old=is_old)
    (problem,) = verify(tmp_path).problems
    assert (problem.kind, words in problem.message) == ("wrong_schema", True)


def test_verify_names_draws_that_are_not_coded_under_an_identity_that_says_so(tmp_path: Path) -> None:
    rows = examples.table("topk_cache", DOCS, draws=examples.DRAWS)
    commit_stored(tmp_path, PARAMS, in_the_old_dress(rows))
    (problem,) = verify(tmp_path).problems
    assert problem.kind == "wrong_schema"
    assert "column sampled_slots_0 is missing" in problem.message


def commit_stored(store: Path, params: dict[str, Any], stored: pa.Table, *, is_old: bool = False) -> None:
    """A result of one part, which has these columns. `is_old`: of an identity from before draws were coded."""
    identity = examples.output(store, "topk_cache", params=params).identity
    identity = {name: value for name, value in identity.items() if name != "draws_codec_version" or not is_old}
    out = plan_output("topk_cache", identity, recipe_folder=store / "tiny", partition_key="tiny-00000")
    stats = {"n_non_finite": 0, "max_probability_sum": 1, "max_codec_kl": 0, "max_codec_mean_kl": 0}
    n_positions = DOCS.n_tokens - DOCS.n_documents
    stats |= {"n_positions": n_positions, "n_draws": n_positions * params.get("draws", 0)}
    with examples.writer(store, out) as result:
        result.write_part(0, stored, n_tokens=DOCS.n_tokens, stats=stats)
        result.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
