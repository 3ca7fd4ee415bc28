"""What a materialization does: plan the work, submit what is missing, follow it, record each result as it is committed.

The bodies of the assets that `components` declares. The rules they keep: a result that is committed is recorded and
never computed; every partition that was asked for ends the run either recorded or named in its failure; and a
termination cancels the job, while any other death of this process leaves it running to be found again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from kd_assets.contract import Asset, Event, JobFile, Output, WorkUnit, read_job
from kd_assets.errors import KdAssetsError
from kd_assets.orchestration.dagster_internals import already_recorded
from kd_assets.orchestration.follow import FailedResult, follow
from kd_assets.orchestration.pictures import loss_curve_markdown
from kd_assets.orchestration.platform import Platform, code_commit
from kd_assets.orchestration.recipe import SHARD_PLAN, SHARDS_MANIFEST, Recipe
from kd_assets.orchestration.recording import Recorder, latest_data_version, result_metadata
from kd_assets.orchestration.work import PlannedWork, Planner, is_committed
from kd_assets.scheduler import JobSpec, LocalScheduler, Submission, spread, submission_key
from kd_assets.store import atomic_write, read_manifest, set_head

PROGRESS_INTERVAL_S = 10.0
"""How often a task's progress is written to Dagster's log."""


def planner_of(recipe: Recipe, platform: Platform) -> Planner:
    return Planner(recipe, platform.recipe_folder(recipe.name), platform.digests(), platform.variables())


def materialize_plan(
    context: dg.AssetExecutionContext, recipe: Recipe, platform: Platform
) -> dg.MaterializeResult[None]:
    """Pin the sources and register one dynamic partition a shard, in sorted order."""
    with _as_failure():
        plan = planner_of(recipe, platform).make_plan()
    keys = [shard.partition_key for shard in plan.shards]
    register_partitions(context.instance, str(recipe.partitions.name), keys)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(plan.plan_hash),
        metadata={
            "shards": len(keys),
            "records": sum(s.n_records for s in plan.shards),
            "bytes": sum(s.n_bytes for s in plan.sources),
            "sources": dg.MetadataValue.table(
                [
                    dg.TableRecord(
                        {
                            "name": s.name,
                            "path": s.path,
                            "records": s.n_records,
                            "bytes": s.n_bytes,
                            "sha256": s.sha256,
                            "licence": s.licence,
                            "revision": s.revision or "",
                        }
                    )
                    for s in plan.sources
                ]
            ),
            "folder": dg.MetadataValue.path(str(platform.recipe_folder(recipe.name) / SHARD_PLAN)),
        },
    )


def register_partitions(instance: dg.DagsterInstance, name: str, keys: list[str]) -> None:
    """Make the dynamic partitions exactly `keys`, in this order.

    Dagster keeps them in the order they were added, and a range means "between these two in that order"; so unless
    the new keys only go on at the end, all are added anew. Removing a key removes no data and no history.
    """
    present = list(instance.get_dynamic_partitions(name))
    kept = [key for key in present if key in set(keys)]
    if kept != keys[: len(kept)]:
        kept = []
    for key in present:
        if key not in set(kept):
            instance.delete_dynamic_partition(name, key)
    if len(kept) < len(keys):
        instance.add_dynamic_partitions(name, keys[len(kept) :])


def materialize_caches(
    context: dg.AssetExecutionContext, recipe: Recipe, platform: Platform
) -> Iterator[dg.MaterializeResult[None]]:
    """Tokenise and cache the selected partitions, whichever of the four assets are selected."""
    selected = [a for a in (SHARDS_MANIFEST, *recipe.caches) if recipe.key(a) in context.selected_asset_keys]
    checked = assets_only_checked(context, recipe)
    keys = partitions_asked_for(context, recipe, checked)
    if not keys:
        raise dg.Failure(description="the selection holds no partition: is the range reversed?", allow_retries=False)
    with _as_failure():
        planner = planner_of(recipe, platform)
        recorder = Recorder(
            context,
            recipe,
            plan_hash=planner.current_plan().plan_hash,
            teacher_version=None
            if recipe.teacher_asset is None
            else latest_data_version(context.instance, recipe.teacher_asset),
        )
    run = Run(context, recipe, platform, planner, recorder)
    if SHARDS_MANIFEST in selected:
        with _as_failure():
            work = planner.shards_work(keys)
        run.carry_out(work)
    if caches := [a for a in selected if a != SHARDS_MANIFEST]:
        without_shard = {f.partition_key for f in run.failed}
        with _as_failure():
            work = planner.teacher_work([k for k in keys if k not in without_shard], caches)
        run.carry_out(work)
    if checked:
        with _as_failure():
            run.check(planner.teacher_work(keys, checked))
    run.raise_if_anything_failed()
    for asset in selected:
        yield already_recorded(recipe.key(asset))


def assets_only_checked(context: dg.AssetExecutionContext, recipe: Recipe) -> list[Asset]:
    """Caches whose checks are selected and which are not: what "Execute" on a check in the web UI asks for."""
    keys = {check.asset_key for check in context.selected_asset_check_keys} - set(context.selected_asset_keys)
    return [asset for asset in recipe.caches if recipe.key(asset) in keys]


def partitions_asked_for(context: dg.AssetExecutionContext, recipe: Recipe, checked: Sequence[Asset]) -> list[str]:
    """The run's partitions. The web UI starts checks alone without any: those are of all that is materialized."""
    if context.selected_asset_keys or context.has_partition_key or context.has_partition_key_range:
        return list(context.partition_keys)
    materialized = [context.instance.get_materialized_partitions(recipe.key(asset)) for asset in checked]
    return sorted(set.intersection(*materialized)) if materialized else []


