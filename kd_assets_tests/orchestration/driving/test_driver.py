"""Join, submit, follow, settle, retry: each transition, and each failure class as a row of a table.

A fake cluster and a fake clock; job folders, event files, marks and committed results are real.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kd_assets.contract import Event
from kd_assets.errors import SchedulerError, SchedulerUnreachableError
from kd_assets.orchestration.driving.following import FollowedJob
from kd_assets.orchestration.driving.listening import milestone_in_words
from kd_assets.orchestration.driving.waiting import LONGEST_BACKOFF_S
from kd_assets.orchestration.retries import FailureClass
from kd_assets.scheduler import Ending, JobSpec, Submission, TaskPhase
from kd_assets.scheduler.submissions import followed_by, followers, mark_cancelled, read_spec
from kd_assets_tests.orchestration.driving.world import RUN_ID, START, World, interrupt

# Submitting and following


def test_missing_results_are_submitted_as_one_job_and_recorded_with_the_task_that_made_them(world: World) -> None:
    world.on_each_submission(world.work_through)
    driver = world.run(n_tasks=2)
    (job,) = world.scheduler.submitted
    assert sorted(world.recorded, key=lambda r: r[0]) == [("p0", job, 0), ("p1", job, 1)]
    assert (driver.failed, driver.failures) == ([], Counter())
    assert world.observed == [(job, Counter())]
    assert "info teacher: submitted fake job 0001 for 2 partitions in 2 tasks" in world.log


def test_a_result_is_recorded_when_it_is_committed_and_not_when_its_task_ends(world: World) -> None:
    def script(job: Submission) -> None:
        world.say(job, "task_started")
        world.at(10, lambda: world.commit_and_say(job, "p0"))
        world.at(500, lambda: world.work_through(job))

    world.on_each_submission(script)
    world.run()
    assert world.recorded_at["p0"] < 12
    assert world.recorded_at["p1"] >= 500
    assert Counter(world.keys_recorded) == {"p0": 1, "p1": 1}


def test_a_result_whose_event_was_lost_is_recorded_when_its_task_has_ended(world: World) -> None:
    def script(job: Submission) -> None:
        world.commit("p0", "p1")
        world.end(job)

    world.on_each_submission(script)
    driver = world.run()
    (job,) = world.scheduler.submitted
    assert world.recorded == [("p0", job, 0), ("p1", job, 0)]
    assert driver.failures == {}


def test_a_committed_event_that_comes_before_the_result_is_seen_is_looked_after(world: World) -> None:
    """As on a shared file system, which shows what another node wrote a while later."""

    def script(job: Submission) -> None:
        world.say(job, "task_started")
        world.say_committed(job, "p0")
        world.at(20, lambda: world.commit("p0"))
        world.at(1000, lambda: world.work_through(job))

    world.on_each_submission(script)
    world.run()
    assert 20 <= world.recorded_at["p0"] < 60


def test_a_task_that_was_taken_for_lost_and_lives_is_still_heard(world: World) -> None:
    """Its event comes late: the result is in the hands of the job that was submitted in its place."""

    def lost(job: Submission) -> None:
        world.say(job, "task_started")
        world.end(job, Ending.LOST)

    def waits(job: Submission) -> None:
        first = world.scheduler.submitted[0]
        world.at(30, lambda: world.commit_and_say(first, "p0"))
        world.at(400, lambda: world.work_through(job))

    world.on_each_submission(lost, waits)
    driver = world.run()
    first = world.scheduler.submitted[0]
    assert (world.recorded[0], world.recorded[1][0]) == (("p0", first, 0), "p1")
    assert world.recorded_at["p0"] < 100
    assert driver.failures == {FailureClass.LOST: 1}


def test_a_task_that_says_it_is_done_has_the_grace_of_the_file_system_to_show_its_results(world: World) -> None:
    def script(job: Submission) -> None:
        world.say(job, "task_started")
        world.say(job, "task_finished")
        world.at(8, lambda: world.commit("p0", "p1"))

    world.on_each_submission(script)
    assert world.run().failures == {}
    assert world.keys_recorded == ["p0", "p1"]


def test_a_task_that_is_requeued_meanwhile_is_not_over(world: World) -> None:
    def script(job: Submission) -> None:
        world.say(job, "task_started")
        world.end(job, Ending.PREEMPTED)
        world.at(5, lambda: world.set_state(job, 0, TaskPhase.PENDING, reason="BeginTime"))
        world.at(60, lambda: world.say(job, "task_started", attempt=1))
        world.at(61, lambda: world.commit_and_say(job, "p0"))
        world.at(62, lambda: world.commit_and_say(job, "p1"))

    world.on_each_submission(script)
    driver = world.run()
    assert len(world.scheduler.submitted) == 1
    assert driver.failures == {FailureClass.KILLED: 1}, "an interruption that the task came back from"
    assert "warning task 0 was requeued (killed) and goes on as attempt 1" in world.log


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"slurm_nodelist": None, "host": "here", "slurm_partition": None}, "on here"),
        ({"slurm_nodelist": "n1", "slurm_partition": "h100"}, "on n1, SLURM job 14_0"),
    ],
)
def test_what_a_task_says_of_its_start_and_its_end_is_words_and_of_slurm_only_where_there_is_one(
    world: World, where: dict[str, Any], words: str
) -> None:
    ids: dict[str, Any] = {
        "slurm_job_id": "17",
        "slurm_array_job_id": "14",
        "slurm_array_task_id": "0",
        "n_partitions": 2,
    }
    usage = {"wall_s": 41.318, "cpu_s": 20.0, "n_cpus": 4, "max_rss_gib": 2.14, "gpu_memory_gib": 60.04}
    counts: dict[str, Any] = {"n_committed": 2, "n_reused": 0, "n_failed": 0, "n_loads": 1}

    def script(job: Submission) -> None:
        world.say(job, "task_started", **ids, **where)
        world.say(job, "teacher_loaded", load_s=1.5, device="cpu", placement={"": 0}, gpu=None)
        world.commit("p0", "p1")
        world.say(job, "task_finished", wall_s=41.318, usage=usage, slurm_job_id="17", **counts)

    world.on_each_submission(script)
    world.run()
    assert [line for line in world.log.lines if "attempt 0: " in line] == [
        f"info task 0, attempt 0: task started, 2 partitions, {words}",
        "info task 0, attempt 0: teacher loaded: load_s 1.5, device cpu",
        "info task 0, attempt 0: task finished: done, 2 results made, 0 reused, 0 failed, in 41 s, 2.1 GiB, "
        "60.0 GiB of GPU memory",
    ]


def test_one_of_several_processes_of_a_task_says_which_it_is() -> None:
    data = {"status": "resumable", "signal": "SIGUSR1", "usage": None, "process_index": 1}
    event = Event(type="task_finished", time=START, task=0, attempt=0, data=data)
    assert milestone_in_words(event) == "task finished: resumable after SIGUSR1 (process 1)"


def test_what_a_task_prints_is_in_the_log_to_its_last_line(world: World) -> None:
    def script(job: Submission) -> None:
        log = world.scheduler.log_file(job, 0)
        world.say(job, "task_started")
        world.at(1, lambda: log.write_text("first\n"))
        world.at(7, lambda: log.write_text("first\nlast\n"))
        world.at(7, lambda: world.work_through(job))

    world.on_each_submission(script)
    world.run()
    assert [line for line in world.log.lines if " | " in line] == ["info task 0 | first", "info task 0 | last"]


# Joining


def test_a_live_job_that_is_at_the_work_is_joined_and_only_the_rest_is_submitted(world: World) -> None:
    theirs = world.job_of_another_run(["p0"])
    world.say(theirs, "task_started")
    world.at(30, lambda: world.work_through(theirs))
    world.on_each_submission(world.work_through)
    world.run()
    (ours,) = world.scheduler.submitted
    assert sorted(world.recorded) == [("p0", theirs, 0), ("p1", ours, 0)]
    assert "info teacher: found, still running, fake job 0001 with 1 of the results" in world.log


def test_what_was_committed_meanwhile_by_somebody_is_recorded_and_not_submitted(world: World) -> None:
    world.commit("p0", "p1")
    world.run()
    assert world.recorded == [("p0", None, None), ("p1", None, None)]
    assert world.scheduler.submitted == []


def test_a_joined_job_that_dies_is_tried_again(world: World) -> None:
    theirs = world.job_of_another_run(["p0", "p1"])
    world.say(theirs, "task_started")
    world.at(5, lambda: world.end(theirs, Ending.KILLED))
    world.on_each_submission(world.work_through)
    driver = world.run()
    (ours,) = world.scheduler.submitted
    assert world.recorded == [("p0", ours, 0), ("p1", ours, 0)]
    assert driver.failures == {FailureClass.KILLED: 1}


def test_the_tasks_of_a_live_job_that_have_said_their_last_word_are_not_joined(world: World) -> None:
    theirs = world.job_of_another_run(["p0", "p1"], n_tasks=2)
    world.say(theirs, "task_started", 0)
    world.say(theirs, "task_finished", 0, status="failed")
    world.at(20, lambda: world.say(theirs, "task_started", 1))
    world.at(21, lambda: world.commit_and_say(theirs, "p1", 1))
    world.on_each_submission(world.work_through)
    driver = world.run()
    (ours,) = world.scheduler.submitted
    assert sorted(world.recorded) == [("p0", ours, 0), ("p1", theirs, 1)]
    assert driver.failures == {}, "its failure was another run's"


def test_a_job_that_is_being_cancelled_is_not_joined(world: World) -> None:
    theirs = world.job_of_another_run(["p0"])
    mark_cancelled(theirs)
    world.on_each_submission(world.work_through)
    world.run()
    assert len(world.scheduler.submitted) == 1
    assert set(world.keys_recorded) == {"p0", "p1"}


@pytest.mark.parametrize("damage", ["another version", "not JSON", "gone"])
def test_a_live_job_of_another_version_is_not_joined_and_does_not_fail_the_run(world: World, damage: str) -> None:
    theirs = world.job_of_another_run(["p0"])
    if damage == "another version":
        raw = json.loads(theirs.job_file.read_text())
        theirs.job_file.write_text(json.dumps(raw | {"contract_version": 1}))
    elif damage == "not JSON":
        theirs.job_file.write_text("{")
    else:
        theirs.job_file.unlink()
    world.on_each_submission(world.work_through)
    driver = world.run()
    (ours,) = world.scheduler.submitted
    assert {job for _, job, _ in world.recorded} == {ours}
    assert driver.failed == []
    assert world.log.count("cannot be joined") == 1


def test_the_jobs_that_a_run_waits_for_are_marked_for_others_as_long_as_it_lives(world: World) -> None:
    seen = []

    def script(job: Submission) -> None:
        seen.append(followers(job))
        world.work_through(job)

    world.on_each_submission(script)
    world.run()
    (job,) = world.scheduler.submitted
    assert seen == [{RUN_ID: True}], "from before it is submitted"
    assert followers(job) == {RUN_ID: False}


# Every class of failure


@dataclass(frozen=True)
class Row:
    failure: FailureClass
    end: Callable[[World, Submission], object]
    """How a task of p0 and p1 ends without its results."""
    is_retried: bool = True
    asks: Callable[[JobSpec], object] = lambda spec: None
    """What of the next job's spec is asked for otherwise …"""
    expected: object = None
    """… and what it is then."""
    words: str = ""
    """In the log, or in the cause of what is given up."""


