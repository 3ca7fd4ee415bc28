"""Steps in their order: what fails, hangs or has no time keeps none from its turn, and all is told at once."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kd_assets_tests.benchmarks.first_minutes.report import Report
from kd_assets_tests.benchmarks.first_minutes.steps import MACHINE, RESERVE_S, Run, Status, Step, steps_of

PROGRAM = """
import json, sys, time
figures = sys.argv[sys.argv.index("--figures") + 1]
open(figures, "w").write(json.dumps({"limit": sys.argv[-1]}))
"""
H200 = {"gpu": "NVIDIA H200", "gpu_memory_gib": 139.8}
H100 = {"gpu": "NVIDIA H100", "gpu_memory_gib": 79.2}


def step(name: str, ends: str = "", *, limit_s: float = 300.0, **options: Any) -> Step:
    return Step(name=name, arguments=("-c", f"{PROGRAM}{ends}"), limit_s=limit_s, **options)


def run_in(folder: Path, *, budget_s: float = 3600.0, told: list[list[Status]] | None = None) -> Run:
    def tell(run: Run) -> None:
        if told is not None:
            told.append([outcome.status for outcome in run.outcomes])

    return Run(folder=folder, budget_s=budget_s, tell=tell)


def test_steps_that_fail_crash_and_hang_keep_none_from_its_turn(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    run.do(step("fails", "sys.exit('no such kernel')"))
    run.do(step("crashes", "import os; os.kill(os.getpid(), 9)"))
    run.do(step("hangs", "time.sleep(600)", limit_s=20.0))
    run.do(step("works"))
    assert [(o.name, o.status) for o in run.outcomes] == [
        ("fails", "failed"),
        ("crashes", "failed"),
        ("hangs", "timeout"),
        ("works", "ok"),
    ]
    fails, crashes, hangs, works = run.outcomes
    assert (fails.why, fails.tail) == ("ended with status 1", "no such kernel")
    assert crashes.why == "was killed by SIGKILL"
    assert "did not end within" in hangs.why
    assert hangs.figures == {"limit": "10"}, "what it had found is kept"
    assert (works.why, works.figures) == ("", {"limit": "290"}), "and each is told to end before it is ended"


def test_a_step_is_told_before_it_begins_and_when_it_has_ended(tmp_path: Path) -> None:
    told: list[list[Status]] = []
    run = run_in(tmp_path, told=told)
    run.do(step("one"))
    run.do(step("two"))
    assert told == [["running"], ["ok"], ["ok", "running"], ["ok", "ok"]]


def test_what_does_not_fit_into_the_budget_is_skipped_and_says_so(tmp_path: Path) -> None:
    run = run_in(tmp_path, budget_s=RESERVE_S + 30.0)
    large = run.do(step("large", least_s=40.0))
    small = run.do(step("small", least_s=20.0, limit_s=100.0))
    assert (large.status, large.why) == ("skipped", "it takes 40 s at least, and 30 s are left")
    assert small.status == "ok"
    assert small.limit_s is not None
    assert small.limit_s <= 30.0, "the budget is the limit of every step"


def test_what_is_of_no_use_here_is_skipped_with_its_reason(tmp_path: Path) -> None:
    outcome = run_in(tmp_path).do(step("large", why_not="this GPU is too small"))
    assert (outcome.status, outcome.why) == ("skipped", "this GPU is too small")


def test_a_run_that_is_cut_off_has_told_what_was_known(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    code = f"""
from pathlib import Path
from kd_assets_tests.benchmarks.first_minutes import steps
from kd_assets_tests.benchmarks.first_minutes.report import Report
from kd_assets_tests.benchmarks.first_minutes.test_steps import step
steps.TELL_EVERY_S = 0.1
run = steps.Run(folder=Path({str(tmp_path / "work")!r}), budget_s=3600, tell=Report(Path({str(tmp_path)!r})).write)
run.do(step("first"))
run.do(step("second", "time.sleep(600)"))
"""
    program = subprocess.Popen([sys.executable, "-c", code])
    known: dict[str, Any] = {}
    while known.get("steps", [{}])[-1].get("figures") != {"limit": "290"} or len(known["steps"]) < 2:
        assert program.poll() is None
        time.sleep(0.05)
        if (tmp_path / "first-minutes.json").exists():
            known = json.loads((tmp_path / "first-minutes.json").read_bytes())
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    known = json.loads((tmp_path / "first-minutes.json").read_bytes())
    assert [(s["name"], s["status"]) for s in known["steps"]] == [("first", "ok"), ("second", "running")]
    assert not known["ended"]
    assert "and it goes on, or was cut off" in (tmp_path / "first-minutes.txt").read_text()


def test_every_step_is_a_program_that_is_there(tmp_path: Path) -> None:
    for machine in (H200, {"gpu": None}):
        for one in (MACHINE, *steps_of(machine, tmp_path)):
            assert one.arguments[0] == "-m"
            assert importlib.util.find_spec(one.arguments[1]) is not None, one


def test_on_a_gpu_the_worker_comes_first_and_the_models_by_size(tmp_path: Path) -> None:
    steps = steps_of(H200, tmp_path)
    assert [s.name for s in steps] == ["worker", "tests", "benchmark 8B", "benchmark 70B", "more tests"]
    assert all(s.why_not is None for s in steps)
    assert sum(s.least_s for s in steps) < 525 - RESERVE_S


def test_a_teacher_that_cannot_fit_the_gpu_is_not_tried(tmp_path: Path) -> None:
    why_not = {s.name: s.why_not for s in steps_of(H100, tmp_path) if s.why_not}
    assert why_not == {
        "benchmark 70B": "weights of 131.4 GiB and a batch do not fit into the 79.2 GiB of this GPU",
    }


@pytest.mark.parametrize(("has_driver", "first"), [(True, "cuda"), (False, "cpu")])
def test_where_the_look_at_the_machine_failed_a_driver_stands_for_a_gpu(
    has_driver: bool, first: str, tmp_path: Path
) -> None:
    driver = tmp_path / "nvidiactl"
    if has_driver:
        driver.touch()
    steps = steps_of({"python": "3.12.1"}, tmp_path, driver=driver)
    assert steps[0].arguments[-1] == first
    assert all(s.why_not is None for s in steps)


def test_the_whole_run_on_this_machine_writes_two_files_and_its_status(tmp_path: Path) -> None:
    """With no time for any step but the look at the machine."""
    argv = [sys.executable, "-m", "kd_assets_tests.benchmarks.first_minutes", str(tmp_path / "out"), "--seconds", "30"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first-minutes.json", "first-minutes.txt"]
    known = json.loads((tmp_path / "out" / "first-minutes.json").read_bytes())
    assert known["ended"]
    assert known["steps"][0]["name"] == "machine"
    assert done.returncode == any(s["status"] in ("failed", "timeout") for s in known["steps"])
    assert done.stdout.strip() == (tmp_path / "out" / "first-minutes.txt").read_text().strip()


def test_a_report_is_whole_after_every_write(tmp_path: Path) -> None:
    report = Report(tmp_path / "new" / "folder")
    run = run_in(tmp_path)
    for n in range(3):
        run.do(step(f"step {n}"))
        report.write(run)
        assert len(json.loads(report.json_file.read_bytes())["steps"]) == n + 1
        assert f"ok       step {n}" in report.text_file.read_text()
