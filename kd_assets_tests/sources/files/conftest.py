"""Files of every kind, and an S3 server."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kd_assets.contract import RecordRange
from kd_assets.sources.files.find import find_source
from kd_assets.sources.files.found import FoundSource, SourceFile
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.files.scan import TextScan
from kd_assets.sources.spec import SourceSpec


def found(path: Path | str, **spec: Any) -> FoundSource:
    source = SourceSpec(name="web", path=str(path), licence="CC0-1.0", **spec)
    return find_source(source, base_folder=Path("/"), environment={})


def one(path: Path | str, **spec: Any) -> SourceFile:
    (file,) = found(path, **spec).files
    return file


def scanned(file: SourceFile, seekable_folder: Path | None = None) -> tuple[TextScan, list[RawRecord]]:
    scan = TextScan(file, seekable_folder=seekable_folder)
    return scan, list(scan)


def range_of(
    file: SourceFile, records: list[RawRecord], *, scan: TextScan | None = None, n_records: int | None = None
) -> RecordRange:
    """The range that begins with the first of these records of a file of text."""
    first = records[0]
    return RecordRange(
        source="web",
        path=file.path,
        file_format=file.file_format,
        compression=file.compression,
        first_record=first.number,
        n_records=len(records) if n_records is None else n_records,
        byte_offset=first.byte_offset,
        first_line=first.line,
        seekable_path=str(scan.seekable_path) if scan and scan.seekable_path else None,
    )


def zstd(data: bytes) -> bytes:
    compressed: bytes = pa.Codec("zstd").compress(data, asbytes=True)
    return compressed


COMPRESS = {"gz": gzip.compress, "zst": zstd}


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """moto's server: S3 by its own protocol, in memory."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket of its own; keys and endpoint are in the environment, as a deployment has them."""
    import boto3
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = boto3.resource("s3").create_bucket(Bucket=f"b{os.urandom(6).hex()}")
    yield bucket
    s3fs.S3FileSystem.clear_instance_cache()
