"""Hidden-state caches of every codec: written, read by everyone's reader, checked, damaged."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc
import pytest

from kd_assets.errors import CodecRangeError, CorruptPartError, KdAssetsError, StoreError, UnknownCodecError
from kd_assets.store import (
    CacheReader,
    Coded,
    Documents,
    KeptPositions,
    ResultFiles,
    check_all,
    coded,
    encode_hidden_states,
    failed_check,
    part_stats,
    plain_table,
    verify,
)
from kd_assets.store.codecs import states
from kd_assets.store.codecs.state_codec import CODED, largest_error
from kd_assets.store.comparing import compare
from kd_assets.store.manifest import Manifest
from kd_assets.store.partfile import ARROW_SUFFIX, PartFile, write_table
from kd_assets.store.reading.summary import inspect, view_documents
from kd_assets.store.schema import HiddenState
from kd_assets.store.writing.documents import offsets_of
from kd_assets_tests.store import examples

SIZE = 128
STATES: tuple[HiddenState, ...] = (0, 2, "after_norm")
ROUNDING = [name for name in CODED if name != "split"]

States = dict[HiddenState, npt.NDArray[np.uint16]]


def states_of(n: int, *, seed: int = 0, size: int = SIZE) -> States:
    rng = np.random.default_rng(seed)
    return {state: states.float32_to_bfloat16(rng.normal(0, 1, (n, size)).astype(np.float32)) for state in STATES}


def params(codec: str, **others: Any) -> dict[str, Any]:
    named = {} if codec == "plain" else {"codec": codec}
    return {"blocks": [0, 2], "final": ["after_norm"], "max_length": examples.MAX_LENGTH, **others, **named}


def commit(
    store: Path, codec: str, *, exact: States | None = None, stats: Mapping[str, float] | None = None, **others: Any
) -> tuple[Path, Manifest, States]:
    """A result of the example documents, in one part. `stats`: in the place of those that were measured."""
    docs = examples.documents().slice(0, len(examples.LENGTHS), examples.MAX_LENGTH)
    exact = states_of(docs.n_tokens) if exact is None else exact
    out = examples.output(store, "hidden_state_cache", params=params(codec, **others))
    with examples.writer(store, out) as writer:
        table = coded(encode_hidden_states(docs, exact), codec)
        found = part_stats("hidden_state_cache", table.decoded) | table.error | dict(stats or {})
        writer.write_part(0, table.stored, n_tokens=docs.n_tokens, stats=found)
        manifest = writer.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    return Path(out.path), manifest, exact


def bits_read(folder: Path, **kwargs: Any) -> dict[str, npt.NDArray[np.uint16]]:
    reader = CacheReader.from_folders([folder], **kwargs)
    names = [name for name in reader.fields if name.startswith("hidden_")]
    return {name: np.concatenate([reader[i][name] for i in range(len(reader))]) for name in names}


@pytest.mark.parametrize("codec", CODED)
def test_readers_give_the_names_types_and_numbers_of_a_raw_cache(tmp_path: Path, codec: str) -> None:
    raw_folder, _, exact = commit(tmp_path, "plain")
    folder, _, _ = commit(tmp_path, codec)
    raw, found = CacheReader.from_folders([raw_folder]), CacheReader.from_folders([folder])
    assert found.schema.equals(raw.schema, check_metadata=True)
    assert found.fields == raw.fields
    assert found.document_ids == raw.document_ids
    for i in range(len(raw)):
        one, other = raw[i], found[i]
        assert one.keys() == other.keys()
        for name, values in one.items():
            if not isinstance(values, np.ndarray):
                assert values == other[name]
                continue
            assert (values.dtype, values.shape) == (other[name].dtype, other[name].shape)
            if not name.startswith("hidden_") or codec == "split":
                assert np.array_equal(values, other[name])
            else:
                assert 0 < states.coding_error(values, other[name]).max_state <= largest_error(codec)
    assert list(exact) == list(STATES)


@pytest.mark.parametrize("codec", CODED)
def test_a_reader_may_want_one_column_alone_and_none_of_the_states(tmp_path: Path, codec: str) -> None:
    folder, _, _ = commit(tmp_path, codec)
    whole = bits_read(folder)
    assert list(whole) == ["hidden_block_0", "hidden_block_2", "hidden_final_after_norm"]
    assert np.array_equal(bits_read(folder, fields=["hidden_block_2"])["hidden_block_2"], whole["hidden_block_2"])
    assert set(CacheReader.from_folders([folder], fields=["n_tokens"])[0]) == {
        "partition_key",
        "document_id",
        "n_tokens",
    }


@pytest.mark.parametrize("codec", CODED)
def test_every_check_and_tool_takes_a_coded_cache(tmp_path: Path, codec: str) -> None:
    shard, _ = examples.commit(tmp_path, "shards_manifest")
    folder, manifest, _ = commit(tmp_path, codec)
    results = check_all(ResultFiles(folder), ResultFiles(shard))
    assert {result.name: result.passed for result in results} == dict.fromkeys(
        ("complete", "schema", "finite", "recomputed", "codec"), True
    ), [result.description for result in results]
    assert verify(tmp_path).problems == ()
    (cache,) = [found for found in inspect(tmp_path).caches if found.asset == "hidden_state_cache"]
    assert cache.params["codec"] == codec
    assert set(view_documents(cache, 1)[0].vectors) == {"hidden_block_0", "hidden_block_2", "hidden_final_after_norm"}
    assert failed_check(manifest) is None
    raw = CacheReader.from_folders([commit(tmp_path, "plain")[0]])
    compared = compare(raw, CacheReader.from_folders([folder]))
    distance = compared.measures["distance hidden_block_2"]
    assert distance.mean is not None
    assert distance.largest == pytest.approx(manifest.stats["max_codec_state_error"], abs=2e-3)
    assert (distance.largest == 0) == (codec == "split")


@pytest.mark.parametrize("codec", CODED)
def test_the_measured_error_is_that_of_what_is_read(tmp_path: Path, codec: str) -> None:
    folder, manifest, exact = commit(tmp_path, codec)
    read = bits_read(folder)
    errors = [states.coding_error(bits, read[name]) for bits, name in zip(exact.values(), read, strict=True)]
    assert manifest.stats["max_codec_relative_rms"] == max(error.relative_rms for error in errors)
    assert manifest.stats["max_codec_state_error"] == max(error.max_state for error in errors)
    assert manifest.stats["max_codec_abs_error"] == max(error.max_abs for error in errors)
    assert manifest.stats["n_non_finite"] == 0
    assert (manifest.stats["max_codec_relative_rms"] == 0) == (codec == "split")


@pytest.mark.parametrize("codec", CODED)
def test_an_error_beyond_what_the_codec_can_cost_fails_the_check_and_readers_refuse(tmp_path: Path, codec: str) -> None:
    shard, _ = examples.commit(tmp_path, "shards_manifest")
    beyond = {"max_codec_state_error": 1.01 * largest_error(codec) + 1e-6}
    folder, manifest, _ = commit(tmp_path, codec, stats=beyond)
    assert "max_codec_state_error" in str(failed_check(manifest))
    (check,) = [found for found in check_all(ResultFiles(folder), ResultFiles(shard)) if found.name == "codec"]
    assert not check.passed
    with pytest.raises(StoreError, match="check codec failed"):
        CacheReader.from_folders([folder])


def test_codes_of_another_scale_are_not_within_the_codecs_error() -> None:
    """That the limit is worth something: states that are off by a factor of 1.1 are beyond it."""
    exact = states_of(20)[0]
    wide = states.bfloat16_to_float32(exact)
    for codec in ROUNDING:
        scaled = states.float32_to_bfloat16(wide * np.float32(1.1))
        assert states.coding_error(exact, scaled).max_state > largest_error(codec)


@pytest.mark.parametrize("codec", CODED)
def test_kept_positions_and_documents_without_any_are_coded(codec: str) -> None:
    docs = examples.documents((5, 1, 3))
    positions = KeptPositions(
        offsets=offsets_of(np.array([2, 0, 3])), positions_M=np.array([1, 4, 0, 1, 2], dtype=np.uint32)
    )
    plain = encode_hidden_states(docs, states_of(5), positions)
    table = coded(plain, codec)
    assert table.decoded.schema.equals(plain.schema, check_metadata=True)
    assert table.decoded["positions"].equals(plain["positions"])
    assert [len(row) for row in table.decoded["hidden_block_2"]] == [2, 0, 3]
    nothing = KeptPositions(offsets=np.zeros(4, np.int64), positions_M=np.zeros(0, np.uint32))
    empty = coded(encode_hidden_states(docs, states_of(0), nothing), codec)
    assert [len(row) for row in empty.decoded["hidden_final_after_norm"]] == [0, 0, 0]
    assert empty.error["max_codec_relative_rms"] == 0
    assert part_stats("hidden_state_cache", empty.decoded) == {"n_non_finite": 0, "max_abs": 0}


@pytest.mark.parametrize("codec", CODED)
def test_random_tables_come_back_group_by_group_and_slice_by_slice(tmp_path: Path, codec: str) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 300, 12).tolist()
        docs, exact = examples.documents(lengths, seed=seed), states_of(sum(lengths), seed=seed, size=256)
        table = coded(encode_hidden_states(docs, exact), codec)
        path = tmp_path / f"part-{seed:05d}{ARROW_SUFFIX}"
        with path.open("wb") as file:
            write_table(table.stored, ARROW_SUFFIX, file)
        with PartFile(path) as part:
            assert part.n_groups > 1
            names = ["hidden_final_after_norm", "n_tokens", "hidden_block_0"]
            read = pa.concat_tables([part.read_group(group, names) for group in range(part.n_groups)])
            assert read.combine_chunks().equals(table.decoded.select(names).combine_chunks())
            assert part.read(names).combine_chunks().equals(read.combine_chunks())
        cut = plain_table(table.stored.slice(3, 4))
        assert (
            cut["hidden_block_2"].combine_chunks().equals(table.decoded.slice(3, 4)["hidden_block_2"].combine_chunks())
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_numbers_that_a_codec_cannot_hold_are_refused_by_document_and_split_keeps_them(
    tmp_path: Path, bad: float
) -> None:
    docs = examples.documents((5, 1, 3, 6))
    exact = states_of(docs.n_tokens)
    exact[2][7, 5] = np.float32(bad).view(np.uint32) >> 16
    plain = encode_hidden_states(docs, exact)
    for codec in ROUNDING:
        with pytest.raises(CodecRangeError, match="hidden_block_2 of document 'document-2', vector 1"):
            coded(plain, codec)
    kept = coded(plain, "split")
    assert kept.decoded.equals(plain)
    assert kept.error == {"max_codec_relative_rms": 0, "max_codec_state_error": 0, "max_codec_abs_error": 0}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec", CODED)
def test_any_flipped_byte_and_any_cut_is_found_before_a_number_is_given(tmp_path: Path, codec: str) -> None:
    folder, manifest, _ = commit(tmp_path, codec)
    path = folder / manifest.parts[0].name
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for number in range(500):
        data = bytearray(whole)
        if number % 3:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        else:
            data = data[: rng.integers(len(data))]
        path.write_bytes(data)
        with pytest.raises(CorruptPartError, match=path.name):
            bits_read(folder)
    path.write_bytes(whole)
    assert bits_read(folder)


@pytest.mark.parametrize("codec", CODED)
def test_damage_behind_a_right_hash_is_a_named_error_or_changes_states_alone(tmp_path: Path, codec: str) -> None:
    """What a hash does not cover (a forged manifest): no crash, no other shapes, no error without the file's name."""
    docs = examples.documents((5, 1, 3, 6))
    table = coded(encode_hidden_states(docs, states_of(docs.n_tokens)), codec)
    sink = io.BytesIO()
    write_table(table.stored, ARROW_SUFFIX, sink)
    rng = np.random.default_rng(2)
    path = tmp_path / f"part-00000{ARROW_SUFFIX}"
    refusals = []
    for _ in range(300):
        data = bytearray(sink.getvalue())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        try:
            with PartFile(path, bytes(data)) as part:
                names = [name for name in part.names if name.startswith("hidden_")]
                read = pa.concat_tables([part.read_group(group, names) for group in range(part.n_groups)])
            assert read.schema.names == names
        except (CorruptPartError, UnknownCodecError) as e:
            refusals.append(str(e))
    assert refusals
    assert all(path.name in refusal for refusal in refusals)


