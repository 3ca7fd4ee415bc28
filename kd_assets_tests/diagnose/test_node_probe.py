"""Waiting for test jobs: each ends in an answer, in an end without one, or cancelled. No cluster: a fake answers."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kd_assets.diagnose.node_probe import GONE, POLL_S, Probe, read_answer, wait_for_probes
from kd_assets.errors import SchedulerUnreachableError
from kd_assets.scheduler.slurm.commands.runners import Answer
from kd_assets_tests.disks import failing

WAIT_S, GRACE_S = 120.0, 30.0


class FakeQueue:
    """A fake of squeue and scancel for one job, with the clock of the test: `happens` is called at each look, with the
    seconds since the beginning."""

    def __init__(self, probe: Probe, happens: Callable[[FakeQueue, float], None]) -> None:
        self.probe, self._happens = probe, happens
        self.now, self.state = 0.0, "PENDING||Priority"
        self.is_reachable = True
        self.cancelled: list[str] = []

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Answer:
        if argv[0] == "scancel":
            self.cancelled += argv[1:]
            return Answer(argv=tuple(argv), status=0, stdout="", stderr="")
        self._happens(self, self.now)
        if not self.is_reachable:
            raise SchedulerUnreachableError("squeue gave no answer")
        if not self.state:
            return Answer(
                argv=tuple(argv), status=1, stdout="", stderr="slurm_load_jobs error: Invalid job id specified"
            )
        return Answer(argv=tuple(argv), status=0, stdout=self.state + "\n", stderr="")

    def answers(self) -> None:
        (self.probe.folder / "answer").write_text("node=n1\ndone=1\n")

    def wait(self) -> float:
        """Seconds until nothing more is waited for."""
        wait_for_probes(
            self, [self.probe], wait_s=WAIT_S, visibility_grace_s=GRACE_S, timeout_s=10,
            clock=lambda: self.now, sleep=self._sleep,
        )  # fmt: skip
        return self.now

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def probe(tmp_path: Path) -> Probe:
    return Probe(name="teacher", folder=tmp_path, nonce="n", job_id=7)


def test_an_answer_ends_the_wait(probe: Probe) -> None:
    queue = FakeQueue(probe, lambda q, now: q.answers() if now >= 10 else None)
    assert queue.wait() == 10
    assert probe.has_answered
    assert queue.cancelled == []


def test_an_answer_may_be_seen_a_while_after_the_end(probe: Probe) -> None:
    def happens(queue: FakeQueue, now: float) -> None:
        queue.state = "COMPLETED|n1|None" if now >= 5 else "RUNNING|n1|None"
        if now >= 5 + GRACE_S - POLL_S:
            queue.answers()

    assert FakeQueue(probe, happens).wait() < 5 + GRACE_S
    assert (probe.has_answered, probe.is_over, probe.node) == (True, True, "n1")


@pytest.mark.parametrize(("state", "known_as"), [("FAILED|n1|NonZeroExitCode", "FAILED"), ("", GONE)])
def test_an_end_without_an_answer_is_given_up_after_the_grace_of_the_disk(
    probe: Probe, state: str, known_as: str
) -> None:
    def happens(queue: FakeQueue, now: float) -> None:
        queue.state = state

    queue = FakeQueue(probe, happens)
    assert GRACE_S < queue.wait() < GRACE_S + 3 * POLL_S
    assert (probe.has_answered, probe.state) == (False, known_as)
    assert queue.cancelled == [], "it is gone by itself"


def test_what_did_not_start_in_time_is_cancelled(probe: Probe) -> None:
    queue = FakeQueue(probe, lambda q, now: None)
    assert queue.wait() == WAIT_S
    assert queue.cancelled == ["7"]
    assert (probe.state, probe.reason) == ("PENDING", "Priority")


def test_not_being_able_to_ask_is_no_end(probe: Probe) -> None:
    def happens(queue: FakeQueue, now: float) -> None:
        queue.is_reachable = now >= 60
        if now >= 70:
            queue.answers()

    assert FakeQueue(probe, happens).wait() == 70
    assert probe.has_answered


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES])
def test_an_answer_that_cannot_be_read_now_is_not_there_yet(probe: Probe, number: int) -> None:
    (probe.folder / "answer").write_text("done=1\n")
    with failing(number, of=probe.folder / "answer"):
        assert read_answer(probe.folder / "answer") == {}
    assert read_answer(probe.folder / "answer") == {"done": "1"}
