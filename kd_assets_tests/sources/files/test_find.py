"""Which files a path, a folder, a pattern or a URL names."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile

from kd_assets.contract import RecordRange
from kd_assets.errors import InputError, MissingInputError, StorageUnavailableError, StorageUnreachableError
from kd_assets.sources.files.find import find_source
from kd_assets.sources.files.read import iter_raw
from kd_assets.sources.spec import SourceSpec
from kd_assets_tests.sources.files.conftest import COMPRESS, found, lines, one, range_of, scanned
from kd_assets_tests.sources.files.hub import running_hub
from kd_assets_tests.store.failing import FailingStorage


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines([name]))
    return folder


def names(path: Path | str, **spec: Any) -> list[str]:
    return [file.name for file in found(path, **spec).files]


def test_a_file_is_a_source_of_one_without_a_name(tmp_path: Path) -> None:
    file = one(fill(tmp_path, "web.jsonl") / "web.jsonl")
    assert (file.name, file.path, file.file_format) == ("", str(tmp_path / "web.jsonl"), "jsonl")
    status = os.stat(file.path)
    assert (file.n_bytes, file.changed) == (status.st_size, str(status.st_mtime_ns))
    assert one(f"file://{file.path}") == file


@pytest.mark.parametrize(
    ("name", "file_format", "compression"),
    [
        ("a.jsonl", "jsonl", None),
        ("a.NDJSON.gz", "jsonl", "gzip"),
        ("a.jsonl.zstd", "jsonl", "zstd"),
        ("a.csv.gzip", "csv", "gzip"),
        ("a.tsv.zst", "tsv", "zstd"),
        ("a.parquet", "parquet", None),
        ("a.zstd.parquet", "parquet", None),
        ("a.arrow", "arrow", None),
        ("a.txt", "jsonl", None),
        ("a", "jsonl", None),
        ("a.gz", "jsonl", "gzip"),
    ],
)
def test_a_name_says_format_and_compression(
    tmp_path: Path, name: str, file_format: str, compression: str | None
) -> None:
    file = one(fill(tmp_path, name) / name)
    assert (file.file_format, file.compression) == (file_format, compression)


def test_the_recipe_says_the_format_where_names_say_another(tmp_path: Path) -> None:
    assert one(fill(tmp_path, "a.data.gz") / "a.data.gz", file_format="csv").file_format == "csv"


def test_a_folder_is_all_its_data_files_by_name_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    fill(
        tmp_path,
        "b.jsonl",
        "a/z.jsonl.gz",
        "a/.cache/x.jsonl",
        ".hidden.jsonl",
        "LICENSE",
        "_SUCCESS",
        "c.parquet",
        "dataset_info.json",
    )
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A data set\n")
    result = found(tmp_path)
    assert [file.name for file in result.files] == ["a/z.jsonl.gz", "b.jsonl", "c.parquet"]
    assert result.said == (f"left out of {tmp_path}: .hidden.jsonl, LICENSE, README.md, _SUCCESS, dataset_info.json",)
    assert result.licence == "cc-by-4.0"


def test_files_of_a_folder_that_no_format_is_known_for_are_listed(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl", "b.bin", "c/d.txt")
    with pytest.raises(InputError, match=r"no known format: b\.bin, c/d\.txt\. Name the others by a pattern"):
        found(tmp_path)
    assert names(tmp_path, file_format="jsonl") == ["a.jsonl", "b.bin", "c/d.txt"]


def test_a_folder_of_plain_texts_is_told_what_is_read(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "b.txt")
    with pytest.raises(
        InputError, match=r"no known format: a\.txt, b\.txt\. Names of data end in \.jsonl, "
    ) as refusal:
        found(tmp_path)
    assert 'write each as a line of JSON, {"text": …}' in str(refusal.value)
    assert "the others" not in str(refusal.value), "there are none"


def test_links_to_folders_are_followed_and_lead_nowhere_for_ever(tmp_path: Path) -> None:
    fill(tmp_path, "data/a.jsonl", "elsewhere/b.jsonl")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "back").symlink_to(tmp_path / "data")
    assert names(tmp_path / "data") == ["a.jsonl", "link/b.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a1.jsonl", "a2.jsonl"]),
        ("a[2-9].jsonl", ["a2.jsonl"]),
        ("**/*.jsonl", ["a1.jsonl", "a2.jsonl", "sub/a3.jsonl", "sub/deep/a4.jsonl"]),
        ("s?b/*.jsonl", ["sub/a3.jsonl"]),
    ],
)
def test_a_pattern_is_the_files_that_match_it(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    fill(tmp_path, "a1.jsonl", "a2.jsonl", "sub/a3.jsonl", "sub/deep/a4.jsonl", "b.txt")
    assert names(tmp_path / pattern) == expected


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    assert one(fill(tmp_path, "a[1].jsonl") / "a[1].jsonl").name == ""


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing.jsonl", r"missing\.jsonl cannot be read: No such file"),
        ("*.nothing", r"no file matches .*\*\.nothing"),
        ("empty", "no data file is in .*empty"),
        ("$NOT_SET/a.jsonl", "NOT_SET of its path .* is not set"),
        ("s3://$NOT_SET/a.jsonl", "NOT_SET of its path .* is not set"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match=reason):
        find_source(SourceSpec(name="web", path=path, licence="x"), base_folder=tmp_path, environment={})


def test_a_named_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(MissingInputError, match=r"a\.jsonl is not a regular file"):
            found(path)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake failure: root may read everything."""
    fill(tmp_path, "data/a.jsonl")
    FailingStorage(monkeypatch, tmp_path / "data").fail(errno.EACCES, first=1)
    with pytest.raises(StorageUnavailableError, match=r"cannot read .*data: .*make it readable"):
        found(tmp_path / "data")


