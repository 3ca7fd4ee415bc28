"""The scheduler as a state machine: each transition and each ending a row, on a fake cluster, in milliseconds.

What the fake cluster stands for is proved on real ones (`kd_assets_tests/slurm`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from kd_assets.errors import SchedulerError, SchedulerMisusedError, SchedulerUnreachableError
from kd_assets.scheduler import Ending, LocalScheduler, Submission, TaskPhase
from kd_assets.scheduler.slurm.commands.runners import Answer
from kd_assets.scheduler.slurm.scheduler import CANCEL_PATIENCE_S
from kd_assets.scheduler.slurm.submitter import REPLY_GRACE_S, UNCLEAR_PATIENCE_S
from kd_assets.scheduler.slurm.task_states import REQUEUE_GRACE_S
from kd_assets_tests.disks import opened_files
from kd_assets_tests.scheduler.jobs import job_spec, write_job_file
from kd_assets_tests.scheduler.slurm.fake_cluster import FakeCluster, MissingCommands, SbatchAnswer
from kd_assets_tests.scheduler.slurm.site import GRACE_S, POLL_S, Site

PATIENCE_S = 30.0 + REPLY_GRACE_S
"""Until an array of which no answer was heard counts as never come: the command's own time limit comes first."""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def without_accounting(tmp_path: Path) -> Site:
    return Site(tmp_path, accounting=False)


# ------------------------------------------------------------------ submitting


def test_a_job_that_sbatch_accepts_is_one_array_and_waits(site: Site) -> None:
    submission = site.submit(n_tasks=3)
    states = site.states(submission)
    assert [(s.phase, s.reason, s.task_id) for s in states] == [
        (TaskPhase.PENDING, "Priority", f"1_{task}") for task in range(3)
    ]
    assert site.cluster.n_asked("sbatch") == 1
    assert site.scheduler.describe(submission) == f"SLURM job 1 ({submission.folder})"
    assert site.scheduler.log_file(submission, 2) == submission.log_folder / "slurm-1_2.log"


@pytest.mark.parametrize(
    ("answer", "n_sbatch", "reason"),
    [
        ("accepted", 1, "Priority"),
        ("pace", 1, "not submitted yet: sbatch: error: Batch job submission failed: Resource temporarily unavailable"),
        ("accepted, not said", 1, "Priority"),
        ("not come, not said", 1, "submitted"),
    ],
)
def test_what_sbatch_answered_decides_what_a_task_waits_for_at_the_next_look(
    site: Site, answer: SbatchAnswer, n_sbatch: int, reason: str
) -> None:
    site.cluster.next_answers = [answer]
    submission = site.submit()
    state = site.state(submission, after_s=20)
    assert (state.phase, state.reason) == (TaskPhase.PENDING, reason)
    assert site.cluster.n_asked("sbatch") == n_sbatch


def test_what_can_never_be_granted_is_refused_in_slurms_words_and_leaves_nothing_alive(site: Site) -> None:
    site.cluster.next_answers = ["impossible"]
    with pytest.raises(SchedulerError, match=r"SLURM refuses kd-demo-teacher-.*Invalid partition name specified"):
        site.submit()
    assert site.scheduler.live("demo", "teacher") == []


def test_what_can_no_longer_be_granted_ends_the_tasks_that_were_not_taken(site: Site) -> None:
    site.cluster.next_answers = ["submit limit", "accepted", "impossible"]
    submission = site.submit(n_tasks=4)
    site.cluster.ends(0)
    site.cluster.ends(1)
    states = site.states(submission)
    assert [s.ending for s in states[:2]] == [Ending.EXITED, Ending.EXITED]
    site.look(submission)
    assert [s.ending for s in site.states(submission)[2:]] == [Ending.IMPOSSIBLE, Ending.IMPOSSIBLE]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("pace", "SLURM takes no more jobs now (sbatch: error: "),
        ("unclear", "SLURM refuses, and may take later (sbatch: error: "),
    ],
)
def test_a_site_that_takes_no_more_jobs_is_asked_again_after_longer_and_longer_pauses(
    site: Site, answer: SbatchAnswer, words: str
) -> None:
    site.cluster.next_answers = [answer] * 6
    submission, asked_at, notices = site.submit(), [site.clock.now], list[str]()
    while site.cluster.next_answers:
        before = site.cluster.n_asked("sbatch")
        notices += site.look(submission, after_s=5).notices
        if site.cluster.n_asked("sbatch") > before:
            asked_at.append(site.clock.now)
    pauses = [after - before for before, after in pairwise(asked_at)]
    assert pauses == [30, 60, 120, 240, 300]
    assert [words in notice for notice in notices] == [True] * 6
    site.look(submission, after_s=300)
    assert site.state(submission).reason == "Priority"