def failing(error: str) -> Callable[[World, Submission], None]:
    def end(world: World, job: Submission) -> None:
        for key in ("p0", "p1"):
            world.say(job, "partition_failed", partition_key=key, error=error, message="so it is")
        world.say(job, "task_finished", status="failed")

    return end


def ending(ending: Ending, **state: Any) -> Callable[[World, Submission], None]:
    return lambda world, job: world.end(job, ending, **state)


ROWS = (
    Row(FailureClass.INTERRUPTED, ending(Ending.EXITED, exit_code=75)),
    Row(FailureClass.TIME_LIMIT, ending(Ending.TIME_LIMIT)),
    Row(FailureClass.PREEMPTED, ending(Ending.PREEMPTED)),
    Row(
        FailureClass.NODE_FAILURE,
        ending(Ending.NODE_FAILURE, node="node7"),
        asks=lambda spec: spec.excluded_nodes,
        expected=("node7",),
        words="tried again, without node node7",
    ),
    Row(
        FailureClass.NODE_FAULT,
        ending(Ending.EXITED, exit_code=127, node="node8"),
        words="is a mount missing?, on node node8); tried again",
    ),
    Row(
        FailureClass.HOST_MEMORY,
        ending(Ending.HOST_MEMORY),
        asks=lambda spec: spec.resources.memory_gib,
        expected=2.0,
        words="tried again, with 2 GiB of memory",
    ),
    Row(
        FailureClass.DEVICE_MEMORY,
        failing("OutOfDeviceMemoryError"),
        words="tried again, with batches of 2048 tokens",
    ),
    Row(FailureClass.KILLED, ending(Ending.KILLED), words="tried again"),
    Row(FailureClass.STORAGE, failing("StorageUnreachableError"), words="tried again"),
    Row(
        FailureClass.LAUNCH_FAILURE,
        ending(Ending.LAUNCH_FAILURE, node="node9"),
        asks=lambda spec: spec.excluded_nodes,
        expected=("node9",),
    ),
    Row(FailureClass.LOST, ending(Ending.LOST)),
    Row(FailureClass.NO_RESULT, lambda world, job: world.say(job, "task_finished")),
    Row(FailureClass.HELD, ending(Ending.HELD, reason="launch failed twice"), is_retried=False, words="launch failed"),
    Row(FailureClass.IMPOSSIBLE, ending(Ending.IMPOSSIBLE), is_retried=False),
    Row(FailureClass.CANCELLED, ending(Ending.CANCELLED), is_retried=False),
    Row(
        FailureClass.WORK,
        failing("TeacherError"),
        is_retried=False,
        words="TeacherError: so it is, on node node1 (log: ",
    ),
)