# ---------------------------------------------------------------- by URL


def test_files_by_url_are_found_scanned_and_read(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/files-find/b.jsonl", lines(["b"]))
    memory.pipe("/files-find/sub/a.jsonl", lines(["a", "aa"]))
    memory.pipe("/files-find/README.md", b"---\nlicense: mit\n---\n")
    result = found("memory://files-find")
    assert [(file.name, file.path) for file in result.files] == [
        ("b.jsonl", "memory:///files-find/b.jsonl"),
        ("sub/a.jsonl", "memory:///files-find/sub/a.jsonl"),
    ]
    assert result.licence == "mit"
    assert names("memory://files-find/**/a*.jsonl") == ["sub/a.jsonl"]
    file = result.files[1]
    _, records = scanned(file, tmp_path)
    assert [r.content for r in records] == [b'{"text": "a"}', b'{"text": "aa"}']
    assert list(iter_raw(range_of(file, records[1:]))) == records[1:]
    memory.pipe("/files-find/sub/a.jsonl", lines(["a", "ab"]))
    with pytest.raises(InputError, match="changed while it was being planned"):
        scanned(file)
    memory.rm("/files-find/sub/a.jsonl")
    with pytest.raises(MissingInputError, match=r"source memory:///files-find/sub/a\.jsonl is not there"):
        list(iter_raw(range_of(file, records)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_store_that_fails_while_a_file_is_read_is_no_fault_of_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is a fake; that of a store cannot be had on demand."""
    data = lines([os.urandom(2000).hex() for _ in range(1000)])
    if name.endswith((".parquet", ".arrow")):
        local = tmp_path / name
        table = pa.table({"text": [os.urandom(2000).hex() for _ in range(1000)]})
        if name == "a.parquet":
            pq.write_table(table, local)
        else:
            with pa.ipc.new_stream(local, table.schema) as writer:
                writer.write_table(table, max_chunksize=100)
        data = local.read_bytes()
    elif not name.endswith(".jsonl"):
        data = COMPRESS[name.rpartition(".")[2]](data)
    fsspec.filesystem("memory").pipe(f"/files-fail/{name}", data)
    file = one(f"memory://files-fail/{name}")
    planned = RecordRange(
        source="w",
        path=file.path,
        file_format=file.file_format,
        compression=file.compression,
        first_record=0,
        n_records=1000,
        byte_offset=0,
        file_identity="x",
    )
    assert len(list(iter_raw(planned))) == 1000
    read = MemoryFile.read

    def failing(self: MemoryFile, size: int = -1) -> bytes:
        if self.tell() > 1_000_000:
            raise TimeoutError("no answer")
        return bytes(read(self, size))

    monkeypatch.setattr(MemoryFile, "read", failing)
    with pytest.raises(StorageUnreachableError, match=rf"cannot read {file.path}: no answer"):
        list(iter_raw(planned))


def test_files_of_a_web_server_are_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines(["a", "b"]))
    with running_hub() as server:
        server.data_sets["some/set"] = {"c" * 40: tmp_path}
        file = one(f"{server.url}/datasets/some/set/resolve/{'c' * 40}/train.jsonl?download=true")
        assert file.file_format == "jsonl"
        _, records = scanned(file)
        assert list(iter_raw(range_of(file, records[1:]))) == records[1:]
        with pytest.raises(MissingInputError, match="is not there"):
            found(f"{server.url}/nothing.jsonl")


def test_a_url_of_an_unknown_kind_or_without_its_plugin_says_what_to_install() -> None:
    with pytest.raises(InputError, match="nosuch://a/b cannot be read: Protocol not known: nosuch"):
        found("nosuch://a/b")
    with pytest.raises(InputError, match=r"gs://a/b\.jsonl cannot be read: .*pip install gcsfs"):
        found("gs://a/b.jsonl")


def test_planning_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    fill(tmp_path, "set/train.jsonl")
    program = f"""
import sys
from pathlib import Path
from kd_assets.sources.files import read, scan
from kd_assets.sources.files.find import find_source
from kd_assets.sources.spec import DatasetSpec, SourceSpec
for spec in (
    SourceSpec(name="w", path={str(tmp_path / "set")!r}, licence="x"),
    SourceSpec(name="w", path="memory://nothing/*", licence="x"),
    SourceSpec(name="w", dataset=DatasetSpec(name={str(tmp_path / "set")!r}), licence="x"),
):
    try:
        find_source(spec, base_folder=Path("/"), environment={{"HF_DATASETS_CACHE": {str(tmp_path / "cache")!r}}})
    except Exception as e:
        print(e)
assert "datasets" in sys.modules
print("heavy:", sorted({{"torch", "transformers", "tensorflow", "jax"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("heavy: []\n"), done.stdout + done.stderr


def test_reading_needs_neither_datasets_nor_fsspec() -> None:
    """A node of the cluster has the first not, and the second only by chance; a URL needs it."""
    program = (
        "import sys\n"
        "from kd_assets.sources.files import read\n"
        "print({'datasets', 'fsspec', 'pandas'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_what_a_variable_stands_for_may_have_a_dollar_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "$HOME ${x} `y`"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "x"}\n')
    spec = SourceSpec(name="s", path="$DATA/a.jsonl", licence="CC0-1.0")
    (file,) = find_source(spec, base_folder=tmp_path, environment={"DATA": str(folder)}).files
    assert file.path == str(folder / "a.jsonl")
