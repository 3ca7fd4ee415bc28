"""Files of columns: what their rows are as records, what of them is read, and how a changed one is noticed."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.contract import RecordRange
from kd_assets.errors import InputError, MissingInputError
from kd_assets.sources.fields import fields_read
from kd_assets.sources.files.columns import batches, identity
from kd_assets.sources.files.found import SourceFile
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.read import check_identity, iter_raw
from kd_assets.sources.files.scan import ColumnScan, scan_columns
from kd_assets_tests.sources.files.conftest import one

PLAIN = RecordRange(source="web", path="", file_format="parquet", first_record=0, n_records=0)
READ = fields_read(PLAIN)
LAYOUTS = ["parquet", "stream", "file"]


def write(folder: Path, layout: str, table: Any, *, group: int = 100, compression: str | None = None) -> SourceFile:
    if layout == "parquet":
        path = folder / "web.parquet"
        pq.write_table(table, path, row_group_size=group)
        return one(path)
    path = folder / "web.arrow"
    new = pa.ipc.new_stream if layout == "stream" else pa.ipc.new_file
    with new(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=group)
    return one(path)


def ranged(file: SourceFile, scan: ColumnScan, first: int, n_records: int, **fields: Any) -> RecordRange:
    """As a planner makes one: it begins in the group that holds its first row."""
    group = [group for group in scan.groups if group.first_record <= first][-1]
    return RecordRange(
        source="web",
        path=file.path,
        file_format=file.file_format,
        first_record=first,
        n_records=n_records,
        file_identity=scan.identity,
        batch_offset=group.batch_offset,
        batch_first_record=group.first_record if group.batch_offset is not None else None,
        **fields,
    )


def rows(file: SourceFile, **fields: Any) -> list[RawRecord]:
    read = fields_read(RecordRange(source="w", path="", file_format="arrow", first_record=0, n_records=0, **fields))
    scan = scan_columns(file, columns_read=read)
    return list(iter_raw(ranged(file, scan, 0, scan.n_records, **fields)))


def contents(records: list[RawRecord]) -> list[Any]:
    return [json.loads(record.content) for record in records]


# ---------------------------------------------------------------- where rows lie


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_range_of_any_layout_gives_the_rows_of_that_range(tmp_path: Path, layout: str, seed: int) -> None:
    rng = random.Random(seed)
    n_rows = rng.randrange(1, 900)
    texts = [f"{rng.random()}" * rng.randrange(4) for _ in range(n_rows)]
    text = pa.array(texts).dictionary_encode() if seed % 2 else pa.array(texts)
    compression = rng.choice([None, "zstd", "lz4"])
    file = write(tmp_path, layout, pa.table({"text": text}), group=rng.randrange(1, 400), compression=compression)
    scan = scan_columns(file, columns_read=READ)
    assert scan.n_records == n_rows
    assert sum(group.n_bytes for group in scan.groups) > 0
    for _ in range(12):
        first, count = rng.randrange(n_rows), rng.randrange(1, n_rows + 50)
        found = [(row.number, json.loads(row.content)["text"]) for row in iter_raw(ranged(file, scan, first, count))]
        assert found == list(enumerate(texts))[first : first + count]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_late_range_is_read_without_the_groups_before_it(tmp_path: Path, layout: str) -> None:
    table = pa.table({"text": [f"t{i}" for i in range(1000)]})
    file = write(tmp_path, layout, table)
    scan = scan_columns(file, columns_read=READ)
    path = Path(file.path)
    damaged = bytearray(path.read_bytes())
    at = damaged.index(b"t0t1t2") if layout != "parquet" else 4
    if layout == "parquet":
        stop = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    else:
        stop = at + 100
    damaged[at:stop] = b"\xff" * (stop - at)
    path.write_bytes(damaged)
    found = list(iter_raw(ranged(file, scan, 950, 20)))
    assert [row.number for row in found] == list(range(950, 970))
    assert found[0].content == b'{"text":"t950"}'


def test_a_scan_reads_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 0)
    monkeypatch.setattr(identity, "BLOCK_BYTES", 16)
    for layout in LAYOUTS:
        file = write(tmp_path, layout, pa.table({"text": [os.urandom(5000).hex() for _ in range(1000)]}))
        n_read = 0

        class Counting:
            """The file, with a count of what is read of it."""

            def __init__(self, f: Any) -> None:
                self._f = f
                self.closed = False

            def read(self, size: int = -1) -> bytes:
                nonlocal n_read
                data = self._f.read(size)
                n_read += len(data)
                return bytes(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._f, name)

        with Path(file.path).open("rb", buffering=0) as opened:
            counting: Any = Counting(opened)
            batches.layout(counting, file.path, file.file_format, READ)
            identity.file_identity(counting, file.path, file.file_format)
        assert n_read < 100_000 < file.n_bytes / 50, layout


@pytest.mark.parametrize("layout", ["stream", "file"])
def test_dictionaries_that_come_later_make_a_reader_begin_at_the_front(tmp_path: Path, layout: str) -> None:
    schema = pa.schema([("text", pa.dictionary(pa.int8(), pa.string()))])
    path = tmp_path / "web.arrow"
    new = pa.ipc.new_stream if layout == "stream" else pa.ipc.new_file
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with new(path, schema, options=options) as writer:
        for words in (["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]):
            column = pa.DictionaryArray.from_arrays(pa.array(range(len(words)), pa.int8()), words)
            writer.write_batch(pa.record_batch([column], schema=schema))
    file = one(path)
    scan = scan_columns(file, columns_read=READ)
    assert {group.batch_offset for group in scan.groups} == {None}
    assert [row["text"] for row in contents(list(iter_raw(ranged(file, scan, 4, 5))))] == ["c", "a", "b", "c", "d"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_was_cut_is_refused_wherever_it_was_cut(tmp_path: Path, layout: str) -> None:
    file = write(tmp_path, layout, pa.table({"text": ["x" * 50] * 40}), group=10)
    path = Path(file.path)
    whole = path.read_bytes()
    for n_bytes in range(1, len(whole), 7):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(InputError, match=rf"{path.name}"):
            scan_columns(one(path), columns_read=READ)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_bytes_in_a_file_never_crash_the_scan(tmp_path: Path, layout: str) -> None:
    file = write(tmp_path, layout, pa.table({"text": ["x" * 50] * 40}), group=10)
    path = Path(file.path)
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):
            scan = scan_columns(one(path), columns_read=READ)
            list(iter_raw(ranged(file, scan, 0, scan.n_records)))


def test_another_format_or_nothing_at_all_is_refused(tmp_path: Path) -> None:
    for name in ("web.parquet", "web.arrow"):
        (tmp_path / name).write_text('{"text": "x"}\n')
        with pytest.raises(InputError, match=name):
            scan_columns(one(tmp_path / name), columns_read=READ)
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(MissingInputError, match="is empty"):
            scan_columns(one(tmp_path / name), columns_read=READ)


# ---------------------------------------------------------------- values


def test_nested_values_become_objects_and_lists_in_the_order_of_the_schema(tmp_path: Path) -> None:
    message = pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.large_string())]))),
            ("arguments", pa.map_(pa.string(), pa.int64())),
            ("at", pa.timestamp("ns")),
        ]
    )
    value = [
        {"role": "user", "content": [{"type": "text", "text": "é"}, None], "arguments": [("z", 1), ("a", None)]},
        {"role": None, "content": None, "at": datetime.datetime(2020, 1, 2, 3, 4, 5)},  # noqa: DTZ001
        None,
    ]
    table = pa.table({"messages": pa.array([value, None], pa.list_(message)), "url": ["u", "v"], "id": ["a", "b"]})
    for layout in LAYOUTS:
        first, second = rows(write(tmp_path, layout, table))
        assert first.content == (
            rb'{"id":"a","messages":[{"role":"user","content":[{"type":"text","text":"\u00e9"},null],'
            rb'"arguments":{"z":1}},{"at":"2020-01-02T03:04:05"},null]}'
        )
        assert second.content == b'{"id":"b"}'
        assert first.columns == ("messages", "url", "id")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([datetime.date(2020, 2, 29)]), "2020-02-29"),
        (pa.array([decimal.Decimal("1.50")]), "1.50"),
        (pa.array([datetime.time(1, 2, 3)]), "01:02:03"),
        (pa.array([1577934245], pa.timestamp("s", "UTC")), "2020-01-02T03:04:05+00:00"),
        (pa.array([1577934245123456789], pa.timestamp("ns")), "2020-01-02T03:04:05.123456"),
        (pa.array([float("nan")]), None),
        (pa.array([0.5], pa.float16()), 0.5),
        (pa.array([True]), True),
        (pa.array([None]), None),
        (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
        (pa.array([["a", None]], pa.list_(pa.string(), 2)), ["a", None]),
        (pa.array([["a"]]).cast(pa.list_(pa.dictionary(pa.int8(), pa.string()))), ["a"]),
        (pa.array(["x"], pa.string_view()), "x"),
    ],
    ids=str,
)
def test_every_type_of_a_column_that_is_read_has_a_form(tmp_path: Path, column: Any, expected: Any) -> None:
    table = pa.table({"text": ["t"], "input": column})
    layouts = ["stream"] if pa.types.is_float16(column.type) else ["stream", "parquet"]
    for layout in layouts:
        (row,) = contents(rows(write(tmp_path, layout, table)))
        assert row.get("input") == expected


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"x"]),
        pa.array([datetime.timedelta(1)]),
        pa.array([{"bytes": b"x"}]),
        pa.array([[b"x"]]),
    ],
    ids=str,
)
def test_a_column_without_such_a_form_is_named_when_it_is_scanned(tmp_path: Path, column: Any) -> None:
    file = write(tmp_path, "stream", pa.table({"text": ["t"], "input": column}))
    with pytest.raises(InputError, match=r"web\.arrow: column 'input' has .* convert it, or name another"):
        scan_columns(file, columns_read=READ)
    unread = write(tmp_path, "stream", pa.table({"text": ["t"], "picture": column}))
    assert contents(rows(unread)) == [{"text": "t"}]


def test_a_string_that_is_not_utf8_is_one_bad_row_wherever_it_stands(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"caf\xe9", b"good too"]).view(pa.string())
    nested = pa.StructArray.from_arrays([texts], ["content"])
    for layout in LAYOUTS:
        file = write(tmp_path, layout, pa.table({"text": texts, "input": nested}))
        assert contents(rows(file)) == [
            {"text": text, "input": {"content": text}} for text in ("good", "caf\udce9", "good too")
        ]


def test_an_id_among_floats_is_the_integer_that_it_was(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c"], "key": [7.0, None, 0.25], "input": [7.0, 1.0, 2.0]})
    found = contents(rows(write(tmp_path, "parquet", table), id_field="key"))
    assert [(row.get("key"), row["input"]) for row in found] == [(7, 7.0), (None, 1.0), ("0.25", 2.0)]


def test_a_plain_row_has_the_bytes_that_earlier_plans_gave_it(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "é"], "id": [1, None], "url": ["u", "v"]})
    file = write(tmp_path, "parquet", table)
    earlier = RecordRange(source="w", path=file.path, file_format="parquet", first_record=0, n_records=2)
    assert [(r.content, r.columns) for r in iter_raw(earlier)] == [(r.content, r.columns) for r in rows(file)]


def test_columns_of_one_name_and_files_without_any_that_counts_are_refused(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    with pytest.raises(InputError, match="2 columns named 'text'"):
        rows(write(tmp_path, "stream", twice))
    with pytest.raises(InputError, match="no column that documents are made of; it has 'body'"):
        rows(write(tmp_path, "parquet", pa.table({"body": ["x"]})))


# ---------------------------------------------------------------- identity


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_large", [False, True])
def test_a_file_that_is_not_what_was_planned_is_refused(
    tmp_path: Path, layout: str, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_large:
        monkeypatch.setattr(identity, "WHOLE_BYTES", 10)
        monkeypatch.setattr(identity, "BLOCK_BYTES", 64)
    texts = [f"text {i} {i * 7919 % 1009}" for i in range(500)]
    file = write(tmp_path, layout, pa.table({"text": texts}))
    scan = scan_columns(file, columns_read=READ)
    assert scan.identity.startswith("sample:" if is_large else "sha256:")
    planned = ranged(file, scan, 0, 10)
    write(tmp_path, layout, pa.table({"text": texts}))
    check_identity(planned)  # written again, with the same content
    for changed in ([*texts[:-1], "other text, longer"], texts[:-1], [*texts, "more"], ["b", *texts[1:]]):
        write(tmp_path, layout, pa.table({"text": changed}))
        with pytest.raises(InputError, match=r"changed after it was planned .*materialize shard_plan again"):
            check_identity(planned)
    Path(file.path).unlink()
    with pytest.raises(MissingInputError, match="No such file"):
        check_identity(planned)


def test_a_file_that_changed_since_it_was_found_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "parquet", pa.table({"text": ["a"]}))
    write(tmp_path, "parquet", pa.table({"text": ["a", "b"]}))
    with pytest.raises(InputError, match="changed while it was being planned"):
        scan_columns(file, columns_read=READ)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_of_the_type_for_json_are_what_their_text_says(tmp_path: Path, layout: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [1]}]
    texts = pa.array([json.dumps(message) for message in messages])
    as_json = pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), pa.ExtensionArray.from_storage(pa.json_(), texts))
    text = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"not quoted"']))
    file = write(tmp_path, layout, pa.table({"messages": as_json, "text": text}))
    scan = scan_columns(file, columns_read=READ)
    (record,) = iter_raw(ranged(file, scan, 0, 1))
    assert json.loads(record.content) == {"messages": messages, "text": "not quoted"}