def test_the_table_has_every_class_of_failure() -> None:
    assert [row.failure for row in ROWS] == list(FailureClass)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.failure.name)
def test_what_a_failed_task_left_is_tried_again_or_given_up_by_its_class(world: World, row: Row) -> None:
    def fails(job: Submission) -> None:
        if row.failure is not FailureClass.LAUNCH_FAILURE:
            world.say(job, "task_started")
        row.end(world, job)

    world.on_each_submission(fails, world.work_through)
    driver = world.run()
    assert driver.failures == {row.failure: 1}, "once for the task, not for each of its partitions"
    assert world.observed[0] == (world.scheduler.submitted[0], Counter({row.failure: 1}))
    if row.is_retried:
        assert driver.failed == []
        _, again = world.specs()
        assert row.asks(again) == row.expected
        assert {job for _, job, _ in world.recorded} == {world.scheduler.submitted[1]}
        assert row.words in world.log
    else:
        assert len(world.scheduler.submitted) == 1
        assert [(f.partition_key, f.asset, f.failure) for f in driver.failed] == [
            (key, "topk_cache", row.failure) for key in ("p0", "p1")
        ]
        log_file = world.scheduler.log_file(world.scheduler.submitted[0], 0)
        assert all(row.words in f.cause and str(log_file) in f.cause and f.log_file == log_file for f in driver.failed)


