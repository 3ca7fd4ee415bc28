"""The worker with a teacher that only commits: `do_nothing` without the imports of a teacher, for what is not about
them. Run in the place of `kd_assets.worker` by the program that `do_nothing.write_python` writes."""

import sys
import time
from pathlib import Path
from typing import Any

from kd_assets.contract import JobFile, Reporter, WorkUnit
from kd_assets.errors import InterruptedTaskError
from kd_assets.worker.main import main
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.task import Runner
from kd_assets_tests.benchmarks.do_nothing import DoNothingTeacher

HOLD = "hold"
"""A file in KD_HOME: as long as it is there, no partition is begun but the first of each task."""


class OnlyCommits(DoNothingTeacher):
    def __init__(self, job: JobFile, report: Reporter, stop: StopFlag) -> None:
        super().__init__(job, report)
        self._stop, self._hold, self._n_done = stop, Path(job.recipe_folder).parents[1] / HOLD, 0

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        while self._n_done and self._hold.exists():
            if self._stop:
                raise InterruptedTaskError(f"stopped by {self._stop.signal_name}")
            time.sleep(0.05)
        self._n_done += 1
        return super().run(unit)


def make_runner(job: JobFile, report: Reporter, stop: StopFlag) -> Runner:
    return OnlyCommits(job, report, stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv, make_runner=make_runner))
