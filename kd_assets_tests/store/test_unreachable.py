"""Storage that gives no true answer for a while: it is asked again, and no result is taken for damaged or missing."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_assets.durable import READ_WAITS_S, read_if_there, read_patiently, size_if_there
from kd_assets.errors import CorruptPartError, StorageUnavailableError, StorageUnreachableError
from kd_assets.store import (
    CacheReader,
    ResultFiles,
    check_all,
    committed,
    count_durable_files,
    read_head,
    read_manifest,
    read_shard,
    set_head,
    variants_of,
    verify,
)
from kd_assets.store.manifest import is_audited
from kd_assets.store.partfile import PartFile
from kd_assets.store.reading.summary import inspect
from kd_assets_tests.store import examples
from kd_assets_tests.store.failing import FailingStorage
from kd_assets_tests.store.test_storage import run_in_mount_namespace

PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN)


def folder_of(store: Path, asset: Any = "topk_cache") -> Path:
    return Path(examples.output(store, asset).path)


def finished_parts(store: Path) -> Any:
    """What a writer finds of an unfinished result."""
    with examples.writer(store, examples.output(store, "embedding_cache", params={"max_length": 5})) as result:
        return sorted(result.finished), result.forgotten


def verified(store: Path) -> Any:
    """What `verify` found; raises what it could not look at."""
    report = verify(store)
    for problem in report.problems:
        if problem.kind == "unreadable":
            raise StorageUnreachableError(problem.message)
    return report


READS: dict[str, Callable[[Path], Any]] = {
    "committed": lambda store: committed(folder_of(store), examples.output(store, "topk_cache").fingerprint),
    "read_manifest": lambda store: read_manifest(folder_of(store)),
    "read_head": lambda store: read_head(folder_of(store).parent),
    "read_shard": lambda store: read_shard(folder_of(store, "shards_manifest")).document_ids,
    "a document of a Parquet cache": lambda store: CacheReader(store / "tiny", "topk_cache")[3]["topk_ids"].tolist(),
    "a document of an Arrow cache": lambda store: len(CacheReader(store / "tiny", "hidden_state_cache")[3]),
    "variants_of": lambda store: variants_of(store / "tiny" / "topk_cache"),
    "inspect": inspect,
    "verify": verified,
    "checks": lambda store: check_all(ResultFiles(folder_of(store)), ResultFiles(folder_of(store, "shards_manifest"))),
    "is_audited": lambda store: is_audited(folder_of(store), read_manifest(folder_of(store))),
    "count_durable_files": lambda store: count_durable_files([folder_of(store)]),
    "set_head": lambda store: set_head(folder_of(store)),
}


@pytest.fixture
def filled(store: Path) -> Path:
    """A shard and its caches, and one cache that is unfinished."""
    examples.commit_all(store)
    docs = examples.documents((3, 2))
    with examples.writer(store, examples.output(store, "embedding_cache", params={"max_length": 5})) as result:
        rows = examples.table("embedding_cache", docs)
        result.write_part(0, rows, n_tokens=docs.n_tokens, stats={})
    return store


@pytest.mark.parametrize("read", READS)
def test_a_failure_that_passes_changes_nothing_of_what_is_read_wherever_it_comes(
    filled: Path, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = READS[read](filled)
    storage = FailingStorage(monkeypatch, filled)
    assert READS[read](filled) == expected
    n_calls = storage.n_calls
    assert n_calls > 0
    for first in range(n_calls):
        storage.fail(PASSING[first % len(PASSING)], first=first, n_failures=1)
        assert READS[read](filled) == expected, f"call {first} of {n_calls}"


@pytest.mark.parametrize("read", [*READS, "a writer that goes on"])
def test_storage_that_stays_away_is_called_that_wherever_it_begins_and_never_damaged_or_missing(
    filled: Path, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = READS.get(read, finished_parts)
    storage = FailingStorage(monkeypatch, filled)
    expected = look(filled)
    messages = []
    for first in range(storage.n_calls):
        storage.fail(errno.ESTALE, first=first)
        try:
            assert look(filled) == expected, f"call {first}"  # of a call that libraries make for nothing
        except StorageUnreachableError as e:
            messages.append(str(e))
    assert messages
    for message in messages:
        assert re.search(r"Stale file handle( \(4 tries\))?; .* says nothing about the results", message)
        assert not re.search(r"damaged|missing|[Mm]ove|no manifest", message)
    storage.recover()
    assert look(filled) == expected


def test_a_writer_that_cannot_see_a_part_makes_none_again_and_keeps_the_manifest(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = examples.commit(store, "topk_cache")
    storage = FailingStorage(monkeypatch, folder / "part-00001.parquet")
    storage.fail(errno.EIO)
    with pytest.raises(StorageUnreachableError), examples.writer(store, examples.output(store, "topk_cache")):
        pytest.fail("entered")
    assert read_manifest(folder) == manifest


def test_no_permission_is_not_waited_for_and_says_how_to_mend_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = examples.commit(store, "topk_cache")
    storage = FailingStorage(monkeypatch, folder)
    storage.fail(errno.EACCES)
    with pytest.raises(StorageUnavailableError, match=r"cannot read .*manifest\.json: .* make it readable") as e:
        read_manifest(folder)
    assert type(e.value) is StorageUnavailableError
    assert storage.n_calls == 1
    part = folder / "part-00000.parquet"
    with pytest.raises(StorageUnavailableError, match=r"cannot read .*part-00000\.parquet: .* make it readable"):
        PartFile(part)


def test_reading_is_tried_four_times_with_growing_waits_and_says_so() -> None:
    """The failure is real: no process has memory at address 0."""
    waits: list[float] = []
    path = Path("/proc/self/mem")
    with pytest.raises(StorageUnreachableError, match=r"^cannot read /proc/self/mem: Input/output error \(4 tries\); "):
        read_patiently(path.read_bytes, path, sleep=waits.append)
    assert waits == list(READ_WAITS_S) == sorted(waits)
    assert sum(waits) <= 2.0


def test_a_file_that_is_not_there_is_an_answer_only_where_the_store_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FailingStorage(monkeypatch, tmp_path / "nothing below")
    assert read_if_there(tmp_path / "a" / "file") is None
    assert read_if_there(tmp_path / "a" / "file", known=tmp_path) is None
    assert size_if_there(tmp_path / "file") is None
    with pytest.raises(StorageUnreachableError, match="check that the store is mounted"):
        read_if_there(tmp_path / "a" / "file", known=tmp_path / "a")
    with pytest.raises(StorageUnreachableError, match="check that the store is mounted"):
        size_if_there(tmp_path / "a" / "file")


def test_a_part_is_opened_anew_after_a_stale_handle(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the failure is made up: reading from a handle that is stale fails for ever."""
    folder, _ = examples.commit(store, "topk_cache")
    FailingStorage(monkeypatch, folder)
    with PartFile(folder / "part-00000.parquet") as part:
        expected = part.read(["input_ids"])

        def stale(*arguments: Any, **named: Any) -> Any:
            raise OSError(errno.ESTALE, "Stale file handle")

        monkeypatch.setattr(part._parquet, "read_row_group", stale)
        assert part.read(["input_ids"]) == expected