def test_a_node_is_left_out_after_its_second_fault_and_all_is_made_elsewhere(tmp_path: Path) -> None:
    """A node without its mount is free again at once, and would be given one task after the other."""
    world = World(tmp_path, [f"p{i}" for i in range(6)])

    def on_n1(job: Submission, task: int) -> None:
        kept_from = world.scheduler.kept_from.get(job, set()) | set(read_spec(job).excluded_nodes)
        if "n1" not in kept_from:
            world.end(job, task=task, node="n1", exit_code=127)
        else:
            world.set_state(job, task, TaskPhase.RUNNING, node="n2")
            world.at(1, lambda: finishes(job, task))

    def finishes(job: Submission, task: int) -> None:
        world.say(job, "task_started", task, slurm_nodelist="n2")
        for output in FollowedJob.of(job).outputs_of(task):
            world.commit_and_say(job, Path(output.path).parent.name, task)
        world.end(job, task=task, exit_code=0, node="n2")

    def script(job: Submission) -> None:
        for task in range(read_spec(job).n_tasks):
            world.at(30 * task + 1, partial(on_n1, job, task))

    world.on_each_submission(*[script] * 4)
    driver = world.run(n_tasks=6)
    assert driver.failed == []
    assert driver.failures == {FailureClass.NODE_FAULT: 2}
    assert driver.node_faults.sick_nodes == {"n1"}
    assert world.log.count("node n1 is left out from now on: n1 (2 faults; the last: task") == 1
    assert world.scheduler.kept_from[world.scheduler.submitted[0]] == {"n1"}, "also what waited already"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RuntimeError", "CUDA error: uncorrectable ECC error encountered"),
        ("AcceleratorError", "CUDA error: no CUDA-capable device is detected"),
        ("RankLostError", "rank 1: RuntimeError: CUDA error: uncorrectable ECC error encountered"),
        ("NVMLError_DriverNotLoaded", "Driver Not Loaded"),
        ("NodeFaultError", "4 GPUs were given and none is seen"),
    ],
)
def test_what_a_task_reports_of_a_broken_node_is_tried_again_elsewhere(world: World, error: str, message: str) -> None:
    def fails(job: Submission) -> None:
        world.say(job, "task_started")
        for key in ("p0", "p1"):
            world.say(job, "partition_failed", partition_key=key, error=error, message=message)
        world.say(job, "task_finished", status="failed")

    world.on_each_submission(fails, fails, world.work_through)
    driver = world.run()
    assert driver.failures == {FailureClass.NODE_FAULT: 2}, "once for a task, however many partitions it had"
    assert [spec.excluded_nodes for spec in world.specs()] == [(), (), ("node1",)]


