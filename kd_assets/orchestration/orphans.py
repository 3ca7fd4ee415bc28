"""Jobs that no run waits for, and runs whose process is gone: found and settled by a sensor, and by the nightly
schedule before it asks what live runs hold.

A run's process holds a lock for as long as it lives, and one for each job it follows; so "is anybody there" is asked of
the file system, as everywhere here, and not of a status that nobody was left to change. GPU hours are paid for, so a
job without a run gets a new run, which finds it and records what it commits; only a job whose run was terminated is
cancelled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from kd_assets.contract import Asset, JobFile, JobKind
from kd_assets.dagster_internals import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG
from kd_assets.durable import prepare_folder, storage_errors
from kd_assets.errors import ContractError
from kd_assets.locks import is_locked, locked
from kd_assets.orchestration.driving.following import FollowedJob, described
from kd_assets.orchestration.schedules import (
    assets_needed,
    few_ranges,
    is_of_recipe,
    partitions_held_by_live_runs,
    with_put_aside,
)
from kd_assets.orchestration.termination import ENDED_ON_PURPOSE
from kd_assets.recipes.recipe import STUDENT_SMOKE, Recipe
from kd_assets.scheduler import Scheduler, Submission
from kd_assets.scheduler.submissions import followers, is_cancelled

KINDS: tuple[JobKind, ...] = ("shards", "recode", "teacher", "export", "student")
SETTLING_S = 60.0
"""A job younger than this may be about to get its run's lock."""


QUIET_S = 300.0
"""A run between two steps for so long has no process: steps follow each other within moments."""


@contextmanager
def alive(jobs_folder: Path, run_id: str) -> Iterator[None]:
    """Says, for as long as it is entered, that the process of a run lives; only a kill leaves the file behind."""
    folder = jobs_folder / ".runs"
    with ExitStack() as lock:
        with storage_errors(folder, "write in"):
            prepare_folder(folder)
            lock.enter_context(locked(folder / run_id))
        try:
            yield
        finally:
            with suppress(OSError):  # then it looks as if it had been killed; but its run has ended, as Dagster knows
                (folder / run_id).unlink(missing_ok=True)


def is_gone(jobs_folder: Path, run_id: str) -> bool:
    """Whether a run had a process that worked for it, and has none now."""
    path = jobs_folder / ".runs" / run_id
    return path.exists() and not is_locked(path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Orphan:
    """A live job that no living process follows."""

    submission: Submission
    job: JobFile
    n_followers: int
    """Runs that have followed it so far."""
    is_unwanted: bool
    """The last of them was terminated."""


def orphaned_jobs(
    instance: dg.DagsterInstance, recipe: Recipe, scheduler: Scheduler, *, clock: Callable[[], float] = time.time
) -> Iterator[Orphan]:
    """Raises SchedulerUnreachableError: then nobody knows what lives."""
    for kind in KINDS:
        for submission in scheduler.live(recipe.name, kind):
            runs = followers(submission)
            if any(runs.values()) or clock() - scheduler.submitted_at(submission) < SETTLING_S:
                continue
            try:
                job = FollowedJob.of(submission)
            except ContractError:  # of another version of kd_assets: not ours to judge
                continue
            job.read(lambda job, event: None)
            if all(report.is_final for report in job.reports.values()):
                continue  # it is done, though the scheduler may not have said so yet
            statuses = [run.status for run_id in runs if (run := instance.get_run_by_id(run_id)) is not None]
            yield Orphan(
                submission=submission,
                job=job.job,
                n_followers=len(runs),
                is_unwanted=is_cancelled(submission)
                or (bool(statuses) and all(status in ENDED_ON_PURPOSE for status in statuses)),
            )


def runs_without_process(
    instance: dg.DagsterInstance, recipe: Recipe, jobs_folder: Path, *, clock: Callable[[], float] = time.time
) -> list[dg.DagsterRun]:
    """Runs that Dagster holds for started and whose process is gone: such as have reached our code, and of the recipe's
    runs also such as have not, or have left it."""
    filters = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])
    return [
        run
        for run in instance.get_runs(filters)
        if is_gone(jobs_folder, run.run_id)
        or (
            is_of_recipe(run, recipe)
            and not (jobs_folder / ".runs" / run.run_id).exists()
            and _is_between_steps(instance, run, clock() - QUIET_S)
        )
    ]