@pytest.mark.parametrize("is_another_process", [False, True])
def test_a_refusal_in_unknown_words_is_final_after_half_an_hour_in_slurms_words(
    site: Site, is_another_process: bool
) -> None:
    """However many processes have heard it."""
    site.cluster.next_answers = ["unclear"] * 50
    submission = site.submit(n_tasks=2)
    state = site.state(submission)
    while state.phase is not TaskPhase.ENDED:
        scheduler = site.process() if is_another_process else None
        state = site.state(submission, after_s=100, scheduler=scheduler)
        assert site.clock.now < 1_800_000_000 + 2 * UNCLEAR_PATIENCE_S
    assert site.clock.now >= 1_800_000_000 + UNCLEAR_PATIENCE_S
    assert state.ending is Ending.IMPOSSIBLE
    assert "I/O error writing script/environment to file (so it has said for 3" in state.reason


def test_what_there_is_to_say_waits_for_an_answer(site: Site) -> None:
    site.cluster.next_answers = ["pace"]
    submission = site.submit()
    site.cluster.is_reachable = False
    assert site.look(submission).notices == ()
    site.cluster.is_reachable = True
    (notice,) = site.look(submission).notices
    assert notice.startswith("SLURM takes no more jobs now (sbatch: error: Batch job submission failed: Resource")
    assert "1 tasks wait, next try in 30 s" in notice
    assert site.look(submission).notices == []


def test_a_limit_on_submitted_tasks_makes_smaller_arrays_that_follow_each_other(tmp_path: Path) -> None:
    site = Site(tmp_path, concurrency=4)
    site.cluster.next_answers = ["submit limit"]
    submission = site.submit(n_tasks=8)
    assert [len(a.tasks) for a in site.cluster.arrays] == [4], "as many as may run at once"
    site.cluster.ends(0)
    site.cluster.ends(1)
    site.look(submission)
    site.look(submission)
    assert [len(a.tasks) for a in site.cluster.arrays] == [4, 2]
    site.cluster.runs(1, array=1)
    assert site.states(submission)[5].task_id == "2_1", "task 5 is the second of the second array"
    assert site.scheduler.log_file(submission, 5).name == "slurm-2_1.log"


def test_more_tasks_than_an_array_may_have_are_several_arrays_at_once(tmp_path: Path) -> None:
    site = Site(tmp_path, max_array_size=5)
    submission = site.submit(n_tasks=12)
    assert [len(a.tasks) for a in site.cluster.arrays] == [5, 5, 2]
    assert [s.task_id for s in site.states(submission)[9:]] == ["2_4", "3_0", "3_1"]


def test_a_lost_answer_is_found_in_the_queue_by_the_arrays_name(site: Site) -> None:
    site.cluster.next_answers = ["accepted, not said"]
    submission = site.submit()
    assert site.state(submission, after_s=1).task_id == "1_0"
    site.cluster.ends(0)
    assert site.state(submission).ending is Ending.EXITED
    assert site.cluster.n_asked("sbatch") == 1
    assert site.scheduler.log_file(submission, 0).name == "slurm-1_0.log"


def test_a_lost_answer_of_a_job_that_has_ended_is_found_in_the_accounting(site: Site) -> None:
    site.cluster.next_answers = ["accepted, not said"]
    submission = site.submit()
    site.cluster.ends(0)
    site.cluster.forgets()
    assert site.state(submission, after_s=PATIENCE_S - 1).phase is TaskPhase.PENDING
    assert site.state(submission, after_s=2).ending is Ending.EXITED
    assert site.cluster.n_asked("sbatch") == 1


@pytest.mark.parametrize("accounting", [True, False])
def test_a_job_that_never_came_is_submitted_again_after_a_while_and_not_before(
    tmp_path: Path, accounting: bool
) -> None:
    site = Site(tmp_path, accounting=accounting)
    site.cluster.next_answers = ["not come, not said"]
    submission = site.submit()
    site.look(submission, after_s=PATIENCE_S - 1)
    assert site.cluster.n_asked("sbatch") == 1
    site.look(submission, after_s=2)
    assert site.cluster.n_asked("sbatch") == 2
    assert site.state(submission).task_id == "2_0"


@pytest.mark.parametrize(
    ("state", "has_it"),
    [("PENDING", True), ("RUNNING", True), ("COMPLETING", True), ("COMPLETED", False), ("CANCELLED by 0", False)],
)
def test_a_job_that_came_after_it_was_given_up_has_those_of_its_tasks_that_live(
    site: Site, state: str, has_it: bool
) -> None:
    site.cluster.next_answers = ["not come, not said"]
    submission = site.submit(n_tasks=2)
    site.look(submission, after_s=PATIENCE_S + 1)
    site.cluster.arrives()
    assert [a.job_id for a in site.cluster.arrays] == [2, 1]
    site.cluster.task(0, array=1).state = state
    site.cluster.forgets(1, task=1)
    assert [s.task_id for s in site.states(submission)] == ["1_0" if has_it else "2_0", "2_1"]


def test_nothing_is_submitted_while_an_answer_is_missing(tmp_path: Path) -> None:
    site = Site(tmp_path, max_array_size=2)
    site.cluster.next_answers = ["not come, not said"]
    submission = site.submit(n_tasks=4)
    site.look(submission, after_s=10)
    assert site.cluster.n_asked("sbatch") == 1
    site.look(submission, after_s=PATIENCE_S)
    assert site.cluster.n_asked("sbatch") == 3