def test_a_node_that_cannot_launch_tasks_is_left_out_by_what_waits_too(world: World) -> None:
    """As where the folder of the logs is not mounted: SLURM itself cannot begin the script."""

    def first(job: Submission) -> None:
        world.end(job, Ending.LAUNCH_FAILURE, 0, node="n1")
        world.end(job, Ending.LAUNCH_FAILURE, 1, node="n1")
        world.at(60, lambda: world.work_through(job))

    world = World(world.store.parents[1] / "another", [f"p{i}" for i in range(3)])
    world.on_each_submission(first, world.work_through)
    driver = world.run(n_tasks=3)
    assert driver.node_faults.sick_nodes == {"n1"}
    assert world.scheduler.kept_from[world.scheduler.submitted[0]] == {"n1"}


def test_what_every_node_lacks_ends_with_a_message_that_says_so(world: World) -> None:
    def on(node: str) -> Callable[[Submission], object]:
        return lambda job: world.end(job, node=node, exit_code=127)

    world.on_each_submission(on("n1"), on("n1"), on("n2"), on("n3"))
    driver = world.run()
    assert len(world.scheduler.submitted) == 4
    assert "failed so on 3 nodes (n1, n2, n3)" in driver.failed[0].cause
    assert ", on node n3" in driver.failed[0].cause


def test_what_the_only_node_there_is_lacks_ends_after_three_starts(world: World) -> None:
    """As on a laptop, where nothing can be left out."""
    world.on_each_submission(*[lambda job: world.end(job, node="n1", exit_code=127)] * 3)
    driver = world.run()
    assert "failed so 3 times on n1 and was given no other node" in driver.failed[0].cause


def test_a_request_that_leaves_no_node_says_which_were_left_out_and_why(world: World) -> None:
    def refused(job: Submission) -> None:
        raise SchedulerError("Requested node configuration is not available")

    sick: Callable[[Submission], object] = lambda job: world.end(job, node="n1", exit_code=126)  # noqa: E731
    world.on_each_submission(sick, sick, refused)
    driver = world.run()
    assert "not available; it leaves out n1, for tasks failed there: n1 (2 faults" in driver.failed[0].cause


def test_a_part_that_no_time_limit_suffices_for_is_given_up_with_the_numbers(world: World) -> None:
    def too_short(job: Submission) -> None:
        world.say(job, "task_started")
        world.say(job, "teacher_loaded", load_s=41.3)
        world.end(job, Ending.TIME_LIMIT)

    world.on_each_submission(*[too_short] * 3)
    driver = world.run()
    assert "the site's time limit, of which loading took 41 s, is too short for a part" in driver.failed[0].cause


def test_a_smaller_token_budget_reaches_the_tasks(world: World) -> None:
    def fails(job: Submission) -> None:
        world.say(job, "task_started")
        failing("OutOfDeviceMemoryError")(world, job)

    world.on_each_submission(fails, world.work_through)
    world.run(token_budget=4096)
    budgets = [json.loads(job.job_file.read_text())["teacher"]["token_budget"] for job in world.scheduler.submitted]
    assert budgets == [4096, 2048]