def _is_between_steps(instance: dg.DagsterInstance, run: dg.DagsterRun, since: float) -> bool:
    """Whether no step of the run is at work and nothing has happened since then."""
    entries = instance.all_logs(run.run_id)
    if max((entry.timestamp for entry in entries), default=since) >= since:
        return False
    kinds = [entry.dagster_event.event_type for entry in entries if entry.dagster_event is not None]
    return kinds.count(dg.DagsterEventType.STEP_START) <= sum(map(kinds.count, _STEP_ENDS))


_STEP_ENDS = (dg.DagsterEventType.STEP_SUCCESS, dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.STEP_SKIPPED)


def settle_dead_runs(
    instance: dg.DagsterInstance, recipe: Recipe, jobs_folder: Path, *, clock: Callable[[], float] = time.time
) -> list[str]:
    """Mark runs whose process is gone as failed, which frees their pool and, with `run_retries` in dagster.yaml, starts
    them again; says of each that it did."""
    dead = runs_without_process(instance, recipe, jobs_folder, clock=clock)
    for run in dead:
        instance.report_run_failed(run, "its process is gone: killed, or the machine restarted; its job goes on")
    return [f"run {run.run_id} had no process any more and is marked as failed" for run in dead]


def settle_orphans(
    instance: dg.DagsterInstance,
    recipe: Recipe,
    scheduler: Scheduler,
    jobs_folder: Path,
    *,
    put_aside: Callable[[], Mapping[str, Collection[str]]] = dict,
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Marks dead runs as failed, has jobs cancelled whose run was terminated, and asks for a run for every other
    orphan whose partitions no live run holds. `put_aside`: what is in quarantine, which such a run does not make."""
    done = settle_dead_runs(instance, recipe, jobs_folder)
    requests: list[dg.RunRequest] = []
    orphans = list(orphaned_jobs(instance, recipe, scheduler))
    if unwanted := [orphan.submission for orphan in orphans if orphan.is_unwanted]:
        # A tick has a minute; one that takes longer to end is found again by the next.
        scheduler.begin_cancelling(unwanted)
        done += [f"cancelling {described(scheduler, job)}, whose run was terminated" for job in unwanted]
    # Dagster starts a run again that was just marked, and that run finds its job: what it does not, the next tick does.
    for orphan in orphans if not done else []:
        if not orphan.is_unwanted:
            requests += requests_for(instance, recipe, orphan, put_aside=put_aside)
    yield from requests
    if not requests:
        yield dg.SkipReason("; ".join(done) or f"every live job of {recipe.name} has its run")


def requests_for(
    instance: dg.DagsterInstance,
    recipe: Recipe,
    orphan: Orphan,
    *,
    put_aside: Callable[[], Mapping[str, Collection[str]]] = dict,
) -> Iterator[dg.RunRequest]:
    """Runs that want what the job makes, and so will find and follow it. Asked for once, until another such run is
    gone, too."""
    key = f"{orphan.submission.folder}#{orphan.n_followers}"
    assets = sorted({o.asset for u in orphan.job.units for o in u.outputs})
    if orphan.job.kind == "student":
        yield dg.RunRequest(run_key=key, asset_selection=[recipe.key(STUDENT_SMOKE)])
        return
    present = list(instance.get_dynamic_partitions(str(recipe.partitions.name)))
    wanted: dict[str, tuple[Asset, ...]] = dict.fromkeys(_partitions_of(orphan.job), tuple(assets))
    held = partitions_held_by_live_runs(instance, recipe, present)
    still_there = wanted.keys() & set(present) - held
    for found in few_ranges(
        recipe,
        present,
        {k: a for k, a in wanted.items() if k in still_there},
        held=held,
        would_be_made=lambda: with_put_aside(recipe, present, assets_needed(instance, recipe, present), put_aside()),
    ):
        yield dg.RunRequest(
            run_key=f"{key}#{found.first}",
            asset_selection=[recipe.key(a) for a in found.assets],
            tags={ASSET_PARTITION_RANGE_START_TAG: found.first, ASSET_PARTITION_RANGE_END_TAG: found.last},
        )


def _partitions_of(job: JobFile) -> Sequence[str]:
    return [unit.partition_key for unit in job.units]
