"""Files of text: what their records are, wherever a range of them begins, and which files are refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_assets.errors import InputError, MissingInputError
from kd_assets.sources.files import raw as raw_module
from kd_assets.sources.files.found import SourceFile
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.read import iter_raw
from kd_assets.sources.files.scan import TextScan
from kd_assets.sources.files.text import arrays, seekable
from kd_assets_tests.sources.files.conftest import COMPRESS, lines, one, range_of, scanned, zstd

RECORDS: list[dict[str, Any]] = [
    {"text": "plain"},
    {"text": 'quotes " and \\ and ] } , [ {', "b": 1, "a": {"z": [1, None, 2.5], "y": {}}},
    {"text": "é😀\u2028\0", "n": 12345678901234567890},
    {"text": ""},
    {"text": "a\r\nb\tc, d"},
]


def written(path: Path, data: bytes) -> SourceFile:
    path.write_bytes(data)
    return one(path)


def contents(records: list[RawRecord]) -> list[Any]:
    return [json.loads(record.content) for record in records]


def table(delimiter: str) -> bytes:
    rows = [["text", "note"], *([record["text"], "x"] for record in RECORDS)]
    quoted = [delimiter.join('"' + field.replace('"', '""') + '"' for field in row) for row in rows]
    return "\r\n".join(quoted).encode()


LAYOUTS: dict[str, Callable[[], bytes]] = {
    "jsonl": lambda: b"".join(json.dumps(record).encode() + b"\n \n" for record in RECORDS),
    "json": lambda: json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "csv": lambda: table(","),
    "tsv": lambda: table("\t"),
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_range_gives_the_records_that_the_scan_gave_wherever_it_begins(
    tmp_path: Path, layout: str, bom: bytes, suffix: str
) -> None:
    data = bom + LAYOUTS[layout]()
    file = written(tmp_path / f"web.{layout}{suffix}", COMPRESS[suffix[1:]](data) if suffix else data)
    assert (file.file_format, file.compression) == (layout, {"": None, ".gz": "gzip", ".zst": "zstd"}[suffix])
    scan, records = scanned(file, tmp_path / "copies")
    expected = RECORDS if layout in ("jsonl", "json") else [{"text": r["text"], "note": "x"} for r in RECORDS]
    assert contents(records) == expected
    assert [record.number for record in records] == list(range(len(RECORDS)))
    assert scan.sha256 == hashlib.sha256(Path(file.path).read_bytes()).hexdigest()
    assert scan.n_bytes == file.n_bytes
    assert (scan.seekable_path is not None) == bool(suffix)
    for i in range(len(records)):
        for stop in range(i + 1, len(records) + 1):
            assert list(iter_raw(range_of(file, records[i:stop], scan=scan))) == records[i:stop]
            assert list(iter_raw(range_of(file, records[i:stop]))) == records[i:stop], "without the copy, too"


def test_the_keys_of_an_element_stay_in_their_order(tmp_path: Path) -> None:
    """A template prints tools in the order in which they are written."""
    _, records = scanned(written(tmp_path / "web.json", b'[ {"b": {"z": 1, "a": 2},\n "a": 1.50} ]'))
    assert records[0].content == b'{"b":{"z":1,"a":2},"a":1.5}'


@pytest.mark.parametrize("seed", range(10))
def test_an_array_gives_the_same_elements_whatever_the_size_of_what_is_read_at_a_time(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", rng.choice([8, 33, 64, 100, 1000]))

    def value(depth: int) -> Any:
        kind = rng.randrange(8 if depth else 5)
        if kind < 3:
            return "".join(rng.choice('ab"\\é😀\n[]{},: ') for _ in range(rng.randrange(200)))
        if kind < 5:
            return rng.choice([True, None, -1.5e-7, 10**15, 0])
        items = [value(depth - 1) for _ in range(rng.randrange(5))]
        return items if kind == 5 else {f"k{i}": item for i, item in enumerate(items)}

    expected = [{"text": value(3)} for _ in range(40)]
    data = json.dumps(expected, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])).encode()
    file = written(tmp_path / "web.json", data)
    _, records = scanned(file)
    assert contents(records) == expected
    for record in records:
        assert record.byte_offset is not None
        assert data[record.byte_offset : record.byte_offset + 1] == b"{"
        assert next(iter(iter_raw(range_of(file, [record])))) == record


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'[{"text": "a"}, {"text": "b"}', "after its element 2 comes the end of the file and no ',' or ']'"),
        (b'[{"text": "a"} {"text": "b"}]', "after its element 1 comes '{' and no ','"),
        (
            b'[{"text": "a"}, {"text": }]' + b" " * 100,
            r"element 2 of its array \(byte 16\) is not JSON: Expecting value",
        ),
        (b'[{"text": "a"}, {"text": "b', r"element 2 of its array \(byte 16\) is not JSON: Unterminated"),
        (b'[{"text": "a"},]', "element 2 of its array"),
        (b'[{"text": "a"}]\n[{"text": "b"}]', r"after its array of 1 elements comes '\['"),
        (b'[{"text": "a"}, ' + b"[" * 100_000, "element 2 of its array .* nested too deeply"),
        (b'{\n "text": "a"\n}\n', "neither an array of objects nor one object a line"),
        (b'{"data": [\n{"text": "a"}\n]}', "neither an array of objects nor one object a line"),
    ],
)
def test_json_that_is_no_array_of_records_is_refused_with_its_place(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=rf"web\.json.*{reason}"):
        scanned(written(tmp_path / "web.json", data))


def test_an_empty_array_has_no_records(tmp_path: Path) -> None:
    assert scanned(written(tmp_path / "web.json", b" [ ] \n"))[1] == []


def test_json_lines_under_the_name_of_json_are_read_as_lines(tmp_path: Path) -> None:
    file = written(tmp_path / "web.json", lines(["a", "b"]))
    assert file.file_format == "jsonl"
    assert [record.line for record in scanned(file)[1]] == [1, 2]


def test_bytes_that_are_not_utf8_stay_one_bad_record(tmp_path: Path) -> None:
    _, records = scanned(written(tmp_path / "web.json", b'[{"text": "caf\xe9"}, {"text": "\xc3\xa9"}]'))
    assert [record["text"] for record in contents(records)] == ["caf\udce9", "é"]
    assert records[1].byte_offset == 19
    _, rows = scanned(written(tmp_path / "web.csv", b"text\ncaf\xe9\n\xc3\xa9\n"))
    assert [row["text"] for row in contents(rows)] == ["caf\udce9", "é"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"text,text\na,b\n", "its header names 'text' twice"),
        (b"text,note\na\n", r"web\.csv:2: the row has 1 fields and the header 2"),
        (b"text,note\na,b\nc,d,e\n", r"web\.csv:3: the row has 3 fields and the header 2"),
        (b'text,note\n"a,b\nc,d\n', r"web\.csv:2: the row cannot be read \(unexpected end of data\)"),
        (b'{"text": "a"}\n', "starts as JSON does, not with the header"),
        (b"PAR1....", "is a Parquet file"),
    ],
)
def test_a_table_that_cannot_be_told_apart_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        scanned(written(tmp_path / "web.csv", data))


def test_lines_of_a_table_count_for_messages_about_them(tmp_path: Path) -> None:
    file = written(tmp_path / "web.csv", b'text,note\n"a\nb",x\n\nc,\n')
    _, records = scanned(file)
    assert contents(records) == [{"text": "a\nb", "note": "x"}, {"text": "c", "note": ""}]
    assert [record.line for record in records] == [2, 5]
    assert records[0].columns == ("text", "note")


def test_a_line_of_50_mb_is_a_record_and_one_above_the_limit_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "x" * (50 << 20)
    for name, data in (("l.jsonl", lines([text, "b"])), ("a.json", json.dumps([{"text": text}]).encode())):
        _, records = scanned(written(tmp_path / name, data))
        assert json.loads(records[0].content)["text"] == text
    monkeypatch.setattr(raw_module, "MAX_RECORD_BYTES", 1 << 20)
    for name in ("l.jsonl", "a.json"):
        with pytest.raises(InputError, match="longer than 1 MiB"):
            scanned(one(tmp_path / name))


# ---------------------------------------------------------------- compressed


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_of_several_members_or_frames_is_one_text(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    data = lines(["a", "b"])
    file = written(tmp_path / f"web.jsonl.{suffix}", compress(data[:9]) + compress(data[9:]) + compress(b""))
    assert [record["text"] for record in contents(scanned(file)[1])] == ["a", "b"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_that_was_cut_is_refused_wherever_it_was_cut_and_leaves_no_copy(
    tmp_path: Path, suffix: str
) -> None:
    compress = COMPRESS[suffix]
    whole = compress(lines([os.urandom(40).hex() for _ in range(50)])) + compress(lines(["z" * 30]))
    first = len(compress(lines([os.urandom(40).hex() for _ in range(50)])))
    cuts = [n for n in range(1, len(whole), 97) if abs(n - first) > 60]
    for n_bytes in [*cuts, len(whole) - 1]:
        path = tmp_path / f"web.jsonl.{suffix}"
        with pytest.raises(InputError, match=rf"web\.jsonl\.{suffix} (was cut|cannot be read as)"):
            scanned(written(path, whole[:n_bytes]), tmp_path / "copies")
    assert list((tmp_path / "copies").iterdir()) == []


@pytest.mark.parametrize(("suffix", "name"), [("gz", "gzip"), ("zst", "zstd")])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path: Path, suffix: str, name: str) -> None:
    with pytest.raises(InputError, match=f"cannot be read as {name} "):
        scanned(written(tmp_path / f"web.jsonl.{suffix}", lines(["a"])))


def test_a_compressed_file_under_a_plain_name_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is compressed with gzip: end its name in \.gz"):
        scanned(written(tmp_path / "web.jsonl", gzip.compress(lines(["a"]))))


def big_copy(tmp_path: Path) -> tuple[SourceFile, TextScan, list[RawRecord]]:
    rng = random.Random(0)
    data = lines([rng.randbytes(20_000).hex() for _ in range(300)])
    file = written(tmp_path / "web.jsonl.zst", zstd(data))
    return file, *scanned(file, tmp_path / "copies")


def test_a_late_range_reads_one_or_two_frames_of_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, scan, records = big_copy(tmp_path)
    read: list[int] = []
    frame_text = seekable._Text._frame_text

    def noting(text: Any, number: int) -> bytes:
        read.append(number)
        return frame_text(text, number)

    monkeypatch.setattr(seekable._Text, "_frame_text", noting)
    assert list(iter_raw(range_of(file, records[290:292], scan=scan))) == records[290:292]
    assert len(read) <= 2
    assert list(iter_raw(range_of(file, records, scan=scan))) == records


def test_the_copy_is_a_zst_file_that_every_reader_of_zstd_understands(tmp_path: Path) -> None:
    file, scan, _ = big_copy(tmp_path)
    assert scan.seekable_path == tmp_path / "copies" / f"{scan.sha256}.zst"
    again = one(scan.seekable_path)
    assert [r.content for r in TextScan(again)] == [r.content for r in TextScan(file)]


def test_a_whole_copy_is_left_where_it_is_and_a_damaged_one_is_written_again(tmp_path: Path) -> None:
    file, scan, _ = big_copy(tmp_path)
    copy = scan.seekable_path
    assert copy is not None
    before = copy.stat().st_ino
    assert scanned(file, tmp_path / "copies")[0].seekable_path == copy
    assert copy.stat().st_ino == before, "a reader on NFS would lose it"
    whole = copy.read_bytes()
    copy.write_bytes(whole[:1000] + b"\0" + whole[1001:])
    scanned(file, tmp_path / "copies")
    assert copy.read_bytes() == whole
    assert [path.name for path in (tmp_path / "copies").iterdir()] == [copy.name]


@pytest.mark.parametrize("damage", ["a byte", "cut", "frames exchanged", "empty", "lost"])
def test_a_copy_that_was_lost_or_damaged_is_told_and_gives_no_wrong_record(tmp_path: Path, damage: str) -> None:
    file, scan, records = big_copy(tmp_path)
    copy = scan.seekable_path
    assert copy is not None
    whole = copy.read_bytes()
    table = whole.rindex(b"\x50\x2a\x4d\x18") + 8
    entries = [whole[table + 16 * i : table + 16 * i + 16] for i in range(2)]
    changed = {
        "a byte": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "cut": whole[:-100],
        "frames exchanged": whole[:table] + entries[1] + entries[0] + whole[table + 32 :],
        "empty": b"",
        "lost": None,
    }[damage]
    copy.unlink() if changed is None else copy.write_bytes(changed)
    with pytest.raises(InputError, match=r"the copy of .*web\.jsonl\.zst .*materialize shard_plan again"):
        list(iter_raw(range_of(file, records, scan=scan)))


# ---------------------------------------------------------------- files that are none


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="is empty"):
        scanned(written(tmp_path / "web.jsonl", b""))


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_a_file_that_changes_before_or_while_it_is_scanned_is_refused(tmp_path: Path, suffix: str) -> None:
    data = lines(["a"] * 100)
    path = tmp_path / f"web.jsonl{suffix}"
    file = written(path, zstd(data) if suffix else data)
    records = iter(TextScan(file, seekable_folder=tmp_path / "copies"))
    next(records)
    with path.open("ab") as f:
        f.write(zstd(data) if suffix else data)
    with pytest.raises(InputError, match="changed while it was being planned"):
        list(records)
    with pytest.raises(InputError, match="changed while it was being planned"):
        scanned(file)
    assert not suffix or list((tmp_path / "copies").iterdir()) == []


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    file = written(tmp_path / "web.jsonl", lines(["a"]))
    _, records = scanned(file)
    Path(file.path).unlink()
    with pytest.raises(MissingInputError, match=r"web\.jsonl cannot be read: No such file"):
        list(iter_raw(range_of(file, records)))


def test_nul_bytes_are_a_bad_record_and_no_crash(tmp_path: Path) -> None:
    _, records = scanned(written(tmp_path / "web.jsonl", lines(["a"]) + b"\0\0\0\n" + lines(["b"])))
    assert records[1].content == b"\0\0\0"
    _, rows = scanned(written(tmp_path / "web.csv", b"text\na\0b\n"))
    assert contents(rows) == [{"text": "a\0b"}]


def test_whoever_stops_before_the_end_leaves_no_copy(tmp_path: Path) -> None:
    records = iter(
        TextScan(written(tmp_path / "web.jsonl.gz", gzip.compress(lines(["a", "b"]))), seekable_folder=tmp_path / "c")
    )
    next(records)
    del records
    assert list((tmp_path / "c").iterdir()) == []
