"""What makes a record, which ones are bad, and that reading nothing crashes."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.contract import RecordRange
from kd_assets.errors import (
    BadRecordError,
    InputError,
    MissingInputError,
    RecipeError,
    StorageUnreachableError,
)
from kd_assets.sources.fields import Fields
from kd_assets.sources.files import raw as raw_module
from kd_assets.sources.files.columns.earlier import iter_columns
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.text.lines import iter_jsonl
from kd_assets.sources.planning.make import plan_shards
from kd_assets.sources.planning.plan import ShardPlan
from kd_assets.sources.range_hash import ShardHash
from kd_assets.sources.records import Record, parse_record, read_records
from kd_assets.sources.spec import Sharding, SourceSpec

RANGE = RecordRange(
    source="web", path="/data/web.jsonl", file_format="jsonl", first_record=0, n_records=1, byte_offset=0, first_line=1
)

FIELDS = Fields("id", "text", "messages", ())


def parsed(line: str | bytes) -> Record:
    return parse_record(RawRecord(6, 7, 0, line if isinstance(line, bytes) else line.encode()), RANGE)


def plan_of(path: Path, *, documents_per_shard: int = 1000, **spec: Any) -> ShardPlan:
    file_format = path.suffix[1:] if path.suffix in (".parquet", ".arrow") else "jsonl"
    source = SourceSpec(name="web", path=str(path), file_format=file_format, licence="CC0-1.0", **spec)  # type: ignore[arg-type]
    return plan_shards([source], Sharding(documents_per_shard=documents_per_shard), shard_prefix="shard")


def read_all(path: Path, **spec: Any) -> list[Record | BadRecordError]:
    plan = plan_of(path, **spec)
    return [item for shard in plan.shards for item in read_records(shard.records, ShardHash())]


# ---------------------------------------------------------------- one record


def test_a_text_becomes_a_document_named_by_source_and_record() -> None:
    record = parsed('{"text": "héllo", "other": [1]}')
    assert record == Record(
        where="/data/web.jsonl:7",
        source="web",
        number=6,
        document_id="web-000000006",
        text="héllo",
        passed_over=("other",),
        sample_id=record.sample_id,
        file="web.jsonl",
    )


def test_a_chat_becomes_messages_of_role_and_content_only() -> None:
    record = parsed(
        '{"messages": [{"role": "user", "content": "hi", "x": null}, {"role": "assistant", "content": ""}]}'
    )
    assert record.messages == ({"role": "user", "content": "hi"}, {"role": "assistant", "content": ""})
    assert record.text is None


def test_messages_win_over_text_unless_they_are_null() -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert parsed(json.dumps({"text": "rendered", "messages": chat})).messages == ({"role": "user", "content": "hi"},)
    assert parsed(json.dumps({"text": "plain", "messages": None})).text == "plain"


@pytest.mark.parametrize(("given", "document_id"), [('"a b"', "a b"), ("12", "12"), ("null", "web-000000006")])
def test_an_id_names_the_document(given: str, document_id: str) -> None:
    assert parsed(f'{{"id": {given}, "text": "x"}}').document_id == document_id


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "x"', "not JSON: Expecting ',' delimiter at column 13"),
        ('{"text": "x"} {"text": "y"}', "not JSON: Extra data"),
        ("plain text", "not JSON: Expecting value at column 1"),
        ("\0\0\0\0", "not JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at position 14 of the record"),
        (b"\xff\xfe{\x00", "not UTF-8"),
        ('"just a string"', "expected an object such as .* found a string"),
        ("[]", "found a list"),
        ("null", "found null"),
        ("NaN", "found a number"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "[" * 100_000, "nested too deeply"),
        ('{"n": ' + "9" * 5_000 + "}", "not JSON that can be read: .*digits"),
        ("{}", r"neither 'text' nor 'messages' is there \(it has no field\)"),
        ('{"prompt": "x", "answer": "y"}', r"neither 'text' nor 'messages' .*'prompt', 'answer'"),
        ('{"text": null}', "'text' is null, and there are no 'messages'"),
        ('{"text": null, "messages": null}', "'text' is null, and there are no 'messages'"),
        ('{"messages": null, "url": "x"}', "'messages' is null, and there is no 'text'"),
        ('{"text": 3}', "'text' is a number; expected a string"),
        ('{"text": NaN}', "'text' is a number"),
        ('{"text": true}', "'text' is a boolean"),
        ('{"text": ["x"]}', "'text' is a list"),
        ('{"text": {"text": "x"}}', "'text' is an object"),
        (r'{"text": "\ud800"}', r"'text' holds half a surrogate pair \(\\ud800\)"),
        (r'{"text": "x\udc80"}', "'text' is not UTF-8: byte 0x80 or a lone surrogate"),
        ('{"text": "a\tb"}', "not JSON: Invalid control character"),
        ('{"messages": []}', "'messages' is an empty list"),
        ('{"messages": "hi"}', "'messages' is a string; expected a list"),
        ('{"messages": {"role": "user"}}', "'messages' is an object"),
        ('{"messages": ["hi"]}', r"messages\[0\] is a string"),
        ('{"messages": [null]}', r"messages\[0\] is null"),
        ('{"messages": [{"content": "x"}]}', r"messages\[0\]\.role is None; expected one of system"),
        ('{"messages": [{"role": "human", "content": "x"}]}', r"messages\[0\]\.role is 'human'"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', r"messages\[0\]\.role is \['user'\]"),
        ('{"messages": [{"role": "user", "content": null}]}', r"messages\[0\]\.content is null"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', r"content\[0\]\.text is null"),
        (r'{"messages": [{"role": "user", "content": "\uDFFF"}]}', r"messages\[0\]\.content holds half a surrogate"),
        ('{"id": "", "text": "x"}', "'id' is an empty string"),
        ('{"id": 1.5, "text": "x"}', "'id' is a number; expected a string or an integer"),
        ('{"id": true, "text": "x"}', "'id' is a boolean"),
        (r'{"id": "\ud900", "text": "x"}', "'id' holds half a surrogate pair"),
    ],
)
def test_a_bad_record_says_file_line_and_reason(line: str | bytes, reason: str) -> None:
    with pytest.raises(BadRecordError, match=rf"^/data/web\.jsonl:7: .*{reason}"):
        parsed(line)


@pytest.mark.parametrize("text", ["", " ", "\0", "a\0b", "\ufeff", "\U0001f600", "\u2028", "x" * 1_000_000])
def test_strange_but_valid_text_is_kept_as_it_is(text: str) -> None:
    assert parsed(json.dumps({"text": text})).text == text


def test_a_message_about_a_huge_value_stays_short() -> None:
    with pytest.raises(BadRecordError) as e:
        parsed(json.dumps({"messages": [{"role": "x" * 10_000, "content": ""}]}))
    assert len(str(e.value)) < 300


# ---------------------------------------------------------------- JSON Lines


def test_byte_order_mark_crlf_blank_lines_and_a_missing_last_newline_are_taken_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \t\n{"text": "b"} \n\n{"text": "c"}')
    items = read_all(path, documents_per_shard=1)
    assert [(r.text, r.number, r.where) for r in items if isinstance(r, Record)] == [
        ("a", 0, f"{path}:1"),
        ("b", 1, f"{path}:4"),
        ("c", 2, f"{path}:6"),
    ]


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n{"text": "\u2029"}\n', encoding="utf-8")
    assert [r.text for r in read_all(path) if isinstance(r, Record)] == ["a\u2028b\x85c", "\u2029"]


def test_an_error_names_its_line_when_the_shard_starts_in_the_middle_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n\n' for i in range(10)) + "broken\n")
    (*_, error) = read_all(path, documents_per_shard=4)
    assert str(error) == f"{path}:21: not JSON: Expecting value at column 1"


def test_a_repeated_id_is_a_bad_record_that_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_text(
        '{"id": 7, "text": "a"}\n{"id": "7", "text": "b"}\n{"text": "c"}\n{"id":"web-000000002","text":"d"}'
    )
    items = read_all(path)
    assert [isinstance(item, BadRecordError) for item in items] == [False, True, False, True]
    assert str(items[1]).startswith(f"{path}:2: id '7' is already that of {path}:1: give one of them another id, or ")


def test_a_line_without_end_is_refused_instead_of_filling_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_module, "MAX_RECORD_BYTES", 1 << 20)
    path = tmp_path / "web.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b"x" * (3 << 20))
    with pytest.raises(InputError, match=r"web\.jsonl:2: the line is longer than 1 MiB"):
        read_all(path)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_never_crash_the_reader(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    pieces = [
        b"\n",
        b"\r\n",
        b'{"text": "x"}',
        b"\xff",
        b"\0",
        b"{",
        b"[",
        b'"\\ud800"',
        b" ",
        b'{"messages": [1]}',
        b"\xc3",
    ]
    path = tmp_path / "web.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + b"".join(rng.choice(pieces) for _ in range(300)))
    items = read_all(path, documents_per_shard=7)
    lines = path.read_bytes().split(b"\n")
    assert len(items) == sum(bool(line.strip(b" \t\r")) for line in lines)
    for item in items:
        if isinstance(item, BadRecordError):
            assert str(item).startswith(f"{path}:")


# ---------------------------------------------------------------- Parquet


def write_parquet(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    None,
    [{"role": "user", "content": "again"}],
]


@pytest.mark.parametrize(
    "text_type",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_rows_become_records_whatever_the_string_type(tmp_path: Path, text_type: Any) -> None:
    table = pa.table({"text": pa.array(["a", "é", None]).cast(text_type), "id": pa.array([4, None, 6]), "x": [[1]] * 3})
    items = read_all(write_parquet(tmp_path / "w.parquet", table))
    assert [(r.document_id, r.text) for r in items if isinstance(r, Record)] == [("4", "a"), ("web-000000001", "é")]
    assert str(items[2]).startswith(f"{tmp_path / 'w.parquet'}: row 3: 'text' is null, and there are no 'messages'")


@pytest.mark.parametrize("list_type", [pa.list_, pa.large_list])
def test_chats_are_read_from_lists_of_structs(tmp_path: Path, list_type: Any) -> None:
    struct = pa.struct([("content", pa.large_string()), ("name", pa.int64()), ("role", pa.string())])
    table = pa.table({"chat": pa.array(CHATS, type=list_type(struct)), "text": [None, "plain", "not used"]})
    items = read_all(write_parquet(tmp_path / "w.parquet", table), messages_field="chat")
    assert [(r.text, r.messages) for r in items if isinstance(r, Record)] == [
        (None, ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})),
        ("plain", None),
        (None, ({"role": "user", "content": "again"},)),
    ]


def test_a_string_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"caf\xe9", b"good too"]).view(pa.string())
    items = read_all(write_parquet(tmp_path / "w.parquet", pa.table({"text": texts})))
    assert [isinstance(item, Record) for item in items] == [True, False, True]
    assert str(items[1]) == f"{tmp_path / 'w.parquet'}: row 2: 'text' is not UTF-8: byte 0xe9 or a lone surrogate"


def test_a_row_range_is_read_without_the_row_groups_around_it(tmp_path: Path) -> None:
    table = pa.table({"text": [f"t{i}" for i in range(1000)]})
    path = write_parquet(tmp_path / "w.parquet", table, row_group_size=100, compression="none", use_dictionary=False)
    damaged = bytearray(path.read_bytes())
    first_group_end = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    damaged[4:first_group_end] = bytes(first_group_end - 4)
    path.write_bytes(damaged)
    rows = list(iter_columns(path, "parquet", fields=FIELDS, first_record=350, n_records=120))
    assert [row.number for row in rows] == list(range(350, 470))
    assert rows[0].content == b'{"text":"t350"}'
    with pytest.raises(InputError, match=r"w\.parquet cannot be read as Parquet"):
        list(iter_columns(path, "parquet", fields=FIELDS))


@pytest.mark.parametrize("seed", range(10))
def test_any_range_of_any_layout_gives_the_rows_of_that_range(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    n_rows = rng.randrange(1, 700)
    texts = [str(rng.random()) * rng.randrange(3) for _ in range(n_rows)]
    path = write_parquet(tmp_path / "w.parquet", pa.table({"text": texts}), row_group_size=rng.randrange(1, 400))
    for _ in range(10):
        first, count = rng.randrange(n_rows), rng.randrange(1, n_rows + 50)
        rows = iter_columns(path, "parquet", fields=FIELDS, first_record=first, n_records=count)
        assert [(r.number, json.loads(r.content)["text"]) for r in rows] == list(enumerate(texts))[
            first : first + count
        ]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"body": ["x"]}, "no column that documents are made of; it has 'body'"),
        ({"text": [1]}, "'text' is a number; expected a string"),
        ({"text": [b"x"]}, "column 'text' has binary"),
        ({"messages": ["x"]}, "'messages' is a string"),
        ({"messages": [[{"role": "user", "content": 1}]]}, "content is a number"),
        ({"text": ["x"], "id": [True]}, "'id' is a boolean; expected a string or an integer"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused_when_planned(
    tmp_path: Path, columns: dict[str, Any], reason: str
) -> None:
    path = write_parquet(tmp_path / "w.parquet", pa.table(columns))
    with pytest.raises(InputError, match=rf"w\.parquet.*{reason}"):
        plan_of(path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    with pytest.raises(InputError, match="2 columns named 'text'"):
        plan_of(write_parquet(tmp_path / "w.parquet", table))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "only magic"])
def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    path = write_parquet(tmp_path / "w.parquet", pa.table({"text": ["x" * 100] * 100}))
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[:-20], "garbage": content[:4] + os.urandom(200), "only magic": b"PAR1"}[damage]
    )
    with pytest.raises(InputError, match=r"w\.parquet cannot be read as Parquet"):
        plan_of(path)


# ---------------------------------------------------------------- Arrow


def write_arrow(path: Path, table: Any, *, rows_a_batch: int = 100, is_stream: bool = True) -> Path:
    new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)
    return path


@pytest.mark.parametrize("is_stream", [True, False])
def test_arrow_gives_the_records_that_parquet_gives(tmp_path: Path, is_stream: bool) -> None:
    texts = [f"t{i}" for i in range(1000)]
    table = pa.table({"text": pa.array(texts).dictionary_encode(), "id": list(range(1000))})
    arrow = write_arrow(tmp_path / "w.arrow", table, rows_a_batch=300, is_stream=is_stream)
    parquet = write_parquet(tmp_path / "w.parquet", pa.table({"text": texts, "id": list(range(1000))}))
    ours, theirs = plan_of(arrow, documents_per_shard=130), plan_of(parquet, documents_per_shard=130)
    assert [s.input_hash for s in ours.shards] == [s.input_hash for s in theirs.shards]
    found = [r for shard in ours.shards for r in read_records(shard.records, ShardHash())]
    assert [(r.document_id, r.text) for r in found if isinstance(r, Record)] == [
        (str(i), text) for i, text in enumerate(texts)
    ]


def test_what_datasets_saves_to_disk_is_read(tmp_path: Path) -> None:
    """Laid out as `datasets.save_to_disk` does it (version 4): streams, with its own description in their schema."""
    chats = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}] for i in range(5)]
    table = pa.Table.from_pylist([{"messages": one} for one in chats])
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {}}})})
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    file = write_arrow(saved / "data-00000-of-00001.arrow", table, rows_a_batch=2)
    records = [r for r in read_all(file) if isinstance(r, Record)]
    assert [r.messages for r in records] == [tuple(one) for one in chats]


@pytest.mark.parametrize("is_stream", [True, False])
def test_an_arrow_file_that_was_cut_is_refused_wherever_it_was_cut(tmp_path: Path, is_stream: bool) -> None:
    """A stream that ends between two batches looks whole to Arrow."""
    path = write_arrow(tmp_path / "w.arrow", pa.table({"text": ["x" * 50] * 40}), rows_a_batch=10, is_stream=is_stream)
    whole = path.read_bytes()
    for n_bytes in range(1, len(whole), 8):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(InputError, match=r"w\.arrow"):
            plan_of(path)


# ---------------------------------------------------------------- fields that nothing is made of


def write_layout(folder: Path, layout: str, records: list[dict[str, Any]]) -> Path:
    path = folder / f"web.{layout}"
    if layout == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif layout == "parquet":
        write_parquet(
            path, pa.Table.from_pylist([{key: r.get(key) for key in {**records[0], **records[1]}} for r in records])
        )
    else:
        write_arrow(
            path, pa.Table.from_pylist([{key: r.get(key) for key in {**records[0], **records[1]}} for r in records])
        )
    return path


@pytest.mark.parametrize("layout", ["jsonl", "parquet", "arrow"])
def test_other_columns_are_passed_over_and_named(tmp_path: Path, layout: str) -> None:
    records = [{"text": "a", "url": "x", "n": 1}, {"text": "b", "url": "y", "n": 2}]
    found = read_all(write_layout(tmp_path, layout, records))
    assert [r.passed_over for r in found if isinstance(r, Record)] == [("url", "n")] * 2


def test_ignored_fields_and_the_id_field_are_in_the_hash_of_a_shard_where_they_are_used(tmp_path: Path) -> None:
    path = write_layout(tmp_path, "jsonl", [{"text": "a"}, {"text": "b"}])
    hashes = {
        plan_of(path, **spec).shards[0].input_hash for spec in ({}, {"ignore_fields": ("tools",)}, {"id_field": "key"})
    }
    assert len(hashes) == 3


@pytest.mark.parametrize("ignored", ["text", "messages", "id", "role", "content"])
def test_what_documents_are_made_of_cannot_be_ignored(tmp_path: Path, ignored: str) -> None:
    with pytest.raises(RecipeError, match=f"ignore_fields has '{ignored}'"):
        plan_of(write_layout(tmp_path, "jsonl", [{"text": "a"}, {"text": "b"}]), ignore_fields=(ignored,))


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_the_recipe_says_which_field_is_the_id(tmp_path: Path, layout: str) -> None:
    path = write_layout(tmp_path, layout, [{"text": "a", "key": "k1", "id": 1}, {"text": "b", "key": "k2", "id": 1}])
    found = [r for r in read_all(path, id_field="key") if isinstance(r, Record)]
    assert [(r.document_id, r.passed_over) for r in found] == [("k1", ("id",)), ("k2", ("id",))]


def test_a_column_of_floats_can_be_the_id(tmp_path: Path) -> None:
    """pandas makes floats of integers beside a null."""
    table = pa.table({"text": ["a", "b", "c", "d"], "id": [7.0, None, float("nan"), 0.25]})
    found = [r for r in read_all(write_parquet(tmp_path / "w.parquet", table)) if isinstance(r, Record)]
    assert [r.document_id for r in found] == ["7", "web-000000001", "web-000000002", "0.25"]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PAR1....", "is a Parquet file: set its format to parquet"),
        (b"ARROW1..", "is an Arrow file: set its format to arrow"),
        (b"\xff\xff\xff\xff....", "is an Arrow stream, as datasets.save_to_disk writes it: set its format to arrow"),
        (b"\x1f\x8b\x08\x00", "is compressed with gzip"),
        (b"\x28\xb5\x2f\xfd\x00", "is compressed with zstd"),
        ('{"text": "x"}\n'.encode("utf-16"), "is UTF-16"),
        (b'[{"text": "x"},\n{"text": "y"}]\n', "holds one JSON array"),
        (b'\xef\xbb\xbf[\n  {"text": "x"}\n]\n', "holds one JSON array"),
    ],
)
def test_another_format_under_the_name_of_jsonl_is_recognised(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "web.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=reason) as e:
        plan_of(tmp_path / "web.jsonl")
    assert str(tmp_path / "web.jsonl") in str(e.value)


def test_jsonl_under_the_name_of_parquet_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "web.parquet").write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match=r"web\.parquet cannot be read as Parquet"):
        plan_of(tmp_path / "web.parquet")


def test_a_named_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "web.jsonl")
    with pytest.raises(MissingInputError, match="not a regular file"):
        plan_of(tmp_path / "web.jsonl")


def test_reading_streams_the_file(tmp_path: Path) -> None:
    class Endless:
        """More lines than would fit anywhere; raises if the reader runs ahead of its consumer."""

        n_lines = 0

        def readline(self, limit: int) -> bytes:
            self.n_lines += 1
            if self.n_lines > 100:
                raise RuntimeError("read ahead")
            return b'{"text": "x"}\n'

    endless: Any = Endless()
    lines = iter_jsonl(endless, Path("web.jsonl"))
    assert [next(lines).number for _ in range(100)] == list(range(100))


# ---------------------------------------------------------------- storage that fails


@pytest.mark.parametrize("name", ["web.jsonl", "web.parquet"])
def test_a_file_system_that_fails_while_a_source_is_read_is_no_fault_of_the_source(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure in the middle of a file is a fake; that of a disk cannot be had on demand."""
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": ["a"] * 2000}), path)
    else:
        path.write_text('{"text": "a"}\n' * 2000)
    plan = plan_of(path)

    class FailingFile(io.BufferedReader):
        def _fail(self, *arguments: Any) -> Any:
            raise OSError(errno.EIO, "Input/output error")

        read = readline = _fail

    monkeypatch.setattr(os, "fdopen", lambda fd, *arguments, **named: FailingFile(io.FileIO(fd)))
    with pytest.raises(StorageUnreachableError, match=rf"cannot read {path}: Input/output error"):
        list(read_records(plan.shards[0].records, ShardHash()))
    with pytest.raises(StorageUnreachableError, match=rf"cannot read {path}: Input/output error"):
        plan_of(path)


def test_sources_whose_ids_are_the_same_go_together_once_one_is_called_after_its_numbers(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"id": 1, "text": "x"}\n')

    def records_of(*, id_field: str) -> list[Record | BadRecordError]:
        a = SourceSpec(name="a", path="a.jsonl", licence="CC0-1.0", weight=1)
        sources = [a, dataclasses.replace(a, name="b", path="b.jsonl", id_field=id_field)]
        (shard,) = plan_shards(sources, Sharding(), shard_prefix="s", base_folder=tmp_path)
        return list(read_records(shard.records, ShardHash()))

    _, second = records_of(id_field="id")
    assert isinstance(second, BadRecordError)
    assert "name a field with id_field of source 'b'" in str(second)
    assert [r.document_id for r in records_of(id_field="none") if isinstance(r, Record)] == ["1", "b-000000000"]
