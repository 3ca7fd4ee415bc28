"""Results whose files lie in folders, written by somebody else and adopted: whole, verified, and inside the result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from kd_assets.contract import Output
from kd_assets.errors import CorruptManifestError, CorruptPartError
from kd_assets.store import (
    ResultWriter,
    WrittenFile,
    committed,
    count_durable_files,
    plan_output,
    read_manifest,
    verify,
)
from kd_assets.store.checking.checks import ResultFiles, check_files
from kd_assets.store.fingerprint import fingerprint
from kd_assets.store.layout import is_file_name
from kd_assets.store.manifest import parse_manifest

OUTSIDE = ("", "/", "/etc/passwd", "../one.bin", "data/../../x", "data//x", "data/", "./x", "data/.x", "a\nb", "a/\0")
FILES = {"data/b/two.bin": b"22", "data/one.bin": b"1", "zero.bin": b""}


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return plan_output("export_hf", {"input": "caches"}, recipe_folder=tmp_path / "tiny", partition_key="p-0")


def writer_of(output: Output) -> ResultWriter:
    folder = Path(output.path).parents[3]
    return ResultWriter(output, recipe="tiny", recipe_folder=folder, partition_key="p-0")


def written(folder: Path, files: dict[str, bytes]) -> list[WrittenFile]:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return [
        WrittenFile(name=name, n_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    ]


def commit(output: Output) -> Path:
    with writer_of(output) as writer:
        writer.adopt_files(written(writer.folder, FILES))
        writer.commit(parts=len(FILES), checks={}, provenance={})
    return writer.folder


@pytest.mark.parametrize("name", ["one.bin", "data/one.bin", "a/b/c", "data/manifest.json", "ü/x y"])
def test_a_name_below_the_result_is_one_of_a_file(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize("name", [*OUTSIDE, "manifest.json", "journal.jsonl", ".lease"])
def test_a_name_that_leads_elsewhere_is_none_and_a_manifest_that_has_it_is_refused(
    tmp_path: Path, output: Output, name: str
) -> None:
    assert not is_file_name(name)
    folder = commit(output)
    with writer_of(output) as writer:
        writer._committed = None  # as of one that is still being made
        with pytest.raises(ValueError, match="cannot be a file of a result"):
            writer.adopt_files([WrittenFile(name=name, n_bytes=0, sha256="0" * 64)])
    manifest = read_manifest(folder).to_json()
    forged = manifest.replace('"name": "zero.bin"', f'"name": {json.dumps(name)}')
    raw = _with_own_hash(forged)
    with pytest.raises(CorruptManifestError, match="a part is named"):
        parse_manifest(raw, tmp_path / "manifest.json")


def _with_own_hash(text: str) -> bytes:
    raw = json.loads(text)
    del raw["manifest_sha256"]
    return json.dumps(raw | {"manifest_sha256": fingerprint(raw)}).encode()


def test_files_in_folders_are_counted_and_links_to_folders_are_not_followed(tmp_path: Path, output: Output) -> None:
    folder = commit(output)
    assert count_durable_files([folder]) == len(FILES) + 1
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (folder / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "data" / ".hidden").touch()
    (folder / "data" / "round").symlink_to(folder)
    assert count_durable_files([folder, tmp_path / "nowhere"]) == len(FILES) + 1 + 2


def test_a_file_that_is_not_as_it_was_written_is_not_adopted(output: Output) -> None:
    with writer_of(output) as writer:
        files = written(writer.folder, FILES)
        (writer.folder / "data" / "one.bin").write_bytes(b"12")
        with pytest.raises(CorruptPartError, match=r"one\.bin is of 2 bytes, and was written with 1"):
            writer.adopt_files(files)
        (writer.folder / "data" / "one.bin").unlink()
        with pytest.raises(CorruptPartError, match=r"one\.bin is missing"):
            writer.adopt_files(files)


def test_a_result_whose_folder_of_files_is_gone_is_not_there_rather_than_unreachable(output: Output) -> None:
    folder = commit(output)
    assert committed(folder, output.fingerprint) is not None
    (folder / "data" / "b" / "two.bin").unlink()
    (folder / "data" / "b").rmdir()
    assert committed(folder, output.fingerprint) is None
    (folder / "data" / "b").write_text("a file in the place of a folder")
    assert committed(folder, output.fingerprint) is None
    assert [problem.kind for problem in verify(folder).problems] == ["missing_part"]
    check = check_files(ResultFiles(folder))
    assert not check.passed
    assert "two.bin" in check.description
    with writer_of(output) as writer:
        assert writer.forgotten == ("data/b/two.bin: missing",)
        assert {record.name for record in writer.finished.values()} == {"data/one.bin", "zero.bin"}


def test_the_check_of_files_names_the_one_that_was_changed(output: Output) -> None:
    folder = commit(output)
    check = check_files(ResultFiles(folder))
    assert check.passed
    assert check.numbers == {"n_files": 3, "n_bytes": 3}
    (folder / "data" / "one.bin").write_bytes(b"2")
    check = check_files(ResultFiles(folder))
    assert not check.passed
    assert str(folder / "data" / "one.bin") in check.description
