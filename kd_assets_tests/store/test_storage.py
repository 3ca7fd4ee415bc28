"""Disks that do not play along: full, read-only, unwritable, in the way. Nothing that is finished is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kd_assets.durable import atomic_write, prepare_folder
from kd_assets.errors import StorageUnavailableError
from kd_assets.store import Manifest, append_audit
from kd_assets_tests.store import examples
from kd_assets_tests.store.test_kill import write_everything

IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def run_in_mount_namespace(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where it may mount file systems of its own; skips the test where the kernel does not allow that."""
    if subprocess.run([*IN_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("no user and mount namespaces here")
    return subprocess.run(
        [*IN_NAMESPACE, sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300
    )


def test_full_disk_is_named_with_its_remedy_and_a_rerun_goes_on(tmp_path: Path) -> None:
    """A real file system that is really full: a tmpfs of 2 MiB with a large file in it, which is then removed."""
    script = """
import subprocess, sys
from pathlib import Path
from kd_assets.errors import StorageUnavailableError
from kd_assets_tests.store import examples, test_kill
mount = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount], check=True)
store, large = Path(mount) / "store", Path(mount) / "large"
large.write_bytes(bytes((2 << 20) - (128 << 10)))
try:
    test_kill.write_everything(store)
except StorageUnavailableError as e:
    print(e)
large.unlink()
with examples.writer(store, examples.output(store, "topk_cache")) as result:
    print(len(result.finished), result.forgotten)
print(test_kill.write_everything(store).data_version)
"""
    done = run_in_mount_namespace(script, str(tmp_path))
    assert done.returncode == 0, done.stderr
    message, finished, data_version = done.stdout.splitlines()
    assert re.search(r"cannot \w+( to)? .*: No space left on device; free some space .* run again", message)
    assert int(finished.split()[0]) > 0
    assert finished.endswith("()")
    assert data_version == write_everything(tmp_path / "undisturbed").data_version


def test_read_only_file_system_is_named_with_its_remedy(tmp_path: Path) -> None:
    script = """
import subprocess, sys
from pathlib import Path
from kd_assets.errors import StorageUnavailableError
from kd_assets_tests.store import test_kill
subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", sys.argv[1]], check=True)
try:
    test_kill.write_everything(Path(sys.argv[1]) / "store")
except StorageUnavailableError as e:
    print(e)
"""
    done = run_in_mount_namespace(script, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"cannot create the folder {tmp_path}/store" in done.stdout
    assert "Read-only file system; mount it writable" in done.stdout


def test_write_that_the_kernel_cuts_short_loses_nothing(tmp_path: Path) -> None:
    """A limit on file size (RLIMIT_FSIZE) stands in for the full disk, so that this runs without any privilege."""
    script = """
import resource, sys
from pathlib import Path
from kd_assets.errors import StorageUnavailableError
from kd_assets.store import part_stats
from kd_assets_tests.store import examples
store = Path(sys.argv[1])
small, large = examples.documents(), examples.documents([500] * 4)
with examples.writer(store, examples.output(store, "topk_cache")) as result:
    rows = examples.table("topk_cache", small)
    result.write_part(0, rows, n_tokens=small.n_tokens, stats=part_stats("topk_cache", rows))
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    rows = examples.table("topk_cache", large)
    try:
        result.write_part(1, rows, n_tokens=large.n_tokens, stats=part_stats("topk_cache", rows))
    except StorageUnavailableError as e:
        print(e)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "part-00001.parquet: File too large; raise the largest file size" in done.stdout
    out = examples.output(tmp_path, "topk_cache")
    with examples.writer(tmp_path, out) as result:
        assert list(result.finished) == [0]
    assert sorted(path.name for path in Path(out.path).iterdir()) == [".lease", "journal.jsonl", "part-00000.parquet"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder_is_named_with_its_remedy(tmp_path: Path) -> None:
    tmp_path.chmod(0o550)
    try:
        with pytest.raises(StorageUnavailableError, match="make it writable for the user that runs the job"):
            write_everything(tmp_path / "store")
    finally:
        tmp_path.chmod(0o750)


def test_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StorageUnavailableError, match=r"cannot create the folder .*store/tiny.* a file is in the way"):
        write_everything(tmp_path / "store")
    with pytest.raises(StorageUnavailableError, match="a file is in the way"):
        prepare_folder(tmp_path / "store")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailableError, match="check that the store is mounted"):
        atomic_write(tmp_path / "missing" / "file", b"")
    with pytest.raises(StorageUnavailableError, match=r"cannot append to .*audit\.jsonl"):
        append_audit(tmp_path / "missing", {})


def test_half_a_line_in_the_audit_log_does_not_tear_the_next(tmp_path: Path) -> None:
    append_audit(tmp_path, {"n": 1})
    with (tmp_path / "audit.jsonl").open("ab") as audit:
        audit.write(b'{"n": 2, "half')
    append_audit(tmp_path, {"n": 3})
    assert (tmp_path / "audit.jsonl").read_text() == '{"n": 1}\n{"n": 2, "half\n{"n": 3}\n'


def bytes_read() -> int:
    """What this process has read so far, as the kernel counts it."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def test_commit_reads_as_little_of_a_long_audit_log_as_of_a_short_one(tmp_path: Path) -> None:
    examples.commit(tmp_path, "topk_cache")
    log = tmp_path / "tiny" / "audit.jsonl"
    (line,) = log.read_bytes().splitlines(keepends=True)
    before = bytes_read()
    examples.commit(tmp_path, "embedding_cache")
    short = bytes_read() - before

    n_lines = 40_000
    log.write_bytes(line * n_lines)
    before = bytes_read()
    examples.commit(tmp_path, "hidden_state_cache")
    assert bytes_read() - before <= short + 10_000
    with log.open("rb") as file:
        lines = file.readlines()
    assert len(lines) == n_lines + 1
    assert b'"asset": "hidden_state_cache"' in lines[-1]


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")
    with pytest.raises(TypeError):
        atomic_write(path, "no bytes")  # type: ignore[arg-type]
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_manifest_of_an_empty_result_is_committed_and_audited(tmp_path: Path) -> None:
    """A shard whose documents were all kept out has no parts."""
    out = examples.output(tmp_path, "shards_manifest")
    with examples.writer(tmp_path, out) as result:
        manifest: Manifest = result.commit(parts=0, checks={}, provenance={}, facts={"n_empty_documents": 2})
    assert (manifest.n_documents, manifest.parts, manifest.facts) == (0, (), {"n_empty_documents": 2})
    assert len((tmp_path / "tiny" / "audit.jsonl").read_text().splitlines()) == 1
