"""An object store: moto's S3 server, reached by URL as any other would be."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets.contract import RecordRange
from kd_assets.errors import InputError, MissingInputError, StorageUnreachableError
from kd_assets.sources.fields import fields_read
from kd_assets.sources.files.read import check_identity, iter_raw
from kd_assets.sources.files.scan import scan_columns
from kd_assets_tests.sources.files.conftest import found, lines, one, range_of, scanned

TEXTS = [f"text {i}" for i in range(300)]


def put_parquet(bucket: Any, key: str, texts: list[str]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, row_group_size=50)
    bucket.put_object(Key=key, Body=buffer.getvalue())


def text_of(records: Any) -> list[str]:
    return [json.loads(record.content)["text"] for record in records]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_json_lines_are_read_by_url(bucket: Any, suffix: str, tmp_path: Path) -> None:
    data = lines(TEXTS)
    bucket.put_object(Key=f"a/web.jsonl{suffix}", Body=gzip.compress(data) if suffix else data)
    file = one(f"s3://{bucket.name}/a/web.jsonl{suffix}")
    scan, records = scanned(file, tmp_path)
    assert text_of(records) == TEXTS
    assert text_of(iter_raw(range_of(file, records[200:210], scan=scan))) == TEXTS[200:210]


def test_parquet_is_read_by_url_and_known_again_by_its_identity(bucket: Any) -> None:
    put_parquet(bucket, "web.parquet", TEXTS)
    file = one(f"s3://{bucket.name}/web.parquet")
    planned = RecordRange(source="w", path=file.path, file_format="parquet", first_record=120, n_records=7)
    scan = scan_columns(file, columns_read=fields_read(planned))
    assert [group.first_record for group in scan.groups] == [0, 50, 100, 150, 200, 250]
    planned = RecordRange(
        source="w", path=file.path, file_format="parquet", first_record=120, n_records=7, file_identity=scan.identity
    )
    check_identity(planned)
    assert text_of(iter_raw(planned)) == TEXTS[120:127]
    put_parquet(bucket, "web.parquet", ["other", *TEXTS])
    with pytest.raises(InputError, match="changed after it was planned"):
        check_identity(planned)


def test_folders_and_patterns_of_a_bucket_are_found_with_what_came_since(bucket: Any) -> None:
    url = f"s3://{bucket.name}/set"
    for key in ("set/b.jsonl", "set/sub/a.jsonl", "set/README.md", "set/.hidden"):
        bucket.put_object(Key=key, Body=lines([key]))
    result = found(url)
    assert [file.name for file in result.files] == ["b.jsonl", "sub/a.jsonl"]
    assert result.said == (f"left out of {url}: .hidden, README.md",)
    assert all(len(file.changed) == 32 for file in result.files), "an ETag"
    bucket.put_object(Key="set/c.jsonl", Body=lines(["c"]))
    assert [file.name for file in found(url).files] == ["b.jsonl", "c.jsonl", "sub/a.jsonl"]
    assert [file.path for file in found(f"{url}/*.jsonl").files] == [f"{url}/b.jsonl", f"{url}/c.jsonl"]
    for file in found(url).files:
        assert one(file.path).changed == file.changed, "a listing says what the object says"


def test_an_object_that_vanished_is_named(bucket: Any) -> None:
    bucket.put_object(Key="web.jsonl", Body=lines(TEXTS))
    file = one(f"s3://{bucket.name}/web.jsonl")
    _, records = scanned(file)
    bucket.Object("web.jsonl").delete()
    with pytest.raises(MissingInputError, match=rf"source {file.path} is not there"):
        list(iter_raw(range_of(file, records)))
    with pytest.raises(MissingInputError, match=rf"source {file.path} is not there"):
        found(file.path)
    with pytest.raises(MissingInputError, match="no file matches"):
        found(f"s3://{bucket.name}/*.jsonl")


def test_an_object_that_was_replaced_is_noticed_by_its_etag(bucket: Any) -> None:
    bucket.put_object(Key="web.jsonl", Body=lines(["a"]))
    file = one(f"s3://{bucket.name}/web.jsonl")
    bucket.put_object(Key="web.jsonl", Body=lines(["b"]))
    assert one(file.path).n_bytes == file.n_bytes
    with pytest.raises(InputError, match="changed while it was being planned"):
        scanned(file)


def test_a_store_that_does_not_answer_is_unreachable_and_no_fault_of_the_source(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageUnreachableError, match=rf"cannot read s3://{bucket.name}/web\.jsonl: .*127\.0\.0\.1:9"):
        found(f"s3://{bucket.name}/web.jsonl")