def materialize_student(
    context: dg.AssetExecutionContext, recipe: Recipe, platform: Platform
) -> dg.MaterializeResult[None]:
    """Train the small student on every complete partition, and show the curve."""
    planner = planner_of(recipe, platform)
    with _as_failure():
        work, shards = planner.student_work()
    run = Run(context, recipe, platform, planner, recorder=None)
    run.carry_out(work)
    run.raise_if_anything_failed()
    ((unit,), n_planned) = work.units, len(planner.current_plan().shards)
    folder = Path(unit.outputs[0].path)
    manifest = read_manifest(folder)
    curve = json.loads((folder / "curve.json").read_bytes())
    return dg.MaterializeResult(
        data_version=dg.DataVersion(manifest.data_version),
        metadata={
            "loss_curve": dg.MetadataValue.md(loss_curve_markdown(curve)),
            "first_loss": manifest.facts["first_loss"],
            "last_loss": manifest.facts["last_loss"],
            "shards": len(shards),
            "shards_in_plan": n_planned,
            **result_metadata(manifest, folder),
        },
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failed:
    partition_key: str
    assets: tuple[str, ...]
    cause: str
    log: str = ""


class Run:
    """One Dagster run's dealings with the scheduler: possibly two jobs, one after the other."""

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        recipe: Recipe,
        platform: Platform,
        planner: Planner,
        recorder: Recorder | None,
    ) -> None:
        self._context, self._recipe, self._platform = context, recipe, platform
        self._planner, self._recorder = planner, recorder
        self.failed: list[_Failed] = []

    def carry_out(self, work: PlannedWork) -> None:
        """See to it that every result of `work` is committed and recorded; what cannot be is added to `failed`."""
        work = work.without_damaged()
        self._give_up_on(work.impossible, work.kind)
        with _as_failure():
            for unit in work.units:
                for output in unit.outputs:
                    # Also the single caches that are there of a partition that lacks another.
                    if is_committed(output):
                        set_head(Path(output.path))
                        self._record(unit, output, reused=True, facts={})
        missing = work.only(lambda o: not is_committed(o))
        if not missing.units:
            self._context.log.info(f"{work.kind}: all {len(work.units)} partitions are committed; nothing to run")
            return
        with _as_failure():
            scheduler = self._platform.make_scheduler()
            failed = self._join_live_jobs(scheduler, missing)
            missing = missing.only(lambda o: o.path not in failed and not is_committed(o))
            if missing.units:
                self._submit(scheduler, missing)

    def check(self, work: PlannedWork) -> None:
        """Run the selected checks on what is committed of `work`; nothing is computed."""
        assert self._recorder is not None
        work = work.without_damaged()
        self._give_up_on(work.impossible, work.kind)
        for unit in work.units:
            for output in unit.outputs:
                if is_committed(output):
                    self._recorder.record_checks(unit, output)
                else:
                    self._give_up_on({unit.partition_key: "there is nothing to check: materialize it"}, output.asset)

    def _give_up_on(self, causes: Mapping[str, str], what: str) -> None:
        self.failed += [_Failed(partition_key=key, assets=(what,), cause=cause) for key, cause in causes.items()]

    def raise_if_anything_failed(self) -> None:
        """Raise a Failure that names every partition that was asked for and is not there, or whose checks failed."""
        checks = self._recorder.failed_checks if self._recorder is not None else {}
        if not self.failed and not checks:
            return
        lines = [f"{f.partition_key} ({', '.join(f.assets)}): {f.cause}" for f in self.failed]
        lines += [f"{key}: {message}" for key, messages in sorted(checks.items()) for message in messages]
        logs = {f.log for f in self.failed if f.log}
        metadata: dict[str, Any] = {
            "failed_partitions": dg.MetadataValue.json(sorted({f.partition_key for f in self.failed} | set(checks))),
            "causes": dg.MetadataValue.md("\n".join(f"- {line}" for line in lines)),
        }
        if logs:
            metadata["logs"] = dg.MetadataValue.json(sorted(logs))
        raise dg.Failure(
            description=f"{len(lines)} not done in recipe {self._recipe.name}:\n" + "\n".join(lines[:50]),
            metadata=metadata,
        )

    def _join_live_jobs(self, scheduler: LocalScheduler, missing: PlannedWork) -> set[str]:
        """Follow the jobs that are at some of this work already, whoever started them; returns the folders of what
        they did not leave behind. The work of a run that was killed is found here, whatever it has committed since."""
        failed: set[str] = set()
        for submission in scheduler.live(self._recipe.name, missing.kind):
            theirs = {o.path for u in read_job(submission.job_file).units for o in u.outputs}
            shared = missing.only(lambda o, theirs=theirs: o.path in theirs)  # type: ignore[misc]
            if shared.units:
                self._context.log.info(
                    f"{shared.kind}: found, still running, {scheduler.describe(submission)} "
                    f"with {len(shared.units)} of these partitions"
                )
                failed |= self._follow(scheduler, submission, shared.units)
        return failed

    def _submit(self, scheduler: LocalScheduler, work: PlannedWork) -> None:
        units, tasks = work.units, self._recipe.tasks_of(work.kind)
        assignment = spread([u.n_tokens for u in units], tasks.n_tasks)
        spec = JobSpec(
            key=submission_key(work.kind, self._recipe.name, units),
            recipe=self._recipe.name,
            kind=work.kind,
            n_tasks=len(assignment),
            concurrency=tasks.concurrency,
        )
        submission, is_new = scheduler.find_or_submit(
            spec,
            lambda new: atomic_write(new.job_file, self._job_file(work, spec, assignment, new).to_json().encode()),
        )
        self._context.log.info(
            f"{work.kind}: {'submitted' if is_new else 'found, still running,'} {scheduler.describe(submission)} "
            f"for {len(units)} partitions in {len(assignment)} tasks"
        )
        self._follow(scheduler, submission, units)

    def _follow(self, scheduler: LocalScheduler, submission: Submission, units: tuple[WorkUnit, ...]) -> set[str]:
        """Record what the job commits of `units` until it has ended; returns the folders of what it did not."""
        watcher = _JobWatcher(self, units, submission, scheduler.job_id(submission))
        try:
            failed = follow(scheduler, submission, watcher.on_event)
        except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
            self._context.log.warning(f"terminated: cancelling {scheduler.describe(submission)}")
            scheduler.cancel(submission)
            raise
        watcher.record_what_is_committed()
        failed = [f for f in failed if watcher.has(f)]
        self.failed += _by_partition(failed)
        for result in failed:
            self._context.log.error(f"{result.partition_key} {result.asset}: {result.cause}\n{result.log_tail}")
        return {f.folder for f in failed}

    def _job_file(
        self, work: PlannedWork, spec: JobSpec, assignment: tuple[tuple[int, ...], ...], submission: Submission
    ) -> JobFile:
        planner = self._planner
        return JobFile(
            kind=work.kind,
            recipe=self._recipe.name,
            key=spec.key,
            recipe_folder=str(planner.recipe_folder),
            events_folder=str(submission.events_folder),
            tasks=assignment,
            units=work.units,
            shards=planner.shards_params() if work.kind == "shards" else None,
            teacher=planner.teacher_params() if work.kind == "teacher" else None,
            student=planner.student_params() if work.kind == "student" else None,
            provenance=planner.provenance(work.kind)
            | {"code_commit": code_commit(), "dagster_run_id": self._context.run.run_id, "submission_key": spec.key},
        )

    def _record(self, unit: WorkUnit, output: Output, *, reused: bool, facts: dict[str, Any]) -> None:
        if self._recorder is not None:
            self._recorder.record(unit, output, reused=reused, facts=facts)


