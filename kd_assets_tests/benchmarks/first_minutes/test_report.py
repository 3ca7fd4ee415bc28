"""The text of a run: figures with their predictions beside them, read from the log."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_assets_tests.benchmarks.first_minutes.predictions import LOG_FILE, beside, predictions
from kd_assets_tests.benchmarks.first_minutes.report import Report, figure_lines, machine_lines
from kd_assets_tests.benchmarks.first_minutes.steps import Outcome, Run, steps_of

LOG = """
# Log
| step | figure | predicted |
| benchmark 8B | mfu | 0.99 |

## Predictions for `.ci/gpu` on one H200
| step | figure | predicted | from |
|---|---|---|---|
| benchmark 8B | `mfu` | 0.64 | so and so |
| benchmark 8B | token_budget | 32,768 | |
| worker | took_s | 65 | |

## Another
| worker | took_s | 1 | |
"""


def test_predictions_are_read_from_their_table_alone() -> None:
    assert predictions(LOG) == {"benchmark 8B": {"mfu": 0.64, "token_budget": 32768.0}, "worker": {"took_s": 65.0}}
    assert predictions("# Log") == {}


def test_the_log_predicts_figures_of_steps_that_there_are(tmp_path: Path) -> None:
    names = {step.name for step in steps_of({"gpu": "NVIDIA H200", "gpu_memory_gib": 139.8}, tmp_path)}
    found = predictions(LOG_FILE.read_text())
    assert {"benchmark 8B", "benchmark 70B"} <= found.keys() <= names
    assert found["benchmark 8B"]["mfu"] > 0.5


@pytest.mark.parametrize(
    ("value", "predicted", "words"),
    [
        (0.66, 0.64, "predicted 0.64 (+3%)"),
        (0.32, 0.64, "predicted 0.64 (-50%)  <---"),
        (40_000, 32_768.0, "predicted 32768 (+22%)  <---"),
        (3, 0.0, "predicted 0"),
    ],
)
def test_what_surprises_has_an_arrow(value: float, predicted: float, words: str) -> None:
    assert beside(value, predicted) == words


def test_figures_of_any_kind_are_lines() -> None:
    figures = {
        "mfu": 0.5,
        "gpu": None,
        "is_new": True,
        "profile": {"gpu_idle_share": 0.02, "top": ["a", "b\nc"]},
        "note": "one\ntwo",
        "parts": [1, 2],
        "bad": [],
    }
    predicted = {"mfu": 1.0, "profile.gpu_idle_share": 0.02, "is_new": 1.0}
    assert [" ".join(line.split()) for line in figure_lines(figures, predicted)] == [
        "mfu 0.5 predicted 1 (-50%) <---",
        "gpu None",
        "is_new True",
        "profile",
        "gpu_idle_share 0.02 predicted 0.02 (+0%)",
        "top",
        "a",
        "b",
        "c",
        "note",
        "one",
        "two",
        "parts [1, 2]",
        "bad []",
    ]


def test_a_machine_without_a_gpu_is_told_in_capitals() -> None:
    (line,) = machine_lines({"gpu": None, "n_cpus": 2, "torch": "2.11.0", "cuda": None})
    assert line.startswith("NO CUDA DEVICE: everything ran small, on 2 CPU cores; torch 2.11.0, ")


def test_the_output_of_a_step_that_failed_is_in_the_text_and_that_of_others_is_not(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, budget_s=100.0, tell=lambda run: None)
    run.outcomes += [
        Outcome(name="machine", status="ok", tail="all is well"),
        Outcome(name="tests", status="failed", why="ended with status 1", tail="illegal memory access"),
        Outcome(name="benchmark 70B", status="skipped", why="this GPU is too small"),
    ]
    report = Report(tmp_path)
    report.write(run)
    text = report.text_file.read_text()
    assert "  | illegal memory access" in text
    assert "all is well" not in text
    assert "skipped  benchmark 70B       0.0 s  this GPU is too small" in text