def changed_metadata(table: pa.Table, **changes: str | None) -> pa.Table:
    metadata = dict(table.schema.metadata)
    for name, value in changes.items():
        key = f"kd_assets.{name}".encode()
        metadata.pop(key, None)
        if value is not None:
            metadata[key] = value.encode()
    return table.replace_schema_metadata(metadata)


def written(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def read_states(path: Path) -> pa.Table:
    with PartFile(path) as part:
        return part.read([name for name in part.names if name.startswith("hidden_")])


def test_columns_that_are_no_codecs_are_refused(tmp_path: Path) -> None:
    docs = examples.documents()
    stored = {c: coded(encode_hidden_states(docs, states_of(docs.n_tokens)), c).stored for c in CODED}
    path = tmp_path / f"part-00000{ARROW_SUFFIX}"
    wrong = {
        "another codec's": changed_metadata(stored["fp8"], codec="split"),
        "other groups": changed_metadata(stored["int8_32"], codec="int8_128"),
        "a column less": stored["int8_32"].drop_columns(["hidden_block_2_int8_scales"]),
        "a column of another type": stored["fp8"].set_column(
            stored["fp8"].schema.get_field_index("hidden_block_0_fp8_scale"),
            pa.field("hidden_block_0_fp8_scale", stored["fp8"]["hidden_block_2_fp8"].type, nullable=False),
            stored["fp8"]["hidden_block_2_fp8"],
        ),
        "scales of other documents": stored["fp8"].set_column(
            stored["fp8"].schema.get_field_index("hidden_block_0_fp8_scale"),
            stored["fp8"].schema.field("hidden_block_0_fp8_scale"),
            pa.chunked_array([stored["fp8"]["hidden_block_0_fp8_scale"].combine_chunks()[::-1]]),
        ),
    }
    for table in wrong.values():
        with pytest.raises(CorruptPartError, match=path.name):
            read_states(written(path, table))


def test_a_codec_of_a_newer_version_is_refused_by_name_everywhere(tmp_path: Path) -> None:
    docs = examples.documents()
    stored = coded(encode_hidden_states(docs, states_of(docs.n_tokens)), "fp8").stored
    newer = changed_metadata(stored, codec="nvfp4", codec_since="0.9.0")
    path = written(tmp_path / f"part-00000{ARROW_SUFFIX}", newer)
    with pytest.raises(UnknownCodecError, match=r"nvfp4.*0\.9\.0"):
        PartFile(path)
    store = tmp_path / "store"
    docs = docs.slice(0, docs.n_documents, examples.MAX_LENGTH)
    out = examples.output(store, "hidden_state_cache", params=params("nvfp4"))
    with examples.writer(store, out) as writer:
        table = coded(encode_hidden_states(docs, states_of(docs.n_tokens)), "fp8")
        writer.write_part(
            0, changed_metadata(table.stored, codec="nvfp4"), n_tokens=docs.n_tokens, stats={"n_non_finite": 0.0}
        )
        writer.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    with pytest.raises(UnknownCodecError, match="nvfp4"):
        CacheReader.from_folders([Path(out.path)])
    (problem,) = verify(store).problems
    assert "nvfp4" in problem.message
    shard, _ = examples.commit(store, "shards_manifest")
    failed = [c for c in check_all(ResultFiles(Path(out.path)), ResultFiles(shard)) if not c.passed]
    assert failed
    assert all("nvfp4" in check.description for check in failed)


def test_a_store_of_before_there_were_codecs_keeps_its_bytes(tmp_path: Path) -> None:
    docs = examples.documents()
    plain = encode_hidden_states(docs, states_of(docs.n_tokens))
    assert coded(plain, "plain").stored is plain
    assert coded(plain, "plain").error == {}
    assert b"kd_assets.codec" not in plain.schema.metadata


def test_groups_that_do_not_divide_a_state_are_refused_before_anything_is_written() -> None:
    docs = examples.documents()
    plain = encode_hidden_states(docs, states_of(docs.n_tokens, size=96))
    with pytest.raises((KdAssetsError, ValueError), match="groups of 128 do not divide"):
        coded(plain, "int8_128")
    assert coded(plain, "int8_32").stored.num_rows == docs.n_documents


def test_numpy_and_pyarrow_alone_read_coded_states(tmp_path: Path) -> None:
    """The decoders of FORMAT.md: a few lines, without this package."""
    docs = examples.documents()
    exact = states_of(docs.n_tokens)
    plain = encode_hidden_states(docs, exact)
    ours: dict[str, Coded] = {codec: coded(plain, codec) for codec in CODED}

    def column(codec: str, name: str) -> npt.NDArray[Any]:
        array = ours[codec].stored[f"hidden_block_2_{name}"].combine_chunks().flatten()
        return np.asarray((array.flatten() if pa.types.is_fixed_size_list(array.type) else array).to_numpy())

    def rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
        torch = pytest.importorskip("torch")
        bits: npt.NDArray[np.uint16] = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return bits

    def read_by_us(codec: str) -> npt.NDArray[np.uint16]:
        array = ours[codec].decoded["hidden_block_2"].combine_chunks().flatten().flatten()
        return np.asarray(array.to_numpy()).reshape(-1, SIZE)

    frames = ours["split"].stored["hidden_block_2_high_bytes"].to_pylist()
    high = b"".join(
        pa.decompress(frame, decompressed_size=length * SIZE, codec="zstd", asbytes=True)
        for frame, length in zip(frames, docs.n_tokens_D.tolist(), strict=True)
    )
    bits = np.frombuffer(high, np.uint8).astype(np.uint16) << 8 | column("split", "low_bytes")
    assert np.array_equal(bits.reshape(-1, SIZE), exact[2])

    torch = pytest.importorskip("torch")
    numbers = torch.from_numpy(column("fp8", "fp8").copy()).view(torch.float8_e4m3fn).float().numpy().reshape(-1, SIZE)
    assert np.array_equal(rounded(numbers * column("fp8", "fp8_scale")[:, None]), read_by_us("fp8"))

    for group in (32, 128):
        name = f"int8_{group}"
        scales = (column(name, "int8_scales").astype(np.uint32) << 16).view(np.float32)
        products = column(name, "int8").astype(np.float32).reshape(-1, group) * scales[:, None]
        assert np.array_equal(rounded(products.reshape(-1, SIZE)), read_by_us(name))


def test_an_older_program_finds_no_state_rather_than_a_wrong_one() -> None:
    docs: Documents = examples.documents()
    for codec in CODED:
        stored = coded(encode_hidden_states(docs, states_of(docs.n_tokens)), codec).stored
        assert not {"hidden_block_0", "hidden_block_2", "hidden_final_after_norm"} & set(stored.schema.names)


def test_the_same_numbers_give_the_same_bytes() -> None:
    docs = examples.documents()
    for codec in CODED:
        sinks = [io.BytesIO(), io.BytesIO()]
        for sink in sinks:
            table = coded(encode_hidden_states(docs, states_of(docs.n_tokens)), codec)
            write_table(table.stored, ARROW_SUFFIX, sink)
        assert sinks[0].getvalue() == sinks[1].getvalue()
