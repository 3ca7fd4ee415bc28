"""A task of a job: reads its job file, works through its partitions, reports.  python -m kd_assets.worker JOB.json

Owns the order of events of a task and its exit status; what a partition needs is the business of the kind's runner
(`sources.shards`, `teacher.runner`, `student.runner`), which is loaded only when something is missing. Imports no
dagster. The invariant: `committed` is reported exactly for results whose manifest is on disk, and one partition's
failure never keeps another from its turn.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kd_assets.contract import JobFile, Output, WorkUnit, event_file, read_job
from kd_assets.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    InputError,
    InterruptedTaskError,
    KdAssetsError,
    ResultBusyError,
)
from kd_assets.report import Reporter, StopFlag
from kd_assets.store import committed, set_head

BUSY_POLL_S = 1.0
"""How often a partition that another live task is computing is looked at again."""


class Runner(Protocol):
    """One kind of work, with whatever it had to load."""

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        """Make and commit every output of `unit`. Returns a short summary; raises KdAssetsError on failure."""
        ...

    def close(self) -> None: ...


RunnerFactory = Callable[[JobFile, Reporter, StopFlag], Runner]


def runner_for(job: JobFile, report: Reporter, stop: StopFlag) -> Runner:
    """The runner of the job's kind; only its own dependencies are imported."""
    match job.kind:
        case "shards":
            from kd_assets.sources.shards import ShardsRunner

            return ShardsRunner(job, report, stop)
        case "teacher":
            from kd_assets.teacher.runner import TeacherRunner

            return TeacherRunner(job, report, stop)
        case "student":
            from kd_assets.student.runner import StudentRunner

            return StudentRunner(job, report, stop)


class Task:
    """One attempt of one array task."""

    def __init__(
        self,
        job: JobFile,
        units: Sequence[WorkUnit],
        report: Reporter,
        stop: StopFlag,
        *,
        make_runner: RunnerFactory = runner_for,
    ) -> None:
        self._job, self._units, self._report, self._stop = job, units, report, stop
        self._make_runner = make_runner
        self._runner: Runner | None = None
        self._load_failure: Exception | None = None
        self._failures: list[BaseException] = []
        self._reported: set[str] = set()
        """Folders of the results that are reported as committed."""
        self._waited_for: set[str] = set()
        self._n_committed = self._n_reused = self._n_runners = 0

    def run(self) -> int:
        """Work through all units; returns the exit status of `slurm/task.sbatch`."""
        started = time.monotonic()
        self._report.emit(
            "task_started",
            kind=self._job.kind,
            n_partitions=len(self._units),
            pid=os.getpid(),
            host=os.uname().nodename,
        )
        status, exit_code = "done", 0
        try:
            self._drain()
        except InterruptedTaskError as e:
            status, exit_code = "resumable", e.exit_code
        finally:
            if self._runner is not None:
                self._runner.close()
        if self._failures and status == "done":
            bad_input = all(isinstance(e, InputError) for e in self._failures)
            status, exit_code = "failed", EXIT_BAD_INPUT if bad_input else EXIT_FAILED
        self._report.emit(
            "task_finished",
            status=status,
            signal=self._stop.signal_name,
            n_committed=self._n_committed,
            n_reused=self._n_reused,
            n_failed=len(self._failures),
            n_loads=self._n_runners,
            wall_s=round(time.monotonic() - started, 3),
        )
        return exit_code

    def _drain(self) -> None:
        queue = deque(self._units)
        n_busy = 0  # units put back in a row: once all are busy elsewhere, waiting is all there is to do
        while queue:
            self._raise_if_stopped()
            unit = queue.popleft()
            try:
                self._run_unit(unit)
                n_busy = 0
            except ResultBusyError as e:
                queue.append(unit)
                if unit.partition_key not in self._waited_for:
                    self._waited_for.add(unit.partition_key)
                    self._report.emit("warning", message=f"{unit.partition_key} is waited for: {e}")
                n_busy += 1
                if n_busy >= len(queue):
                    time.sleep(BUSY_POLL_S)
            except InterruptedTaskError:
                raise
            except KdAssetsError as e:
                self._fail(unit, e)
            except Exception as e:  # noqa: BLE001 - the task reports what it did not foresee, too, and goes on
                traceback.print_exc()
                self._fail(unit, e)

    def _run_unit(self, unit: WorkUnit) -> None:
        missing = [o for o in unit.outputs if not self._reuse(unit, o)]
        if not missing:
            return
        self._loaded_runner().run(dataclasses.replace(unit, outputs=tuple(missing)))
        for output in missing:
            manifest = committed(Path(output.path), output.fingerprint)
            if manifest is None:
                raise KdAssetsError(f"{output.path}: its runner returned without committing it; this is a bug of ours")
            self._emit_committed(unit, output, manifest.data_version, reused=False)

    def _loaded_runner(self) -> Runner:
        """The runner, made once. What failed to load is not loaded again for every partition."""
        if self._load_failure is not None:
            raise self._load_failure
        if self._runner is None:
            try:
                self._runner = self._make_runner(self._job, self._report, self._stop)
            except InterruptedTaskError:
                raise
            except Exception as e:
                self._load_failure = e
                raise
            self._n_runners += 1
        return self._runner

    def _reuse(self, unit: WorkUnit, output: Output) -> bool:
        manifest = committed(Path(output.path), output.fingerprint)
        if manifest is None:
            return False
        set_head(Path(output.path))
        self._emit_committed(unit, output, manifest.data_version, reused=True)
        return True

    def _emit_committed(self, unit: WorkUnit, output: Output, data_version: str, *, reused: bool) -> None:
        """Once for each result, however often a busy unit comes round again."""
        if output.path in self._reported:
            return
        self._reported.add(output.path)
        self._n_reused += reused
        self._n_committed += not reused
        self._report.emit(
            "committed",
            partition_key=unit.partition_key,
            asset=output.asset,
            path=output.path,
            fingerprint=output.fingerprint,
            data_version=data_version,
            reused=reused,
        )

    def _fail(self, unit: WorkUnit, e: Exception) -> None:
        self._failures.append(e)
        self._report.emit(
            "partition_failed",
            partition_key=unit.partition_key,
            assets=[o.asset for o in unit.outputs],
            error=type(e).__name__,
            message=str(e) or type(e).__name__,
        )

    def _raise_if_stopped(self) -> None:
        if self._stop:
            raise InterruptedTaskError(f"stopped by {self._stop.signal_name}")


def main(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Run the task that the environment names. Returns the exit status (see `slurm/task.sbatch`)."""
    if len(argv) != 2:
        print("usage: python -m kd_assets.worker JOB.json", file=sys.stderr)
        return EXIT_BAD_INPUT
    stop = StopFlag().listen()
    try:
        job = read_job(Path(argv[1]))
        task_index = int(environment.get("SLURM_ARRAY_TASK_ID", "0"))
        units = job.units_of_task(task_index)
    except KdAssetsError as e:
        print(f"kd_assets.worker: {e}", file=sys.stderr)
        return e.exit_code
    attempt = int(environment.get("SLURM_RESTART_COUNT", "0"))
    with Reporter(event_file(Path(job.events_folder), task_index), task=task_index, attempt=attempt) as report:
        return Task(job, units, report, stop).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