def test_a_part_that_is_gone_is_missing_only_while_its_folder_is_there(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = examples.commit(store, "topk_cache")
    FailingStorage(monkeypatch, folder)
    (folder / "part-00000.parquet").unlink()
    with pytest.raises(CorruptPartError, match="is missing"):
        PartFile(folder / "part-00000.parquet")
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(StorageUnreachableError, match="check that the store is mounted"):
        PartFile(folder / "part-00000.parquet")


def test_a_mount_that_goes_and_comes_back_takes_no_result_with_it(tmp_path: Path) -> None:
    """A real mount, really gone: its mount point is an empty folder meanwhile."""
    script = """
import subprocess, sys
from pathlib import Path
from kd_assets.errors import StorageUnreachableError
from kd_assets.store import committed
from kd_assets_tests.store import examples
disk, mount = Path(sys.argv[1]) / "disk", Path(sys.argv[1]) / "mount"
for folder in (disk, mount):
    folder.mkdir()
subprocess.run(["mount", "--bind", disk, mount], check=True)
examples.commit(mount, "topk_cache")
wanted = examples.output(mount, "topk_cache")
missing = examples.output(mount, "embedding_cache")
print(committed(Path(wanted.path), wanted.fingerprint) is not None)
subprocess.run(["umount", mount], check=True)
for out in (wanted, missing):
    try:
        print(committed(Path(out.path), out.fingerprint))
    except StorageUnreachableError as e:
        print(e)
subprocess.run(["mount", "--bind", disk, mount], check=True)
print(committed(Path(wanted.path), wanted.fingerprint) is not None)
print(committed(Path(missing.path), missing.fingerprint))
"""
    done = run_in_mount_namespace(script, str(tmp_path))
    assert done.returncode == 0, done.stderr
    before, *away, after, missing = done.stdout.splitlines()
    assert (before, after, missing) == ("True", "True", "None")
    assert [re.sub(r".*manifest\.json: ", "", line) for line in away] == [
        "No such file or directory (4 tries); check that the store is mounted on this machine, then run again: what is "
        "finished is kept"
    ] * 2
