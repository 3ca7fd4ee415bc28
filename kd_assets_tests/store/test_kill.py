"""Real processes, really killed: what they leave behind, and that the next one goes on from it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_assets.errors import NotCommittedError, ResultBusyError
from kd_assets.store import Manifest, committed, part_stats, plan_parts, read_manifest, set_head, verify
from kd_assets.store.manifest import write_head
from kd_assets.store.writing.writer import ResultWriter
from kd_assets_tests.store import examples

N_DOCUMENTS = 120
WRITER = """
import sys
from pathlib import Path
from kd_assets_tests.store import examples, test_kill
print("ready", flush=True)
sys.stdin.readline()
test_kill.write_everything(Path(sys.argv[1]))
"""
HOLDER = """
import sys
from pathlib import Path
from kd_assets_tests.store import examples
store = Path(sys.argv[1])
with examples.writer(store, examples.output(store, "topk_cache")):
    print("ready", flush=True)
    sys.stdin.readline()
"""


def write_everything(store: Path) -> Manifest:
    """What a task does: a part for every three documents, except those that are finished, then the commit."""
    docs = examples.documents([1 + i % 50 for i in range(N_DOCUMENTS)])
    plans = plan_parts(docs.n_tokens_D, max_documents=3, max_tokens=10**6)
    with examples.writer(store, examples.output(store, "topk_cache")) as result:
        for plan in plans:
            if plan.index not in result.finished:
                part = docs.slice(plan.first_document, plan.n_documents)
                rows = examples.table("topk_cache", part)
                result.write_part(plan.index, rows, n_tokens=part.n_tokens, stats=part_stats("topk_cache", rows))
        return result.commit(parts=len(plans), checks={}, provenance={})


def start(script: str, store: Path) -> subprocess.Popen[str]:
    """A process of our own that is past its imports and waits for a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lease"}


def test_writer_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    undisturbed, store = tmp_path / "undisturbed", tmp_path / "killed"
    started = time.monotonic()
    expected = write_everything(undisturbed)
    whole_s = time.monotonic() - started
    folder = Path(examples.output(store, "topk_cache").path)

    moments = random.Random(0)
    n_parts_seen = []
    for _ in range(6):
        process = start(WRITER, store)
        go_on(process)
        time.sleep(moments.uniform(0, whole_s / 2))
        kill(process)
        n_parts_seen.append(len(list(folder.glob("part-*"))) if folder.exists() else 0)
        if not (folder / "manifest.json").exists():
            with pytest.raises(NotCommittedError):
                read_manifest(folder)

    manifest = write_everything(store)
    set_head(folder)
    assert n_parts_seen == sorted(n_parts_seen)  # no kill loses a finished part
    assert manifest == expected
    assert files_of(folder) == files_of(Path(examples.output(undisturbed, "topk_cache").path))
    assert len((store / "tiny" / "audit.jsonl").read_text().splitlines()) == 1
    report = verify(store)
    assert (report.ok, report.notes) == (True, ())


@pytest.mark.parametrize("step", ["write_head", "audit_commit", "remove_file"])
def test_kill_between_manifest_and_clean_up_is_tidied_up_by_the_next_reuse(tmp_path: Path, step: str) -> None:
    """The process kills itself at the entry of the step: the moment is exact, the SIGKILL is real."""
    script = f"""
import os, signal, sys
from pathlib import Path
from kd_assets.store.writing import writer
from kd_assets_tests.store import test_kill
print("ready", flush=True)
sys.stdin.readline()
writer.{step} = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
test_kill.write_everything(Path(sys.argv[1]))
"""
    process = start(script, tmp_path)
    go_on(process)
    assert process.wait() == -signal.SIGKILL
    kill(process)
    out = examples.output(tmp_path, "topk_cache")
    folder = Path(out.path)
    assert committed(folder, out.fingerprint) is not None
    report = verify(tmp_path)
    assert [problem.kind for problem in report.problems] == (["no_head"] if step == "write_head" else [])
    assert [note.kind for note in report.notes] == ["interrupted_commit"]

    set_head(folder)
    set_head(folder)
    assert not (folder / "journal.jsonl").exists()
    assert len((tmp_path / "tiny" / "audit.jsonl").read_text().splitlines()) == 1
    assert verify(tmp_path).notes == ()


