"""What one Dagster run wants made: what is there is recorded, what is missing is driven, what failed is named.

Here driving meets Dagster: the run's log, its recorder, its tags, and how it is told that it is terminated.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
import sqlalchemy as sa

from kd_assets.contract import Asset, JobFile, JobKind, Output, WorkUnit
from kd_assets.dagster_internals import InterruptSignals, interrupt_signals
from kd_assets.errors import NO_ANSWER, KdAssetsError, SchedulerError, StorageUnavailableError, printable
from kd_assets.orchestration.driving.callbacks import Callbacks, CommittedResult
from kd_assets.orchestration.driving.driver import Driver
from kd_assets.orchestration.driving.following import FollowedJob, described
from kd_assets.orchestration.driving.results import FailedResult
from kd_assets.orchestration.driving.waiting import STORAGE_PATIENCE_S, Log, storage_waits
from kd_assets.orchestration.planned_work import PlannedWork
from kd_assets.orchestration.planner import Planner
from kd_assets.orchestration.platform import Platform, code_commit
from kd_assets.orchestration.recording.job_table import failures_in_words, job_observation, task_facts
from kd_assets.orchestration.recording.recorder import Recorder
from kd_assets.orchestration.retries import Asked, FailureClass
from kd_assets.orchestration.task_resources import task_resources
from kd_assets.orchestration.termination import is_terminated
from kd_assets.recipes.recipe import SHARDS_MANIFEST, Recipe
from kd_assets.scheduler import JobSpec, Profile, Scheduler, Submission
from kd_assets.store import Manifest, failed_check, set_head

FAILURES_TAG = "kd_assets/failures"
"""Of a run: what kept tasks from their results, by class, whether it was healed or not."""


class Run:
    """One kind of work after the other, and what could not be had of it."""

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        recipe: Recipe,
        platform: Platform,
        planner: Planner,
        recorder: Recorder | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._context, self._recipe, self._platform = context, recipe, platform
        self._planner, self._recorder = planner, recorder
        self._clock, self._sleep = clock, sleep
        self.failed: list[FailedResult] = []
        self.variants_made: dict[Asset, str] = {}
        """The variant of what this run's jobs made of an asset."""
        self._failed_checks: set[str] = set()
        """Folders of the results that are committed and not worth it, as their manifests say."""
        self._failures: Counter[FailureClass] = Counter()
        self._being_finished: list[CommittedResult] = []
        """Recorded while their task was between the manifest and the end of the commit: it may be killed there."""
        self._node_faults: list[str] = []

    @cached_property
    def _profile(self) -> Profile | None:
        """The cluster profile, read once a run."""
        return self._platform.profile()

    @cached_property
    def _scheduler(self) -> Scheduler:
        return self._platform.make_scheduler(profile=self._profile)

    # ------------------------------------------------------------------ work

    def planned(self, plan: Callable[[Sequence[str]], PlannedWork], partition_keys: Sequence[str]) -> PlannedWork:
        """The work of these partitions. Those whose files cannot be reached are asked for again, for STORAGE_PATIENCE_S
        in all, and are impossible after that."""
        work, waits = plan(partition_keys), storage_waits()
        while work.unreachable and waits.failing_for_s(self._clock()) < STORAGE_PATIENCE_S:
            if not waits.n_failures:
                why = next(iter(work.unreachable.values()))
                self._context.log.warning(
                    f"files of {len(work.unreachable)} partitions cannot be reached ({why}); they are tried again for "
                    f"{STORAGE_PATIENCE_S / 60:g} minutes"
                )
            waits.failed(self._clock())
            self._sleep(waits.next_at - self._clock())
            work = work.with_more(plan(list(work.unreachable)))
        return work.without_unreachable()

    def carry_out(self, work: PlannedWork) -> None:
        """See to it that every result of `work` is committed and recorded; what cannot be is added to `failed`."""
        with as_failure(), self._flushing():
            # Also the single caches that are there of a partition that lacks another.
            survey = work.survey(self._reuse)
        self._give_up_on(survey.impossible, work.kind)
        if not survey.missing.units:
            n_failed = len(
                {unit.partition_key for unit, output in survey.committed if output.path in self._failed_checks}
            )
            but = f", but {n_failed} of them failed a check" if n_failed else ""
            self._context.log.info(f"{work.kind}: all {len(work.units)} partitions are committed{but}; nothing to run")
            return
        with as_failure(), interrupt_signals() as interrupts:
            driver = self._driver(survey.missing, interrupts)
            try:
                driver.run()
                for result in self._being_finished:
                    set_head(Path(result.output.path), result.manifest)
                self._being_finished.clear()
            finally:
                self.failed += driver.failed
                self._failures += driver.failures
                if faults := driver.node_faults.in_words():
                    self._node_faults.append(faults)
                    self._context.log.warning(f"{work.kind}: nodes at fault: {faults}")
                if self._failures:
                    words = failures_in_words(self._failures)
                    self._context.instance.add_run_tags(self._context.run.run_id, {FAILURES_TAG: words})

    def check(self, work: PlannedWork) -> None:
        """Run the selected checks on what is committed of `work`; nothing is computed."""
        assert self._recorder is not None
        with self._flushing():
            survey = work.survey(self._check)
        self._give_up_on(survey.impossible, work.kind)
        nothing = {
            unit.partition_key: survey.unreachable.get(output.path, "there is nothing to check: materialize it")
            for unit in survey.missing.units
            for output in unit.outputs
        }
        self._give_up_on(nothing, work.kind)

    def _driver(self, work: PlannedWork, interrupts: InterruptSignals) -> Driver:
        recipe, run_id = self._recipe, self._context.run.run_id
        resources = task_resources(recipe, self._platform, self._planner, work.kind, profile=self._profile).resources
        tasks = recipe.tasks_of(work.kind)
        return Driver(
            work,
            recipe.name,
            self._scheduler,
            Callbacks(
                run_id=run_id,
                log=self._context.log,
                record=self._record,
                flush=self._flush,
                observe=self._observe,
                is_terminated=lambda: is_terminated(self._context.instance.get_run_by_id(run_id), interrupts.last),
                interrupts=(KeyboardInterrupt, dg.DagsterExecutionInterruptedError),
            ),
            asked=Asked(
                resources=resources, token_budget=recipe.teacher.token_budget if work.kind == "teacher" else None
            ),
            n_tasks=tasks.n_tasks,
            concurrency=tasks.concurrency,
            make_job_file=self._job_file,
            clock=self._clock,
            sleep=self._sleep,
        )

    def _job_file(
        self, work: PlannedWork, spec: JobSpec, tasks: tuple[tuple[int, ...], ...], new: Submission, asked: Asked
    ) -> JobFile:
        return self._planner.job_file(
            work,
            key=spec.key,
            tasks=tasks,
            events_folder=new.events_folder,
            token_budget=asked.token_budget,
            provenance={
                "code_commit": code_commit(),
                "dagster_run_id": self._context.run.run_id,
                "submission_key": spec.key,
            },
        )

    # ------------------------------------------------------------------ telling Dagster

    def _reuse(self, unit: WorkUnit, output: Output, manifest: Manifest) -> None:
        self._record(CommittedResult(unit=unit, output=output, manifest=manifest))

    def _check(self, unit: WorkUnit, output: Output, manifest: Manifest) -> None:
        assert self._recorder is not None
        set_head(Path(output.path), manifest)
        self._recorder.record_checks(unit, output, manifest)

    def _record(self, result: CommittedResult) -> None:
        self._note_failed_check(result)
        if result.job is not None:
            self.variants_made[result.output.asset] = result.output.variant
        # Also of what a task has just committed: it may have been killed between its manifest and its head.
        if not set_head(Path(result.output.path), result.manifest):
            self._being_finished.append(result)
        if self._recorder is not None:
            self._recorder.record(
                result.unit,
                result.output,
                result.manifest,
                reused=result.job is None,
                facts=self._facts(result),
            )

    def _note_failed_check(self, result: CommittedResult) -> None:
        """A result that failed a check is recorded for everyone to see, and fails this run and every later one, with
        whatever checks selected: it is there, so nothing makes it again by itself."""
        if (why := failed_check(result.manifest)) is None or result.output.path in self._failed_checks:
            return
        self._failed_checks.add(result.output.path)
        self.failed.append(
            FailedResult(
                partition_key=result.unit.partition_key,
                asset=result.output.asset,
                failure=FailureClass.WORK,
                cause=f"{why}. It stays in {result.output.path} to be looked at, and no reader takes it. Mend "
                "the cause (another dtype or other weights name another result), or move that folder away and "
                "materialize again",
            )
        )

    def _facts(self, result: CommittedResult) -> Mapping[str, Any]:
        """Which task made a result; nothing where that cannot be read: it informs."""
        if result.job is None or result.task is None:
            return {}
        try:
            return task_facts(self._scheduler, result.job, result.task)
        except (SchedulerError, *NO_ANSWER):
            return {}

    def _observe(self, job: FollowedJob, failures: Counter[FailureClass]) -> None:
        try:
            observation = job_observation(self._recipe, self._scheduler, job, failures)
        except (SchedulerError, *NO_ANSWER) as e:  # it informs
            self._context.log.warning(f"no table of {described(self._scheduler, job.submission)}: {e}")
        else:
            self._context.log_event(observation)

    @contextmanager
    def _flushing(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._flush()

    def _flush(self) -> None:
        if self._recorder is not None:
            self._recorder.flush()

    # ------------------------------------------------------------------ what failed

    def _give_up_on(self, causes: Mapping[str, str], kind: JobKind) -> None:
        asset = SHARDS_MANIFEST if kind == "shards" else kind
        self.failed += [
            FailedResult(partition_key=key, asset=asset, failure=FailureClass.WORK, cause=cause)
            for key, cause in causes.items()
        ]

    def without_failure(self, partition_keys: Sequence[str]) -> list[str]:
        """Those of which nothing has failed so far: the others are named for what was to come before."""
        failed = {f.partition_key for f in self.failed}
        return [key for key in partition_keys if key not in failed]

    def raise_if_anything_failed(self) -> None:
        """Raise a Failure that names every partition that was asked for and is not there, or whose checks failed."""
        checks = self._recorder.failed_checks if self._recorder is not None else {}
        if not self.failed and not checks:
            return
        lines = failed_in_words(self.failed)
        lines += [f"{key}: {message}" for key, messages in sorted(checks.items()) for message in messages]
        failed_partitions = sorted({f.partition_key for f in self.failed} | set(checks))
        metadata: dict[str, Any] = {
            "failed_partitions": dg.MetadataValue.json(failed_partitions),
            "causes": dg.MetadataValue.md("\n".join(f"- {as_markdown(line)}" for line in lines)),
        }
        if self._failures:
            metadata["failures_by_class"] = failures_in_words(self._failures)
        if self._node_faults:
            metadata["nodes_at_fault"] = "; ".join(self._node_faults)
        if logs := {str(f.log_file) for f in self.failed if f.log_file is not None}:
            metadata["logs"] = dg.MetadataValue.json(sorted(logs))
        raise dg.Failure(
            description=f"{len(failed_partitions)} partitions not done in recipe {self._recipe.name}:\n"
            + "\n".join(lines[:50]),
            metadata=metadata,
        )


def failed_in_words(failed: Iterable[FailedResult]) -> list[str]:
    """One line a cause, with the partitions and assets it kept from being done."""
    grouped: dict[str, list[FailedResult]] = {}
    for result in failed:
        grouped.setdefault(result.cause, []).append(result)
    lines = []
    for cause, results in grouped.items():
        keys = sorted({r.partition_key for r in results})
        named = ", ".join(keys) if len(keys) <= 5 else f"{keys[0]} … {keys[-1]} ({len(keys)} partitions)"
        safe_cause = "\n".join(map(printable, cause.splitlines()))
        lines.append(f"{named} ({', '.join(dict.fromkeys(r.asset for r in results))}): {safe_cause}")
    return lines


def as_markdown(text: str) -> str:
    """Text that Markdown shows as it is: what a file says is no link, no picture and no HTML of ours."""
    return re.sub(r"([\\`*_{}\[\]<>()#+\-.!|~&$])", r"\\\1", text)


@contextmanager
def as_failure() -> Iterator[None]:
    """Turns our errors into a Dagster Failure with the same text: the message is for the user, the traceback is not."""
    try:
        yield
    except KdAssetsError as e:
        raise dg.Failure(description=f"{type(e).__name__}: {e}", allow_retries=False) from e
    except sa.exc.OperationalError as e:
        raise dg.Failure(
            description=f"Dagster's own database does not do what it was asked: {e.orig}. See to the disk of "
            "DAGSTER_HOME or the server of its `storage`, and materialize again: what is committed is kept, and is "
            "recorded then"
        ) from e


T = TypeVar("T")


def patiently(
    ask: Callable[[], T],
    log: Log,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """The answer of what reads files, asked again for STORAGE_PATIENCE_S while they cannot be reached.

    Raises StorageUnavailableError when they still cannot be after that.
    """
    waits = storage_waits()
    while True:
        try:
            return ask()
        except StorageUnavailableError as e:
            if waits.failing_for_s(clock()) >= STORAGE_PATIENCE_S:
                raise
            if not waits.n_failures:
                log.warning(
                    f"a file cannot be reached ({e}); it is tried again for {STORAGE_PATIENCE_S / 60:g} minutes"
                )
        waits.failed(clock())
        sleep(waits.next_at - clock())
