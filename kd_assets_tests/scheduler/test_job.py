"""Submission keys and the spreading of work: pure functions."""

from __future__ import annotations

import random

import pytest

from kd_assets.contract import Output, WorkUnit
from kd_assets.scheduler import spread, submission_key


def unit(partition_key: str, fingerprint: str, n_tokens: int = 0) -> WorkUnit:
    output = Output(asset="topk_cache", path="/o", variant="v", fingerprint=fingerprint, identity={})
    return WorkUnit(partition_key=partition_key, n_tokens=n_tokens, outputs=(output,))


def test_equal_work_has_an_equal_key_whatever_its_order_and_estimates() -> None:
    a, b = unit("p0", "f0"), unit("p1", "f1")
    assert submission_key("teacher", "demo", [a, b]) == submission_key("teacher", "demo", [unit("p1", "f1", 9), a])
    assert len(submission_key("teacher", "demo", [a])) == 32


def test_other_work_has_another_key() -> None:
    key = submission_key("teacher", "demo", [unit("p0", "f0")])
    assert key != submission_key("teacher", "demo", [unit("p0", "f1")])
    assert key != submission_key("teacher", "demo", [unit("p1", "f0")])
    assert key != submission_key("teacher", "other", [unit("p0", "f0")])
    assert key != submission_key("shards", "demo", [unit("p0", "f0")])


def test_every_partition_is_in_exactly_one_task_and_no_task_is_empty() -> None:
    rng = random.Random(0)
    for _ in range(200):
        sizes = [rng.randrange(0, 100) for _ in range(rng.randrange(1, 30))]
        tasks = spread(sizes, rng.randrange(1, 10))
        assert sorted(i for task in tasks for i in task) == list(range(len(sizes)))
        assert all(tasks)


def test_the_largest_task_is_within_four_thirds_of_an_even_share() -> None:
    sizes = [7, 7, 6, 6, 5, 5, 4, 4, 4]
    assert max(sum(sizes[i] for i in task) for task in spread(sizes, 3)) <= 4 / 3 * sum(sizes) / 3


def test_partitions_of_unknown_size_are_dealt_out_evenly() -> None:
    assert sorted(len(task) for task in spread([0] * 9, 3)) == [3, 3, 3]


def test_a_job_without_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        spread([1], 0)