class _JobWatcher:
    """Turns a job's events into Dagster's log and its committed results into materializations."""

    def __init__(self, run: Run, units: tuple[WorkUnit, ...], submission: Submission, job_id: str) -> None:
        self._run, self._submission, self._job_id = run, submission, job_id
        self._outputs: dict[tuple[str, Asset], tuple[WorkUnit, Output]] = {
            (u.partition_key, o.asset): (u, o) for u in units for o in u.outputs
        }
        self._next_progress: dict[int, float] = {}

    def on_event(self, event: Event | str) -> None:
        log = self._run._context.log
        if isinstance(event, str):
            log.warning(f"a line of the event file is no event (a killed attempt?): {event[:200]}")
            return
        data, where = event.data, f"task {event.task}"
        match event.type:
            case "committed":
                self._record(data["partition_key"], data["asset"], task=event.task, reused=data["reused"])
            case "partition_failed":
                log.error(f"{where}: {data['partition_key']}: {data['error']}: {data['message']}")
            case "warning":
                log.warning(f"{where}: {data['message']}")
            case "progress":
                if event.time >= self._next_progress.get(event.task, 0.0):
                    self._next_progress[event.task] = event.time + PROGRESS_INTERVAL_S
                    log.info(f"{where}: {progress_in_words(data)}")
            case "task_started" | "teacher_loaded" | "task_finished":
                log.info(f"{where}, attempt {event.attempt}: {event.type.replace('_', ' ')}: {_in_words(data)}")

    def has(self, result: FailedResult) -> bool:
        """Whether it is one of ours: a job that was joined may have more to do."""
        return (result.partition_key, result.asset) in self._outputs

    def record_what_is_committed(self) -> None:
        """After the job's end: results whose event was lost are results all the same."""
        for (partition_key, asset), (_, output) in self._outputs.items():
            if is_committed(output):
                self._record(partition_key, asset, task=None, reused=False)

    def _record(self, partition_key: str, asset: Asset, *, task: int | None, reused: bool) -> None:
        if (partition_key, asset) not in self._outputs:
            return  # an event of another contract's imagination: the store is asked at the end
        unit, output = self._outputs[partition_key, asset]
        facts: dict[str, Any] = {"job_id": self._job_id, "job_folder": str(self._submission.folder)}
        if task is not None:
            facts["log"] = dg.MetadataValue.path(str(self._submission.log_file(task)))
        self._run._record(unit, output, reused=reused, facts=facts)