def test_who_finds_a_commit_that_its_task_is_still_finishing_is_told_so(tmp_path: Path) -> None:
    """The task is stopped between its manifest and its audit line, and then killed there."""
    script = """
import os, signal, sys
from pathlib import Path
from kd_assets.store.writing import writer
from kd_assets_tests.store import test_kill
print("ready", flush=True)
sys.stdin.readline()
writer.audit_commit = lambda *arguments: os.kill(os.getpid(), signal.SIGSTOP)
test_kill.write_everything(Path(sys.argv[1]))
"""
    process = start(script, tmp_path)
    go_on(process)
    folder = Path(examples.output(tmp_path, "topk_cache").path)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    assert not set_head(folder)
    kill(process)
    assert set_head(folder)
    assert (verify(tmp_path).problems, verify(tmp_path).notes) == ((), ())


def test_lease_names_its_holder_and_ends_with_a_kill(tmp_path: Path) -> None:
    process = start(HOLDER, tmp_path)
    with pytest.raises(ResultBusyError, match=f'"pid": {process.pid}'):
        write_everything(tmp_path)
    kill(process)
    assert write_everything(tmp_path).n_documents == N_DOCUMENTS


def test_of_two_processes_one_gets_the_lease_and_the_other_finds_the_result(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from kd_assets.errors import ResultBusyError
from kd_assets_tests.store import test_kill
print("ready", flush=True)
sys.stdin.readline()
n_busy = 0
while True:
    try:
        print(test_kill.write_everything(Path(sys.argv[1])).created_at)
        break
    except ResultBusyError:
        n_busy += 1
print("busy", n_busy)
"""
    processes = [start(script, tmp_path) for _ in range(2)]
    for process in processes:
        go_on(process)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("busy 0" in text for text in outputs) >= 1
    assert verify(tmp_path).ok
    assert len((tmp_path / "tiny" / "audit.jsonl").read_text().splitlines()) == 1


def test_lease_does_not_outlive_its_process_through_a_forked_child(tmp_path: Path) -> None:
    script = """
import os, sys, time
from pathlib import Path
from kd_assets_tests.store import examples
store = Path(sys.argv[1])
writer = examples.writer(store, examples.output(store, "topk_cache"))
writer.__enter__()
child = os.fork()
if child == 0:
    os.close(1)
    sys.stdin.readline()
    os._exit(0)
print("ready", flush=True)
time.sleep(60)
"""
    process = start(script, tmp_path)
    process.kill()
    process.wait()
    try:
        assert write_everything(tmp_path).n_documents == N_DOCUMENTS  # though the child lives, with the file open
    finally:
        go_on(process)
        kill(process)


def test_head_that_points_to_an_unfinished_result_is_no_result(tmp_path: Path) -> None:
    out = examples.output(tmp_path, "topk_cache")
    with examples.writer(tmp_path, out):
        write_head(Path(out.path), out.fingerprint)
    report = verify(tmp_path)
    assert [problem.kind for problem in report.problems] == ["dangling_head"]
    assert str(Path(out.path).parent / "head.json") in report.problems[0].message
    assert [note.kind for note in report.notes] == ["unfinished"]


def test_writer_of_a_result_that_is_committed_meanwhile_returns_that_one(tmp_path: Path) -> None:
    out = examples.output(tmp_path, "topk_cache")
    late: ResultWriter = examples.writer(tmp_path, out)
    first = write_everything(tmp_path)
    before = os.stat(Path(out.path) / "part-00000.parquet").st_mtime_ns
    with late as result:
        assert len(result.finished) == len(first.parts)
        assert result.commit(parts=len(first.parts), checks={"other": {}}, provenance={}) == first
    assert os.stat(Path(out.path) / "part-00000.parquet").st_mtime_ns == before
