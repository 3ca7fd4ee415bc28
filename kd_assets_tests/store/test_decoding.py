"""What `verify` finds in rows behind right hashes: whatever a reader would refuse, by part and document."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.contract import Asset
from kd_assets.errors import CorruptPartError
from kd_assets.export.joined import joined_partition
from kd_assets.store import CacheReader, Problem, choose, coded, encode_hidden_states, part_stats, plain_table, verify
from kd_assets.store.checking.rows import schema_difference
from kd_assets.store.codecs.state_codec import CODED
from kd_assets.store.codecs.states import float32_to_bfloat16
from kd_assets.store.manifest import read_manifest
from kd_assets.store.reading.columns import Column, Ragged, column_of
from kd_assets.store.reading.shapes import lists_difference, require_columns
from kd_assets.store.schema import HiddenState
from kd_assets_tests.store import examples

SIZE = 128
STATES_PARAMS: dict[str, Any] = {"blocks": [0, 2], "max_length": examples.MAX_LENGTH}
Change = Callable[[pa.Table], pa.Table]


def params_of(codec: str) -> tuple[Asset, dict[str, Any]]:
    if codec == "compact":
        return "topk_cache", examples.COMPACT
    if codec == "plain":
        return "topk_cache", examples.PARAMS["topk_cache"]
    return "hidden_state_cache", STATES_PARAMS | ({} if codec == "raw" else {"codec": codec})


def commit(store: Path, codec: str, change: Change) -> Path:
    """A result of one part, written by a task with a bug: its hash is right, and its rows are changed."""
    asset, params = params_of(codec)
    docs = examples.documents().slice(0, len(examples.LENGTHS), examples.MAX_LENGTH)
    rng = np.random.default_rng(0)
    numbers = {b: rng.normal(0, 1, (docs.n_tokens, SIZE)).astype(np.float32) for b in (0, 2)}
    states: dict[HiddenState, Any] = {b: float32_to_bfloat16(of_block) for b, of_block in numbers.items()}
    plain = examples.table("topk_cache", docs) if asset == "topk_cache" else encode_hidden_states(docs, states)
    made = coded(plain, "plain" if codec == "raw" else codec)
    output = examples.output(store, asset, params=params)
    with examples.writer(store, output) as writer:
        stats = {"n_non_finite": 0.0, "max_probability_sum": 1.0} | made.error
        writer.write_part(0, change(made.stored), n_tokens=docs.n_tokens, stats=stats)
        writer.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    return Path(output.path)


def replaced(name: str, row: int, change: Callable[[Any], Any]) -> Change:
    """A value of a column changed, as Python has it."""

    def changed(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = change(values[row])
        field = table.schema.field(name)
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, type=field.type))

    return changed


WRONG: dict[str, tuple[str, Change]] = {
    "a frame that is cut": ("split", replaced("hidden_block_2_high_bytes", 2, lambda frame: frame[:-1])),
    "NaN": ("fp8", replaced("hidden_block_0_fp8", 2, lambda rows: [[0x7F, *rows[0][1:]], *rows[1:]])),
    "a scale that is none": ("fp8", replaced("hidden_block_0_fp8_scale", 2, lambda scales: [-1.0, *scales[1:]])),
    "-128": ("int8_32", replaced("hidden_block_2_int8", 2, lambda rows: [[-128, *rows[0][1:]], *rows[1:]])),
    "a scale too few": ("int8_128", replaced("hidden_block_2_int8_scales", 2, lambda scales: scales[:-1])),
    "a plane that is cut": ("compact", replaced("topk_tail", 2, lambda plane: plane[:-1])),
}


def only_problem(store: Path) -> Problem:
    (problem,) = verify(store).problems
    return problem


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_decoder_would_refuse_is_named_with_part_and_document(tmp_path: Path, wrong: str) -> None:
    codec, change = WRONG[wrong]
    folder = commit(tmp_path, codec, change)
    problem = only_problem(tmp_path)
    assert problem.kind == "unreadable_part"
    assert problem.path.parent == folder
    assert "the first document that cannot be decoded is 2, 'document-2'" in problem.message
    with pytest.raises(CorruptPartError):
        CacheReader.from_folders([folder])[2]


@pytest.mark.parametrize("codec", ["plain", "compact", "raw", *CODED])
def test_sound_rows_of_every_codec_are_found_sound(tmp_path: Path, codec: str) -> None:
    commit(tmp_path, codec, lambda table: table)
    assert verify(tmp_path).problems == ()


@pytest.mark.parametrize("name", ["topk_ids", "topk_logprobs", "logsumexp", "target_logprob"])
def test_a_list_that_is_too_short_is_named_by_verify_and_refused_by_readers(tmp_path: Path, name: str) -> None:
    """[F56]"""
    folder = commit(tmp_path, "plain", replaced(name, 0, lambda rows: rows[:-1]))
    problem = only_problem(tmp_path)
    assert (problem.kind, f"{name} of a document has not one element" in problem.message) == ("wrong_lists", True)
    with pytest.raises(CorruptPartError, match=f"{name} of a document has not one element for each"):
        CacheReader.from_folders([folder], fields=[name])[0]


def test_states_of_too_few_tokens_are_refused_by_readers_and_by_exports(tmp_path: Path) -> None:
    folder = commit(tmp_path, "raw", replaced("hidden_block_2", 3, lambda rows: rows[:-1]))
    assert only_problem(tmp_path).kind == "wrong_lists"
    with pytest.raises(CorruptPartError, match="hidden_block_2 of a document"):
        CacheReader.from_folders([folder])[3]
    chosen = {"hidden_state_cache": choose(tmp_path / examples.RECIPE, "hidden_state_cache")}
    joined = joined_partition(chosen, examples.PARTITION, states=[2], max_length=None)  # type: ignore[arg-type]
    with pytest.raises(CorruptPartError, match="hidden_block_2 of a document"):
        list(joined.documents(0, range(4), first_number=0))


@pytest.mark.parametrize("name", ["n_tokens", "loss_mask"])
def test_lists_of_other_tokens_are_named_and_refused(tmp_path: Path, name: str) -> None:
    def backwards(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        return table.set_column(at, table.schema.field(at), table[name].take(list(reversed(range(table.num_rows)))))

    folder = commit(tmp_path, "plain", backwards)
    assert only_problem(tmp_path).kind == "wrong_tokens"
    with pytest.raises(CorruptPartError, match="n_tokens differs from the length of"):
        CacheReader.from_folders([folder])[3]


@pytest.mark.parametrize("codec", ["plain", "compact", "split"])
def test_a_document_that_is_there_twice_is_found(tmp_path: Path, codec: str) -> None:
    """[F30] Who joins caches by their documents would join the wrong rows."""

    def twice(table: pa.Table) -> pa.Table:
        ids = table["document_id"].to_pylist()
        return table.set_column(0, table.schema.field("document_id"), pa.array([ids[0], ids[0], *ids[2:]]))

    commit(tmp_path, codec, twice)
    problem = only_problem(tmp_path)
    assert problem.kind == "wrong_documents"
    assert "document 'document-0' is there twice" in problem.message


def test_a_document_that_is_in_two_parts_is_found(tmp_path: Path) -> None:
    """[F30]"""
    docs = examples.documents()
    output = examples.output(tmp_path, "topk_cache", params={"k": examples.K, "max_length": examples.MAX_LENGTH})
    half = docs.slice(0, 1, examples.MAX_LENGTH)
    with examples.writer(tmp_path, output) as writer:
        for part in range(2):
            table = examples.table("topk_cache", half)
            writer.write_part(part, table, n_tokens=half.n_tokens, stats=part_stats("topk_cache", table))
        writer.commit(parts=2, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    problem = only_problem(tmp_path)
    assert problem.kind == "wrong_documents"
    assert problem.path.name == "part-00001.parquet"


@pytest.mark.parametrize("codec", ["compact", "split"])
def test_a_part_of_another_codec_than_its_manifest_says_is_refused(tmp_path: Path, codec: str) -> None:
    """[F56] Without its name in the schema the columns of a codec would be taken for a cache's own."""

    def nameless(table: pa.Table) -> pa.Table:
        metadata = {k: v for k, v in table.schema.metadata.items() if k != b"kd_assets.codec"}
        return table.replace_schema_metadata(metadata)

    folder = commit(tmp_path, codec, nameless)
    assert only_problem(tmp_path).kind == "wrong_schema"
    with pytest.raises(CorruptPartError, match=f"of codec 'plain', its manifest says {codec}"):
        CacheReader.from_folders([folder])


