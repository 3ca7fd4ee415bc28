"""Tests that fail, crash and hang, run as those of a GPU are: every other one still has its turn, once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from kd_assets_tests.benchmarks.figures import Figures
from kd_assets_tests.benchmarks.first_minutes import chosen_tests
from kd_assets_tests.benchmarks.first_minutes.bounded import ROOT
from kd_assets_tests.benchmarks.first_minutes.chosen_tests import TESTS, Notes, read_notes, run_tests
from kd_assets_tests.benchmarks.first_minutes.noting import FIRST, MATRIX, WIDELY_USED, rank_of
from kd_assets_tests.teacher.tiny import ARCHITECTURES

TROUBLE = """
import os, time
from pathlib import Path
import pytest

def note(name):
    with open(Path(__file__).with_name("ran"), "a") as file:
        file.write(name + "\\n")

def test_passes(): note("passes")
def test_fails(): note("fails"); assert 1 == 2
def test_crashes(): note("crashes"); os.kill(os.getpid(), 9)
def test_skips(): pytest.skip("no device")
def test_hangs(): note("hangs"); time.sleep(600)
@pytest.mark.parametrize("n", [1, 2])
def test_comes_last(n): note(f"last {n}")
"""


def trouble(folder: Path) -> Path:
    path = folder / "test_trouble.py"
    path.write_text(TROUBLE)
    return path


def outcomes(folder: Path) -> dict[str, str]:
    notes = read_notes(folder / "tests.jsonl")
    return {test.rpartition("::test_")[2]: note["outcome"] for test, note in notes.outcomes.items()}


def test_a_failure_a_crash_and_a_hang_keep_no_test_from_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen_tests, "TEST_LIMIT_S", 20.0)
    monkeypatch.setenv("PYTEST_ADDOPTS", "--reruns 1")
    figures = Figures(tmp_path / "figures.json")
    assert run_tests([str(trouble(tmp_path))], tmp_path, figures, deadline=time.time() + 300) is None
    assert outcomes(tmp_path) == {
        "passes": "passed",
        "fails": "failed",
        "crashes": "crashed",
        "skips": "skipped",
        "hangs": "hung",
        "comes_last[1]": "passed",
        "comes_last[2]": "passed",
    }
    assert (tmp_path / "ran").read_text().split("\n")[:-1] == [
        "passes",
        "fails",
        "crashes",
        "hangs",
        "last 1",
        "last 2",
    ]
    known = json.loads((tmp_path / "figures.json").read_bytes())
    counts = {name: n for name, n in known.items() if name.startswith("n_")}
    assert counts == {"n_passed": 3, "n_failed": 1, "n_skipped": 1, "n_hung": 1, "n_crashed": 1, "n_not_run": 0}
    failed, crashed, hung = known["bad"]
    assert failed.startswith("FAILED ")
    assert "assert 1 == 2" in failed
    assert "its program was killed by SIGKILL" in crashed
    assert "test_trouble.py" in hung, "the traceback says where it hung"


def test_a_later_run_goes_on_with_what_an_earlier_one_had_no_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trouble(tmp_path)
    chosen = [str(path), "-k", "passes or last"]
    notes = tmp_path / "tests.jsonl"
    with monkeypatch.context() as hurry:
        hurry.setattr(chosen_tests, "LAST_TEST_S", 1e9)
        chosen_tests.run_pytest(chosen, notes, tmp_path / "log", Figures(None), deadline=time.time() + 300)
    assert outcomes(tmp_path) == {"passes": "passed"}, "the time was over after the first"
    assert read_notes(notes).figures()["n_not_run"] == 2
    assert read_notes(notes).figures()["first_not_run"].endswith("::test_comes_last[1]")
    assert run_tests(chosen, tmp_path, Figures(None), deadline=time.time() + 300) is None
    assert list(outcomes(tmp_path)) == ["passes", "comes_last[1]", "comes_last[2]"]
    assert (tmp_path / "ran").read_text() == "passes\nlast 1\nlast 2\n"


def test_where_pytest_can_run_nothing_its_words_come_back(tmp_path: Path) -> None:
    path = tmp_path / "test_broken.py"
    path.write_text("import no_such_module_at_all")
    said = run_tests([str(path)], tmp_path, Figures(None), deadline=time.time() + 300)
    assert said is not None
    assert "no_such_module_at_all" in said


def test_half_a_note_is_left_for_later(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text('{"test": "a", "begun_at": 1.0}\n{"test": "a", "outc')
    assert read_notes(tmp_path / "notes").begun == "a"


def test_a_test_that_has_ended_is_no_longer_at_work() -> None:
    ended: dict[str, Any] = {"test": "a", "outcome": "passed", "seconds": 1.0, "message": ""}
    notes = Notes.of(
        [json.dumps({"collected": ["a", "b"]}), json.dumps({"test": "a", "begun_at": 1.0}), json.dumps(ended)]
    )
    assert notes.begun is None
    assert notes.figures()["first_not_run"] == "b"


def test_numbers_come_before_the_many_architectures_and_compiled_ones_between() -> None:
    order = [
        f"teacher/test_gpu.py::{FIRST[0]}_and_nowhere_else",
        f"teacher/test_gpu.py::{MATRIX}[bfloat16-llama]",
        f"teacher/test_gpu.py::{MATRIX}[float32-llama]",
        "teacher/test_gpu.py::test_usr1_during_a_batch[cuda-float32]",
        "teacher/devices/test_memory.py::test_memory_that_runs_out",
        "teacher/batch/test_topk.py::test_on_a_gpu",
        "teacher/devices/test_compiled.py::test_memory_of_compiled_blocks",
        f"teacher/test_gpu.py::{MATRIX}[bfloat16-qwen3]",
        f"teacher/test_gpu.py::{MATRIX}[float32-qwen3]",
        f"teacher/test_gpu.py::{MATRIX}[bfloat16-rwkv]",
        f"teacher/test_gpu.py::{MATRIX}[float32-rwkv]",
    ]
    ranks = [rank_of(test) for test in order]
    assert ranks == sorted(set(ranks))


def test_the_widely_used_architectures_are_among_those_that_are_tested() -> None:
    assert set(WIDELY_USED) <= ARCHITECTURES.keys()


def test_all_tests_of_the_gpu_lie_where_they_are_looked_for() -> None:
    marked = [p for p in (ROOT / "kd_assets_tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text()]
    folders = [ROOT / folder for folder in TESTS["cuda"][2:]]
    assert len(marked) > 5
    others = [p for p in marked if not any(p.is_relative_to(folder) for folder in folders)]
    assert others == [Path(__file__)], "this file only names the mark"
