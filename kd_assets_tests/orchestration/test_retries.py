"""What is made of each failure: pure decisions, one by one."""

from __future__ import annotations

import dataclasses

import pytest

from kd_assets.orchestration.retries import (
    FREE,
    MAX_ATTEMPTS,
    Asked,
    Attempts,
    FailureClass,
    GiveUp,
    NodeFaults,
    PartitionError,
    Retry,
    classify,
    decide,
)
from kd_assets.scheduler import Ending, Resources, TaskPhase, TaskState

ASKED = Asked(resources=Resources(memory_gib=8.0), token_budget=4096)


def ended(ending: Ending, exit_code: int | None = None) -> TaskState:
    return TaskState(phase=TaskPhase.ENDED, ending=ending, exit_code=exit_code)


def retried(failure: FailureClass, asked: Asked = ASKED, *, node: str = "n1") -> Asked:
    decision = decide(failure, asked, Attempts(), n_parts=0, node=node)
    assert isinstance(decision, Retry)
    return decision.asked


@pytest.mark.parametrize("ending", [e for e in Ending if e is not Ending.EXITED])
def test_every_ending_has_a_class(ending: Ending) -> None:
    assert isinstance(classify(ended(ending), None, None), FailureClass)


@pytest.mark.parametrize(
    ("exit_code", "failure"),
    [
        (0, FailureClass.NO_RESULT),
        (None, FailureClass.NO_RESULT),
        (75, FailureClass.INTERRUPTED),
        (137, FailureClass.KILLED),
        (1, FailureClass.WORK),
        (2, FailureClass.WORK),
        (126, FailureClass.NODE_FAULT),
        (127, FailureClass.NODE_FAULT),
        (132, FailureClass.NODE_FAULT),
        (135, FailureClass.NODE_FAULT),
        (-4, FailureClass.NODE_FAULT),
    ],
)
def test_a_script_that_ended_by_itself_is_classed_by_its_status(exit_code: int | None, failure: FailureClass) -> None:
    assert classify(ended(Ending.EXITED, exit_code), None, None) is failure


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        ("OutOfDeviceMemoryError", FailureClass.DEVICE_MEMORY),
        ("OutOfHostMemoryError", FailureClass.HOST_MEMORY),
        ("RankLostError", FailureClass.KILLED),
        ("StorageUnreachableError", FailureClass.STORAGE),
        ("StorageUnavailableError", FailureClass.WORK),  # a full disk: somebody has to make room
        ("BadRecordError", FailureClass.WORK),
        ("NoProgressError", FailureClass.WORK),
        ("ZeroDivisionError", FailureClass.WORK),
    ],
)
def test_what_the_task_reports_counts_before_what_the_scheduler_says(error: str, failure: FailureClass) -> None:
    assert classify(ended(Ending.NODE_FAILURE), "failed", PartitionError(name=error, message="")) is failure


def test_a_rank_that_was_killed_for_its_memory_is_a_lack_of_memory() -> None:
    lost = PartitionError(name="RankLostError", message="killed by SIGKILL")
    assert classify(ended(Ending.HOST_MEMORY), "failed", lost) is FailureClass.HOST_MEMORY


def test_a_task_that_said_it_was_done_and_left_nothing_ended_without_its_results() -> None:
    assert classify(TaskState(phase=TaskPhase.RUNNING), "done", None) is FailureClass.NO_RESULT


def test_a_script_that_never_began_is_a_launch_failure() -> None:
    assert (
        classify(ended(Ending.EXITED, 1), None, None, said_anything=False, has_begun=False)
        is FailureClass.LAUNCH_FAILURE
    )


@pytest.mark.parametrize("ending", [Ending.EXITED, Ending.KILLED])
@pytest.mark.parametrize("exit_code", [1, 2, 137])
def test_a_task_that_dies_with_a_word_and_before_its_first_event_is_a_node_fault(
    ending: Ending, exit_code: int
) -> None:
    assert classify(ended(ending, exit_code), None, None, has_begun=False) is FailureClass.NODE_FAULT


