"""One task of a job: works through its partitions, and reports.

Owns the order of events of a task and its exit status; what a partition needs is the business of the kind's runner
(`sources.shards`, `teacher.runner`, `student.runner`, `export.runner`, `recode_runner`), which is loaded only when
something is missing.
The invariant: `committed` is reported exactly for results whose manifest is on disk, and one partition's failure never
keeps another from its turn.
"""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kd_assets.contract import JobFile, Output, Reporter, WorkUnit
from kd_assets.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    InputError,
    InterruptedTaskError,
    KdAssetsError,
    OutOfHostMemoryError,
    ResultBusyError,
    StorageUnavailableError,
    StorageUnreachableError,
)
from kd_assets.locks import local_locks
from kd_assets.store import committed, count_durable_files, raise_if_busy, set_head
from kd_assets.store.computing_versions import require_same_versions
from kd_assets.worker.attempt import Attempt, EarlierStart, no_progress
from kd_assets.worker.given_gpus import require_given_gpus
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.usage import UsageMeter, n_cpus

if TYPE_CHECKING:
    from kd_assets.worker.telemetry.sampler import Sampler, UsageSpan


FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 10.0
"""Before partitions are looked at again that have to be waited for: twice as long each time, until one gets on."""
STORAGE_TRIES = 12
"""Of a partition while the file system does not answer: with the waits between them a minute and a half. What takes
longer is left to who started the task; a loaded teacher is worth this much."""


class Runner(Protocol):
    """One kind of work, with whatever it had to load."""

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        """Make and commit every output of `unit`. Returns a short summary; raises KdAssetsError on failure."""
        ...

    def close(self) -> None: ...


RunnerFactory = Callable[[JobFile, Reporter, StopFlag], Runner]