def test_a_missing_sbatch_is_an_error_and_not_a_wait(site: Site) -> None:
    with pytest.raises(SchedulerError, match="is not installed"):
        site.submit(scheduler=site.process(MissingCommands()))


def test_a_missing_batch_script_is_an_error_before_anything_is_written(site: Site) -> None:
    site.script.unlink()
    with pytest.raises(SchedulerError, match=r"task\.sbatch is missing"):
        site.scheduler.submit(job_spec(), write_job_file)
    assert not site.jobs_folder.exists()


# ------------------------------------------------------------------ what a task's state is


LIVE = [
    ("PENDING", "Resources", TaskPhase.PENDING),
    ("PENDING", "BeginTime", TaskPhase.PENDING),
    ("REQUEUE_HOLD", "None", TaskPhase.PENDING),
    ("CONFIGURING", "None", TaskPhase.RUNNING),
    ("RUNNING", "None", TaskPhase.RUNNING),
    ("SUSPENDED", "None", TaskPhase.RUNNING),
    ("COMPLETING", "None", TaskPhase.RUNNING),
    ("A_WORD_OF_TOMORROW", "None", TaskPhase.PENDING),
]


@pytest.mark.parametrize(("state", "reason", "phase"), LIVE)
def test_a_task_that_lives(site: Site, state: str, reason: str, phase: TaskPhase) -> None:
    submission = site.submit()
    site.cluster.task(0).state, site.cluster.task(0).reason = state, reason
    found = site.state(submission)
    assert (found.phase, found.ending, found.exit_code) == (phase, None, None)


ENDINGS = [
    ("COMPLETED", "None", 0, Ending.EXITED, 0),
    ("FAILED", "NonZeroExitCode", 3 << 8, Ending.EXITED, 3),
    ("FAILED", "JobLaunchFailure", 9, Ending.KILLED, -9),
    ("FAILED", "JobLaunchFailure", 53, Ending.LAUNCH_FAILURE, -53),
    ("OUT_OF_MEMORY", "OutOfMemory", 125, Ending.HOST_MEMORY, -125),
    ("TIMEOUT", "TimeLimit", 0, Ending.TIME_LIMIT, 0),
    ("DEADLINE", "DeadLine", 0, Ending.TIME_LIMIT, 0),
    ("PREEMPTED", "None", 0, Ending.PREEMPTED, None),
    ("NODE_FAIL", "NodeDown", 0, Ending.NODE_FAILURE, None),
    ("BOOT_FAIL", "None", 0, Ending.NODE_FAILURE, None),
    ("CANCELLED by 1000", "None", 15, Ending.CANCELLED, -15),
]


@pytest.mark.parametrize(("state", "reason", "status", "ending", "exit_code"), ENDINGS)
@pytest.mark.parametrize("seen_in", ["queue", "accounting", "queue, then forgotten"])
def test_a_task_that_ended(
    site: Site,
    state: str,
    reason: str,
    status: int,
    ending: Ending,
    exit_code: int | None,
    seen_in: str,
) -> None:
    submission = site.submit()
    site.cluster.runs(0)
    site.look(submission)
    site.cluster.ends(0, state, reason=reason, status=status)
    if seen_in == "accounting":
        site.cluster.forgets()
    site.look(submission)
    found = site.state(submission, after_s=REQUEUE_GRACE_S)
    if seen_in == "queue, then forgotten":
        site.cluster.forgets()
        site.cluster.accounted.clear()
        found = site.state(submission, after_s=10 * GRACE_S)
    assert (found.phase, found.ending, found.exit_code) == (TaskPhase.ENDED, ending, exit_code)
    assert found.node == "n1"
    assert found.reason.startswith(state)


@pytest.mark.parametrize("state", ["PREEMPTED", "NODE_FAIL", "BOOT_FAIL"])
@pytest.mark.parametrize("seen_in", ["queue", "accounting"])
def test_an_end_that_may_be_taken_back_is_waited_out(site: Site, state: str, seen_in: str) -> None:
    submission = site.submit()
    site.cluster.runs(0)
    site.look(submission)
    site.cluster.ends(0, state)
    if seen_in == "accounting":
        (job,) = site.cluster.arrays
        site.cluster.forgets()
    assert site.state(submission).phase is not TaskPhase.ENDED
    if seen_in == "accounting":
        site.cluster.arrays.append(job)
    site.cluster.waits(0, "BeginTime", restarts=1)
    found = site.state(submission)
    assert (found.phase, found.reason, found.restarts) == (TaskPhase.PENDING, "BeginTime", 1)
    site.cluster.runs(0, restarts=1)
    assert site.state(submission).phase is TaskPhase.RUNNING


def test_tasks_whose_indices_slurm_forgot_are_cancelled(site: Site) -> None:
    submission = site.submit(n_tasks=2)
    (job,) = site.cluster.arrays
    cancelled = job.tasks[0]
    cancelled.state = "CANCELLED by 0"
    job.tasks = {"N/A": cancelled}  # type: ignore[dict-item]
    assert [s.ending for s in site.states(submission)] == [Ending.CANCELLED, Ending.CANCELLED]