@pytest.mark.parametrize(
    ("error", "message", "failure"),
    [
        ("RuntimeError", "CUDA error: uncorrectable ECC error encountered", FailureClass.NODE_FAULT),
        ("RuntimeError", "CUDA error: device-side assert triggered", FailureClass.WORK),
        ("RuntimeError", "No CUDA GPUs are available", FailureClass.NODE_FAULT),
        ("RuntimeError", "Found no NVIDIA driver on your system.", FailureClass.NODE_FAULT),
        ("ImportError", "libcuda.so.1: cannot open shared object file: No such file", FailureClass.NODE_FAULT),
        ("ModuleNotFoundError", "No module named 'torch'", FailureClass.WORK),
        ("BadRecordError", "a text about NVML", FailureClass.WORK),
    ],
)
def test_a_librarys_text_tells_faults_of_the_node_from_those_of_the_work(
    error: str, message: str, failure: FailureClass
) -> None:
    assert classify(ended(Ending.EXITED, 1), "failed", PartitionError(name=error, message=message)) is failure


def faults(*nodes: str) -> list[Retry | GiveUp]:
    """What is decided about a partition that meets a fault on one of these nodes after the other."""
    attempts, decisions = Attempts(), []
    for node in nodes:
        decisions.append(decide(FailureClass.NODE_FAULT, ASKED, attempts, n_parts=0, node=node))
        attempts = getattr(decisions[-1], "attempts", attempts)
    return decisions


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        (("n1", "n1", "n2", "n2", "n3"), "it failed so on 3 nodes (n1, n2, n3)"),
        (("n1", "n2", "n3"), "that is no fault of one node but of the work"),
        (("n1", "n1", "n1"), "it failed so 3 times on n1 and was given no other node"),
        (("", "", ""), "given up after 3 attempts in a row"),
    ],
)
def test_faults_of_nodes_are_bounded_by_the_number_of_nodes(nodes: tuple[str, ...], why: str) -> None:
    *before, last = faults(*nodes)
    assert all(isinstance(decision, Retry) for decision in before)
    assert isinstance(last, GiveUp)
    assert why in last.why


def test_a_node_is_sick_with_the_faults_of_two_tasks_and_not_of_two_partitions() -> None:
    seen = NodeFaults()
    for task in (1, 1):
        seen.note("n1", task, "exit status 127")
    assert (seen.sick_nodes, seen.in_words()) == (frozenset(), "n1 (1 fault; the last: exit status 127)")
    seen.note("n1", 2, "exit status 126")
    assert (seen.sick_nodes, seen.in_words()) == (frozenset({"n1"}), "n1 (2 faults; the last: exit status 126)")


def test_out_of_device_memory_is_bounded_by_the_smallest_batch_and_not_by_attempts() -> None:
    asked, attempts = Asked(resources=Resources(), token_budget=16384), Attempts()
    budgets = []
    while isinstance(decision := decide(FailureClass.DEVICE_MEMORY, asked, attempts, n_parts=0, node=""), Retry):
        asked, attempts = decision.asked, decision.attempts
        budgets.append(asked.token_budget)
    assert budgets == [8192, 4096, 2048, 1024, 512, 256]


def test_weights_that_do_not_fit_are_not_tried_again_with_smaller_batches() -> None:
    error = PartitionError(name="OutOfDeviceMemoryError", message="", while_loading=True)
    assert classify(ended(Ending.EXITED, 1), "failed", error) is FailureClass.WORK


@pytest.mark.parametrize(
    "failure", [FailureClass.WORK, FailureClass.IMPOSSIBLE, FailureClass.CANCELLED, FailureClass.HELD]
)
def test_what_another_start_cannot_heal_is_given_up_at_once(failure: FailureClass) -> None:
    assert decide(failure, ASKED, Attempts(), n_parts=99, node="n1") == GiveUp(why="")


def test_a_failed_node_is_left_out_next_time() -> None:
    first = retried(FailureClass.NODE_FAILURE)
    assert first.excluded_nodes == {"n1"}
    assert retried(FailureClass.NODE_FAILURE, first, node="n2").excluded_nodes == {"n1", "n2"}
    assert retried(FailureClass.NODE_FAILURE, node="").excluded_nodes == frozenset()


def test_out_of_host_memory_asks_for_twice_as_much_up_to_the_limit() -> None:
    asked = dataclasses.replace(ASKED, resources=Resources(memory_gib=8.0, max_memory_gib=20.0))
    second = retried(FailureClass.HOST_MEMORY, asked)
    third = retried(FailureClass.HOST_MEMORY, second)
    assert [a.resources.memory_gib for a in (asked, second, third)] == [8.0, 16.0, 20.0]
    last = decide(FailureClass.HOST_MEMORY, third, Attempts(), n_parts=0, node="")
    assert last == GiveUp(why="it had the most memory that max_memory_gib allows, 20 GiB")


