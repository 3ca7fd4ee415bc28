"""The two files of a run: JSON for programs, text for people; both always whole, and of all that is known so far."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kd_assets.durable import atomic_write, prepare_folder
from kd_assets_tests.benchmarks.first_minutes.predictions import HEADING, LOG_FILE, beside, predictions
from kd_assets_tests.benchmarks.first_minutes.steps import Outcome, Run

TAIL_LINES = 60
"""Of the output of a step that went wrong, in the text; the JSON has a little more."""


class Report:
    """Writes `first-minutes.json` and `first-minutes.txt` into a folder."""

    def __init__(self, folder: Path) -> None:
        prepare_folder(folder)
        self.json_file, self.text_file = folder / "first-minutes.json", folder / "first-minutes.txt"
        self._predictions = predictions(LOG_FILE.read_text())
        self._started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def write(self, run: Run) -> None:
        steps = [
            dataclasses.asdict(outcome) | {"predicted": self._predictions.get(outcome.name, {})}
            for outcome in run.outcomes
        ]
        record = {
            "started_at": self._started_at,
            "seconds": round(run.seconds, 1),
            "budget_s": run.budget_s,
            "ended": run.ended,
            "steps": steps,
        }
        atomic_write(self.json_file, json.dumps(record, indent=1, default=str).encode() + b"\n")
        atomic_write(self.text_file, "\n".join(self._lines(run)).encode() + b"\n")

    def _lines(self, run: Run) -> Iterator[str]:
        yield f"First minutes of kd_assets, {self._started_at}"
        yield from machine_lines(run.outcomes[0].figures if run.outcomes else {})
        so_far = "" if run.ended else ", and it goes on, or was cut off"
        yield f"{run.seconds:.0f} s of {run.budget_s:.0f} s{so_far}. Predictions: LOG.md, {HEADING}."
        yield ""
        for outcome in run.outcomes:
            yield f"{outcome.status:8} {outcome.name:16} {outcome.seconds:6.1f} s  {outcome.why}".rstrip()
        for outcome in run.outcomes:
            yield from self._step_lines(outcome)

    def _step_lines(self, outcome: Outcome) -> Iterator[str]:
        if outcome.status == "skipped":
            return
        yield ""
        yield f"== {outcome.name}: {outcome.status} =="
        predicted = self._predictions.get(outcome.name, {})
        yield from figure_lines({"took_s": outcome.seconds, **outcome.figures}, predicted)
        if outcome.status != "ok" and outcome.tail:
            yield "  the end of its output:"
            yield from (f"  | {line}" for line in outcome.tail.splitlines()[-TAIL_LINES:])


def machine_lines(machine: Mapping[str, Any]) -> Iterator[str]:
    if not machine:
        yield "(the machine is not known yet)"
        return
    versions = ", ".join(f"{name} {machine.get(name)}" for name in ("torch", "cuda", "transformers", "python"))
    if machine.get("gpu"):
        yield f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, driver {machine['driver']}; {versions}"
    else:
        yield f"NO CUDA DEVICE: everything ran small, on {machine.get('n_cpus')} CPU cores; {versions}"


def figure_lines(figures: Mapping[str, Any], predicted: Mapping[str, float], indent: str = "  ") -> Iterator[str]:
    """A figure a line, its prediction beside it; what is nested below its name. A prediction for what is nested has
    its path for a name, as `profile.gpu_idle_share`."""
    for name, value in figures.items():
        if isinstance(value, Mapping) and value:
            inside = {key.removeprefix(f"{name}."): v for key, v in predicted.items() if key.startswith(f"{name}.")}
            yield f"{indent}{name}"
            yield from figure_lines(value, inside, indent + "  ")
        elif isinstance(value, str) and "\n" in value:
            yield f"{indent}{name}"
            yield from (f"{indent}  {line}" for line in value.splitlines())
        elif isinstance(value, list) and value and isinstance(value[0], str):
            yield f"{indent}{name}"
            yield from (f"{indent}  {line}" for item in value for line in str(item).splitlines())
        else:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            comparison = beside(value, predicted[name]) if is_number and name in predicted else ""
            yield f"{indent}{name:36} {value!s:20} {comparison}".rstrip()
