"""A tensor-parallel teacher of two gloo ranks on the CPU, through the real worker: its caches, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_assets.contract import Event, TeacherParams, WorkUnit, event_file, read_events
from kd_assets.errors import EXIT_FAILED, EXIT_RESUMABLE, OutOfDeviceMemoryError, RankLostError
from kd_assets.store import read_manifest, read_shard
from kd_assets.teacher.devices import rank_group as ranks
from kd_assets.teacher.devices.lost_rank import lost_rank
from kd_assets.teacher.devices.rank_group import rank_environment
from kd_assets.teacher.model.load import load_teacher
from kd_assets.teacher.recompute import Comparison, reference, stored_row
from kd_assets_tests.teacher.tiny import (
    Desk,
    part_bytes,
    save_teacher,
    tiny_documents,
    tiny_params,
)

WAIT_S = 300.0
TENSOR_PARALLEL: dict[str, Any] = {"placement": "tensor_parallel", "n_devices": 2}
SMALL_PARTS: dict[str, Any] = {"part_documents": 1, "token_budget": 64}


SPLIT = (
    "llama", "llama_tied", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3", "phi", "gpt_neox", "granite", "cohere",
    "olmo2", "deepseek_v3",
)  # fmt: skip
"""Tiny teachers whose heads divide by 2, of architectures with plans of every kind."""
ROUNDING = {"block": 2.0**-8, "logprobs": 2.0**-10}
"""Of what is stored in 16 bits: a number on the edge may be rounded to either side."""


class Tasks:
    """Tasks of jobs over one saved teacher, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher = save_teacher(folder / "teacher")
        self.processes: list[subprocess.Popen[str]] = []
        self.documents = tiny_documents([30, 7, 50, 64, 20, 1, 33, 12, *[40] * 24])

    def prepare(self, name: str, **params: Any) -> Task:
        desk, all_params = Desk(self.folder / name), tiny_params(self.teacher, **params)
        unit = desk.unit(desk.commit_shard(self.documents), all_params)
        (desk.folder / "job.json").write_text(desk.job(all_params, [unit]).to_json())
        return Task(self, desk, unit, all_params)


