"""What one Dagster run wants made: what is there is recorded, what is missing is driven, what failed is named.

Here driving meets Dagster: the run's log, its recorder, its tags, and how it is told that it is terminated.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg

from kd_assets.contract import Asset, JobFile, JobKind, Output, WorkUnit
from kd_assets.dagster_internals import InterruptSignals, database_errors, interrupt_signals
from kd_assets.errors import NO_ANSWER, KdAssetsError, SchedulerError, StorageUnavailableError
from kd_assets.orchestration.driving.callbacks import Callbacks, CommittedResult
from kd_assets.orchestration.driving.driver import Driver
from kd_assets.orchestration.driving.following import FollowedJob, described
from kd_assets.orchestration.driving.progress import EVERY_S, counts_in_words
from kd_assets.orchestration.driving.results import FailedResult
from kd_assets.orchestration.driving.waiting import STORAGE_PATIENCE_S, Log, storage_waits
from kd_assets.orchestration.failure_report import failure_report
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.orchestration.planning.planner import Planner
from kd_assets.orchestration.planning.task_resources import task_resources
from kd_assets.orchestration.platform import Platform, code_commit
from kd_assets.orchestration.recording.earlier_jobs import EarlierJobs
from kd_assets.orchestration.recording.job_table import failures_in_words, job_observation, task_facts
from kd_assets.orchestration.recording.recorder import Recorder
from kd_assets.orchestration.retries import Asked, FailureClass
from kd_assets.orchestration.termination import is_canceled, is_terminated
from kd_assets.recipes.recipe import SHARDS_MANIFEST, Recipe
from kd_assets.scheduler import JobSpec, Profile, Scheduler, Submission
from kd_assets.store import Manifest, failed_check, set_head
from kd_assets.store.current_variants import say_current
from kd_assets.store.layout import recipe_folder_of

FAILURES_TAG = "kd_assets/failures"
"""Of a run: what kept tasks from their results, by class, whether it was healed or not."""
INTERRUPTS = (dg.DagsterExecutionInterruptedError, KeyboardInterrupt)
"""How a run learns that its process is to end, terminated or not."""


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
        self._started = clock()
        self._made: set[str] = set()
        """Partitions of which this run's jobs made a result."""
        self._reused: set[str] = set()
        """Partitions of which a result was there."""
        self._recorded: dict[str, set[Asset]] = {}
        """Partition → of which assets a result is recorded."""
        self.failed: list[FailedResult] = []
        self._said_current: dict[Asset, str] = {}
        self.variants_made: dict[Asset, str] = {}
        """The variant of what this run's jobs made of an asset."""
        self._failed_checks: set[str] = set()
        """Folders of the results that are committed and not worth it, as their manifests say."""
        self._failures: Counter[FailureClass] = Counter()
        self._being_finished: list[CommittedResult] = []
        """Recorded while their task was between the manifest and the end of the commit: it may be killed there."""
        self._node_faults: list[str] = []
        self._earlier_jobs = EarlierJobs(platform.jobs_folder)

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
        self.make(self.reused(work))

    def reused(self, work: PlannedWork) -> PlannedWork:
        """Record what is committed of `work`, and what cannot be asked for as failed; returns what is missing."""
        next_line = self._clock() + EVERY_S
        found = set[str]()

        def reuse(unit: WorkUnit, output: Output, manifest: Manifest) -> None:
            nonlocal next_line
            self._record(CommittedResult(unit=unit, output=output, manifest=manifest))
            found.add(unit.partition_key)
            if self._clock() >= next_line:  # of thousands this takes minutes
                next_line = self._clock() + EVERY_S
                self.say(f"{work.kind}: {len(found):,} of {len(work.units):,} partitions found committed so far")

        with as_failure(), self._flushing():
            # Also the single caches that are there of a partition that lacks another.
            survey = work.survey(reuse)
        self._give_up_on(survey.impossible, work.kind)
        if survey.missing.units and (n_whole := len(found - {unit.partition_key for unit in survey.missing.units})):
            self.say(f"{work.kind}: {n_whole:,} of {len(work.units):,} partitions are committed")
        if not survey.missing.units:
            n_failed = len(
                {unit.partition_key for unit, output in survey.committed if output.path in self._failed_checks}
            )
            but = f", but {n_failed} of them failed a check" if n_failed else ""
            self._context.log.info(f"{work.kind}: all {len(work.units)} partitions are committed{but}; nothing to run")
        return survey.missing

    def make(self, work: PlannedWork) -> None:
        """Have results made that are missing, and record them; what cannot be is added to `failed`."""
        if not work.units:
            return
        with as_failure(), interrupt_signals() as interrupts:
            driver = self._driver(work, interrupts)
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
                is_canceled=lambda: is_canceled(self._context.instance, run_id),
                interrupts=INTERRUPTS,
                raise_lost_interrupt=interrupts.raise_again,
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

    def _check(self, unit: WorkUnit, output: Output, manifest: Manifest) -> None:
        assert self._recorder is not None
        set_head(Path(output.path), manifest)
        self._recorder.record_checks(unit, output, manifest)

    def _record(self, result: CommittedResult) -> None:
        self._note_failed_check(result)
        self._say_current(result.output)
        (self._reused if result.job is None else self._made).add(result.unit.partition_key)
        self._recorded.setdefault(result.unit.partition_key, set()).add(result.output.asset)
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

    def _say_current(self, output: Output) -> None:
        """Once an asset and run: readers that name no variant follow the recipe."""
        if self._said_current.get(output.asset) != output.variant:
            say_current(recipe_folder_of(Path(output.path)), output.asset, output.variant)
            self._said_current[output.asset] = output.variant

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
            return self._earlier_jobs.task_facts(result.manifest)
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

    def say(self, line: str) -> None:
        """A line of the run's log."""
        self._context.log.info(line)

    def say_what_was_done(self) -> None:
        """The run's last line: each partition that was asked for is counted once."""
        failed = self._failed_partitions()
        made, reused = self._made - failed, self._reused - self._made - failed
        seconds = self._clock() - self._started
        self.say(counts_in_words(len(made), len(reused), len(failed), seconds))

    @contextmanager
    def saying_how_far_it_came(self, partition_keys: Sequence[str], assets: Collection[Asset]) -> Iterator[None]:
        """The last line of a run that is stopped within this block, where `say_what_was_done` is not reached: a
        partition counts as made or reused only with all that was asked for of it."""
        try:
            yield
        except INTERRUPTS:
            failed = self._failed_partitions()
            whole = {key for key in partition_keys if self._recorded.get(key, set()).issuperset(assets)} - failed
            counts = counts_in_words(
                len(whole & self._made), len(whole - self._made), len(failed), self._clock() - self._started
            )
            n_left = len(set(partition_keys) - whole - failed)
            self.say(f"stopped: {counts}; {n_left:,} are left for the next run that asks for them")
            raise

    def _failed_partitions(self) -> set[str]:
        """Those with a result that is not there, or that failed a check."""
        failed = {f.partition_key for f in self.failed}
        return failed if self._recorder is None else failed | self._recorder.failed_checks.keys()

    def raise_if_anything_failed(self) -> None:
        """Raise a Failure that names every partition that was asked for and is not there, or whose checks failed."""
        failure = failure_report(
            self._recipe.name,
            self.failed,
            checks=self._recorder.failed_checks if self._recorder is not None else {},
            failures=self._failures,
            node_faults=self._node_faults,
        )
        if failure is not None:
            raise failure


@contextmanager
def as_failure() -> Iterator[None]:
    """Turns our errors into a Dagster Failure with the same text: the message is for the user, the traceback is not."""
    try:
        yield
    except KdAssetsError as e:
        raise dg.Failure(description=f"{type(e).__name__}: {e}", allow_retries=False) from e
    except database_errors() as e:
        cause = getattr(e, "orig", None) or (f"{e} ({e.__cause__})" if e.__cause__ is not None else e)
        raise dg.Failure(
            description=f"Dagster's own database does not do what it was asked: {cause}. See to the disk of "
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