def test_a_column_that_is_there_twice_is_a_difference_and_no_traceback() -> None:
    schema = examples.table("topk_cache", examples.documents()).schema
    assert schema_difference(schema, schema.append(schema.field("n_tokens"))) == "column n_tokens is there twice"


@pytest.mark.parametrize(
    ("codec", "name"), [("plain", "topk_logprobs"), ("plain", "input_ids"), ("raw", "hidden_block_2")]
)
def test_a_part_that_lacks_a_column_of_its_asset_is_refused_by_its_name(tmp_path: Path, codec: str, name: str) -> None:
    folder = commit(tmp_path, codec, lambda table: table.drop_columns([name]))
    assert only_problem(tmp_path).kind == "wrong_schema"
    with pytest.raises(CorruptPartError, match=f"has no column {name}"):
        CacheReader.from_folders([folder])


def test_a_part_that_has_a_column_twice_is_refused_by_its_name(tmp_path: Path) -> None:
    def twice(table: pa.Table) -> pa.Table:
        return table.append_column(table.schema.field("hidden_block_2"), table["hidden_block_2"])

    folder = commit(tmp_path, "raw", twice)
    assert only_problem(tmp_path).kind == "wrong_schema"
    with pytest.raises(CorruptPartError, match="has the column hidden_block_2 twice"):
        CacheReader.from_folders([folder]).schema  # noqa: B018