def test_a_job_that_another_run_of_ours_cancelled_is_tried_again(world: World) -> None:
    def cancelled(job: Submission) -> None:
        mark_cancelled(job)
        world.end(job, Ending.CANCELLED)

    world.on_each_submission(cancelled, world.work_through)
    driver = world.run()
    assert driver.failures == {FailureClass.INTERRUPTED: 1}
    assert set(world.keys_recorded) == {"p0", "p1"}


def test_three_attempts_without_progress_end_it_and_progress_renews_them(world: World) -> None:
    def killed(job: Submission) -> None:
        world.say(job, "task_started")
        world.end(job, Ending.KILLED)

    def killed_after_p0(job: Submission) -> None:
        world.say(job, "task_started")
        world.commit("p0")
        world.end(job, Ending.KILLED)

    world.on_each_submission(killed, killed, killed_after_p0, killed, killed)
    driver = world.run()
    assert world.keys_recorded == ["p0"]
    (failed,) = driver.failed
    assert failed.partition_key == "p1"
    assert "given up after 3 attempts in a row without a new part on disk" in failed.cause
    assert len(world.scheduler.submitted) == 5


def test_partitions_that_failed_alike_in_one_look_are_tried_again_as_one_job_of_as_many_tasks(world: World) -> None:
    def both_killed(job: Submission) -> None:
        world.end(job, Ending.KILLED, 0)
        world.end(job, Ending.KILLED, 1)

    world.on_each_submission(both_killed, world.work_through)
    world.run(n_tasks=2)
    assert [spec.n_tasks for spec in world.specs()] == [2, 2]


def test_one_task_fails_and_the_others_go_on(world: World) -> None:
    def script(job: Submission) -> None:
        world.say(job, "task_started", 0)
        world.say(job, "task_started", 1)
        world.say(job, "partition_failed", 0, partition_key="p0", error="TeacherError", message="no")
        world.say(job, "task_finished", 0, status="failed")
        world.at(50, lambda: world.commit_and_say(job, "p1", 1))

    world.on_each_submission(script)
    driver = world.run(n_tasks=2)
    assert [f.partition_key for f in driver.failed] == ["p0"]
    assert world.keys_recorded == ["p1"]


def test_a_damaged_result_is_given_up_with_what_to_do_and_is_not_submitted(world: World) -> None:
    world.commit("p0")
    manifest = world.folder_of("p0") / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"n_bytes": 1', '"n_bytes": 2'))
    world.on_each_submission(world.work_through)
    driver = world.run()
    (failed,) = driver.failed
    assert (failed.partition_key, failed.failure) == ("p0", FailureClass.WORK)
    assert f"Move {world.folder_of('p0')} away and materialize again" in failed.cause
    assert world.keys_recorded == ["p1"]


def test_a_result_that_is_damaged_when_its_task_ends_is_given_up(world: World) -> None:
    def script(job: Submission) -> None:
        world.say(job, "task_started")
        world.at(5, lambda: world.commit("p0"))
        world.at(5, lambda: (world.folder_of("p0") / "manifest.json").write_text("{"))
        world.at(6, lambda: world.commit_and_say(job, "p1"))
        world.at(7, lambda: world.say(job, "task_finished"))

    world.on_each_submission(script)
    driver = world.run()
    assert [f.partition_key for f in driver.failed] == ["p0"]
    assert "is not JSON" in driver.failed[0].cause


# A scheduler that does not answer


def answers_again(world: World, after_s: float) -> None:
    def again() -> None:
        world.scheduler.answers = True

    world.scheduler.answers = False
    world.at(after_s, again)


def test_the_first_submission_waits_for_a_scheduler_that_does_not_answer(world: World) -> None:
    answers_again(world, 600)
    world.on_each_submission(world.work_through)
    driver = world.run()
    assert driver.failed == []
    assert set(world.keys_recorded) == {"p0", "p1"}
    assert world.now - START < 600 + 1.5 * LONGEST_BACKOFF_S
    assert world.log.count("the scheduler does not answer") == 1
    assert world.scheduler.n_live < 20, "asked ever more seldom"


