"""What following costs: that of the tasks that are active, not of all that there are. Operations are counted."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kd_assets.scheduler import Submission, TaskPhase
from kd_assets_tests.orchestration.driving.world import World, interrupt


@dataclass
class Opened:
    """What this process opens or lists, while `counts`."""

    counts: bool = False
    names: Counter[str] = field(default_factory=Counter)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.counts and event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], (str, Path)):
            path = Path(args[0])
            kind = "log" if path.suffix == ".log" else "event file" if path.parent.name == "events" else path.name
            self.names[kind] += 1


@pytest.fixture(scope="module")
def audit() -> Opened:
    """An audit hook can be added and never removed: so it is one for all tests."""
    opened = Opened()
    sys.addaudithook(opened.hook)
    return opened


@pytest.fixture
def opened(audit: Opened) -> Iterator[Opened]:
    audit.names = Counter()
    yield audit
    audit.counts = False


@pytest.mark.parametrize("n_tasks", [5, 40])
def test_following_costs_what_the_tasks_cost_that_are_active_and_not_all_that_there_are(
    tmp_path: Path, opened: Opened, n_tasks: int
) -> None:
    """One task runs, one is over, the others wait in the queue: so it stays for a hundred seconds."""
    world = World(tmp_path, [f"p{i}" for i in range(n_tasks)])

    def script(job: Submission) -> None:
        for task in (0, 1):
            world.say(job, "task_started", task)
            world.set_state(job, task, TaskPhase.RUNNING)
        world.commit_and_say(job, "p0", 0)
        world.say(job, "task_finished", 0)
        world.end(job, task=0)

        def begin() -> None:
            opened.counts = True

        def end() -> None:
            opened.counts = False
            interrupt()

        world.at(20, begin)
        world.at(120, end)

    world.on_each_submission(script)
    with pytest.raises(KeyboardInterrupt):
        world.run(n_tasks=n_tasks)
    n_looks = 200
    assert opened.names["event file"] == pytest.approx(n_looks, rel=0.1), "that of the task that runs"
    assert opened.names["events"] == pytest.approx(n_looks, rel=0.1), "one listing a look"
    assert opened.names["log"] == pytest.approx(n_looks / 4, rel=0.1)
    assert set(opened.names) == {"event file", "events", "log"}, "and nothing else, in the store for instance"


def test_a_job_all_of_whose_tasks_have_begun_is_not_listed_any_more(world: World, opened: Opened) -> None:
    def script(job: Submission) -> None:
        world.say(job, "task_started")
        world.at(5, lambda: setattr(opened, "counts", True))
        world.at(50, lambda: world.work_through(job))

    world.on_each_submission(script)
    world.run()
    assert opened.names["event file"] > 50
    assert opened.names["events"] == 0