class Task:
    def __init__(self, tasks: Tasks, desk: Desk, unit: WorkUnit, params: TeacherParams) -> None:
        self.tasks, self.desk, self.unit, self.params = tasks, desk, unit, params

    def start(
        self, *, attempt: int = 0, program: str = "kd_assets.worker", **environment: str
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", program, str(self.desk.folder / "job.json")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "SLURM_RESTART_COUNT": str(attempt), **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.tasks.processes.append(process)
        return process

    def events(self, event_type: str) -> list[dict[str, Any]]:
        found = (event for _, event in read_events(event_file(self.desk.folder / "events", 0)))
        return [e.data for e in found if isinstance(e, Event) and e.type == event_type]

    def wait_for(self, event_type: str, process: subprocess.Popen[str]) -> None:
        wait_until(lambda: bool(self.events(event_type)) or process.poll() is not None)
        assert self.events(event_type), f"no {event_type}, exit status {process.poll()}"


@pytest.fixture
def tasks(tmp_path: Path) -> Iterator[Tasks]:
    made = Tasks(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


def wait_until(is_so: Callable[[], bool], *, seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def of_rank_1(process: subprocess.Popen[str]) -> int:
    """Its process id, once it runs our program."""
    found: list[int] = []

    def is_there() -> bool:
        found[:] = [
            p for p in children_of(process.pid) if b"devices.follower" in Path(f"/proc/{p}/cmdline").read_bytes()
        ]
        return len(found) == 1

    wait_until(is_there)
    return found[0]


# ------------------------------------------------------------------------------------------------------ the same


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A task that two ranks finished; parts of one document."""
    tasks = Tasks(tmp_path_factory.mktemp("uninterrupted"))
    task = tasks.prepare("whole", **SMALL_PARTS, **TENSOR_PARALLEL)
    process = task.start()
    said = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 0, said
    return task


def test_two_ranks_make_the_caches_that_one_process_makes(uninterrupted: Task) -> None:
    task = uninterrupted
    (loaded,) = task.events("teacher_loaded")
    assert (loaded["placement"], loaded["n_devices"], loaded["head"]) == ("tensor_parallel", 2, "proven")
    assert len(task.events("committed")) == 3
    assert [p.name for p in (task.desk.folder / "events").iterdir()] == ["task-00000.jsonl"], "only rank 0 reports"

    whole = load_teacher(task.params, digests=None, warn=pytest.fail)
    shard = read_shard(Path(task.unit.inputs["shards_manifest"][0]))
    for output in task.unit.outputs:
        manifest = read_manifest(Path(output.path))
        assert manifest.checks["recomputed"]["passed"]
        comparison = Comparison(asset=output.asset, dtype=torch.float32, seed=0)
        for index, part in enumerate(manifest.parts):
            document = shard.slice(index, 1, max_length=64)
            comparison.add(stored_row(Path(output.path) / part.name, 0), reference(whole, document.input_ids, (1,)))
        assert comparison.result(shard.document_ids)["passed"]


def test_architectures_split_over_two_ranks_give_what_they_give_in_one_piece(tmp_path: Path) -> None:
    for name in SPLIT:
        save_teacher(tmp_path / name, name)
    program = [sys.executable, "-m", "kd_assets_tests.teacher.split_teachers", str(tmp_path)]
    ranks = [
        subprocess.Popen(
            [*program, str(rank), *SPLIT],
            env={**os.environ, **rank_environment(rank, 2)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=WAIT_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    # Beside the JSON they say that they hash.
    said = [[json.loads(line) for line in out.splitlines() if line.startswith("{")] for out, _ in told]
    *compared, refused = said[0]
    for found in compared:
        assert found["head"], found
        assert found["n_parameters"][0] == found["n_parameters"][1], found
        for what, difference in found["differences"].items():
            assert difference < ROUNDING.get(what.split()[0], 1e-5), found
    assert "its ranks hold different outputs of block 1" in refused["said"]
    assert [found["said"] for found in said[1]] == [refused["said"]], "every rank raises it, so that none waits"


# ------------------------------------------------------------------------------------------------------- the end


@pytest.mark.slow
def test_a_split_teacher_stopped_by_usr1_resumes_to_the_same_bytes(tasks: Tasks, uninterrupted: Task) -> None:
    """The signal goes to all processes, as a scheduler's may."""
    task = tasks.prepare("stopped", **SMALL_PARTS, **TENSOR_PARALLEL)
    process = task.start()
    other = of_rank_1(process)
    wait_until(lambda: bool(part_bytes(task.unit)) or process.poll() is not None)
    os.kill(other, signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(WAIT_S) == EXIT_RESUMABLE
    assert 0 < len(part_bytes(task.unit)) < 3 * tasks.documents.n_documents
    assert task.start(attempt=1).wait(WAIT_S) == 0
    assert part_bytes(task.unit) == part_bytes(uninterrupted.unit)


def test_a_killed_rank_ends_the_task_with_its_reason(tasks: Tasks) -> None:
    task = tasks.prepare("killed", **SMALL_PARTS, **TENSOR_PARALLEL)
    process = task.start()
    task.wait_for("teacher_loaded", process)
    os.kill(of_rank_1(process), signal.SIGKILL)
    assert process.wait(WAIT_S) == EXIT_FAILED, "not when a collective gives up"
    (failed,) = task.events("partition_failed")
    assert (failed["error"], failed["during"]) == ("RankLostError", "run")
    assert failed["message"].startswith("rank 1 of 2 of the teacher was killed by SIGKILL")
    (finished,) = task.events("task_finished")
    assert (finished["status"], finished["n_failed"]) == ("failed", 1)


def test_no_rank_outlives_rank_0(tasks: Tasks) -> None:
    task = tasks.prepare("orphans", **TENSOR_PARALLEL)
    process = task.start()
    other = of_rank_1(process)
    process.kill()
    process.wait()
    wait_until(lambda: not is_alive(other))


def test_a_rank_that_cannot_load_ends_the_task_with_its_reason(tasks: Tasks) -> None:
    """Its Python lacks a package, which that of rank 0 has."""
    (tasks.folder / "sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('RANK') == '1': sys.modules['safetensors'] = None\n"
    )
    task = tasks.prepare("broken", **TENSOR_PARALLEL)
    process = task.start(PYTHONPATH=os.pathsep.join([str(tasks.folder), *sys.path]))
    said = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode not in (0, EXIT_RESUMABLE)
    (failed,) = task.events("partition_failed")
    assert failed["message"].startswith("rank 1 of 2")
    assert failed["during"] == "load"
    assert "rank 1: Traceback" in said
    (finished,) = task.events("task_finished")
    assert (finished["status"], finished["n_failed"]) == ("failed", 1)


STUCK = """
    import sys, time
    from kd_assets.worker.main import main
    from kd_assets.teacher.devices import rank_group as ranks

    class Stuck:
        def __init__(self, job, report, stop):
            ranks.STUCK_S = 0.5
            child = (sys.executable, "-c", "import sys; sys.exit('no more memory on this rank')")
            self.ranks = ranks.RankGroup(2, ("load",), report_fatal=report.report_fatal, program=child)
        def run(self, unit):
            time.sleep(300)
        def close(self):
            pass

    sys.exit(main(sys.argv, make_runner=Stuck))
"""


def test_a_main_thread_that_waits_for_a_lost_rank_for_ever_is_ended_with_last_words(tasks: Tasks) -> None:
    """As in a kernel of NCCL; gloo would say that its connection broke."""
    (tasks.folder / "stuck.py").write_text(textwrap.dedent(STUCK))
    task = tasks.prepare("stuck")
    process = task.start(program="stuck", PYTHONPATH=os.pathsep.join([str(tasks.folder), *sys.path]))
    assert process.wait(WAIT_S) == EXIT_FAILED
    (failed,) = task.events("partition_failed")
    assert failed["error"] == "RankLostError"
    assert "rank 1 of 2 of the teacher ended with status 1" in failed["message"]
    assert failed["message"].endswith("Its last lines:\n  no more memory on this rank")
    (finished,) = task.events("task_finished")
    assert (finished["status"], finished["n_failed"]) == ("failed", 1)


def test_a_rank_that_ends_before_it_is_told_anything_ends_with_its_reason() -> None:
    """The message is larger than a pipe holds, so that it is never told."""
    program = (sys.executable, "-c", "import sys; sys.exit('no module of ours')")
    with pytest.raises(RankLostError, match=r"(?s)rank 1 of 2 of the teacher ended with status 1.*no module of ours"):
        ranks.RankGroup(2, (bytes(2**20),), report_fatal=print, program=program)


LISTENER = """
    import sys
    from multiprocessing.connection import Connection
    from pathlib import Path

    connection = Connection(int(sys.argv[sys.argv.index("--pipe") + 1]))
    commands = [connection.recv_bytes(), connection.recv_bytes()]
    Path(sys.argv[-1]).with_name("told").touch()
"""


def test_all_ranks_leave_their_group_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL ends a group only when every rank of the node does: gloo would not mind."""
    program = (sys.executable, "-c", textwrap.dedent(LISTENER))
    others = ranks.RankGroup(2, ("load",), report_fatal=print, program=program)
    told = others.store_file.with_name("told")
    monkeypatch.setattr(ranks, "leave_group", lambda: wait_until(told.exists))
    others.close()


@pytest.mark.parametrize(
    ("status", "word", "expected", "message"),
    [
        (-9, None, RankLostError, "rank 2 of 4 of the teacher was killed by SIGKILL; the others cannot go on"),
        (1, ("OutOfDeviceMemoryError", "too large"), OutOfDeviceMemoryError, "rank 2 of 4: too large"),
        (1, ("RuntimeError", "no kernel"), RankLostError, "failed with RuntimeError: no kernel"),
        (3, None, RankLostError, "ended with status 3"),
    ],
)
def test_a_lost_rank_is_named_with_how_it_ended(
    status: int, word: tuple[str, str] | None, expected: type[Exception], message: str
) -> None:
    error = lost_rank(2, 4, status, word, ["first line", "last line"]).error
    assert type(error) is expected
    assert message in str(error)


def test_a_rank_that_only_lost_its_connection_is_not_the_cause() -> None:
    assert not lost_rank(2, 4, 1, ("RuntimeError", "Connection closed by peer [127.0.0.1]:1234"), []).is_cause
    assert lost_rank(1, 4, -9, None, []).is_cause
