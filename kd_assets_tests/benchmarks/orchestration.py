"""What Dagster costs with thousands of partitions, beside the work itself, on sqlite and on PostgreSQL.

    python -m kd_assets_tests.benchmarks.orchestration --json [--storage postgresql] [--only page,tick]

A deployment of its own with the shipped dagster.yaml, a plan of 100,000 one-document shards, the local scheduler, the
real batch script and worker with a teacher that only commits (`only_commits`: real, tiny results of all three caches),
and `dagster asset materialize` in a process of its own, first over `--compared` partitions, then over others,
`--materialized` of them. Their shards are committed and recorded before. Wall time, and seconds of a processor beside
it where it says `cpu`: whoever else works on the machine takes part in the first.

    definitions_load_s         processor seconds of a new Python that loads the recipes of this checkout
    plan_s                     the run that makes the plan: counts, registers
    register_100k_s            to register as many partitions as `--partitions` says, at once
    reuse_ms_per_partition     the command that records the shards, which are committed, a partition
    overhead_ms_per_partition  from the run's start to its last record, without the longest task, a partition: three
                               caches with four checks each
    overhead_ratio             the same, over that of the run over `--compared` partitions
    command_ms_per_partition   from starting the command to its last record
    run_cpu_ms_per_partition   processor time of the command's process, a partition
    before_run_s               from starting the command to the run's start: Python, definitions, planned events
    before_submit_s            from the run's start to the first task's
    after_last_commit_s        from the last task's end to the last record
    rss_mb_of_run              the most memory that the command's process had
    asset_page_query_s         the asset page's query, when nobody has asked for it since the run; _again_s: once more
    partitions_tab_query_s     which partitions are made and failed, for the partitions tab
    schedule_tick_s            what the nightly schedule finds out, when it has read nothing yet; _again_s: once more
    sensor_tick_s              the checks of each asset as a whole, after that
    card_s                     to make the recipe's card
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import psutil  # type: ignore[import-untyped]
import yaml  # type: ignore[import-untyped]

from kd_assets.contract import CACHES
from kd_assets.orchestration.card_asset import CACHE_CARD, CARD_S
from kd_assets.orchestration.materialize import register_partitions
from kd_assets.orchestration.platform import PROJECT_FOLDER, Platform
from kd_assets.orchestration.schedules import nightly_requests, planned_partitions
from kd_assets.orchestration.staleness.coverage import asset_evaluations
from kd_assets_tests.benchmarks.do_nothing import write_python
from kd_assets_tests.benchmarks.scheduler import CACHE_SETTINGS, rounded, unheard
from kd_assets_tests.orchestration.command_line import CommandLine
from kd_assets_tests.orchestration.deployment import Deployment, documents, make_tiny_teacher
from kd_assets_tests.orchestration.postgresql_server import PostgresqlServer, storage_on
from kd_assets_tests.orchestration.web_queries import web_queries
from kd_assets_tests.slurm.deployment import commit_shards

STEPS = ("load", "register", "run", "page", "tick", "card")
STORAGES = ("sqlite", "postgresql")
LOAD = "import kd_assets.definitions as d; d.defs().get_repository_def().load_all_definitions()"
RECORDS = {dg.DagsterEventType.ASSET_MATERIALIZATION, dg.DagsterEventType.ASSET_CHECK_EVALUATION}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    storage: str
    n_partitions: int
    n_materialized: int
    n_compared: int
    n_tasks: int
    steps: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """How a command went."""

    started: float
    """In seconds since the epoch."""
    cpu_s: float
    rss_mb: float


@contextmanager
def instance_of(folder: Path, storage: str) -> Iterator[dg.DagsterInstance]:
    """An instance with the shipped dagster.yaml, on a server of its own where it is one of PostgreSQL."""
    settings = yaml.safe_load((PROJECT_FOLDER / "dagster.yaml").read_text())
    with ExitStack() as stack:
        if storage == "postgresql":
            server = stack.enter_context(PostgresqlServer())
            settings["storage"] = storage_on(server.url)
        folder.mkdir(parents=True)
        (folder / "dagster.yaml").write_text(yaml.safe_dump(settings))
        os.environ["DAGSTER_HOME"] = str(folder)
        yield stack.enter_context(dg.DagsterInstance.get())


class Bench:
    def __init__(self, folder: Path, instance: dg.DagsterInstance, asked: Asked) -> None:
        self._instance, self._asked = instance, asked
        home = folder / "home"
        home.mkdir()
        python = home / "python"
        write_python(python, module="kd_assets_tests.benchmarks.only_commits")
        with unheard(folder / "teacher.log"):
            teacher = make_tiny_teacher(folder / "teacher")
        tasks = {"n_tasks": asked.n_tasks, "concurrency": asked.n_tasks}
        self._deployment = Deployment(
            home,
            teacher,
            instance,
            platform=Platform(home=str(home), compute_python=str(python)),
            documents_per_shard=1,
            caches=dict(CACHE_SETTINGS.values()),
            jobs={"teacher": tasks},
        )
        self._deployment.write(documents(asked.n_partitions))
        self._log = folder / "runs.log"

    def figures(self) -> Iterator[dict[str, Any]]:
        """As they become known."""
        steps = self._asked.steps
        if "load" in steps:
            yield {"definitions_load_s": load_cpu_s()}
        if "register" in steps:
            yield {"register_100k_s": self._register_s()}
        if set(steps) - {"load", "register"}:
            with unheard(self._log):
                yield {"plan_s": timed(self._deployment.plan)}
        if "run" in steps:
            yield from self._runs()
        if "page" in steps:
            yield self._page()
        if "tick" in steps:
            yield self._ticks()
        if "card" in steps:
            yield {"card_s": self._card_s()}

    def _register_s(self) -> float:
        keys = [f"other-{i:06d}" for i in range(self._asked.n_partitions)]
        return timed(lambda: register_partitions(self._instance, "others", keys))

    # ------------------------------------------------------------------ runs

    def _runs(self) -> Iterator[dict[str, Any]]:
        keys = planned_partitions(self._instance, self._deployment.recipe)
        compared, materialized = self._asked.n_compared, self._asked.n_materialized
        first, others = keys[:compared], keys[compared : compared + materialized]
        yield {"making_shards_s": timed(lambda: commit_shards(self._deployment, [*first, *others]))}
        command = self._command([*first, *others], "shards_manifest")
        records = self._records()
        yield {"reuse_ms_per_partition": 1000 * (max(records) - command.started) / len(records)}
        small = self._run(first)
        large = self._run(others)
        names = ("overhead_ms_per_partition", "command_ms_per_partition", "run_cpu_ms_per_partition")
        yield {f"{name}_compared": small[name] for name in names}
        yield {**large, "overhead_ratio": large[names[0]] / small[names[0]]}

    def _run(self, keys: Sequence[str]) -> dict[str, float]:
        """Of the three caches."""
        command = self._command(keys, *CACHES)
        records = self._records()
        (run,) = self._instance.get_run_records(limit=1)
        starts, ends = (self._times_of(event_type, command) for event_type in ("task_started", "task_finished"))
        found, expected = len(records), len(keys) * len(CACHES) * (1 + 4)
        if found != expected or len(starts) != min(self._asked.n_tasks, len(keys)):
            raise RuntimeError(f"{found} of {expected} records, {len(starts)} tasks; see {self._log}")
        assert run.start_time is not None
        last, n = max(records), len(keys)
        task_s = max(end - start for start, end in zip(sorted(starts), sorted(ends), strict=True))
        return {
            "overhead_ms_per_partition": 1000 * (last - run.start_time - task_s) / n,
            "command_ms_per_partition": 1000 * (last - command.started) / n,
            "run_cpu_ms_per_partition": 1000 * command.cpu_s / n,
            "before_run_s": run.start_time - command.started,
            "before_submit_s": min(starts) - run.start_time,
            "task_work_s": task_s,
            "after_last_commit_s": last - max(ends),
            "rss_mb_of_run": command.rss_mb,
        }

    def _times_of(self, event_type: str, command: Command) -> list[float]:
        """Of the command's own tasks: folders of jobs have an order, but not that of time."""
        return [e.time for e in self._deployment.job_events(event_type) if e.time >= command.started]

    def _records(self) -> list[float]:
        """When the last run recorded each materialization and check of a partition."""
        (run,) = self._instance.get_run_records(limit=1)
        found, cursor = list[float](), None
        while True:
            page = self._instance.get_records_for_run(
                run.dagster_run.run_id, of_type=RECORDS, cursor=cursor, limit=5000
            )
            found += [r.timestamp for r in page.records if r.event_log_entry.get_dagster_event().partition or _check(r)]
            if not page.has_more:
                return found
            cursor = page.cursor

    def _command(self, keys: Sequence[str], *assets: str) -> Command:
        """`dagster asset materialize` over consecutive partitions."""
        command_line = CommandLine(self._deployment)
        started = time.time()
        process = command_line.start(*assets, partition=("--partition-range", f"{keys[0]}...{keys[-1]}"))
        watched = Watched(process.pid)
        text, _ = process.communicate()
        watched.join()
        with self._log.open("a") as log:
            log.write(text)
        if process.returncode != 0:
            raise RuntimeError(f"the run failed:\n{text[-5000:]}")
        return Command(started=started, cpu_s=watched.cpu_s, rss_mb=watched.rss_mb)

    # ------------------------------------------------------------------ what looks at them

    def _page(self) -> dict[str, float]:
        with web_queries(self._deployment) as web:
            first, again = (timed(lambda: web.asset("topk_cache")) for _ in range(2))
            return {
                "asset_page_query_s": first,
                "asset_page_query_again_s": again,
                "partitions_tab_query_s": timed(lambda: web.partitions_tab("topk_cache")),
            }

    def _ticks(self) -> dict[str, float]:
        recipe = self._deployment.recipe
        first, again = (timed(lambda: list(nightly_requests(self._instance, recipe))) for _ in range(2))
        keys = planned_partitions(self._instance, recipe)
        sensor = timed(lambda: asset_evaluations(self._instance, recipe, keys, {}))
        return {"schedule_tick_s": first, "schedule_tick_again_s": again, "sensor_tick_s": sensor}

    def _card_s(self) -> float:
        with unheard(self._log):
            assert self._deployment.run(CACHE_CARD).success
        event = self._instance.get_latest_materialization_event(self._deployment.recipe.key(CACHE_CARD))
        assert event is not None
        assert event.asset_materialization is not None
        return float(event.asset_materialization.metadata[CARD_S].value)  # type: ignore[arg-type]