# ------------------------------------------------------------------ absent is not unreachable


def test_a_task_that_the_cluster_does_not_know_keeps_its_state_for_a_grace_and_is_lost_after_it(
    without_accounting: Site,
) -> None:
    site = without_accounting
    submission = site.submit()
    site.cluster.runs(0)
    running = site.state(submission)
    site.cluster.forgets()
    assert site.state(submission) == running
    assert site.state(submission, after_s=GRACE_S - 1) == running
    lost = site.state(submission, after_s=2)
    assert (lost.phase, lost.ending, lost.node) == (TaskPhase.ENDED, Ending.LOST, "n1")
    assert "nobody saw it end" in lost.reason


def test_a_task_that_comes_back_within_its_grace_has_a_whole_one_the_next_time(without_accounting: Site) -> None:
    site = without_accounting
    submission = site.submit()
    site.cluster.runs(0)
    site.look(submission)
    (job,) = site.cluster.arrays
    for _ in range(3):
        site.cluster.forgets()
        assert site.state(submission, after_s=GRACE_S - 1).phase is TaskPhase.RUNNING
        site.cluster.arrays.append(job)
        assert site.state(submission).phase is TaskPhase.RUNNING


def test_the_time_that_a_cluster_does_not_answer_ends_nothing(without_accounting: Site) -> None:
    site = without_accounting
    submission = site.submit()
    site.cluster.runs(0)
    running = site.state(submission)
    site.cluster.is_reachable = False
    for _ in range(10):
        poll = site.look(submission, after_s=GRACE_S)
        assert poll.unreachable is not None
        assert poll.states[submission] == {0: running}
    site.cluster.is_reachable = True
    assert site.state(submission) == running


def test_a_process_that_has_seen_nothing_knows_nothing_while_the_cluster_does_not_answer(site: Site) -> None:
    submission = site.submit(n_tasks=2)
    site.cluster.ends(0)
    site.look(submission)
    site.cluster.is_reachable = False
    poll = site.look(submission, scheduler=site.process())
    assert [s.phase for s in poll.states[submission].values()] == [TaskPhase.ENDED, TaskPhase.PENDING]
    assert "the cluster does not answer" in poll.states[submission][1].reason


def test_a_grace_goes_on_in_another_process(without_accounting: Site) -> None:
    site = without_accounting
    submission = site.submit()
    site.look(submission)
    site.cluster.forgets()
    site.look(submission)
    assert site.state(submission, after_s=GRACE_S + 1, scheduler=site.process()).ending is Ending.LOST


def test_an_answer_older_than_a_submission_says_nothing_about_it(site: Site) -> None:
    first = site.submit()
    site.look(first)
    site.clock.now += POLL_S / 2
    second = site.submit(key="f" * 32)
    poll = site.scheduler.poll([first, second])
    assert poll.states[second][0].phase is TaskPhase.PENDING
    assert site.cluster.n_asked("squeue") == 1, "the answer of half an interval ago does for both"


def test_accounting_is_asked_only_for_what_the_queue_no_longer_shows(site: Site) -> None:
    submission = site.submit()
    site.look(submission)
    assert site.cluster.n_asked("sacct") == 0
    site.cluster.forgets()
    site.look(submission)
    assert site.cluster.n_asked("sacct") == 1


def test_accounting_that_does_not_answer_explains_nothing_and_ends_nothing(site: Site) -> None:
    submission = site.submit()
    site.cluster.runs(0)
    site.look(submission)
    site.cluster.ends(0)
    site.cluster.forgets()
    site.cluster.silent = {"sacct"}
    assert site.state(submission).phase is TaskPhase.RUNNING
    site.cluster.silent = set()
    assert site.state(submission).ending is Ending.EXITED


# ------------------------------------------------------------------ nodes that fail


def requeued_from(site: Site, node_state: str) -> Submission:
    submission = site.submit()
    site.cluster.runs(0, node="n7")
    site.look(submission)
    site.cluster.node_states["n7"] = node_state
    site.cluster.waits(0, "BeginTime", restarts=1)
    return submission


def test_a_requeued_task_is_kept_from_the_node_that_failed_besides_those_it_is_kept_from_already(site: Site) -> None:
    submission = requeued_from(site, "down*")
    site.cluster.task(0).excluded = ["n2"]
    poll = site.look(submission)
    assert site.cluster.task(0).excluded == ["n2", "n7"]
    assert poll.states[submission][0].failed_nodes == ("n7",)
    assert "its node n7 is down* and is excluded from now on" in poll.notices[0]
    site.cluster.runs(0, node="n1", restarts=1)
    assert site.state(submission).failed_nodes == ("n7",)


def test_a_node_whose_state_nobody_tells_is_asked_after_again(site: Site) -> None:
    submission = requeued_from(site, "down")
    site.cluster.silent = {"sinfo"}
    assert site.state(submission).failed_nodes == ()
    site.cluster.silent = set()
    assert site.state(submission).failed_nodes == ("n7",)


def test_a_node_that_a_task_could_not_be_kept_from_is_named_all_the_same(site: Site) -> None:
    submission = requeued_from(site, "down")
    site.cluster.silent = {"scontrol"}
    assert site.state(submission).failed_nodes == ("n7",)