def test_a_scheduler_that_does_not_answer_while_jobs_run_costs_nothing(world: World) -> None:
    def script(job: Submission) -> None:
        world.say(job, "task_started")
        answers_again(world, 300)
        world.at(50, lambda: world.commit_and_say(job, "p0"))
        world.at(300 + 2 * LONGEST_BACKOFF_S, lambda: world.work_through(job))

    world.on_each_submission(script)
    driver = world.run()
    assert world.recorded_at["p0"] < 52, "recording does not wait for the scheduler"
    assert driver.failures == {}
    assert world.log.count("the scheduler does not answer") == 1
    assert world.log.count("the scheduler answers again, after") == 1


def test_a_retry_that_waits_for_the_scheduler_keeps_nothing_else_from_being_recorded(world: World) -> None:
    """Task 0 is killed while the controller is away; task 1 goes on to commit, and prints."""

    def script(job: Submission) -> None:
        log = world.scheduler.log_file(job, 1)
        for task in (0, 1):
            world.say(job, "task_started", task)
        world.say(job, "partition_failed", 0, partition_key="p0", error="RankLostError", message="gone")
        world.say(job, "task_finished", 0, status="failed")
        answers_again(world, 3000)
        world.at(200, lambda: log.write_text("a line\n"))
        world.at(300, lambda: world.commit_and_say(job, "p1", 1))

    world.on_each_submission(script, world.work_through)
    driver = world.run(n_tasks=2)
    assert world.recorded_at["p1"] < 302
    assert "info task 1 | a line" in world.log
    assert 3000 <= world.recorded_at["p0"] < 3000 + 1.5 * LONGEST_BACKOFF_S
    assert driver.failures == {FailureClass.KILLED: 1}


def test_a_first_submission_that_waits_for_the_scheduler_records_what_joined_jobs_commit(world: World) -> None:
    """The scheduler goes away between finding a live job and taking the rest."""
    theirs = world.job_of_another_run(["p0"])
    world.say(theirs, "task_started")
    submit = world.scheduler.submit

    def away(spec: JobSpec, write_job_file: Callable[[Submission], object]) -> Submission:
        answers_again(world, 1000)
        world.scheduler.submit = submit  # type: ignore[method-assign]
        return submit(spec, write_job_file)

    world.scheduler.submit = away  # type: ignore[method-assign]
    world.at(100, lambda: world.commit_and_say(theirs, "p0"))
    world.on_each_submission(world.work_through)
    world.run()
    assert 100 <= world.recorded_at["p0"] < 102
    assert world.recorded_at["p1"] >= 1000


def test_what_somebody_commits_while_a_submission_waits_is_recorded_without_the_scheduler(world: World) -> None:
    answers_again(world, 5000)
    world.at(100, lambda: world.commit("p0", "p1"))
    world.run()
    assert max(world.recorded_at.values()) < 100 + LONGEST_BACKOFF_S
    assert world.scheduler.submitted == []


def test_retries_that_waited_for_the_scheduler_become_one_job(tmp_path: Path) -> None:
    world = World(tmp_path, [f"p{i}" for i in range(4)])

    def fails(job: Submission, task: int) -> None:
        lost: dict[str, Any] = {"partition_key": f"p{task}", "error": "RankLostError", "message": "gone"}
        world.say(job, "partition_failed", task, **lost)
        world.say(job, "task_finished", task, status="failed")

    def script(job: Submission) -> None:
        answers_again(world, 1000)
        for task in range(4):
            world.say(job, "task_started", task)
            world.at(10 * task, partial(fails, job, task))

    world.on_each_submission(script, world.work_through)
    world.run(n_tasks=4)
    assert [spec.n_tasks for spec in world.specs()] == [4, 4]


def test_a_job_whose_submission_was_not_answered_is_found_again_and_not_submitted_twice(world: World) -> None:
    submit = world.scheduler.submit

    def unanswered(spec: JobSpec, write_job_file: Callable[[Submission], object]) -> Submission:
        world.scheduler.submit = submit  # type: ignore[method-assign]
        submission = submit(spec, write_job_file)
        world.at(30, lambda: world.work_through(submission))
        raise SchedulerUnreachableError("sbatch gave no answer")

    world.scheduler.submit = unanswered  # type: ignore[method-assign]
    world.run()
    assert len(world.scheduler.submitted) == 1
    assert set(world.keys_recorded) == {"p0", "p1"}
    assert "found, still running" in world.log