def _by_partition(failed: list[FailedResult]) -> list[_Failed]:
    grouped: dict[tuple[str, str], list[FailedResult]] = {}
    for result in failed:
        grouped.setdefault((result.partition_key, result.cause), []).append(result)
    return [
        _Failed(
            partition_key=key,
            assets=tuple(r.asset for r in results),
            cause=f"{cause} (log: {results[0].log_file})",
            log=str(results[0].log_file),
        )
        for (key, cause), results in grouped.items()
    ]


def progress_in_words(data: Mapping[str, Any]) -> str:
    """A `progress` event as one phrase: which partition, how far, how fast."""
    words = f"{data['partition_key']}: {data['done_documents']:,} of {data['n_documents']:,} documents"
    if data.get("n_steps"):
        words += f", step {data['done_steps']:,} of {data['n_steps']:,}, loss {data['loss']:.3f}"
    if data.get("tokens_per_s"):
        words += f", {data['tokens_per_s']:,.0f} tokens/s"
    return words


def _in_words(data: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in data.items() if value is not None)


@contextmanager
def _as_failure() -> Iterator[None]:
    """Turns our errors into a Dagster Failure with the same text: the message is for the user, the traceback is not."""
    try:
        yield
    except KdAssetsError as e:
        raise dg.Failure(description=f"{type(e).__name__}: {e}", allow_retries=False) from e