def test_a_task_that_was_requeued_from_a_sound_node_may_go_back_to_it(site: Site) -> None:
    submission = requeued_from(site, "idle")
    assert site.state(submission).failed_nodes == ()
    assert site.cluster.task(0).excluded == []


def test_a_task_that_was_started_elsewhere_before_anybody_looked_names_its_failed_node(site: Site) -> None:
    submission = requeued_from(site, "drained")
    site.cluster.runs(0, node="n1", restarts=1)
    assert site.state(submission).failed_nodes == ("n7",)
    assert site.cluster.task(0).excluded == []


# ------------------------------------------------------------------ tasks that wait for ever


def test_what_waits_is_kept_from_nodes_at_fault_with_one_command_an_array(site: Site) -> None:
    submission = site.submit(n_tasks=5)
    site.cluster.runs(1, node="n2")
    site.scheduler.keep_from([submission], ["n1"])
    assert site.look(submission).notices == ["4 waiting tasks are kept from n1, where tasks failed"]
    site.look(submission)
    assert [argv for argv in site.cluster.asked if argv[:2] == ["scontrol", "update"]] == [
        ["scontrol", "update", "JobId=1_[0,2-4]", "ExcNodeList=n1"]
    ]
    site.cluster.waits(1, "BeginTime", restarts=1)
    assert site.look(submission).notices == ["1 waiting tasks are kept from n1, where tasks failed"]
    assert [site.cluster.task(task).excluded for task in range(5)] == [["n1"]] * 5


def test_what_is_submitted_later_is_kept_from_nodes_at_fault_too(site: Site) -> None:
    site.cluster.next_answers = ["pace"]
    submission = site.submit()
    site.scheduler.keep_from([submission], ["n1"])
    site.look(submission, after_s=40)
    assert [a for a in site.cluster.asked if a[0] == "sbatch"][-1].count("--exclude=n1") == 1
    site.look(submission)
    assert site.cluster.n_asked("scontrol") == 1, "the size of arrays only: there was nothing to change"


def test_a_cluster_that_does_not_keep_tasks_from_a_node_is_asked_again_and_all_is_followed(site: Site) -> None:
    submission = site.submit()
    site.scheduler.keep_from([submission], ["n1"])
    site.cluster.silent = {"scontrol"}
    poll = site.look(submission)
    assert poll.unreachable is None
    assert "could not be kept from n1 yet" in poll.notices[0]
    site.cluster.silent = set()
    site.look(submission)
    assert site.cluster.task(0).excluded == ["n1"]


def test_a_task_whose_launch_failed_is_released_once_and_runs(site: Site) -> None:
    submission = site.submit()
    site.cluster.waits(0, "launch failed requeued held")
    poll = site.look(submission)
    assert "is held by SLURM (launch failed requeued held): released once" in poll.notices[0]
    assert site.cluster.task(0).reason == "None"
    site.cluster.runs(0)
    assert site.state(submission).phase is TaskPhase.RUNNING


@pytest.mark.parametrize("process", ["the same", "another"])
def test_a_task_that_is_held_again_is_given_up_and_leaves_the_queue(site: Site, process: str) -> None:
    submission = site.submit()
    site.cluster.waits(0, "JobHoldMaxRequeue")
    site.look(submission)
    site.cluster.waits(0, "JobHoldMaxRequeue")
    scheduler = site.scheduler if process == "the same" else site.process()
    found = site.state(submission, after_s=6, scheduler=scheduler)
    assert (found.ending, found.reason) == (Ending.HELD, "SLURM cannot start it: JobHoldMaxRequeue")
    assert site.cluster.task(0).state == "CANCELLED by 0"
    assert site.state(submission).ending is Ending.HELD, "and not cancelled"


def test_a_task_that_cannot_be_released_for_want_of_an_answer_is_released_later(site: Site) -> None:
    submission = site.submit()
    site.cluster.waits(0, "JobHoldMaxRequeue")
    site.cluster.silent = {"scontrol"}
    assert site.look(submission).unreachable is not None
    site.cluster.silent = set()
    assert "released once" in site.look(submission, after_s=60).notices[0]


def test_what_somebody_holds_stays_held(site: Site) -> None:
    submission = site.submit()
    site.cluster.waits(0, "JobHeldUser")
    for _ in range(3):
        assert site.state(submission).phase is TaskPhase.PENDING
    assert site.cluster.n_asked("scontrol") == 1, "for MaxArraySize"


@pytest.mark.parametrize("reason", ["PartitionTimeLimit", "BadConstraints", "QOSMaxCpuPerJobLimit", "InvalidQOS"])
def test_a_task_that_can_never_start_is_given_up_and_leaves_the_queue(site: Site, reason: str) -> None:
    submission = site.submit()
    site.cluster.waits(0, reason)
    found = site.state(submission)
    assert (found.ending, found.reason) == (Ending.IMPOSSIBLE, f"SLURM cannot start it: {reason}")
    assert site.cluster.task(0).state == "CANCELLED by 0"


