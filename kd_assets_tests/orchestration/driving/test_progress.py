"""How far a run is, in lines of its log. The clock is a list of seconds, so nothing here waits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from kd_assets.contract import JobKind, Output, WorkUnit
from kd_assets.orchestration.driving.listening import training_in_words
from kd_assets.orchestration.driving.progress import (
    EVERY_S,
    LONGEST_PAUSE_S,
    Progress,
    counts_in_words,
    span_in_words,
)
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.scheduler import Submission
from kd_assets_tests.orchestration.driving.world import Log, World


class Watched:
    """Ten shards of 1,000 tokens, two caches each."""

    def __init__(self, kind: JobKind = "teacher", *, n_shards: int = 10, n_tokens: int = 1000) -> None:
        self.now = 0.0
        self.log = Log()
        self.units = tuple(
            WorkUnit(
                partition_key=f"p{i}",
                n_tokens=n_tokens,
                outputs=tuple(
                    Output(asset=asset, path=f"/{asset}/p{i}", fingerprint="f", variant="v", identity={})
                    for asset in ("topk_cache", "embedding_cache")
                ),
            )
            for i in range(n_shards)
        )
        work = PlannedWork(kind=kind, units=self.units)
        self.progress = Progress(work, log=self.log, clock=lambda: self.now)

    def at(self, seconds: float) -> list[str]:
        """The lines that are said when it is looked at then."""
        self.now = seconds
        n_before = len(self.log.lines)
        self.progress.tell()
        return self.log.lines[n_before:]

    def done(self, *shards: int, is_made: bool = True) -> None:
        for i in shards:
            for output in self.units[i].outputs:
                self.progress.on_closed(self.units[i], output, is_made=is_made)

    def half_done(self, shard: int, **data: Any) -> None:
        self.progress.on_event({"partition_key": f"p{shard}", "n_tokens": 800, "done_tokens": 400} | data)


def test_a_line_says_shards_their_share_of_tokens_the_rate_and_what_is_left() -> None:
    run = Watched()
    assert run.at(0) == []
    run.done(0, 1, 2)
    run.half_done(3)
    assert run.at(10) == ["info teacher: 3 of 10 shards, 35 % of tokens, 350 tokens/s, about 19 s left"]


def test_a_run_of_seconds_says_nothing_of_it() -> None:
    run = Watched()
    run.done(*range(9))
    assert [line for tenth in range(int(EVERY_S) * 10) for line in run.at(tenth / 10)] == []


def test_of_tokens_that_nobody_knows_nothing_is_said() -> None:
    run = Watched(n_tokens=0)
    run.at(0)
    run.done(0, 1)
    assert run.at(10) == ["info teacher: 2 of 10 shards"]


def test_nothing_is_said_again_while_nothing_moves() -> None:
    run = Watched()
    run.done(0)
    assert len(run.at(10)) == 1
    assert [line for seconds in range(11, 600) for line in run.at(seconds)] == []


def test_lines_are_seconds_apart_and_further_in_a_run_of_hours() -> None:
    run = Watched(n_shards=5000)
    said_at = []
    for seconds in range(20_000):
        if seconds % 4 == 0:
            run.done(seconds // 4)
        if run.at(seconds):
            said_at.append(seconds)
    pauses = [b - a for a, b in pairwise(said_at)]
    assert min(pauses) >= EVERY_S
    assert max(pauses) <= LONGEST_PAUSE_S + 1
    assert len(said_at) < 500


def test_a_job_that_waits_in_the_queue_is_no_slow_work() -> None:
    run = Watched()
    assert [line for seconds in range(3600) for line in run.at(seconds)] == []
    run.done(0, 1)
    (line,) = run.at(3660)
    assert "2 of 10 shards, 20 % of tokens" in line
    assert float(line.split("tokens/s")[0].split(", ")[-1]) > 20


def test_what_a_job_had_done_before_it_was_found_is_in_the_share_and_not_in_the_rate() -> None:
    run = Watched()
    run.done(0, 1, 2, 3)
    run.at(0)
    run.done(4)
    assert run.at(10) == ["info teacher: 5 of 10 shards, 50 % of tokens, 100 tokens/s, about 50 s left"]


def test_shards_that_failed_are_not_among_those_that_are_done() -> None:
    run = Watched()
    run.done(0)
    run.done(1, is_made=False)
    (line,) = run.at(10)
    assert line.startswith("info teacher: 1 of 10 shards, 1 failed, 20 % of tokens")


def test_of_a_shard_of_which_one_cache_is_there_only_the_rest_is_under_way() -> None:
    run = Watched()
    run.progress.on_closed(run.units[0], run.units[0].outputs[0], is_made=True)
    run.half_done(0)
    (line,) = run.at(10)
    assert "0 of 10 shards, 8 % of tokens" in line  # 750 of 10,000


def test_results_that_are_made_one_by_one_are_counted_one_by_one() -> None:
    run = Watched("export")
    run.half_done(0, asset="topk_cache")
    run.half_done(0, asset="embedding_cache", done_tokens=800)
    (line,) = run.at(10)
    assert "info export: 0 of 10 shards, 8 % of tokens" in line


def test_what_a_joined_job_makes_for_others_is_not_counted() -> None:
    run = Watched("export", n_shards=2)
    run.half_done(0, asset="of_another", done_tokens=800)
    run.half_done(1, asset="of_another", done_tokens=800)
    assert run.at(10) == []
    run.half_done(0, asset="topk_cache")
    (line,) = run.at(20)
    assert "0 of 2 shards, 12 % of tokens" in line  # 250 of 2,000


def test_an_event_that_comes_when_its_result_is_there_is_not_added_to_it() -> None:
    run = Watched(n_shards=2)
    run.progress.on_closed(run.units[0], run.units[0].outputs[0], is_made=True)
    run.half_done(0, asset="topk_cache", done_tokens=800)
    run.done(1)
    run.half_done(1, done_tokens=800)
    (line,) = run.at(10)
    assert "1 of 2 shards, 75 % of tokens" in line


def test_records_tell_how_far_a_shard_is_whose_tokens_are_not_counted_yet() -> None:
    run = Watched("shards")
    run.progress.on_event({"partition_key": "p0", "n_tokens": None, "n_documents": 4, "done_documents": 1})
    run.progress.on_event({"partition_key": "of another run", "n_tokens": 10, "done_tokens": 10})
    (line,) = run.at(10)
    assert "0 of 10 shards, 2 % of tokens" in line


def test_a_training_tells_its_steps_itself() -> None:
    run = Watched("student")
    run.half_done(0)
    assert run.at(100) == []
    step = {"n_steps": 60, "done_steps": 20, "loss": 3.2141, "tokens_per_s": 5120.4}
    assert training_in_words(step) == "step 20 of 60, loss 3.214, 5,120 tokens/s"


def test_a_driver_tells_how_far_it_is_from_what_tasks_say(world: World) -> None:
    def script(job: Submission) -> None:
        world.say(job, "task_started")
        world.at(8, lambda: world.say(job, "progress", partition_key="p0", n_tokens=10, done_tokens=5))
        world.at(20, lambda: world.commit_and_say(job, "p0"))
        world.at(40, lambda: world.work_through(job))

    world.on_each_submission(script)
    world.run()
    told = [line.split(", ")[:2] for line in world.log.lines if " shards, " in line]
    assert told == [
        ["info teacher: 0 of 2 shards", "25 % of tokens"],
        ["info teacher: 1 of 2 shards", "50 % of tokens"],
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (42, "42 s"), (89, "89 s"), (372, "6 min"), (5399, "90 min"), (18_800, "5.2 h")],
)
def test_spans_of_time_are_as_exact_as_a_person_reads_them(seconds: float, words: str) -> None:
    assert span_in_words(seconds) == words
    assert counts_in_words(10, 0, 1200, seconds) == f"10 made, 0 reused, 1,200 failed, {words}"
