"""Files that a thread writes: the same bytes and hashes, whatever the sizes, and the failures of a plain file."""

from __future__ import annotations

import errno
import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from kd_assets.durable import TEMPORARY_SUFFIX, HashingFile
from kd_assets.errors import StorageUnavailableError
from kd_assets.export import aside
from kd_assets.export.aside import FilesAside, export_file


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "_BUFFER_BYTES", 64)


@pytest.mark.parametrize(
    "sizes", [[], [0], [1], [63], [64], [65], [640, 3], [1, 63, 64, 0, 1000, 7], [10_000]], ids=str
)
def test_a_file_has_what_was_written_in_order_and_its_hash(tmp_path: Path, sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    written = [rng.bytes(size) for size in sizes]
    with export_file(tmp_path / "file") as file:
        for at, data in enumerate(written):
            assert file.write(data) == len(data)
            assert file.tell() == sum(sizes[: at + 1])
    whole = b"".join(written)
    assert (tmp_path / "file").read_bytes() == whole
    assert file.sha256 == hashlib.sha256(whole).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_was_handed_over_may_change_afterwards(tmp_path: Path) -> None:
    data = np.zeros(30, dtype=np.uint32)
    with export_file(tmp_path / "file") as file:
        for at in range(50):
            data[:] = at
            file.write(data)
    assert np.array_equal(np.fromfile(tmp_path / "file", np.uint32), np.repeat(np.arange(50), 30))


def test_an_array_of_several_dimensions_is_written_as_its_bytes(tmp_path: Path) -> None:
    data = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    with export_file(tmp_path / "file") as file:
        assert file.write(data) == data.nbytes
    assert (tmp_path / "file").read_bytes() == data.tobytes()


@pytest.mark.parametrize("n_written", [5, 64, 100, 100_000])
def test_a_full_disk_is_named_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_written: int
) -> None:
    def full(self: HashingFile, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HashingFile, "write", full)
    with pytest.raises(StorageUnavailableError, match="free some space"), export_file(tmp_path / "file") as file:
        file.write(bytes(n_written))
    assert list(tmp_path.iterdir()) == []
    assert threads() == []


def test_a_failure_of_who_writes_leaves_no_file_and_no_thread(tmp_path: Path) -> None:
    def write() -> None:
        with export_file(tmp_path / "file") as file:
            file.write(bytes(1000))
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        write()
    assert list(tmp_path.iterdir()) == []
    assert threads() == []


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "export-file"]


def test_files_one_after_the_other_are_all_whole_when_the_block_ends(tmp_path: Path) -> None:
    written = {tmp_path / f"file-{at}": np.random.default_rng(at).bytes(37 * at) for at in range(9)}
    with FilesAside() as files:
        for path, data in written.items():
            with files.file(path) as file:
                file.write(data)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == written
    assert list(files.sha256.items()) == [(path, hashlib.sha256(data).hexdigest()) for path, data in written.items()]


@pytest.mark.parametrize("failing", [0, 1, 4])
def test_a_file_that_cannot_be_written_fails_the_block_at_the_latest_with_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write = HashingFile.write

    def full(self: HashingFile, data: memoryview) -> int:
        if bytes(data[:1]) == bytes([failing]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(HashingFile, "write", full)

    def write_all() -> None:
        with FilesAside() as files:
            for at in range(5):
                with files.file(tmp_path / f"file-{at}") as file:
                    file.write(bytes([at]) * 64)  # one buffer, which is written when the file is closed

    with pytest.raises(StorageUnavailableError, match=f"file-{failing}.*free some space"):
        write_all()
    names = {path.name for path in tmp_path.iterdir()}
    assert {f"file-{at}" for at in range(failing)} <= names
    assert f"file-{failing}" not in names
    assert not [name for name in names if name.endswith(TEMPORARY_SUFFIX)]
    assert threads() == []


def test_a_failure_between_files_keeps_those_before_whole(tmp_path: Path) -> None:
    def write() -> None:
        with FilesAside() as files:
            with files.file(tmp_path / "file") as file:
                file.write(bytes(1000))
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == bytes(1000)