# ------------------------------------------------------------------ finding live jobs


def test_a_live_job_is_found_by_a_process_that_knows_nothing_of_it(site: Site) -> None:
    submission = site.submit()
    assert site.process().live("demo", "teacher") == [submission]
    assert site.process().live("demo", "shards") == site.process().live("other", "teacher") == []


@pytest.mark.parametrize(
    ("becomes", "is_live"),
    [
        (lambda cluster: cluster.runs(0), True),
        (lambda cluster: cluster.ends(0), False),
        (lambda cluster: cluster.ends(0, "FAILED", status=256), False),
        (lambda cluster: cluster.ends(0, "PREEMPTED"), True),
        (lambda cluster: cluster.forgets(), True),
    ],
    ids=["runs", "completed", "failed", "may be requeued", "not known"],
)
def test_whether_a_job_lives(without_accounting: Site, becomes: Callable[[FakeCluster], None], is_live: bool) -> None:
    site = without_accounting
    submission = site.submit()
    becomes(site.cluster)
    site.clock.now += POLL_S
    assert site.process().live("demo", "teacher") == ([submission] if is_live else [])


def test_a_job_is_not_over_because_the_local_scheduler_looked_for_its_own(site: Site) -> None:
    submission = site.submit()
    assert LocalScheduler(site.jobs_folder, script=site.script).live("demo", "teacher") == []
    assert site.process().live("demo", "teacher") == [submission]


def test_looking_for_live_jobs_submits_and_releases_nothing(site: Site) -> None:
    site.cluster.next_answers = ["pace"]
    submission = site.submit()
    site.clock.now += 1000
    assert site.process().live("demo", "teacher") == [submission]
    assert site.cluster.n_asked("sbatch") == 1
    site.look(submission)
    site.cluster.waits(0, "launch failed requeued held")
    site.clock.now += 1000
    site.process().live("demo", "teacher")
    assert site.cluster.task(0).reason == "launch failed requeued held"


def test_nobody_knows_what_lives_while_the_cluster_does_not_answer(site: Site) -> None:
    site.submit()
    site.cluster.is_reachable = False
    site.clock.now += POLL_S
    with pytest.raises(SchedulerUnreachableError):
        site.process().live("demo", "teacher")


class Misunderstands:
    """A fake of a cluster whose version of one command does not know an option."""

    def __init__(self, cluster: FakeCluster, command: str) -> None:
        self._cluster, self._command = cluster, command

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Answer:
        if argv[0] != self._command:
            return self._cluster.run(argv, timeout_s=timeout_s)
        stderr = f"{argv[0]}: unrecognized option '{argv[1]}'\n"
        return Answer(argv=tuple(argv), status=1, stdout="", stderr=stderr)


@pytest.mark.parametrize("command", ["squeue", "sacct", "sinfo"])
def test_a_question_that_slurm_does_not_understand_is_not_the_absence_of_an_answer(site: Site, command: str) -> None:
    submission = site.submit(n_tasks=2)
    site.cluster.runs(0)
    scheduler = site.process(Misunderstands(site.cluster, command))
    if command != "squeue":
        site.look(submission, scheduler=scheduler)
    site.cluster.waits(0, "BeginTime", restarts=1)  # so sinfo is asked for its node
    site.cluster.forgets(task=1)  # and sacct for its end
    with pytest.raises(SchedulerMisusedError, match=f"`{command} .*unrecognized option"):
        site.look(submission, scheduler=scheduler)


def test_cancelling_what_cannot_be_asked_for_says_at_once_what_to_do_by_hand(site: Site) -> None:
    submission, before = site.submit(), site.clock.now
    with pytest.raises(SchedulerMisusedError, match=r"the jobs may go on: .*By hand: scancel --name=kd-demo-teacher-"):
        site.process(Misunderstands(site.cluster, "squeue")).cancel([submission])
    assert site.clock.now == before


def test_the_same_work_submitted_again_is_the_next_number_and_alone_may_live(site: Site) -> None:
    first = site.submit()
    site.cluster.ends(0)
    site.look(first)
    second = site.submit()
    assert (first.folder.name, second.folder.name) == ("0001", "0002")
    assert site.process().live("demo", "teacher") == [second]


# ------------------------------------------------------------------ cancelling


def test_cancelling_returns_once_no_task_is_alive(site: Site) -> None:
    site.cluster.kills_slowly = True
    submission, before = site.submit(n_tasks=2), site.clock.now
    site.cluster.runs(0)
    sleep = site.clock.sleep

    def sleep_until_killed(seconds: float) -> None:
        sleep(seconds)
        if site.clock.now > before + 40:
            site.cluster.kills()

    site.clock.sleep = sleep_until_killed  # type: ignore[method-assign]
    scheduler = site.process()
    scheduler.cancel([submission])
    assert 40 < site.clock.now - before < 50
    assert site.cluster.n_asked("scancel") == 2, "once more after SLURM's KillWait"
    assert [s.ending for s in site.states(submission)] == [Ending.CANCELLED, Ending.CANCELLED]