def test_a_refusal_gives_up_what_was_to_be_submitted_with_the_schedulers_words(world: World) -> None:
    def refused(job: Submission) -> None:
        raise SchedulerError("no such partition: h200")

    world.on_each_submission(refused)
    driver = world.run()
    assert [(f.partition_key, f.failure, f.cause) for f in driver.failed] == [
        (key, FailureClass.IMPOSSIBLE, "no such partition: h200") for key in ("p0", "p1")
    ]


# Termination


@pytest.mark.parametrize("end", [SystemExit, GeneratorExit, RuntimeError])
def test_an_end_of_the_process_that_is_no_interrupt_leaves_its_jobs(world: World, end: type[BaseException]) -> None:
    def dies(job: Submission) -> None:
        world.say(job, "task_started")

        def die() -> None:
            raise end("in the middle")

        world.at(10, die)

    world.on_each_submission(dies)
    with pytest.raises(end):
        world.run()
    assert world.scheduler.cancelled == []


def test_a_termination_cancels_the_jobs_that_nobody_else_waits_for(world: World) -> None:
    theirs = world.job_of_another_run(["p0"])
    world.say(theirs, "task_started")
    world.on_each_submission(lambda job: world.say(job, "task_started"))
    world.at(20, interrupt)
    with followed_by(theirs, "another-run"), pytest.raises(KeyboardInterrupt):
        world.run()
    (ours,) = world.scheduler.submitted
    assert world.scheduler.cancelled == [ours]
    assert "goes on: run another-run waits for it, too" in world.log
    assert world.log.count("terminated: cancelling") == 1


def test_a_run_that_is_cancelled_and_gets_no_signal_ends_like_a_terminated_one_within_half_a_minute(
    world: World,
) -> None:
    world.on_each_submission(lambda job: world.say(job, "task_started"))
    world.at(100, lambda: setattr(world, "is_canceled", True))
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert world.scheduler.cancelled == world.scheduler.submitted != []
    assert world.now - START <= 100 + 31
    assert world.n_asked_whether_canceled == 4, "one question in half a minute"
    assert "warning this run was cancelled, and nothing else has told its process" in world.log


def test_a_termination_says_what_still_runs_and_that_nothing_does(world: World) -> None:
    def stays(submissions: object) -> None:
        raise SchedulerUnreachableError("the jobs are not gone. Still there: 14 (COMPLETING on n1)")

    world.on_each_submission(lambda job: world.say(job, "task_started"))
    world.at(20, interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert "info nothing runs any more of fake job 0001" in world.log
    world.scheduler.cancel = stays  # type: ignore[method-assign]
    world.on_each_submission(lambda job: world.say(job, "task_started"))
    world.at(20, interrupt)
    with pytest.raises(SchedulerUnreachableError):
        world.run()
    assert "error terminated, and its jobs may go on: the jobs are not gone. Still there: 14 (COMPLETING" in world.log


def test_a_termination_whose_exception_was_lost_is_one_at_the_next_look(world: World) -> None:
    world.on_each_submission(lambda job: world.say(job, "task_started"))
    world.lost_interrupt_from = world.now + 20
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert world.scheduler.cancelled == world.scheduler.submitted


def test_a_process_that_is_stopped_without_its_run_being_terminated_leaves_its_jobs(world: World) -> None:
    world.is_terminated = False
    world.on_each_submission(lambda job: world.say(job, "task_started"))
    world.at(20, interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert world.scheduler.cancelled == []
    assert "the jobs go on, and the next run finds them" in world.log


def test_a_termination_while_the_scheduler_is_being_asked_to_take_a_job_cancels_it(world: World) -> None:
    world.on_each_submission(lambda job: interrupt())
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert world.scheduler.cancelled == world.scheduler.submitted


def test_a_termination_before_anything_is_submitted_cancels_nothing(world: World) -> None:
    world.scheduler.answers = False
    world.at(20, interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert world.scheduler.cancelled == []


def test_an_error_of_ours_cancels_nothing(world: World) -> None:
    def bug(job: Submission) -> None:
        raise ZeroDivisionError

    world.on_each_submission(bug)
    with pytest.raises(ZeroDivisionError):
        world.run()
    assert world.scheduler.cancelled == []
