"""Memory does not follow the size of a file, and a late range costs what an early one costs."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.contract import RecordRange
from kd_assets.sources.files.read import iter_raw
from kd_assets.sources.files.scan import scan_columns
from kd_assets_tests.sources.files.conftest import one, range_of, scanned, zstd

MEASURE = """
import resource, sys
from pathlib import Path
from kd_assets.contract import RecordRange
from kd_assets.sources.files.find import find_source
from kd_assets.sources.files.read import iter_raw
from kd_assets.sources.files.scan import TextScan, scan_columns
from kd_assets.sources.spec import SourceSpec
(file,) = find_source(SourceSpec(name="w", path=sys.argv[1], licence="x"), base_folder=Path("/"), environment={}).files
common = dict(source="w", path=file.path, file_format=file.file_format, first_record=0, compression=file.compression)
if file.file_format in ("parquet", "arrow"):
    scan = scan_columns(file, columns_read=["text"])
    records = RecordRange(**common, n_records=scan.n_records, file_identity=scan.identity)
else:
    scan = TextScan(file, seekable_folder=Path(sys.argv[1] + ".copies"))
    n = sum(1 for _ in scan)
    seekable = str(scan.seekable_path) if scan.seekable_path else None
    records = RecordRange(**common, n_records=n, byte_offset=0, first_line=1, seekable_path=seekable)
assert sum(1 for _ in iter_raw(records)) == records.n_records
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write(path: Path, n_records: int) -> None:
    texts = (f"{i} " + "abcdefgh" * 250 for i in range(n_records))
    if path.suffix in (".parquet", ".arrow"):
        schema = pa.schema([("text", pa.string())])
        opened = pq.ParquetWriter(path, schema) if path.suffix == ".parquet" else pa.ipc.new_stream(path, schema)
        with opened as writer:
            for _ in range(0, n_records, 1000):
                writer.write_table(pa.table({"text": [next(texts) for _ in range(1000)]}, schema=schema))
        return
    is_array = ".json" in path.suffixes
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as f:
        for i, text in enumerate(texts):
            before = (b"," if i else b"[") if is_array else b""
            f.write(before + json.dumps({"text": text}).encode() + b"\n")
        f.write(b"]" if is_array else b"")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    peaks = []
    for n_records in (10_000, 100_000):  # 20 and 200 MB
        path = tmp_path / str(n_records) / name
        path.parent.mkdir()
        write(path, n_records)
        done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] <= 25, peaks


class Counting:
    """Counts the bytes that are read of source files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_bytes = 0
        outer = self

        class Counted(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                n_bytes = super().readinto(buffer)
                outer.n_bytes += n_bytes
                return n_bytes

        monkeypatch.setattr(os, "fdopen", lambda fd, *_, **__: io.BufferedReader(Counted(fd), 1 << 16))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet", "a.arrow"])
def test_a_late_range_reads_no_more_than_an_early_one(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    if name.endswith(".zst"):
        write(tmp_path / "plain.jsonl", 20_000)
        path.write_bytes(zstd((tmp_path / "plain.jsonl").read_bytes()))
    else:
        write(path, 20_000)
    file = one(path)
    if file.file_format in ("parquet", "arrow"):
        scan = scan_columns(file, columns_read=["text"])

        def planned(first: int) -> RecordRange:
            group = [group for group in scan.groups if group.first_record <= first][-1]
            return RecordRange(
                source="w",
                path=file.path,
                file_format=file.file_format,
                first_record=first,
                n_records=1000,
                file_identity=scan.identity,
                batch_offset=group.batch_offset,
                batch_first_record=group.first_record if group.batch_offset is not None else None,
            )
    else:
        text_scan, records = scanned(file, tmp_path / "copies")

        def planned(first: int) -> RecordRange:
            return range_of(file, records[first : first + 1], scan=text_scan, n_records=1000)

    counting = Counting(monkeypatch)  # from here on files are only read
    costs = []
    for first in (1000, 19_000):
        counting.n_bytes = 0
        assert [record.number for record in iter_raw(planned(first))] == list(range(first, first + 1000))
        costs.append(counting.n_bytes)
    assert costs[1] <= 1.2 * costs[0] + 100_000, costs