def test_nothing_more_of_a_cancelled_job_is_submitted(site: Site) -> None:
    site.cluster.next_answers = ["pace"]
    submission = site.submit()
    site.scheduler.cancel([submission])
    found = site.state(submission, after_s=1000)
    assert (found.ending, found.reason) == (Ending.CANCELLED, "cancelled before it was submitted")
    assert site.cluster.n_asked("sbatch") == 1
    assert site.process().live("demo", "teacher") == []


def test_cancelling_waits_for_a_job_whose_answer_was_lost(site: Site) -> None:
    site.cluster.next_answers = ["not come, not said"]
    submission, before = site.submit(), site.clock.now
    site.scheduler.cancel([submission])
    assert site.clock.now - before > PATIENCE_S, "until it is known that none came"
    site.cluster.next_answers = ["accepted, not said"]
    second = site.submit(key="e" * 32)
    site.scheduler.cancel([second])
    assert site.cluster.task(0).state == "CANCELLED by 0"


def test_cancelling_without_an_answer_says_what_to_do_by_hand(site: Site) -> None:
    submission, before = site.submit(), site.clock.now
    site.cluster.is_reachable = False
    with pytest.raises(SchedulerUnreachableError, match=r"By hand: scancel --name=kd-demo-teacher-.*\.1-"):
        site.scheduler.cancel([submission])
    assert site.clock.now - before >= CANCEL_PATIENCE_S
    site.cluster.is_reachable = True
    assert site.state(submission).phase is TaskPhase.PENDING
    site.cluster.forgets()
    assert site.state(submission, after_s=PATIENCE_S).phase is TaskPhase.PENDING
    assert site.cluster.n_asked("sbatch") == 1, "its mark stays"


@pytest.mark.parametrize("name", ["kd-another", "somebody's own"])
def test_a_job_that_somebody_renamed_is_followed_and_cancelled_by_its_comment(
    without_accounting: Site, name: str
) -> None:
    site = without_accounting
    submission = site.submit()
    site.cluster.runs(0)
    site.cluster.arrays[0].name = name
    assert site.state(submission, after_s=2 * GRACE_S).phase is TaskPhase.RUNNING
    assert site.state(submission, after_s=2 * GRACE_S).phase is TaskPhase.RUNNING
    site.scheduler.cancel([submission])
    assert site.cluster.task(0).state == "CANCELLED by 0"


def test_a_job_whose_comment_somebody_changed_is_followed_and_cancelled_by_its_name(without_accounting: Site) -> None:
    site = without_accounting
    submission = site.submit()
    site.cluster.runs(0)
    site.cluster.arrays[0].comment = "kd_assets, ask Jo"
    assert site.state(submission, after_s=2 * GRACE_S).phase is TaskPhase.RUNNING
    site.scheduler.cancel([submission])
    assert site.cluster.task(0).state == "CANCELLED by 0"


def renamed(site: Site) -> None:
    """Somebody makes the job their own in every word."""
    site.cluster.arrays[0].name, site.cluster.arrays[0].comment = "somebody's own", "ask Jo"


def test_a_job_whose_name_and_comment_were_changed_is_followed_and_cancelled_by_its_id(
    without_accounting: Site,
) -> None:
    site = without_accounting
    submission = site.submit(n_tasks=2)
    site.cluster.runs(0)
    site.states(submission)
    renamed(site)
    notices: list[str] = []
    for _ in range(4):
        poll = site.look(submission, after_s=GRACE_S)
        notices += poll.notices
        assert [s.phase for s in poll.states[submission].values()] == [TaskPhase.RUNNING, TaskPhase.PENDING]
    assert ["is followed by its id" in notice for notice in notices] == [True]
    site.scheduler.cancel([submission])
    assert [site.cluster.task(i).state for i in (0, 1)] == ["CANCELLED by 0", "CANCELLED by 0"]
    before = site.clock.now
    site.process().cancel([submission])
    assert site.clock.now - before >= GRACE_S, "nobody has seen it end under its own name"


def test_a_job_that_somebody_else_has_under_the_same_id_is_left_alone(without_accounting: Site) -> None:
    """As after a controller that lost its state."""
    site = without_accounting
    submission = site.submit()
    site.states(submission)
    renamed(site)
    site.cluster.arrays[0].folder = "/home/jo"
    site.cluster.runs(0)
    site.scheduler.cancel([submission])
    assert site.cluster.task(0).state == "RUNNING"
    site.look(submission)
    assert site.state(submission, after_s=2 * GRACE_S).phase is TaskPhase.ENDED


def test_a_job_that_squeue_does_not_show_for_a_moment_is_cancelled_when_it_does(without_accounting: Site) -> None:
    site = without_accounting
    submission, before = site.submit(), site.clock.now
    site.cluster.runs(0)
    site.cluster.hidden = list(site.cluster.arrays)
    site.cluster.arrays.clear()
    sleep = site.clock.sleep

    def shown_again(seconds: float) -> None:
        sleep(seconds)
        if site.clock.now > before + 20 and site.cluster.hidden:
            site.cluster.arrays, site.cluster.hidden = site.cluster.hidden, []

    site.clock.sleep = shown_again  # type: ignore[method-assign]
    site.process().cancel([submission])
    assert site.cluster.task(0).state == "CANCELLED by 0"


