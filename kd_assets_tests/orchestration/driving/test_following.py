"""What a task says of itself, event by event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kd_assets.contract import Event, EventType, JobFile, WorkUnit, event_file
from kd_assets.orchestration.driving.following import FollowedJob, TaskReport
from kd_assets.orchestration.driving.tails import LOG_LINES_A_LOOK, EventTail, LogTail, log_tail
from kd_assets.orchestration.retries import FailureClass, PartitionError
from kd_assets.scheduler import Ending, JobSpec, Submission, TaskPhase, TaskState


def event(event_type: EventType, *, attempt: int = 0, time: float = 0.0, **data: Any) -> Event:
    return Event(type=event_type, time=time, task=0, attempt=attempt, data=data)


def report_of(*events: Event, n_processes: int = 1) -> TaskReport:
    report = TaskReport(n_processes=n_processes)
    for e in events:
        report.add(e)
    return report


FAILED = event("partition_failed", partition_key="p0", error="TeacherError", message="no")


def test_the_last_attempt_has_the_last_word_on_a_partition() -> None:
    assert report_of(event("task_started"), FAILED).errors == {"p0": PartitionError(name="TeacherError", message="no")}
    assert report_of(event("task_started"), FAILED, event("task_started", attempt=1)).errors == {}
    assert report_of(event("task_started"), FAILED, event("committed", partition_key="p0")).errors == {}


def test_a_task_says_with_which_token_budget_it_loaded_and_to_which_it_came_down_in_a_partition() -> None:
    loaded = event("teacher_loaded", token_budget=24576)
    halved = event("warning", partition_key="p1", message="out of memory", token_budget=12288)
    report = report_of(event("task_started"), loaded, halved)
    assert (report.token_budget("p0"), report.token_budget("p1")) == (24576, 12288)
    report.add(event("task_started", attempt=1))
    assert report.token_budget("p1") is None
    assert report_of(event("task_started"), event("teacher_loaded", token_budget=None)).token_budget("p0") is None


@pytest.mark.parametrize(
    ("last_words", "why"),
    [
        ([event("task_finished", status="resumable", signal="SIGUSR1")], FailureClass.TIME_LIMIT),
        ([event("task_finished", status="resumable", signal="SIGTERM")], FailureClass.PREEMPTED),
        ([event("task_finished", status="failed", signal=None)], FailureClass.INTERRUPTED),
        ([], FailureClass.KILLED),
    ],
)
def test_a_restart_says_why_the_attempt_before_ended(last_words: list[Event], why: FailureClass) -> None:
    report = report_of(event("task_started"), *last_words, event("task_started", attempt=1))
    assert [ended for _, ended in report.interruptions] == [why]
    assert report.attempt == 1
    assert report.last_word is None


def test_only_a_word_that_ends_a_task_is_final() -> None:
    for status, is_final in (("done", True), ("failed", True), ("resumable", False)):
        assert report_of(event("task_started"), event("task_finished", status=status)).is_final is is_final


def test_a_second_copy_that_left_says_nothing_of_the_task() -> None:
    assert report_of(event("task_started"), event("task_finished", status="duplicate")).last_word is None


def test_a_task_of_several_processes_is_done_when_the_last_of_them_is_and_as_well_as_the_worst() -> None:
    started = [event("task_started", process_index=process_index) for process_index in (0, 1)]
    done, failed = (
        event("task_finished", status="done", process_index=0),
        event("task_finished", status="failed", process_index=1),
    )
    assert report_of(*started, done, n_processes=2).last_word is None
    assert report_of(*started, done, failed, n_processes=2).last_word == "failed"
    assert report_of(*started, n_processes=2).started_at == [0.0]


def test_the_last_words_of_an_earlier_attempt_say_nothing_of_the_one_at_work() -> None:
    report = report_of(
        event("task_started", attempt=1, process_index=0),
        event("task_finished", attempt=1, status="done", process_index=0),
        event("task_started", attempt=0, process_index=1),
        event("partition_failed", attempt=0, partition_key="p0", error="TeacherError", message="no"),
        event("task_finished", attempt=0, status="failed", process_index=1),
        n_processes=2,
    )
    assert report.last_word is None, "process_index 1 of attempt 1 is at work"
    assert report.errors == {}


def test_events_are_read_once_and_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    submission = Submission(folder=tmp_path)
    path = event_file(submission.events_folder, 0)
    path.parent.mkdir()
    line = event("task_started").to_line()
    path.write_text(line + "no event\n" + line[:10])
    tail = EventTail(submission, 1)
    assert [e if isinstance(e, str) else e.type for e in tail.new_events()] == ["task_started", "no event"]
    assert list(tail.new_events()) == []
    with path.open("a") as f:
        f.write(line[10:])
    assert [e.type for e in tail.new_events() if isinstance(e, Event)] == ["task_started"]


class Job:
    """One task's job whose state and last word a test sets."""

    def __init__(self, folder: Path) -> None:
        unit = WorkUnit(partition_key="p0", outputs=())
        job = JobFile(
            kind="teacher", recipe="r", key="k", recipe_folder="", events_folder="", tasks=((0,),) * 3, units=(unit,)
        )
        spec = JobSpec(key="0" * 32, recipe="r", kind="teacher", n_tasks=3, concurrency=3)
        self.submission = Submission(folder=folder)
        self.submission.events_folder.mkdir()
        self.followed = FollowedJob(submission=self.submission, job=job, spec=spec)

    def end(self) -> None:
        self.followed.see({0: TaskState(phase=TaskPhase.ENDED, ending=Ending.KILLED, reason="killed")})

    def say(self, event_type: EventType, **data: Any) -> None:
        with event_file(self.submission.events_folder, 0).open("a") as f:
            f.write(event(event_type, **data).to_line())
        self.followed.read(lambda job, event: None)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_task_has_ended_when_it_says_so_or_the_scheduler_does_and_until_it_is_over(job: Job) -> None:
    assert job.followed.ended_tasks(0.0) == []
    job.say("task_started")
    assert job.followed.ended_tasks(1.0) == []
    job.say("task_finished", status="done")
    assert job.followed.ended_tasks(2.0) == [0]
    job.end()
    assert job.followed.ended_tasks(3.0) == [0]
    assert job.followed.ended_since == {0: 2.0}
    job.followed.end(0)
    assert job.followed.ended_tasks(4.0) == []
    job.end()
    assert job.followed.ended_tasks(5.0) == [], "each task is over once"


