"""The steps in the order of their worth, each a program of its own: one that hangs or crashes keeps none from its turn.

Nothing heavy is imported here. `Run` owns the budget and tells after every step, and every few seconds within one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kd_assets_tests.benchmarks.figures import read_figures
from kd_assets_tests.benchmarks.first_minutes.bounded import KILL_S, TRACEBACK_S, run_bounded

Status = Literal["ok", "failed", "timeout", "skipped", "running"]
TELL_EVERY_S = 5.0
RESERVE_S = TRACEBACK_S + KILL_S + 2.0
"""Of the budget, for ending what hangs and for the last report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A program with the options `--figures FILE`, where it keeps what it has found (see `benchmarks.figures`), and
    `--time-limit SECONDS`."""

    name: str
    arguments: tuple[str, ...]
    """Of Python: `-m`, a module, its options."""
    limit_s: float
    """It is ended after this many seconds, and earlier where the budget ends earlier."""
    margin_s: float = 10.0
    """By so much earlier it is asked, with `--time-limit`, to come to an end by itself."""
    least_s: float = 0.0
    """With less left it is not begun."""
    why_not: str | None = None
    """Why it is of no use on this machine."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of a step; of one that still runs, what is known of it."""

    name: str
    status: Status
    seconds: float = 0.0
    limit_s: float | None = None
    why: str = ""
    """Why it is not `ok`."""
    figures: dict[str, Any] = field(default_factory=dict)
    tail: str = ""
    """The end of its output."""


@dataclass(kw_only=True)
class Run:
    """The steps of one run, within one budget of time."""

    folder: Path
    """For logs and figures of the steps."""
    budget_s: float
    tell: Callable[[Run], None]
    """Called with all that is known, after every step and every few seconds within one."""
    outcomes: list[Outcome] = field(default_factory=list)
    ended: bool = False
    """No step is left."""
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def left_s(self) -> float:
        return self.budget_s - RESERVE_S - self.seconds

    def do(self, step: Step) -> Outcome:
        """Run one step, if there is a use and time for it; its outcome is told."""
        outcome = Outcome(name=step.name, status="running")
        self.outcomes.append(outcome)
        if step.why_not is not None:
            outcome.status, outcome.why = "skipped", step.why_not
        elif self.left_s < step.least_s:
            outcome.status = "skipped"
            outcome.why = f"it takes {step.least_s:.0f} s at least, and {max(0.0, self.left_s):.0f} s are left"
        else:
            self._run(step, outcome)
        self.tell(self)
        return outcome

    def _run(self, step: Step, outcome: Outcome) -> None:
        number = len(self.outcomes)
        log, figures = self.folder / f"{number}.log", self.folder / f"{number}.json"
        outcome.limit_s = limit_s = round(min(step.limit_s, self.left_s), 1)
        began = told = time.monotonic()
        self.tell(self)

        def look() -> bool:
            nonlocal told
            if time.monotonic() > told + TELL_EVERY_S:
                told = time.monotonic()
                outcome.seconds, outcome.figures = round(told - began, 1), read_figures(figures)
                self.tell(self)
            return True

        own_limit_s = max(1.0, limit_s - step.margin_s)
        argv = [sys.executable, *step.arguments, "--figures", str(figures), "--time-limit", f"{own_limit_s:.0f}"]
        ended = run_bounded(argv, limit_s=limit_s, log=log, look=look)
        outcome.seconds, outcome.figures, outcome.tail = round(ended.seconds, 1), read_figures(figures), ended.tail
        if ended.status == 0:
            outcome.status = "ok"
        else:
            outcome.status, outcome.why = "failed" if ended.status is not None else "timeout", ended.in_words


HERE = "kd_assets_tests.benchmarks"
MACHINE = Step(name="machine", arguments=("-m", f"{HERE}.first_minutes.machine"), limit_s=120.0)
"""The first import of torch reads gigabytes of libraries, perhaps over a network."""
GIB_OF_70B = 135.0
"""Of the GPU: weights of 131.4 GiB and room for a batch (LOG.md)."""
DRIVER = Path("/dev/nvidiactl")


def steps_of(machine: Mapping[str, Any], folder: Path, *, driver: Path = DRIVER) -> list[Step]:
    """What to do after the look at the machine, in the order of worth. `folder`: for large files on a local disk.

    Where the look came to nothing, a driver's file stands for a GPU.
    """
    has_gpu = machine["gpu"] is not None if "gpu" in machine else driver.exists()
    return _on_a_gpu(machine.get("gpu_memory_gib"), folder) if has_gpu else _on_a_cpu(folder)


def _on_a_gpu(memory_gib: float | None, folder: Path) -> list[Step]:
    too_small = None
    if memory_gib is not None and memory_gib < GIB_OF_70B:
        too_small = f"weights of 131.4 GiB and a batch do not fit into the {memory_gib:.1f} GiB of this GPU"
    return [
        Step(name="worker", arguments=_worker(folder, "cuda"), limit_s=110.0, least_s=30.0),
        Step(name="tests", arguments=_tests(folder, "cuda"), limit_s=85.0, least_s=30.0),
        Step(
            name="benchmark 8B",
            arguments=_benchmark(folder, "llama31_8b", seconds=6, profile="profile-8b"),
            limit_s=210.0,
            least_s=60.0,
            margin_s=60.0,  # for documents of mixed lengths and the profile, which come after the turns
        ),
        Step(
            name="benchmark 70B",
            arguments=(*_benchmark(folder, "llama31_70b", seconds=12), "--without-three-pass"),
            limit_s=240.0,
            least_s=80.0,
            margin_s=25.0,
            why_not=too_small,
        ),
        Step(name="more tests", arguments=_tests(folder, "cuda"), limit_s=600.0, least_s=40.0),
    ]


def _on_a_cpu(folder: Path) -> list[Step]:
    benchmark = _benchmark(folder, "tiny", seconds=0.1, profile="profile-tiny")
    return [
        Step(name="worker", arguments=_worker(folder, "cpu"), limit_s=180.0, least_s=20.0),
        Step(name="tests", arguments=_tests(folder, "cpu"), limit_s=120.0, least_s=20.0),
        Step(name="benchmark tiny", arguments=benchmark, limit_s=120.0, least_s=20.0),
    ]


def _worker(folder: Path, device: str) -> tuple[str, ...]:
    return ("-m", f"{HERE}.first_minutes.worker_smoke", "--folder", str(folder), "--device", device)


def _tests(folder: Path, device: str) -> tuple[str, ...]:
    """Those that a step before it had no time for, where there was one."""
    return ("-m", f"{HERE}.first_minutes.chosen_tests", "--folder", str(folder), "--device", device)


def _benchmark(folder: Path, shape: str, *, seconds: float, profile: str | None = None) -> tuple[str, ...]:
    """The profile comes with it: a program of its own would have to make, load and compile the teacher once more."""
    arguments = ("-m", f"{HERE}.gpu", "--json", "--shape", shape, "--seconds", str(seconds), "--folder", str(folder))
    return arguments if profile is None else (*arguments, "--profile", str(folder / profile))