@pytest.mark.parametrize("name", ["topk_ids", "n_tokens"])
def test_whoever_takes_the_schema_of_a_cache_gets_none_that_has_a_column_twice(tmp_path: Path, name: str) -> None:
    """A server that asked it for k ended in Arrow's words."""
    folder = commit(tmp_path, "plain", lambda table: table)
    stored = pq.read_schema(folder / "part-00000.parquet")
    with pytest.raises(CorruptPartError, match=f"part has the column {name} twice"):
        require_columns(Path("part"), stored.append(stored.field(name)), [*stored.names, name], read_manifest(folder))


def test_text_whose_offsets_lead_elsewhere_is_no_text() -> None:
    buffers = [None, pa.py_buffer(np.array([0, 3, 1], np.int32)), pa.py_buffer(b"abc")]
    broken = pa.chunked_array([pa.Array.from_buffers(pa.string(), 2, buffers)])
    with pytest.raises(pa.ArrowInvalid):
        column_of(broken)


def test_positions_that_are_something_else_are_a_difference() -> None:
    ids = Column(values=np.zeros(5, np.uint32), offsets=np.array([0, 2, 5], np.int32))
    lists = Ragged(values=np.zeros(3, np.uint16), offsets=np.array([0, 1, 1, 2, 2, 3], np.int32))
    others = {
        "lists": Column(values=lists, offsets=ids.offsets),
        "numbers": Column(values=np.zeros(2), offsets=None),
        "text": Column(values=["a", "b"], offsets=None),
        "parts of numbers": Column(values=np.zeros(5, np.float32), offsets=ids.offsets),
    }
    for positions in others.values():
        said = lists_difference({"input_ids": ids, "positions": positions}, has_next=False)
        assert said == "positions of a document are no list of whole numbers"


def test_lists_whose_elements_are_not_there_are_a_difference() -> None:
    """As of a mapped file of which something has overwritten how many they are."""
    ids = Column(values=np.zeros(5, np.uint32), offsets=np.array([0, 2, 5], np.int32))
    states = Column(values=np.zeros((4, 8), np.uint16), offsets=np.array([0, 2, 5], np.int32))
    said = lists_difference({"input_ids": ids, "hidden_block_0": states}, has_next=False)
    assert said == "hidden_block_0 of a document has not one element for each of its positions"


def test_memory_of_verifying_coded_states_is_that_of_a_group(tmp_path: Path) -> None:
    """A part of many groups takes no more than one of a few."""
    most = []
    for n in (20, 200):
        docs = examples.documents([100] * n)
        bits = np.zeros((docs.n_tokens, SIZE), np.uint16)
        made = coded(encode_hidden_states(docs, {0: bits, 2: bits}), "int8_32")
        store = tmp_path / str(n)
        output = examples.output(store, "hidden_state_cache", params={"blocks": [0, 2], "codec": "int8_32"})
        with examples.writer(store, output) as writer:
            writer.write_part(0, made.stored, n_tokens=docs.n_tokens, stats={"n_non_finite": 0.0} | made.error)
            writer.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
        assert plain_table(made.stored).num_rows == n
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        assert verify(store).ok
        most.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before)
        tracemalloc.stop()
    assert most[1] < 2 * most[0]