def test_what_still_runs_after_cancelling_is_told_with_its_ids(site: Site) -> None:
    site.cluster.kills_slowly = True
    submission = site.submit()
    site.cluster.runs(0, node="n7")
    with pytest.raises(
        SchedulerUnreachableError, match=r"Still there: 1 \(COMPLETING on n7\)\. By hand: .*; scancel 1$"
    ):
        site.scheduler.cancel([submission])


# ------------------------------------------------------------------ accounting


def test_accounting_has_every_attempt_under_the_task_of_the_job(tmp_path: Path) -> None:
    site = Site(tmp_path, max_array_size=2)
    submission = site.submit(n_tasks=3)
    site.cluster.ends(0, "NODE_FAIL", array=1)
    site.cluster.ends(0, "COMPLETED", array=1)
    attempts = site.scheduler.accounting(submission)
    assert {task: [a.state for a in found] for task, found in attempts.items()} == {2: ["NODE_FAIL", "COMPLETED"]}


def test_without_accounting_there_is_none_and_it_is_asked_for_once(without_accounting: Site) -> None:
    site = without_accounting
    submission = site.submit()
    assert [site.scheduler.accounting(submission) for _ in range(3)] == [{}, {}, {}]
    assert site.cluster.n_asked("sacct") == 1


# ------------------------------------------------------------------ what it costs the site


def test_all_processes_of_a_deployment_share_one_question_an_interval(site: Site) -> None:
    submissions = [site.submit(key=f"{i}" * 32) for i in range(3)]
    processes = [site.process() for _ in range(4)]
    for _ in range(5):
        site.clock.now += POLL_S
        for process in processes:
            process.poll(submissions)
    assert site.cluster.n_asked("squeue") == 5
    assert site.cluster.n_asked("sacct") == 0


def test_a_clock_that_was_set_back_makes_no_answer_last_for_ever(site: Site) -> None:
    submission = site.submit()
    site.look(submission)
    site.clock.now -= 10_000
    site.cluster.runs(0)
    assert site.scheduler.poll([submission]).states[submission][0].phase is TaskPhase.RUNNING


def test_a_look_opens_as_many_files_for_many_tasks_and_arrays_as_for_one(tmp_path: Path) -> None:
    opened_for: dict[int, int] = {}
    for n_tasks in (1, 100):
        site = Site(tmp_path / str(n_tasks), max_array_size=5)
        submission = site.submit(n_tasks)
        site.look(submission)
        with opened_files(site.jobs_folder) as opened:
            assert len(site.states(submission)) == n_tasks
        opened_for[n_tasks] = len(opened)
    assert opened_for[1] == opened_for[100]


def test_nothing_is_read_to_say_where_the_log_of_a_task_is_and_what_its_job_is_called(tmp_path: Path) -> None:
    site = Site(tmp_path, max_array_size=5)
    submission = site.submit(n_tasks=50)
    with opened_files(site.jobs_folder) as opened:
        logs = [site.scheduler.log_file(submission, task).name for task in range(50)]
        site.scheduler.describe(submission)
        site.scheduler.submitted_at(submission)
    assert logs == [f"slurm-{1 + task // 5}_{task % 5}.log" for task in range(50)]
    assert opened == []


def test_a_log_of_an_array_that_another_process_submitted_is_found(tmp_path: Path) -> None:
    site = Site(tmp_path, max_array_size=5)
    site.cluster.next_answers = ["accepted", "pace"]
    submission, other = site.submit(n_tasks=10), site.process()
    assert other.log_file(submission, 7) == submission.log_folder
    site.look(submission, after_s=60)
    assert other.log_file(submission, 7).name == "slurm-2_2.log"


def test_what_is_over_costs_nothing_when_live_jobs_are_looked_for(site: Site) -> None:
    for i in range(10):
        ended = site.submit(key=f"{i:032x}")
        site.cluster.ends(0)
        site.look(ended)
        site.cluster.forgets()
    alive = site.submit(key="a" * 32)
    site.clock.now += POLL_S
    with opened_files(site.jobs_folder / "demo") as opened:
        assert site.process().live("demo", "teacher") == [alive]
    assert {path.relative_to(site.jobs_folder / "demo").parts[0] for path in opened} == {f"teacher-{'a' * 32}"}
    with opened_files(site.jobs_folder / "demo") as opened:
        assert site.process().live("demo", "shards") == []
    assert opened == []


def test_a_job_that_was_taken_for_over_and_turns_up_again_is_live_again(without_accounting: Site) -> None:
    site = without_accounting
    submission = site.submit()
    site.cluster.runs(0)
    site.look(submission)
    (job,) = site.cluster.arrays
    site.cluster.forgets()
    site.look(submission)
    assert site.state(submission, after_s=GRACE_S + 1).ending is Ending.LOST
    assert site.process().live("demo", "teacher") == []
    site.cluster.arrays.append(job)
    assert site.state(submission).phase is TaskPhase.RUNNING
    assert site.process().live("demo", "teacher") == [submission]
