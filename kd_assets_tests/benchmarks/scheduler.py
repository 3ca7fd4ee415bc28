"""What the way through SLURM costs a partition, beside the work itself, and against one job a partition.

    python -m kd_assets_tests.benchmarks.scheduler --json

On a real SLURM cluster, made for this in a folder of its own, with as many nodes of one CPU as there are tasks; the
real batch script and worker, with a teacher that does nothing (`do_nothing`: all imports, no model, real caches of a
few tokens). A partition has its top-k cache, or all three with `--caches 3`. The shards are there before anything is
timed. A round is

- the run: `dagster asset materialize` of all partitions, in a process of its own with its events in sqlite, all four
  checks of each result included;
- plain jobs: what a shell script would do, for other partitions of the same plan. One `sbatch task.sbatch JOB.json` a
  partition, one after the other; then it waits until all have ended. As many run at once as the run has tasks. Nothing
  is recorded for them, and writing their job files is not timed.

Times of the run are those of Dagster's events and of the tasks' own, in seconds since the epoch:

    wall_s                     from the run's start (RUN_START) to its last materialization
    run_s                      from its start to its end (RUN_SUCCESS): with the last checks and the job's summary
    command_s                  of the whole command: with starting Python, loading the definitions, and the event of a
                               planned materialization that Dagster itself stores for each result as it creates a run
    task_work_s                the tasks' own work: the longest time from a task's task_started to its task_finished,
                               in which it imports torch and transformers and commits its partitions
    overhead_ms_per_partition  (wall_s - task_work_s) / n_partitions: planning, submitting, SLURM's start of the tasks,
                               Python's start in them, and recording that the tasks' work did not hide
    before_submit_s            from the run's start to sbatch
    submit_to_first_result_s   from sbatch to the first materialization
    after_last_commit_s        from the last task_finished to the last materialization
    scheduler_calls            all calls of SLURM commands while the command ran, counted by programs of the same names
                               that come first in PATH; to be at most `scheduler_calls_allowed`, which is
                               wall_s / poll_interval_s + 10
    one_job_per_partition_ms   plain jobs: from the first sbatch to the end of the last job, a partition
    speedup_over_one_job_per_partition
                               one_job_per_partition_ms / (wall_s / n_partitions)

Of several rounds, each with a deployment of its own, the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from kd_assets.contract import CACHES, Asset, JobFile
from kd_assets.orchestration.card_asset import CACHE_CARD
from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.platform import BATCH_SCRIPT
from kd_assets.orchestration.recording.check_specs import CHECKS
from kd_assets_tests.benchmarks.do_nothing import write_python
from kd_assets_tests.orchestration.command_line import CommandLine
from kd_assets_tests.orchestration.deployment import make_tiny_teacher
from kd_assets_tests.slurm.cluster import ClusterOptions, SlurmCluster, missing_commands, search_path
from kd_assets_tests.slurm.deployment import SlurmDeployment, key

COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo", "srun", "sacctmgr", "sstat", "sprio")
CALLS_BESIDE_POLLS = 10
TASK = {"cpus": 1, "memory_gib": 1}
CACHE_SETTINGS: dict[Asset, tuple[str, dict[str, Any]]] = {
    "topk_cache": ("topk", {"k": 4, "max_length": 64}),
    "hidden_state_cache": ("hidden_states", {"blocks": [1], "max_length": 64}),
    "embedding_cache": ("embeddings", {"max_length": 64}),
}
PLAIN_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a round measures."""

    n_partitions: int
    n_tasks: int
    poll_interval_s: float
    n_plain_jobs: int
    caches: tuple[Asset, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """When things happened in one run, in seconds since the epoch."""

    run_started: float
    run_ended: float
    submitted: float
    n_partitions: int
    materialized: Sequence[float]
    tasks: Sequence[tuple[float, float]]
    """Start and end of each task, by its own word."""

    def figures(self) -> dict[str, float]:
        """See the module's docstring."""
        last = max(self.materialized)
        wall_s = last - self.run_started
        task_work_s = max(end - start for start, end in self.tasks)
        return {
            "wall_s": wall_s,
            "run_s": self.run_ended - self.run_started,
            "task_work_s": task_work_s,
            "overhead_ms_per_partition": 1000 * (wall_s - task_work_s) / self.n_partitions,
            "before_submit_s": self.submitted - self.run_started,
            "submit_to_first_result_s": min(self.materialized) - self.submitted,
            "after_last_commit_s": last - max(end for _, end in self.tasks),
        }


class CountedCommands:
    """A folder for the front of PATH whose programs note that they were called and become the real ones."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._calls = folder, folder / "calls"
        self._calls.touch()
        for name in COMMANDS:
            if (real := shutil.which(name, path=search_path())) is not None:
                program = folder / name
                program.write_text(
                    f'#!/bin/sh\necho {name} >>{shlex.quote(str(self._calls))}\nexec {shlex.quote(real)} "$@"\n'
                )
                program.chmod(0o755)

    @contextmanager
    def in_path(self) -> Iterator[None]:
        before = os.environ["PATH"]
        os.environ["PATH"] = f"{self._folder}:{before}"
        try:
            yield
        finally:
            os.environ["PATH"] = before

    def calls(self) -> Counter[str]:
        return Counter(self._calls.read_text().split())


def measure_round(folder: Path, teacher: Path, cluster: SlurmCluster, asked: Asked) -> dict[str, Any]:
    """A deployment with all its shards, and its two ways to the caches."""
    instance_folder = folder / "instance"
    instance_folder.mkdir(parents=True)
    with dg.DagsterInstance.local_temp(str(instance_folder)) as instance:
        with unheard(folder / "making.log"):
            deployment = SlurmDeployment(
                folder / "home",
                teacher,
                instance,
                cluster,
                n_tasks=asked.n_tasks,
                n_shards=asked.n_partitions + asked.n_plain_jobs,
                profile={"poll_interval_s": asked.poll_interval_s},
                slurm=TASK,
                caches={name: settings for asset, (name, settings) in CACHE_SETTINGS.items() if asset in asked.caches},
            )
        write_python(Path(deployment.platform.compute_python))
        figures = measure_run(deployment, CountedCommands(folder / "counted"), asked)
        if asked.n_plain_jobs:
            each_ms = 1000 * plain_jobs_s(deployment, folder / "plain", asked) / asked.n_plain_jobs
            figures |= {
                "one_job_per_partition_ms": each_ms,
                "speedup_over_one_job_per_partition": each_ms / (1000 * figures["wall_s"] / asked.n_partitions),
            }
    return figures


def measure_run(deployment: SlurmDeployment, commands: CountedCommands, asked: Asked) -> dict[str, Any]:
    partitions = ("--partition-range", f"{key(0)}...{key(asked.n_partitions - 1)}")
    command_line = CommandLine(deployment)
    started = time.perf_counter()
    with commands.in_path():
        status, text = command_line.run(*asked.caches, partition=partitions)
    command_s = time.perf_counter() - started
    if status != 0:
        raise RuntimeError(f"the run failed:\n{text[-5000:]}")
    figures = times_of_last_run(deployment, asked).figures()
    calls = commands.calls()
    return figures | {
        "command_s": command_s,
        "scheduler_calls": calls.total(),
        "scheduler_calls_allowed": figures["wall_s"] / asked.poll_interval_s + CALLS_BESIDE_POLLS,
        "calls_by_command": dict(calls),
    }


def times_of_last_run(deployment: SlurmDeployment, asked: Asked) -> Times:
    """Raises RuntimeError unless the run did all that it was to do, and in one array."""
    instance = deployment.instance
    (run,) = instance.get_run_records(limit=1)
    assert run.start_time is not None
    assert run.end_time is not None
    run_id = run.dagster_run.run_id
    kind = dg.DagsterEventType.ASSET_MATERIALIZATION
    records = instance.get_records_for_run(run_id, of_type=kind).records
    materialized = [r.timestamp for r in records if r.asset_key != deployment.recipe.key(CACHE_CARD)]
    starts, ends = deployment.job_events("task_started"), deployment.job_events("task_finished")
    found = len(materialized), len(deployment.checks(run_id)), len(starts), deployment.n_teacher_loads()
    n_tasks, n_results = min(asked.n_tasks, asked.n_partitions), len(asked.caches) * asked.n_partitions
    expected = n_results, len(CHECKS) * n_results, n_tasks, n_tasks
    if found != expected:
        raise RuntimeError(f"materializations, checks, tasks, teacher loads: expected {expected}, found {found}")
    (submission,) = deployment.submissions()
    return Times(
        run_started=run.start_time,
        run_ended=run.end_time,
        submitted=deployment.slurm.submitted_at(submission),
        n_partitions=asked.n_partitions,
        materialized=materialized,
        tasks=[(start.time, end.time) for start, end in zip(starts, ends, strict=True)],
    )


def plain_jobs_s(deployment: SlurmDeployment, folder: Path, asked: Asked) -> float:
    """Seconds from the first sbatch to the end of the last job."""
    planner = planner_of(deployment.recipe, deployment.platform)
    keys = [key(asked.n_partitions + i) for i in range(asked.n_plain_jobs)]
    storage_as_no_answer = []
    for unit in planner.teacher_work(keys, asked.caches).units:
        job_folder = folder / unit.partition_key
        job_folder.mkdir(parents=True)
        job = JobFile(
            kind="teacher",
            recipe=deployment.recipe.name,
            key=unit.partition_key,
            recipe_folder=str(planner.recipe_folder),
            events_folder=str(job_folder / "events"),
            tasks=((0,),),
            units=(unit,),
            teacher=planner.teacher_params(),
            provenance=planner.provenance("teacher"),
        )
        storage_as_no_answer.append(job_folder / "job.json")
        storage_as_no_answer[-1].write_text(job.to_json())
    environment = folder / "environment.sh"
    environment.write_text(f"export KD_PYTHON={shlex.quote(deployment.platform.compute_python)}\n")

    started = time.perf_counter()
    for path in storage_as_no_answer:
        deployment.cluster.sbatch(
            f"--cpus-per-task={TASK['cpus']}",
            f"--mem={TASK['memory_gib']}G",
            f"--output={path.with_suffix('.log')}",
            f"--chdir={path.parent}",
            BATCH_SCRIPT,
            path,
            "0",
            environment,
        )
    while deployment.cluster.run("squeue", "--noheader").stdout:
        time.sleep(PLAIN_POLL_S)
    elapsed_s = time.perf_counter() - started

    if missing := planner.teacher_work(keys, asked.caches).survey().missing.units:
        log = folder / missing[0].partition_key / "job.log"
        raise RuntimeError(f"{len(missing)} plain jobs failed, such as {log}:\n{log.read_text()[-5000:]}")
    return elapsed_s


@contextmanager
def unheard(log_file: Path) -> Iterator[None]:
    """Warnings, progress bars and Dagster's log of a thousand events go to a file."""
    with log_file.open("w") as log, redirect_stderr(log):
        yield


def measure(folder: Path, asked: Asked, *, rounds: int) -> dict[str, Any]:
    load_before = os.getloadavg()[0]
    with unheard(folder / "teacher.log"):
        teacher = make_tiny_teacher(folder / "teacher")
    options = ClusterOptions(nodes=asked.n_tasks, cpus=1, gpus=0)
    with SlurmCluster(folder / "cluster", options) as cluster:
        os.environ.update(cluster.env)
        found = [measure_round(folder / f"round-{n}", teacher, cluster, asked) for n in range(rounds)]
    return {
        "n_partitions": asked.n_partitions,
        "n_tasks": asked.n_tasks,
        "n_caches": len(asked.caches),
        "n_plain_jobs": asked.n_plain_jobs,
        "poll_interval_s": asked.poll_interval_s,
        **medians(found),
        "calls_by_command": found[-1]["calls_by_command"],
        "load_average_before": round(load_before, 2),
        "n_cpus": os.cpu_count(),
        "versions": {"dagster": dg.__version__, "slurm": slurm_version()},
        "rounds": [{name: rounded(value) for name, value in figures.items()} for figures in found],
    }


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of each figure that is a number, over the rounds."""
    names = [name for name, value in rounds[0].items() if isinstance(value, (int, float))]
    return {name: rounded(statistics.median(figures[name] for figures in rounds)) for name in names}


def rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def slurm_version() -> str:
    return subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--partitions", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--caches", type=int, default=1, choices=range(1, len(CACHES) + 1), help="of a partition")
    parser.add_argument("--poll-interval", type=float, default=1.0, help="seconds")
    parser.add_argument("--plain-jobs", type=int, default=50, help="0: do not compare with one job a partition")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    asked = Asked(
        n_partitions=options.partitions,
        n_tasks=options.tasks,
        poll_interval_s=options.poll_interval,
        n_plain_jobs=options.plain_jobs,
        caches=CACHES[: options.caches],
    )
    if missing := missing_commands():
        sys.exit(f"this needs a real SLURM, and there is no {', '.join(missing)} here: run .ci/install-slurm")
    with tempfile.TemporaryDirectory(prefix="kd-assets-benchmark-") as folder:
        result = measure(Path(folder), asked, rounds=options.rounds)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:36} {value}")


if __name__ == "__main__":
    main()