def runner_for(
    job: JobFile,
    report: Reporter,
    stop: StopFlag,
    *,
    sampler: Sampler | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Runner:
    """The runner of the job's kind; only its own dependencies are imported. `sampler`: the task's.

    Raises NodeFaultError where a kind that runs a model does not see the GPUs that it was given.
    """
    if job.kind in ("teacher", "student"):
        require_given_gpus(environment, n_processes=Attempt.of(environment).n_processes)
    match job.kind:
        case "shards":
            from kd_assets.sources.shards import ShardsRunner

            return ShardsRunner(job, report, stop)
        case "teacher":
            from kd_assets.teacher.runner import TeacherRunner

            return TeacherRunner(job, report, stop, sampler=sampler)
        case "student":
            from kd_assets.student.runner import StudentRunner

            return StudentRunner(job, report, stop)
        case "export":
            from kd_assets.export.runner import ExportRunner

            return ExportRunner(job, report, stop)
        case "recode":
            from kd_assets.worker.recode_runner import RecodeRunner

            return RecodeRunner(job, report, stop)


class Task:
    """One attempt of one array task, or one process's share of it."""

    def __init__(
        self,
        job: JobFile,
        units: Sequence[WorkUnit],
        report: Reporter,
        stop: StopFlag,
        *,
        make_runner: RunnerFactory = runner_for,
        attempt: Attempt | None = None,
        earlier_starts: Sequence[EarlierStart] = (),
        telemetry: UsageSpan | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        """`sleep`: in place of one that a request to stop ends."""
        self._job, self._units, self._report, self._stop = job, units, report, stop
        self._make_runner, self._sleep = make_runner, sleep or stop.sleep
        self._attempt = attempt or Attempt.of(os.environ)
        self._earlier_starts = earlier_starts
        self._meter, self._telemetry = UsageMeter(n_cpus=n_cpus(n_processes=self._attempt.n_processes)), telemetry
        self._runner: Runner | None = None
        self._load_failure: Exception | None = None
        self._failed: list[type[Exception]] = []
        """Classes only: an exception keeps the arrays of the frames it went through."""
        self._given_up: set[str] = set()
        """Partitions that are reported as failed."""
        self._reported: set[str] = set()
        """Folders of the results that are reported as committed."""
        self._warned_of: set[str] = set()
        """Partitions that are waited for, and whose reason has been said."""
        self._storage_tries: Counter[str] = Counter()
        self._n_committed = self._n_reused = self._n_runners = 0
        report.report_fatal = self._report_fatal

    def run(self) -> int:
        """Work through all units; returns the exit status of `slurm/task.sbatch`."""
        n_parts_on_disk = self._count_parts()
        self._load_failure = no_progress(self._earlier_starts, n_parts_on_disk)
        self._report.emit(
            "task_started",
            kind=self._job.kind,
            n_partitions=len(self._units),
            n_parts_on_disk=n_parts_on_disk,
            **self._attempt.facts(),
        )
        self._warn_of_local_locks()
        status, exit_code = "done", 0
        try:
            self._drain()
        except InterruptedTaskError as e:
            status, exit_code = "resumable", e.exit_code
        finally:
            if self._runner is not None:
                self._runner.close()
        if self._failed and status == "done":
            bad_input = all(issubclass(e, InputError) for e in self._failed)
            status, exit_code = "failed", EXIT_BAD_INPUT if bad_input else EXIT_FAILED
        self._report_finished(status)
        return exit_code

    def _count_parts(self) -> int | None:
        """Files of the results that a kill does not undo; None where the file system does not let us look now."""
        try:
            return count_durable_files(Path(o.path) for u in self._units for o in u.outputs)
        except StorageUnavailableError:
            return None

    def _report_fatal(self, e: Exception) -> None:
        """The end of the task in the words of another thread than the one that works, which is stuck."""
        during: Literal["load", "run"] = "run" if self._runner is not None else "load"
        for unit in self._units:
            if unit.partition_key not in self._given_up and any(o.path not in self._reported for o in unit.outputs):
                self._fail(unit, e, during=during)
        self._report_finished("failed")

    def _report_finished(self, status: str) -> None:
        usage = self._usage()
        self._report.emit(
            "task_finished",
            status=status,
            signal=self._stop.signal_name,
            n_committed=self._n_committed,
            n_reused=self._n_reused,
            n_failed=len(self._failed),
            n_loads=self._n_runners,
            wall_s=usage["wall_s"],
            usage=usage,
            process_index=self._attempt.process_index,
            slurm_job_id=self._attempt.slurm_job_id,
        )

    def _usage(self) -> dict[str, Any]:
        """What this attempt has used so far (see `kd_assets.contract.events.EventType`)."""
        sampled = self._telemetry.usage().facts() if self._telemetry is not None else {}
        return self._meter.usage() | {name: value for name, value in sampled.items() if value is not None}

    def _warn_of_local_locks(self) -> None:
        """Where locks are not shared nothing fails, and two nodes may compute the same: that is not to stay unsaid."""
        if reason := local_locks(Path(self._job.recipe_folder)):
            self._report.emit(
                "warning",
                message=f"{reason}: its locks are not seen on other nodes, so two of them may compute the same results "
                "at once; mount it with locks that all nodes share",
            )

    def _drain(self) -> None:
        """Run every unit. One that has to be waited for goes to the end of the queue; once all of the queue do, waiting
        is all there is to do."""
        queue = deque(self._units)
        n_waiting, wait_s = 0, FIRST_WAIT_S
        while queue:
            self._raise_if_stopped()
            unit = queue.popleft()
            if not self._has_to_wait(unit):
                n_waiting, wait_s = 0, FIRST_WAIT_S
                continue
            queue.append(unit)
            n_waiting += 1
            if n_waiting >= len(queue):
                self._sleep(wait_s)
                n_waiting, wait_s = 0, min(2 * wait_s, LONGEST_WAIT_S)

    def _has_to_wait(self, unit: WorkUnit) -> bool:
        """Run the unit and report what comes of it; returns whether it is to be tried again."""
        try:
            self._run_unit(unit)
        except InterruptedTaskError:
            raise
        except ResultBusyError as e:
            self._warn_once(unit, f"{unit.partition_key} is waited for: {e}")
            return True
        except StorageUnreachableError as e:
            self._storage_tries[unit.partition_key] += 1
            if self._storage_tries[unit.partition_key] < STORAGE_TRIES:
                self._warn_once(unit, f"{unit.partition_key} is tried again later: {e}")
                return True
            self._fail(unit, e)
        except KdAssetsError as e:
            self._fail(unit, e)
        except MemoryError as e:
            self._fail(unit, out_of_host_memory(e))
        except Exception as e:  # noqa: BLE001 - the task reports what it did not foresee, too, and goes on
            traceback.print_exc()
            self._fail(unit, e)
        return False

    def _warn_once(self, unit: WorkUnit, message: str) -> None:
        if unit.partition_key not in self._warned_of:
            self._warned_of.add(unit.partition_key)
            self._report.emit("warning", message=message)

    def _run_unit(self, unit: WorkUnit) -> None:
        missing = [o for o in unit.outputs if not self._reuse(unit, o)]
        if not missing:
            return
        for output in missing:
            require_same_versions(output)
            raise_if_busy(output)  # before anything is loaded or read for it
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
            except (InterruptedTaskError, StorageUnreachableError):
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
        set_head(Path(output.path), manifest)
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
            usage=self._usage(),
        )

    def _fail(self, unit: WorkUnit, e: Exception, *, during: Literal["load", "run"] | None = None) -> None:
        self._failed.append(type(e))
        self._given_up.add(unit.partition_key)
        self._report.emit(
            "partition_failed",
            partition_key=unit.partition_key,
            assets=[o.asset for o in unit.outputs],
            error=type(e).__name__,
            message=str(e) or type(e).__name__,
            during=during or ("run" if self._load_failure is None else "load"),
        )

    def _raise_if_stopped(self) -> None:
        if self._stop:
            raise InterruptedTaskError(f"stopped by {self._stop.signal_name}")


def out_of_host_memory(e: MemoryError) -> OutOfHostMemoryError:
    return OutOfHostMemoryError(
        f"the node's memory did not suffice ({str(e) or 'MemoryError'}): ask for more memory for the task"
    )
