"""The worker's program: `python -m kd_assets.worker JOB.json [--task-offset N]` runs task SLURM_ARRAY_TASK_ID + N.

Reads the job file, takes the task's lease, and hands over to `task`. Imports no dagster.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_assets.contract import JobKind, Reporter, event_file, lease_file, read_job
from kd_assets.durable import storage_errors
from kd_assets.errors import InterruptedTaskError, KdAssetsError
from kd_assets.worker.attempt import Attempt, DuplicateTaskError, gpus_of_process, hold_task, starts_of
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.task import RunnerFactory, Task, runner_for
from kd_assets.worker.usage import n_cpus

if TYPE_CHECKING:
    from kd_assets.worker.telemetry.sampler import Sampler


def sampler_of(kind: JobKind) -> Sampler | None:
    """A sampler of the task's GPUs and processors, for kinds of job that run a model."""
    if kind in ("shards", "export", "recode"):
        return None
    from kd_assets.worker.telemetry.sampler import Sampler

    return Sampler()


def share_node(attempt: Attempt, environment: MutableMapping[str, str] = os.environ) -> None:
    """Where several processes share a task: leave this one its GPUs and its processors. Before torch is imported."""
    if attempt.n_processes == 1:
        return
    n_gpus = sum(1 for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal())
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = gpus_of_process(visible, attempt.process_index, attempt.n_processes, n_gpus=n_gpus)
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    environment.setdefault("OMP_NUM_THREADS", str(n_cpus(environment, n_processes=attempt.n_processes)))


def main(
    argv: Sequence[str], environment: Mapping[str, str] = os.environ, *, make_runner: RunnerFactory | None = None
) -> int:
    """Run the task that the environment names. Returns the exit status (see `slurm/task.sbatch`).

    `make_runner`: what a test runs in place of the job's kind.
    """
    parser = argparse.ArgumentParser(usage="python -m kd_assets.worker JOB.json [--task-offset N]", add_help=False)
    parser.add_argument("job_file", type=Path)
    parser.add_argument("--task-offset", type=int, default=0)
    arguments = parser.parse_args(argv[1:])
    stop = StopFlag().listen()
    try:
        attempt = Attempt.of(environment)
        job = read_job(arguments.job_file)
        task_index = int(environment.get("SLURM_ARRAY_TASK_ID", "0")) + arguments.task_offset
        units = job.units_of_task(task_index)[attempt.process_index :: attempt.n_processes]
        events_folder = Path(job.events_folder)
        events = event_file(events_folder, task_index, attempt.process_index)
        with storage_errors(events, "write"):
            reporter = Reporter(events, task=task_index, attempt=attempt.slurm_restart_count)
    except KdAssetsError as e:
        print(f"kd_assets.worker: {e}", file=sys.stderr)
        return e.exit_code
    share_node(attempt)
    with reporter as report:
        try:
            lease = hold_task(
                lease_file(events_folder, task_index, attempt.process_index), attempt, report=report, stop=stop
            )
        except DuplicateTaskError as e:
            report.emit("warning", message=f"a second copy of this task, which leaves it to the first: {e}")
            _finished_at_once(report, attempt, status="duplicate", holder=dict(e.holder))
            return 0
        except InterruptedTaskError as e:
            _finished_at_once(report, attempt, status="resumable", signal=stop.signal_name)
            return e.exit_code
        sampler = sampler_of(job.kind)
        try:
            starts = starts_of(events)
            return Task(
                job,
                units,
                report,
                stop,
                make_runner=make_runner or functools.partial(runner_for, sampler=sampler),
                attempt=attempt,
                earlier_starts=starts,
                telemetry=sampler.span() if sampler is not None else None,
            ).run()
        finally:
            if sampler is not None:
                sampler.close()
            if lease is not None:
                lease.release()


def _finished_at_once(
    report: Reporter, attempt: Attempt, *, status: str, signal: str | None = None, **more: Any
) -> None:
    report.emit(
        "task_finished",
        status=status,
        signal=signal,
        n_committed=0,
        n_reused=0,
        n_failed=0,
        n_loads=0,
        wall_s=0.0,
        usage=None,
        process_index=attempt.process_index,
        slurm_job_id=attempt.slurm_job_id,
        **more,
    )