def test_without_a_limit_memory_is_raised_to_four_times_the_first_request() -> None:
    asked = ASKED
    for _ in range(2):
        asked = retried(FailureClass.HOST_MEMORY, asked)
    assert asked.resources.memory_gib == 32.0
    assert isinstance(decide(FailureClass.HOST_MEMORY, asked, Attempts(), n_parts=0, node=""), GiveUp)


def test_memory_that_was_never_asked_for_cannot_be_raised_and_the_recipe_is_told_how() -> None:
    decision = decide(FailureClass.HOST_MEMORY, Asked(resources=Resources()), Attempts(), n_parts=0, node="")
    assert isinstance(decision, GiveUp)
    assert "set memory_gib" in decision.why


def test_out_of_device_memory_halves_the_batches_until_they_cannot_be_smaller() -> None:
    assert retried(FailureClass.DEVICE_MEMORY).token_budget == 2048
    smallest = dataclasses.replace(ASKED, token_budget=300)
    decision = decide(FailureClass.DEVICE_MEMORY, smallest, Attempts(), n_parts=0, node="")
    assert isinstance(decision, GiveUp)
    assert "300 tokens" in decision.why


FOUND_BY_ITSELF = dataclasses.replace(ASKED, token_budget=None)


@pytest.mark.parametrize(
    ("asked", "reported", "next_budget"),
    [
        (FOUND_BY_ITSELF, 24576, 12288),  # what the task measured
        (ASKED, 1024, 512),  # the recipe says 4,096, and the task had come down to less
        (ASKED, None, 2048),
        (FOUND_BY_ITSELF, None, 4096),  # it did not say
    ],
)
def test_half_of_the_budget_that_the_task_had_last_is_tried_next(
    asked: Asked, reported: int | None, next_budget: int
) -> None:
    decision = decide(FailureClass.DEVICE_MEMORY, asked, Attempts(), n_parts=0, node="n1", token_budget=reported)
    assert isinstance(decision, Retry)
    assert decision.asked.token_budget == next_budget


def test_other_failures_leave_it_to_the_task_to_find_its_budget() -> None:
    for failure in (FailureClass.NODE_FAILURE, FailureClass.HOST_MEMORY, FailureClass.KILLED):
        decision = decide(failure, FOUND_BY_ITSELF, Attempts(), n_parts=0, node="n1", token_budget=24576)
        assert isinstance(decision, Retry)
        assert decision.asked.token_budget is None


def test_a_node_whose_storage_does_not_answer_is_left_out_next_time() -> None:
    assert retried(FailureClass.STORAGE).excluded_nodes == {"n1"}


@pytest.mark.parametrize(
    "failure", [FailureClass.KILLED, FailureClass.LOST, FailureClass.TIME_LIMIT, FailureClass.STORAGE]
)
def test_attempts_without_progress_are_bounded(failure: FailureClass) -> None:
    attempts = Attempts()
    for _ in range(MAX_ATTEMPTS - 1):
        decision = decide(failure, ASKED, attempts, n_parts=0, node="")
        assert isinstance(decision, Retry)
        attempts = decision.attempts
    last = decide(failure, ASKED, attempts, n_parts=0, node="")
    assert last == GiveUp(why=f"given up after {MAX_ATTEMPTS} attempts in a row without a new part on disk")


@pytest.mark.parametrize("failure", [f for f in FailureClass if f in FREE])
def test_interruptions_cost_no_attempt_while_parts_are_added(failure: FailureClass) -> None:
    attempts = Attempts()
    for n_parts in range(1, 50):
        decision = decide(failure, ASKED, attempts, n_parts=n_parts, node="")
        assert isinstance(decision, Retry)
        assert decision.attempts.n_without_progress == 0
        attempts = decision.attempts


def test_progress_renews_the_attempts_of_any_failure() -> None:
    tired = Attempts(n_without_progress=MAX_ATTEMPTS - 1, n_parts=4)
    assert isinstance(decide(FailureClass.KILLED, ASKED, tired, n_parts=4, node=""), GiveUp)
    renewed = decide(FailureClass.KILLED, ASKED, tired, n_parts=5, node="")
    assert isinstance(renewed, Retry)
    assert renewed.attempts == Attempts(n_without_progress=1, n_parts=5)