def _check(record: dg.EventLogRecord) -> bool:
    event = record.event_log_entry.get_dagster_event()
    return (
        event.event_type is dg.DagsterEventType.ASSET_CHECK_EVALUATION
        and event.asset_check_evaluation_data.partition is not None
    )


class Watched(threading.Thread):
    """The processor time of a process, and the most memory it had, until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self.cpu_s = self.rss_mb = 0.0
        self.start()

    def run(self) -> None:
        try:
            while True:
                times = self._process.cpu_times()
                self.cpu_s = times.user + times.system
                self.rss_mb = max(self.rss_mb, self._process.memory_info().rss / 1e6)
                time.sleep(0.1)
        except psutil.Error:
            return


def timed(do: Callable[[], object]) -> float:
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


def load_cpu_s() -> float:
    program = f"import time; {LOAD}; print(time.process_time())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--storage", choices=STORAGES, default="sqlite")
    parser.add_argument("--partitions", type=int, default=100_000, help="that are planned and registered")
    parser.add_argument("--materialized", type=int, default=10_000, help="in one run")
    parser.add_argument("--compared", type=int, default=1_000, help="in a run before it")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--only", default=",".join(STEPS), help=f"steps, of {','.join(STEPS)}")
    options = parser.parse_args(arguments)
    steps = tuple(options.only.split(","))
    if unknown := set(steps) - set(STEPS):
        parser.error(f"there is no step {', '.join(sorted(unknown))}")
    if options.compared + options.materialized > options.partitions:
        parser.error("more partitions are to be materialized than there are")
    asked = Asked(
        storage=options.storage,
        n_partitions=options.partitions,
        n_materialized=options.materialized,
        n_compared=options.compared,
        n_tasks=options.tasks,
        steps=steps,
    )
    result: dict[str, Any] = {
        "storage": asked.storage,
        "n_partitions": asked.n_partitions,
        "n_materialized": asked.n_materialized,
        "n_cpus": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "dagster": dg.__version__,
    }
    with tempfile.TemporaryDirectory(prefix="kd-assets-benchmark-") as name:
        folder = Path(name)
        with instance_of(folder / "instance", asked.storage) as instance:
            for figures in Bench(folder, instance, asked).figures():
                for figure, value in figures.items():
                    result[figure] = rounded(value)
                    print(f"{figure:36} {result[figure]}", flush=True)
    result["load_average_after"] = round(os.getloadavg()[0], 2)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
