"""`kd-assets index`: lost indexes of results of any size are written anew, of parts that are what was committed."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest

from kd_assets.cli import main
from kd_assets.commands.progress import Progress
from kd_assets.errors import EXIT_FAILED
from kd_assets.locks import Lease
from kd_assets.store import verify
from kd_assets.store.layout import INDEX_NAME, LEASE_NAME
from kd_assets.store.writing import lost_index
from kd_assets_tests.store import examples

OTHER = "tiny-00001"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The top-k caches of two partitions, each too large for a reuse to write its index anew."""
    monkeypatch.setattr(lost_index, "MOST_BYTES", 1)
    monkeypatch.setattr("kd_assets.store.checking.verify.MOST_BYTES", 1)
    keys = (examples.PARTITION, OTHER)
    return {key: examples.commit(tmp_path, "topk_cache", partition_key=key)[0] for key in keys}


def index_of(tmp_path: Path, *words: str) -> int:
    return main(["index", str(tmp_path / examples.RECIPE), *words])


def test_lost_indexes_are_written_anew_with_the_bytes_that_they_had(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (folder / INDEX_NAME for folder in folders.values())
    sound = first.read_bytes(), second.read_bytes()
    first.unlink()
    examples.flip_byte(second)
    assert index_of(tmp_path) == 0
    assert (first.read_bytes(), second.read_bytes()) == sound
    said = capsys.readouterr().out
    assert f"{first} is written anew" in said
    assert "2 results: 0 need no index or have a sound one, 2 are written anew, 0 are not" in said
    assert index_of(tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["written"] == []


def test_only_the_partitions_that_are_named_are_looked_at(tmp_path: Path, folders: dict[str, Path]) -> None:
    for folder in folders.values():
        (folder / INDEX_NAME).unlink()
    assert index_of(tmp_path, "--partitions", OTHER) == 0
    assert [(folder / INDEX_NAME).exists() for folder in folders.values()] == [False, True]
    assert index_of(tmp_path, "--partitions", "tiny-00009") != 0


def test_no_index_is_written_of_a_damaged_part_and_the_others_are(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in folders.values():
        (folder / INDEX_NAME).unlink()
    part = sorted(folders[OTHER].glob("part-*"))[1]
    examples.flip_byte(part)
    assert index_of(tmp_path) == EXIT_FAILED
    assert [(folder / INDEX_NAME).exists() for folder in folders.values()] == [True, False]
    assert f"{part} was changed after its commit" in capsys.readouterr().err


def test_an_index_is_left_to_the_task_that_works_on_its_result(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders[OTHER]
    (folder / INDEX_NAME).unlink()
    lease = Lease(folder / LEASE_NAME)
    lease.acquire({"host": "elsewhere"})
    try:
        assert index_of(tmp_path) == EXIT_FAILED
    finally:
        lease.release()
    assert "is being computed" in capsys.readouterr().err


def test_a_copy_without_a_lease_gets_its_index_and_no_lease(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = folders[OTHER]
    for name in (INDEX_NAME, LEASE_NAME):
        (folder / name).unlink()
    assert index_of(tmp_path) == 0
    assert (folder / INDEX_NAME).exists()
    assert not (folder / LEASE_NAME).exists()


def test_verify_names_the_command_of_a_large_result_without_an_index_and_of_a_damaged_index(
    folders: dict[str, Path],
) -> None:
    folder = folders[OTHER]
    (folder / INDEX_NAME).unlink()
    report = verify(folder)
    assert report.ok
    (note,) = report.notes
    assert (note.kind, note.path) == ("no_index", folder / INDEX_NAME)
    assert "kd-assets index" in note.message
    shutil.copy(folders[examples.PARTITION] / "manifest.json", folder / INDEX_NAME)
    (problem,) = verify(folder).problems
    assert problem.kind == "corrupt_index"
    assert "kd-assets index" in problem.message


def test_nothing_to_index_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / examples.RECIPE).mkdir()
    (tmp_path / examples.RECIPE / "audit.jsonl").touch()
    assert index_of(tmp_path) == EXIT_FAILED
    assert "has no committed results" in capsys.readouterr().err


def test_progress_says_what_is_hashed(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_assets.commands.index.Progress", functools.partial(Progress, every_s=0.0))
    (folders[OTHER] / INDEX_NAME).unlink()
    assert index_of(tmp_path) == 0
    assert "hashing part-00001.parquet" in capsys.readouterr().err
