"""The codec of top-k caches: what comes back is what went in, within what the codec can cost; all else is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.errors import CodecRangeError, CorruptPartError, UnknownCodecError, UnknownFieldError
from kd_assets.store import (
    CacheReader,
    Documents,
    KeptPositions,
    coded,
    encode_topk,
    plain_table,
    read_manifest,
    verify,
)
from kd_assets.store.arrays import flat
from kd_assets.store.checking.checks import ResultFiles, check_codec
from kd_assets.store.codecs import topk_compact
from kd_assets.store.codecs.topk_compact import CodeError, bands, divergence, divergence_limit, logprob_tolerance
from kd_assets.store.comparing import compare
from kd_assets.store.partfile import PartFile, write_table
from kd_assets.store.recorded_checks import codec_failure
from kd_assets.store.writing.documents import offsets_of
from kd_assets_tests.store import examples

FORMAT_FILE = Path(__file__).parents[2] / "FORMAT.md"
Rows = tuple[npt.NDArray[np.uint32], npt.NDArray[np.float16]]


def decoder_to_copy(name: str = "decode_compact") -> Any:
    """A function as it stands in FORMAT.md."""
    (source,) = re.findall(r"^```python\n(.*?)^```", FORMAT_FILE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(source, names)
    return names[name]


def random_rows(m: int, k: int, vocabulary: int, *, spread: float, seed: int) -> Rows:
    """The k largest of random logits over a vocabulary; of a large one the logits of 4 k, and a mass beyond."""
    rng = np.random.default_rng(seed)
    n = min(vocabulary, 4 * k + 8)
    ids = np.stack([rng.choice(vocabulary, n, replace=False) for _ in range(m)])
    logits = rng.normal(0, spread, (m, n))
    rest = 0.0 if n == vocabulary else np.exp(rng.normal(-1, 3, (m, 1)))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True) + rest)
    order = np.argsort(-logprobs, axis=1)[:, :k]
    return (
        np.take_along_axis(ids, order, axis=1).astype(np.uint32),
        np.take_along_axis(logprobs, order, axis=1).astype(np.float16),
    )


def table_of(rows: Rows, lengths: list[int], *, positions: KeptPositions | None = None, seed: int = 0) -> pa.Table:
    """A plain table of these rows; half of the targets are among the kept ids."""
    rng = np.random.default_rng(seed)
    ids_Mk, logprobs_Mk = rows
    offsets = offsets_of(np.array(lengths, np.int64))
    input_ids = rng.integers(0, 1 << 17, int(offsets[-1]), dtype=np.uint32)
    is_next = np.ones(len(input_ids), np.bool_)
    is_next[offsets[:-1]] = False
    if positions is None:
        input_ids[is_next] = np.where(rng.random(len(ids_Mk)) < 0.5, ids_Mk[:, -1], input_ids[is_next])
    docs = Documents(
        document_ids=[f"document-{i}" for i in range(len(lengths))],
        offsets=offsets,
        input_ids=input_ids,
        loss_mask=rng.random(len(input_ids)) < 0.5,
    )
    return encode_topk(
        docs,
        topk_ids_Mk=ids_Mk,
        topk_logprobs_Mk=logprobs_Mk,
        logsumexp_M=rng.normal(20, 3, len(ids_Mk)).astype(np.float32),
        target_logprob_M=-rng.exponential(4, len(ids_Mk)).astype(np.float32),
        positions=positions,
    )


def part_of(table: pa.Table, path: Path) -> Path:
    with path.open("wb") as file:
        write_table(table, ".parquet", file)
    return path


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 12.0])
@pytest.mark.parametrize(
    ("k", "vocabulary"), [(1, 1), (1, 128_256), (2, 5), (3, 128_256), (5, 5), (16, 128_256), (33, 40), (64, 128_256)]
)
def test_rows_come_back_in_order_with_their_ids_and_within_what_the_codec_can_cost(
    k: int, vocabulary: int, spread: float, tmp_path: Path
) -> None:
    m = 400
    ids_Mk, logprobs_Mk = random_rows(m, k, vocabulary, spread=spread, seed=k)
    made = topk_compact.encode(ids_Mk, logprobs_Mk)
    np.testing.assert_array_equal(topk_compact.decode_ids(made.ids, vocabulary=vocabulary), ids_Mk)
    found_Mk, tails_M = topk_compact.decode_logprobs(made.codes, made.tails_M)
    assert (np.diff(found_Mk.astype(np.float32), axis=1) <= 0).all()
    mass_M = np.exp(found_Mk.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(mass_M + tails_M, 1, atol=4e-3)
    has_others_M = np.exp(logprobs_Mk.astype(np.float64)).sum(axis=1) < 1 - 1e-6
    assert (tails_M[has_others_M] > 0).all(), "what was possible stays possible"
    kl_M = divergence(logprobs_Mk, found_Mk, tails_M)
    assert kl_M.max() <= divergence_limit(k)
    exact_Mk = logprobs_Mk.astype(np.float64)
    allowed_Mk = logprob_tolerance(exact_Mk, at=exact_Mk) + 2**-10 * np.abs(exact_Mk)
    assert (np.abs(found_Mk - exact_Mk) <= allowed_Mk).all()

    table = table_of((ids_Mk, logprobs_Mk), [m // 2 + 1, 1, m // 2 + 1])
    made_table = coded(table, "compact")
    decode = decoder_to_copy()
    with PartFile(part_of(made_table.stored, tmp_path / "part-00000.parquet"), vocabulary=1 << 17) as part:
        read = part.read(part.names)
    assert read.equals(made_table.decoded)
    assert read.schema.equals(table.schema, check_metadata=True)
    for i, row in enumerate(made_table.stored.to_pylist()):
        for name, expected in zip(
            ("topk_ids", "topk_logprobs", "target_logprob", "logsumexp"), decode(row, k), strict=True
        ):
            found = flat(read[name].slice(i, 1))
            np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def test_divergence_is_the_one_of_its_definition() -> None:
    ids_Mk, exact_Mk = random_rows(50, 8, 1000, spread=2.0, seed=0)
    made = topk_compact.encode(ids_Mk, exact_Mk)
    found_Mk, tails_M = topk_compact.decode_logprobs(made.codes, made.tails_M)
    p_Mk, q_Mk = (np.exp(x.astype(np.float64)) for x in (exact_Mk, found_Mk))
    p_M = np.maximum(1 - p_Mk.sum(axis=1), 0)
    p_Mk /= np.maximum(p_Mk.sum(axis=1), 1)[:, None]
    every_p, every_q = np.column_stack([p_Mk, p_M]), np.column_stack([q_Mk, tails_M])
    kl_M = (every_p * np.log(every_p / every_q) - every_p + every_q).sum(axis=1)
    np.testing.assert_allclose(divergence(exact_Mk, found_Mk, tails_M), kl_M, atol=1e-6)
    assert 3e-6 < kl_M.mean() < 4e-5


def test_without_the_tail_byte_the_divergence_would_be_many_times_larger() -> None:
    ids_Mk, exact_Mk = random_rows(2000, 16, 128_256, spread=4.0, seed=1)
    made = topk_compact.encode(ids_Mk, exact_Mk)
    found_Mk, tails_M = topk_compact.decode_logprobs(made.codes, made.tails_M)
    wrong_M = np.maximum(tails_M[::-1], 1e-9)
    assert divergence(exact_Mk, found_Mk, tails_M).mean() * 5 < divergence(exact_Mk, found_Mk, wrong_M).mean()


def test_two_codes_that_are_one_keep_the_order_that_was_given() -> None:
    logprobs_Mk = np.log(np.array([[0.3001, 0.3, 0.2]])).astype(np.float16)
    made = topk_compact.encode(np.array([[7, 3, 5]], np.uint32), logprobs_Mk)
    found_Mk, _ = topk_compact.decode_logprobs(made.codes, made.tails_M)
    assert found_Mk[0, 0] == found_Mk[0, 1]
    assert topk_compact.decode_ids(made.ids)[0].tolist() == [7, 3, 5]


def test_codes_that_are_one_but_for_rounding_are_decoded_all_the_same() -> None:
    """Their sum is below 1 in float32, and not in float64."""
    logprobs = np.array([[-0.532, -0.959, -3.69, -5.418, -15.55, -15.76]], np.float16)
    rows = (np.arange(6, dtype=np.uint32)[None], logprobs)
    made = topk_compact.encode(*rows)
    found, tails = topk_compact.decode_logprobs(made.codes, made.tails_M)
    assert topk_compact.divergence(logprobs, found, tails)[0] < divergence_limit(6)


def test_bands_are_of_every_slot_once() -> None:
    assert bands(1) == ((0, 1),)
    assert bands(2) == ((0, 1), (1, 2))
    assert bands(3) == ((0, 1), (1, 2), (2, 3))
    assert bands(16) == ((0, 1), (1, 2), (2, 4), (4, 16))
    assert bands(50) == ((0, 1), (1, 2), (2, 4), (4, 16), (16, 50))
    assert bands(300)[-2:] == ((64, 256), (256, 300))


def test_a_small_table_has_these_bytes() -> None:
    docs = Documents(
        document_ids=["a", "b"],
        offsets=np.array([0, 3, 4]),
        input_ids=np.array([1, 70_000, 9, 2], np.uint32),
        loss_mask=np.ones(4, np.bool_),
    )
    probabilities = np.array([[0.5, 0.25, 0.125], [0.9, 0.05, 1e-6]])
    made = coded(
        encode_topk(
            docs,
            topk_ids_Mk=np.array([[70_000, 258, 3], [5, 6, 65_536]], np.uint32),
            topk_logprobs_Mk=np.log(probabilities).astype(np.float16),
            logsumexp_M=np.array([20, 2.5], np.float32),
            target_logprob_M=np.array([-0.6931, -7.5], np.float32),
        ),
        "compact",
    )
    stored = {name: made.stored[name].to_pylist() for name in made.stored.schema.names[4:]}
    assert {name: [value.hex() for value in values] for name, values in stored.items()} == {
        "topk_ids_byte_0": ["700203050600", ""],
        "topk_ids_byte_1": ["110100000000", ""],
        "topk_ids_byte_2": ["010000000001", ""],
        "topk_codes_0": ["d6f8", ""],
        "topk_codes_1": ["227f", ""],
        "topk_codes_2": ["1c71", ""],
        "topk_tail": ["6750", ""],
        "target_logprob_outside": ["80c7", ""],
        "logsumexp_float16": ["004d0041", ""],
    }
    assert made.stored.schema.metadata[b"kd_assets.codec"] == b"compact"
    assert made.decoded["target_logprob"].to_pylist() == [[made.decoded["topk_logprobs"][0].as_py()[0][0], -7.5], []]
    assert made.decoded["logsumexp"].to_pylist() == [[20.0, 2.5], []]


@pytest.mark.parametrize("options", [{}, {"logsumexp": False}, {"draws": 3, "seed": 0}])
def test_a_coded_result_reads_as_a_plain_one_and_is_found_whole(tmp_path: Path, options: dict[str, Any]) -> None:
    docs = examples.documents((5, 1, 3, 7, 1))
    of_plain = {k: v for k, v in {**examples.PARAMS["topk_cache"], **options}.items() if k != "logsumexp"}
    plain, _ = examples.commit(tmp_path / "plain", "topk_cache", docs=docs, params=of_plain)
    folder, manifest = examples.commit(
        tmp_path / "coded", "topk_cache", docs=docs, params={**examples.COMPACT, **options}, max_documents=2
    )
    report = verify(tmp_path / "coded")
    assert report.problems == ()
    assert manifest.variant != read_manifest(plain).variant
    one, other = CacheReader.from_folders([plain]), CacheReader.from_folders([folder])
    assert set(one.fields) - set(other.fields) == ({"logsumexp"} if "logsumexp" in options else set())
    found = compare(one, other)
    assert (found.n_documents, found.other_tokens) == (5, [])
    assert found.measures["ids_differ"].largest == 0
    assert 0 < found.measures["kl"].largest < 2 * divergence_limit(examples.K)
    for i in range(5):
        for name in other.fields:
            if name.startswith(("sampled", "input", "loss", "n_tokens")):
                assert str(one[i][name]) == str(other[i][name])
        assert other[i]["topk_logprobs"].dtype == np.float16
        assert other[i]["target_logprob"].dtype == np.float32
    for part in sorted(folder.glob("part-*")):
        with PartFile(part) as file:
            assert plain_table(pq.read_table(part)).equals(file.read(file.names))


def test_positions_that_are_kept_say_whose_target_it_is(tmp_path: Path) -> None:
    rows = random_rows(5, 4, 50, spread=1.0, seed=2)
    positions = KeptPositions(offsets=np.array([0, 2, 2, 5]), positions_M=np.array([0, 3, 1, 2, 5], np.uint32))
    table = table_of(rows, [6, 2, 8], positions=positions)
    tokens = flat(table["input_ids"]).copy()
    starts = np.array([0, 0, 8, 8, 8])
    tokens[starts + positions.positions_M + 1] = [rows[0][0, 2], 99, rows[0][2, 0], 98, rows[0][4, 3]]
    tokens_column = pa.ListArray.from_arrays(pa.array([0, 6, 8, 16], pa.int32()), pa.array(tokens))
    table = table.set_column(2, table.schema.field(2), tokens_column.cast(table.schema.field(2).type))
    made = coded(table, "compact")
    logprobs = flat(made.decoded["topk_logprobs"]).reshape(-1, 4)
    given = flat(table["target_logprob"]).astype(np.float16)
    assert flat(made.decoded["target_logprob"]).tolist() == [
        logprobs[0, 2],
        given[1],
        logprobs[2, 0],
        given[3],
        logprobs[4, 3],
    ]
    with PartFile(part_of(made.stored, tmp_path / "part-00000.parquet")) as part:
        assert part.read(part.names).equals(made.decoded)
    of_decoder = [decoder_to_copy()(row, 4)[2] for row in made.stored.to_pylist()]
    np.testing.assert_array_equal(np.concatenate(of_decoder), flat(made.decoded["target_logprob"]))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("topk_logprobs", -np.inf, "-inf as a log-probability"),
        ("topk_logprobs", np.nan, "nan as a log-probability"),
        ("topk_logprobs", 0.5, "0.5 as a log-probability"),
        ("topk_logprobs", -0.001, "do not descend"),
        ("topk_ids", 1 << 24, "token id 16777216, and 16777215 is the largest"),
        ("topk_ids", "twice", "has a token id twice"),
        ("target_logprob", 1e30, "1.0000000150474662e+30 as a target's log-probability"),
        ("target_logprob", np.nan, "nan as a target's log-probability"),
        ("logsumexp", -1e30, "as a logsumexp"),
        ("logsumexp", np.inf, "inf as a logsumexp"),
    ],
)
def test_what_the_codec_cannot_hold_is_refused_with_document_and_row(name: str, value: Any, words: str) -> None:
    table = table_of(random_rows(6, 4, 50, spread=1.0, seed=3), [4, 1, 4])
    numbers = flat(table[name]).copy()
    at = 4 * 4 + 2 if name.startswith("topk") else 4
    numbers[at] = numbers[at - 1] if value == "twice" else value
    leaf: pa.Array = pa.array(numbers)
    if name.startswith("topk"):
        leaf = pa.FixedSizeListArray.from_arrays(leaf, 4)
    column = pa.ListArray.from_arrays(pa.array([0, 3, 3, 6], pa.int32()), leaf)
    at_name = table.schema.get_field_index(name)
    table = table.set_column(at_name, table.schema.field(name), column.cast(table.schema.field(name).type))
    with pytest.raises(CodecRangeError, match=re.escape(words)) as refused:
        coded(table, "compact")
    assert "row 1 of document 'document-2'" in str(refused.value)


def test_probabilities_of_more_than_one_are_refused() -> None:
    logprobs = np.full((1, 3), np.log(0.4), np.float16)
    with pytest.raises(topk_compact.RangeError, match=r"add up to 1\.1997"):
        topk_compact.encode(np.array([[1, 2, 3]], np.uint32), logprobs)


@pytest.mark.parametrize(
    ("column", "change", "words"),
    [
        ("topk_tail", lambda value: value[:-1], "topk_tail of document 0 of the rows has 3 bytes, expected 4"),
        ("topk_ids_byte_1", lambda value: value + b"\0", "expected 16"),
        ("topk_codes_0", lambda value: b"\0" * len(value), "row 0 of document 0 of the rows has a code below 1"),
        ("topk_codes_1", lambda value: b"\xff" * len(value), "a code below 1"),
        ("topk_codes_2_3", lambda value: b"\xff" * len(value), "a code below 1"),
        ("topk_ids_byte_2", lambda value: b"\x7f" * len(value), "the teacher knows ids 0 to 131071"),
        ("target_logprob_outside", lambda value: value + b"\0\0", "target_logprob_outside of document 0"),
        ("logsumexp_float16", lambda value: b"\x00\x7c" * (len(value) // 2), "NaN or infinite"),
    ],
)
def test_bytes_that_no_encoder_writes_are_damage(tmp_path: Path, column: str, change: Any, words: str) -> None:
    stored = coded(table_of(random_rows(4, 4, 50, spread=1.0, seed=4), [5, 1]), "compact").stored
    at = stored.schema.get_field_index(column)
    first, *others = stored[column].to_pylist()
    changed = stored.set_column(at, stored.schema.field(column), pa.array([change(first), *others], pa.binary()))
    path = part_of(changed, tmp_path / "part-00000.parquet")
    with PartFile(path, vocabulary=1 << 17) as part:
        assert part.read(["input_ids"]).num_rows == 2, "what is not coded can be read"
        with pytest.raises(CorruptPartError, match=re.escape(words)) as damage:
            part.read(part.names)
    assert str(path) in str(damage.value)


def test_a_tail_byte_that_leaves_no_mass_is_damage() -> None:
    with pytest.raises(CodeError, match="a tail byte that cannot be"):
        topk_compact.decode_logprobs([np.array([[255]], np.uint8)], np.array([255], np.uint8))
    logprobs, tails = topk_compact.decode_logprobs([np.array([[200]], np.uint8)], np.array([255], np.uint8))
    assert tails[0] == 1 - (200 / 255) ** 4
    assert logprobs[0, 0] == np.float16(4 * np.log(200 / 255))


def test_a_damaged_part_is_never_read_as_other_numbers(tmp_path: Path) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache", params=examples.COMPACT)
    path = folder / "part-00000.parquet"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        at = int(rng.integers(len(data)))
        if rng.random() < 0.3:
            del data[at:]
        else:
            data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(data))
        with pytest.raises(CorruptPartError, match=re.escape(path.name)):
            CacheReader.from_folders([folder])[0]
        # Whoever does not compare hashes is told so, too, or finds a table.
        with contextlib.suppress(CorruptPartError, UnknownCodecError), PartFile(path) as part:
            part.read(part.names)


def test_a_codec_of_a_later_version_is_refused_by_its_name_and_by_the_version_that_reads_it(tmp_path: Path) -> None:
    stored = coded(table_of(random_rows(2, 4, 50, spread=1.0, seed=5), [3]), "compact").stored
    later = {**stored.schema.metadata, b"kd_assets.codec": b"tiny", b"kd_assets.codec_since": b"7.1.0"}
    path = tmp_path / "part-00000.parquet"
    pq.write_table(stored.replace_schema_metadata(later), path)
    with pytest.raises(UnknownCodecError, match=r"'tiny': kd_assets 7\.1\.0 and later read it; .* plain, compact"):
        PartFile(path)
    with pytest.raises(UnknownCodecError, match="'tiny'"):
        coded(table_of(random_rows(2, 4, 50, spread=1.0, seed=5), [3]), "tiny")


def test_a_manifest_with_a_codec_of_a_later_version_is_refused_by_readers_and_named_by_verify(tmp_path: Path) -> None:
    out = examples.output(tmp_path, "topk_cache", params={**examples.COMPACT, "codec": "tiny"})
    docs = examples.documents()
    made = coded(examples.table("topk_cache", docs), "compact")
    with examples.writer(tmp_path, out) as result:
        result.write_part(0, made.stored, n_tokens=docs.n_tokens, stats={"n_non_finite": 0, "max_probability_sum": 1})
        result.commit(parts=1, checks={}, provenance={"kd_assets": "7.1.0"})
    with pytest.raises(UnknownCodecError, match=r"'tiny': kd_assets 7\.1\.0 and later read it"):
        CacheReader.from_folders([Path(out.path)], allow_failed=True)
    problems = verify(tmp_path).problems
    assert [problem.kind for problem in problems] == ["unreadable"]
    assert "codec 'tiny'" in problems[0].message


def test_a_cache_without_logsumexp_says_so_when_it_is_asked_for_it(tmp_path: Path) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache", params={**examples.COMPACT, "logsumexp": False})
    assert "logsumexp" not in CacheReader.from_folders([folder]).fields
    with pytest.raises(UnknownFieldError, match="its recipe leaves it out, and logits cannot be had"):
        CacheReader.from_folders([folder], fields=["logsumexp"])


def test_coding_that_costs_more_than_it_can_has_failed_a_check(tmp_path: Path) -> None:
    _, manifest = examples.commit(tmp_path, "topk_cache", params=examples.COMPACT)
    folder = Path(examples.output(tmp_path, "topk_cache", params=examples.COMPACT).path)
    assert codec_failure(manifest) is None
    passed = check_codec(ResultFiles(folder))
    assert passed is not None
    assert passed.passed
    assert passed.numbers["max_codec_mean_kl"] <= passed.numbers["max_codec_kl"]  # type: ignore[operator]
    for name in ("max_codec_kl", "max_codec_mean_kl"):
        for value in (1e-3, float("nan")):
            part = dataclasses.replace(manifest.parts[0], stats={**manifest.parts[0].stats, name: value})
            assert name in str(codec_failure(dataclasses.replace(manifest, parts=(part,))))
    plain, _ = examples.commit(tmp_path, "topk_cache", partition_key="other")
    assert check_codec(ResultFiles(plain)) is None


def test_verify_finds_token_ids_that_the_teacher_does_not_have(tmp_path: Path) -> None:
    out = examples.output(tmp_path, "topk_cache", params=examples.COMPACT)
    docs = examples.documents((3, 4))
    made = coded(examples.table("topk_cache", docs), "compact")
    with examples.writer(tmp_path, out) as result:
        stats = {"n_non_finite": 0, "max_probability_sum": 1, **made.error}
        result.write_part(0, made.stored, n_tokens=docs.n_tokens, stats=stats)
        result.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={}, facts={"vocab_size": 4})
    assert [problem.kind for problem in verify(tmp_path).problems] == ["wrong_ids"]
    with pytest.raises(CorruptPartError, match="the teacher knows ids 0 to 3"):
        CacheReader.from_folders([Path(out.path)])[0]
