"""`.ci/gpu FOLDER`: within a budget of time, all that a GPU machine is to tell first, into two files of FOLDER.

    python3 -m kd_assets_tests.benchmarks.first_minutes FOLDER

Needs torch, transformers, accelerate, pyarrow, nvidia-ml-py and pytest; no dagster and no network. Without a GPU the
same steps run small on the CPU. Exit status 1 where a step failed or did not end in time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from kd_assets_tests.benchmarks.first_minutes.report import Report
from kd_assets_tests.benchmarks.first_minutes.steps import MACHINE, Run, steps_of

BUDGET_S = 525.0
"""Less than nine minutes."""


def main() -> int:
    parser = argparse.ArgumentParser(prog=".ci/gpu", description="The first minutes on a GPU machine.")
    parser.add_argument("folder", type=Path, help="for first-minutes.json and first-minutes.txt")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="of all steps together (default: %(default)s)")
    options = parser.parse_args()
    report = Report(options.folder.absolute())
    with tempfile.TemporaryDirectory(prefix="kd-assets-first-minutes-") as folder:
        run = Run(folder=Path(folder), budget_s=options.seconds, tell=report.write)
        machine = run.do(MACHINE)
        for step in steps_of(machine.figures, Path(folder)):
            run.do(step)
        run.ended = True
        report.write(run)
    print(report.text_file.read_text())
    return any(outcome.status in ("failed", "timeout") for outcome in run.outcomes)


if __name__ == "__main__":
    sys.exit(main())
