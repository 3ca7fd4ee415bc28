"""Children that hang or crash cost their own item and no other; operations are disturbed exactly where planned."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_assets_tests.campaign import children
from kd_assets_tests.campaign.children import Lost, Say, in_children
from kd_assets_tests.campaign.file_operations import Disturbance, How, install


def test_an_item_that_hangs_or_crashes_is_told_and_the_others_are_done(tmp_path: Path) -> None:
    def work(item: int, say: Say) -> dict[str, Any]:
        say(f"at {item}", 0.3 if item == 1 else 300)
        if item == 1:
            time.sleep(300)
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"item": item}

    outcomes = dict(in_children(range(5), work, log=tmp_path / "log"))
    assert [outcomes[i] for i in (0, 2, 4)] == [{"item": 0}, {"item": 2}, {"item": 4}]
    assert outcomes[1] == Lost(hung=True, at="at 1", words="no answer after 0.3 s")
    assert outcomes[3] == Lost(hung=False, at="at 3", words="killed by SIGKILL")


def test_a_child_whose_parent_was_killed_does_not_wait_for_somebody_to_hear_it(tmp_path: Path) -> None:
    started, log = tmp_path / "started", tmp_path / "log"

    def work(item: int, say: Say) -> dict[str, Any]:
        parent = os.getppid()
        started.with_suffix(".tmp").write_text(str(os.getpid()))
        started.with_suffix(".tmp").rename(started)
        while os.getppid() == parent:
            time.sleep(0.01)
        say("more than a pipe holds" * 10_000, 180)
        return {}

    parent = children.fork(lambda: list(in_children([0], work, log=log)), log=log)
    until = time.monotonic() + 180
    while not started.exists() and time.monotonic() < until:
        time.sleep(0.01)
    children.end(parent)
    try:
        while "BrokenPipeError" not in log.read_text() and time.monotonic() < until:
            time.sleep(0.01)
        assert "BrokenPipeError" in log.read_text()
    finally:
        children.end(int(started.read_text()), group=True)


def test_an_exception_in_a_child_is_in_the_log_and_never_in_its_parent(tmp_path: Path) -> None:
    def body() -> None:
        raise ValueError("of the child")

    status = children.wait(children.fork(body, log=tmp_path / "log"), 180)
    assert status is not None
    assert children.in_words(status) == "ended with status 1"
    assert "ValueError: of the child" in (tmp_path / "log").read_text()


def write_two(folder: Path) -> None:
    for name in ("a", "b"):
        temporary = folder / f"{name}.tmp"
        with temporary.open("wb") as file:
            file.write(b"12345678")
        os.replace(temporary, folder / name)


def disturbed(folder: Path, nth: int, how: How, body: Callable[[Path], None] = write_two) -> int:
    """How a child ended that did `body` with this disturbance."""
    folder.mkdir()
    plan = Disturbance(below=f"{folder}/", nth=nth, how=how, done_file=str(folder.parent / "done"))

    def child() -> None:
        install(plan)
        body(folder)

    status = children.wait(children.fork(child, log=folder.parent / "log"), 180)
    assert status is not None
    return os.waitstatus_to_exitcode(status)


def found_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("nth", "how", "left"),
    [
        (1, "kill before", {}),
        (1, "kill after", {"a.tmp": b""}),
        (2, "kill half", {"a.tmp": b"1234"}),
        (3, "kill before", {"a.tmp": b"12345678"}),
        (3, "kill after", {"a": b"12345678"}),
        (4, "kill after", {"a": b"12345678", "b.tmp": b""}),
    ],
)
def test_a_process_is_killed_exactly_at_the_nth_operation(
    nth: int, how: How, left: dict[str, bytes], tmp_path: Path
) -> None:
    assert disturbed(tmp_path / "f", nth, how) == -signal.SIGKILL
    assert found_in(tmp_path / "f") == left


def test_one_operation_fails_and_the_next_succeeds(tmp_path: Path) -> None:
    def twice(folder: Path) -> None:
        for _ in range(2):
            try:
                write_two(folder)
            except OSError as e:
                (folder.parent / "said").write_text(e.strerror or "")

    assert disturbed(tmp_path / "f", 2, "ENOSPC", twice) == 0
    assert (tmp_path / "said").read_text() == "No space left on device"
    assert found_in(tmp_path / "f") == {"a": b"12345678", "b": b"12345678"}


def test_a_full_disk_stays_full(tmp_path: Path) -> None:
    def twice(folder: Path) -> None:
        for _ in range(2):
            try:
                write_two(folder)
            except OSError:
                continue

    assert disturbed(tmp_path / "f", 3, "ENOSPC from then on", twice) == 0
    assert found_in(tmp_path / "f") == {"a.tmp": b"12345678"}


def test_operations_are_counted_below_the_folder_only(tmp_path: Path) -> None:
    def body(folder: Path) -> None:
        write_two(folder)
        (folder.parent / "beside").write_text("not counted")

    assert disturbed(tmp_path / "f", 0, "only count", body) == 0
    counted = [line.split() for line in (tmp_path / "done").read_text().splitlines()]
    assert counted == [
        ["1", "open", "a.tmp"],
        ["2", "write", "a.tmp"],
        ["3", "replace", "a"],
        ["4", "open", "b.tmp"],
        ["5", "write", "b.tmp"],
        ["6", "replace", "b"],
    ]
