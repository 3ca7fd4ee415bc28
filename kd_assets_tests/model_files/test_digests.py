"""What `model_files.digests` promises: a digest is that of the file's bytes, and no file is read twice for it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from kd_assets.errors import InputError, MissingInputError
from kd_assets.model_files import digests
from kd_assets.model_files.digests import (
    MOST_STATUSES,
    SAY_S,
    DigestCache,
    HashingProgress,
    cached_sha256,
    hashed_sha256,
    known_sha256,
)
from kd_assets_tests.model_files.hub_cache import link_blob

LONG_AGO_NS = 1_700_000_000_000_000_000
needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")


@pytest.fixture(autouse=True)
def files_settle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own files are all new, and no program can set a ctime."""
    monkeypatch.setattr(digests, "SETTLED_NS", 0)


def written(path: Path, content: bytes, mtime_ns: int = LONG_AGO_NS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def entries(cache_file: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(cache_file.read_bytes())["files"]
    return found


def kept(cache_file: Path) -> dict[str, list[str]]:
    return {path: [entry["sha256"] for entry in found] for path, found in entries(cache_file).items()}


def reads_of(path: Path, cache: DigestCache) -> int:
    """Bytes that were read for a digest."""
    n_read: list[int] = []
    cached_sha256(path, cache, read=n_read.append)
    return sum(n_read)


def test_a_digest_is_that_of_the_bytes_with_and_without_cache(tmp_path: Path) -> None:
    path = written(tmp_path / "a", b"x" * 5_000_000)
    cache = DigestCache(tmp_path / "cache" / "digests.json")
    assert (
        cached_sha256(path, None)
        == cached_sha256(path, cache)
        == cached_sha256(path, cache)
        == sha256(b"x" * 5_000_000)
    )
    assert kept(tmp_path / "cache" / "digests.json") == {str(path): [sha256(b"x" * 5_000_000)]}


def test_an_unchanged_file_is_not_read_again_by_another_process(tmp_path: Path) -> None:
    path = written(tmp_path / "a", b"weights")
    assert reads_of(path, DigestCache(tmp_path / "digests.json")) == 7
    assert reads_of(path, DigestCache(tmp_path / "digests.json")) == 0


def test_a_changed_file_of_the_same_size_is_noticed_by_its_time(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "digests.json")
    assert cached_sha256(written(tmp_path / "a", b"one"), cache) == sha256(b"one")
    assert cached_sha256(written(tmp_path / "a", b"two", LONG_AGO_NS + 1), cache) == sha256(b"two")


def test_a_changed_file_whose_time_was_set_back_is_noticed_by_its_ctime(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "digests.json")
    assert cached_sha256(written(tmp_path / "a", b"one"), cache) == sha256(b"one")
    before = (tmp_path / "a").stat()
    assert cached_sha256(written(tmp_path / "a", b"two"), cache) == sha256(b"two")
    after = (tmp_path / "a").stat()
    assert (before.st_mtime_ns, before.st_size, before.st_ino) == (after.st_mtime_ns, after.st_size, after.st_ino)


def test_a_replaced_file_of_the_same_size_and_time_is_noticed_by_its_inode(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "digests.json")
    assert cached_sha256(written(tmp_path / "a", b"one"), cache) == sha256(b"one")
    os.replace(written(tmp_path / "b", b"two"), tmp_path / "a")
    assert cached_sha256(tmp_path / "a", cache) == sha256(b"two")


def status_of(n: int) -> os.stat_result:
    """Of a node's own copy of one file."""
    return os.stat_result((0o100644, 1000 + n, 5, 1, 0, 0, 7, 0, 0, 0))


def test_nodes_with_copies_of_their_own_under_one_path_keep_each_others_digests(tmp_path: Path) -> None:
    path = Path("/local/model.safetensors")
    for n in range(3):
        DigestCache(tmp_path / "digests.json").put(path, status_of(n), f"{n:064x}")
    again = DigestCache(tmp_path / "digests.json")
    assert [again.get(path, status_of(n)) for n in range(4)] == [*(f"{n:064x}" for n in range(3)), None]


def test_of_one_path_the_oldest_statuses_make_room(tmp_path: Path) -> None:
    cache, path = DigestCache(tmp_path / "file" / "digests.json"), Path("/local/model.safetensors")
    written(tmp_path / "file", b"in the way, so that nothing is written: this is about memory")
    for n in range(MOST_STATUSES + 2):
        cache.put(path, status_of(n), f"{n:064x}")
    known = [n for n in range(MOST_STATUSES + 2) if cache.get(path, status_of(n)) is not None]
    assert known == list(range(2, MOST_STATUSES + 2))


def test_an_entry_of_the_first_version_is_believed_once_more_and_kept_with_its_ctime(tmp_path: Path) -> None:
    path = written(tmp_path / "a", b"weights")
    status = path.stat()
    first = {"size": 7, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino, "sha256": sha256(b"weights")}
    (tmp_path / "digests.json").write_text(json.dumps({"version": 1, "files": {str(path): first}}))
    assert reads_of(path, DigestCache(tmp_path / "digests.json")) == 0
    assert entries(tmp_path / "digests.json") == {str(path): [{**first, "ctime_ns": status.st_ctime_ns}]}
    written(path, b"changed")
    assert reads_of(path, DigestCache(tmp_path / "digests.json")) == 7


def test_the_digest_of_a_file_changed_just_now_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its mtime says: it may change again under the same time stamps."""
    monkeypatch.setattr(digests, "SETTLED_NS", 10**12)
    cached_sha256(written(tmp_path / "a", b"one"), DigestCache(tmp_path / "digests.json"))
    assert not (tmp_path / "digests.json").exists()


def test_links_to_one_blob_are_hashed_once(tmp_path: Path) -> None:
    blob = written(tmp_path / "blobs" / "x", b"blob")
    (tmp_path / "link").symlink_to(blob)
    cache = DigestCache(tmp_path / "digests.json")
    assert cached_sha256(tmp_path / "link", cache) == cached_sha256(blob, cache)
    assert list(kept(tmp_path / "digests.json")) == [str(blob)]


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"files": []}',
        b'{"files": {"a": null}}',
        b'{"files": {"a": {"sha256": 3}}}',
        b'{"files": {"a": [{"sha256": 3}]}}',
        b'{"files": {"a": [3]}}',
        b"[" * 100_000,
    ],
)
def test_a_corrupt_cache_is_ignored_and_rebuilt(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "digests.json").write_bytes(junk)
    path = written(tmp_path / "a", b"one")
    assert cached_sha256(path, DigestCache(tmp_path / "digests.json")) == sha256(b"one")
    assert kept(tmp_path / "digests.json") == {str(path): [sha256(b"one")]}


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    written(tmp_path / "file", b"in the way")
    cache = DigestCache(tmp_path / "file" / "digests.json")
    path = written(tmp_path / "a", b"one")
    assert cached_sha256(path, cache) == sha256(b"one")
    assert cache.get(path, path.stat()) == sha256(b"one")  # for this process it is still remembered


@needs_permissions
def test_an_unreadable_cache_folder_does_not_break_hashing(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o000)
    try:
        assert cached_sha256(written(tmp_path / "a", b"one"), DigestCache(folder / "digests.json")) == sha256(b"one")
    finally:
        folder.chmod(0o700)


def hash_some(cache_file: Path, folder: Path, first: int) -> None:
    digests.SETTLED_NS = 0
    cache = DigestCache(cache_file)
    for i in range(first, first + 25):
        cached_sha256(folder / f"{i:03d}", cache)


def test_concurrent_writers_lose_no_digest_and_leave_no_rubbish(tmp_path: Path) -> None:
    for i in range(100):
        written(tmp_path / "files" / f"{i:03d}", b"%d" % i)
    context = multiprocessing.get_context("spawn")
    cache_file = tmp_path / "cache" / "digests.json"
    writers = [
        context.Process(target=hash_some, args=(cache_file, tmp_path / "files", first)) for first in (0, 25, 50, 75)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert kept(cache_file) == {str(tmp_path / "files" / f"{i:03d}"): [sha256(b"%d" % i)] for i in range(100)}
    assert sorted(path.name for path in cache_file.parent.iterdir()) == [".digests.json.lock", "digests.json"]
    assert cache_file.stat().st_mode & 0o777 == 0o640


def test_a_missing_file_a_folder_and_a_loop_of_links_are_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("absent", ".", "loop"):
        with pytest.raises(MissingInputError, match=r"cannot be read|not a file") as e:
            cached_sha256(tmp_path / name, None)
        assert str(tmp_path) in str(e.value)


# ---------------------------------------------------------------- blobs of the Hugging Face cache


def test_a_blob_of_the_hugging_face_cache_is_known_by_its_name(tmp_path: Path) -> None:
    content = b"0" * 1000
    link = link_blob(tmp_path, "model.safetensors", content)
    assert known_sha256(link, None) == cached_sha256(link, None) == hashed_sha256(link, None) == sha256(content)
    assert reads_of(link, DigestCache(tmp_path / "digests.json")) == 0


def test_only_a_link_of_a_snapshot_to_a_name_of_64_digits_is_believed(tmp_path: Path) -> None:
    small = link_blob(tmp_path, "config.json", b"{}", name="a" * 40)  # git's own hash
    blob = link_blob(tmp_path, "model.safetensors", b"0").resolve()
    elsewhere = written(tmp_path / "blobs" / sha256(b"1"), b"2")
    (tmp_path / "link").symlink_to(elsewhere)
    assert [known_sha256(path, None) for path in (small, blob, elsewhere, tmp_path / "link")] == [None] * 4


# ---------------------------------------------------------------- progress


def test_hashing_says_how_far_it_is_every_few_seconds(tmp_path: Path) -> None:
    files = [written(tmp_path / name, b"") for name in ("a", "b")]
    for path in files:
        os.truncate(path, 10**9)
    said: list[str] = []
    now_s = [0.0]
    progress = HashingProgress(files, said.append, clock=lambda: now_s[0])
    for _ in range(4):
        now_s[0] += SAY_S / 2
        progress.read(5 * 10**8)
    assert said == [
        f"hashing 2 files of {tmp_path}: 2.0 GB, once for as long as nothing changes",
        f"hashing 2 files of {tmp_path}: 1.0 GB of 2.0 GB",
        f"hashing 2 files of {tmp_path}: 2.0 GB of 2.0 GB",
    ]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a", b"one")
    with pytest.raises(InputError, match="changed while it was being read"):
        cached_sha256(path, None, read=lambda n_bytes: os.utime(path, ns=(1, 1)))
