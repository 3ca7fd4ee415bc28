"""The GPU's tests in the order of their worth, as far as the time goes: a failure, a crash or a hang keeps none from
its turn.

pytest runs in a program of its own, which notes every test as it begins and ends (see `noting`). Where one hangs or
brings the program down, or leaves the device unusable, pytest is started again with those that are left. The notes stay
in the folder, so that a later run goes on where this one ended. Without a GPU: the same tests' CPU variants.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_assets_tests.benchmarks.figures import Figures
from kd_assets_tests.benchmarks.first_minutes.bounded import Ended, run_bounded

TEST_LIMIT_S = 60.0
"""Of one test: compiling kernels for the first time takes half of it."""
LAST_TEST_S = 5.0
"""With less left no test begins (but the first of a program)."""
START_S = 15.0
"""What it takes to import and to collect: with less left pytest is not started."""
TESTS = {
    "cuda": ("-m", "gpu", "kd_assets_tests/teacher", "kd_assets_tests/worker"),
    "cpu": ("-m", "not gpu", "kd_assets_tests/teacher/test_gpu.py"),
}
"""What pytest is to collect."""
PYTEST = (
    "-q",
    "-W",
    "default",  # a GPU machine has other versions than those pinned: what they warn of is no error
    "-p",
    "no:cacheprovider",
    "-p",
    "kd_assets_tests.benchmarks.first_minutes.noting",
)
NOTES_OPTION, DEADLINE_OPTION = "--notes", "--no-test-after"
OUTCOMES = ("passed", "failed", "skipped", "hung", "crashed")
GOOD = ("passed", "skipped")
MOST_MESSAGE = 3000
"""Characters of a failure that are kept."""


@dataclass(kw_only=True, slots=True)
class Notes:
    """What is known of the tests, from the lines of the notes."""

    collected: list[str] = field(default_factory=list)
    """Names of all tests, in the order in which they run."""
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """test → its outcome, seconds and message."""
    begun: str | None = None
    """The test that has begun and not ended."""
    begun_at: float = 0.0

    @staticmethod
    def of(lines: Sequence[str]) -> Notes:
        notes = Notes()
        for line in lines:
            note = json.loads(line)
            if "collected" in note:
                notes.collected = notes.collected or note["collected"]
            elif "begun_at" in note:
                notes.begun, notes.begun_at = note["test"], note["begun_at"]
            else:
                notes.outcomes[note["test"]] = note
                notes.begun = None
        return notes

    def figures(self) -> dict[str, Any]:
        counts = Counter(note["outcome"] for note in self.outcomes.values())
        bad = [note for note in self.outcomes.values() if note["outcome"] not in GOOD]
        slowest = sorted(self.outcomes.values(), key=lambda note: -note["seconds"])[:5]
        not_run = [test for test in self.collected if test not in self.outcomes]
        return {
            **{f"n_{outcome}": counts[outcome] for outcome in OUTCOMES},
            "n_not_run": len(not_run),
            "first_not_run": not_run[0] if not_run else None,
            "bad": [f"{n['outcome'].upper()} {n['test']} ({n['seconds']:.1f} s): {n['message']}" for n in bad],
            "slowest": [f"{note['seconds']:6.1f} s  {note['test']}" for note in slowest],
        }


def read_notes(path: Path) -> Notes:
    """Of the whole lines: the last one may still be written."""
    if not path.exists():
        return Notes()
    return Notes.of([line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")])


def run_tests(chosen: Sequence[str], folder: Path, figures: Figures, *, deadline: float) -> str | None:
    """Run what the notes have no outcome of, until all have one or `deadline` (by `time.time`) is near. Returns what
    pytest said where it could not run any."""
    path = folder / "tests.jsonl"
    while time.time() < deadline - START_S:
        before = read_notes(path)
        if before.collected and not before.figures()["n_not_run"]:
            return None
        ended = run_pytest(chosen, path, folder / "pytest.log", figures, deadline=deadline)
        notes = read_notes(path)
        if notes.begun is not None:
            note_end(path, notes, ended)
        figures.add(**read_notes(path).figures())
        if len(read_notes(path).outcomes) == len(before.outcomes):
            return ended.tail
    return None


def run_pytest(chosen: Sequence[str], path: Path, log: Path, figures: Figures, *, deadline: float) -> Ended:
    """One program, until it ends, `deadline` comes, or a test takes too long."""

    def look() -> bool:
        notes = read_notes(path)
        figures.add(**notes.figures())
        return notes.begun is None or time.time() < notes.begun_at + TEST_LIMIT_S

    no_test_after = str(deadline - LAST_TEST_S)
    argv = [sys.executable, "-m", "pytest", *PYTEST, NOTES_OPTION, str(path), DEADLINE_OPTION, no_test_after, *chosen]
    # Each test runs once, whatever CI asks of its own pytest.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return run_bounded(argv, limit_s=deadline - time.time(), log=log, look=look, environment=environment)


def note_end(path: Path, notes: Notes, ended: Ended) -> None:
    """The outcome of a test that its program did not live to tell. One that only the deadline ended has none."""
    seconds = round(time.time() - notes.begun_at, 1)
    if ended.status is None and seconds < TEST_LIMIT_S:
        return
    outcome = "hung" if ended.status is None else "crashed"
    message = f"its program {ended.in_words}\n{ended.tail}"
    note(path, test=notes.begun, outcome=outcome, seconds=seconds, message=message[-MOST_MESSAGE:])


def note(path: Path, **fields: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(fields) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", choices=sorted(TESTS), required=True)
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, required=True)
    options = parser.parse_args()
    deadline = time.time() + options.time_limit
    figures = Figures(options.figures)
    why = run_tests(TESTS[options.device], options.folder, figures, deadline=deadline)
    if why is not None:
        print(f"pytest ran no test:\n{why}", file=sys.stderr)
    return 1 if why is not None or figures.known.get("bad") else 0


if __name__ == "__main__":
    sys.exit(main())