def test_a_task_that_is_requeued_meanwhile_ends_anew(job: Job) -> None:
    job.end()
    assert job.followed.ended_tasks(0.0) == [0]
    job.followed.see({0: TaskState(phase=TaskPhase.PENDING, reason="BeginTime")})
    assert job.followed.ended_tasks(9.0) == []
    job.end()
    assert job.followed.ended_tasks(11.0) == [0]
    assert job.followed.ended_since == {0: 11.0}


def test_a_task_that_starts_again_after_its_last_word_has_not_ended(job: Job) -> None:
    job.say("task_started")
    job.say("task_finished", status="failed")
    job.say("task_started", attempt=1)
    assert job.followed.ended_tasks(0.0) == []


def test_no_more_is_read_of_a_task_that_is_finished_with(job: Job) -> None:
    job.say("task_started")
    job.followed.end(0)
    job.say("warning", message="still here")
    job.followed.finish_reading(0)
    heard: list[object] = []
    with event_file(job.submission.events_folder, 0).open("a") as f:
        f.write(event("warning", message="nobody hears it").to_line())
    job.followed.read(lambda job, event: heard.append(event))
    assert heard == []


def test_a_queue_is_told_in_words(job: Job) -> None:
    waits = TaskState(phase=TaskPhase.PENDING, reason="Priority")
    job.followed.see({0: TaskState(phase=TaskPhase.RUNNING, reason="RUNNING"), 1: waits, 2: waits})
    assert job.followed.queue_in_words() == "1 run, 2 wait (Priority)"


def test_a_log_tail_leaves_out_event_lines_and_a_missing_log_is_empty(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert log_tail(log) == ""
    assert log_tail(tmp_path) == ""
    log.write_text("first\n" + event("progress").to_line() + "Traceback\nlast\n")
    assert log_tail(log, 2) == "Traceback\nlast"


def test_what_a_task_prints_is_passed_on_line_by_line_without_its_events(tmp_path: Path) -> None:
    log, tail = tmp_path / "log", LogTail()
    assert tail.new_lines(log) == []
    log.write_text("first\n" + event("progress").to_line() + "10 %\r20 %\r30 %\nhalf a li")
    assert tail.new_lines(log) == ["first", "30 %"]
    assert tail.new_lines(log) == []
    with log.open("a") as f:
        f.write("ne\n\x1b[31mred\x07\n\n")
    assert tail.new_lines(log) == ["half a line", "[31mred"]


def test_of_a_chatty_task_the_last_lines_are_passed_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n" for i in range(50_000)))
    lines = LogTail().new_lines(log)
    assert lines[0] == "… (more in the log)"
    assert lines[-1] == "line 49999"
    assert len(lines) == LOG_LINES_A_LOOK + 1
