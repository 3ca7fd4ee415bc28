"""What a materialization does: plan the work, have what is missing made (`driving`), record each result.

The bodies of the assets that `assets` declares. The rule they keep: every partition that was asked for ends the run
either recorded or named in its failure.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from kd_assets.contract import Asset, JobKind, Output, WorkUnit
from kd_assets.dagster_internals import already_recorded
from kd_assets.errors import KdAssetsError
from kd_assets.model_files.digests import Say
from kd_assets.orchestration.driving.driver import Driver, FailedResult
from kd_assets.orchestration.orphans import alive
from kd_assets.orchestration.planner import PlannedWork, Planner
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.recording.job_table import failures_in_words
from kd_assets.orchestration.recording.loss_picture import loss_picture_markdown
from kd_assets.orchestration.recording.metadata import result_metadata
from kd_assets.orchestration.recording.recorder import Recorder, latest_data_version
from kd_assets.orchestration.retries import FailureClass
from kd_assets.orchestration.task_resources import task_resources
from kd_assets.recipes.recipe import SHARD_PLAN, SHARDS_MANIFEST, Recipe
from kd_assets.store import read_manifest, set_head

FAILURES_TAG = "kd_assets/failures"
"""Of a run: what kept tasks from their results, by class, whether it was healed or not."""
COLLECT_S = 1.0
"""How long results may wait to be recorded together. While a job is followed they wait for the end of one look at its
events at most."""


def planner_of(recipe: Recipe, platform: Platform, *, say: Say = lambda line: None) -> Planner:
    folder = platform.recipe_folder(recipe.name)
    return Planner(recipe, folder, platform.digests(), platform.variables(), say=say)


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
        planner = planner_of(recipe, platform, say=context.log.info)
        recorder = Recorder(
            context,
            recipe,
            plan_hash=planner.current_plan().plan_hash,
            teacher_version=None
            if recipe.teacher_asset is None
            else latest_data_version(context.instance, recipe.teacher_asset),
            collect_s=COLLECT_S,
        )
    run = Run(context, recipe, platform, planner, recorder)
    with alive(platform.jobs_folder, context.run.run_id):
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
                run.check(planner.teacher_work(keys, checked, weights=planner.planned_weights()))
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
    planner = planner_of(recipe, platform, say=context.log.info)
    with _as_failure():
        work, shards = planner.student_work()
    run = Run(context, recipe, platform, planner, recorder=None)
    with alive(platform.jobs_folder, context.run.run_id):
        run.carry_out(work)
    run.raise_if_anything_failed()
    ((unit,), n_planned) = work.units, len(planner.current_plan().shards)
    folder = Path(unit.outputs[0].path)
    manifest = read_manifest(folder)
    curve = json.loads((folder / "curve.json").read_bytes())
    return dg.MaterializeResult(
        data_version=dg.DataVersion(manifest.data_version),
        metadata={
            "loss_curve": dg.MetadataValue.md(loss_picture_markdown(curve)),
            "first_loss": manifest.facts["first_loss"],
            "last_loss": manifest.facts["last_loss"],
            "shards": len(shards),
            "shards_in_plan": n_planned,
            **result_metadata(manifest, folder),
        },
    )


class Run:
    """What one Dagster run wants made, one kind of work after the other, and what it could not get."""

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
        self.failed: list[FailedResult] = []
        self._failures: Counter[FailureClass] = Counter()

    def carry_out(self, work: PlannedWork) -> None:
        """See to it that every result of `work` is committed and recorded; what cannot be is added to `failed`."""
        survey = work.survey()
        self._give_up_on(survey.impossible, survey.missing.kind)
        with _as_failure(), self._flushing():
            # Also the single caches that are there of a partition that lacks another.
            for unit, output in survey.committed:
                set_head(Path(output.path))
                self._record(unit, output, {"reused": True})
        if not survey.missing.units:
            self._context.log.info(f"{work.kind}: all {len(work.units)} partitions are committed; nothing to run")
            return
        with _as_failure():
            driver = Driver(
                self._context,
                self._recipe,
                self._planner,
                self._platform.make_scheduler(),
                survey.missing,
                resources=task_resources(self._recipe, self._platform, self._planner, work.kind).resources,
                record=self._record,
                flush=self._flush,
            )
            try:
                driver.run()
            finally:
                self.failed += driver.failed
                self._failures += driver.failures
                if self._failures:
                    words = failures_in_words(self._failures)
                    self._context.instance.add_run_tags(self._context.run.run_id, {FAILURES_TAG: words})

    def check(self, work: PlannedWork) -> None:
        """Run the selected checks on what is committed of `work`; nothing is computed."""
        assert self._recorder is not None
        survey = work.survey()
        self._give_up_on(survey.impossible, work.kind)
        with self._flushing():
            for unit, output in survey.committed:
                self._recorder.record_checks(unit, output)
        nothing = {u.partition_key: "there is nothing to check: materialize it" for u in survey.missing.units}
        self._give_up_on(nothing, work.kind)

    def _give_up_on(self, causes: Mapping[str, str], kind: JobKind) -> None:
        asset = SHARDS_MANIFEST if kind == "shards" else kind
        self.failed += [
            FailedResult(partition_key=key, asset=asset, failure=FailureClass.WORK, cause=cause)
            for key, cause in causes.items()
        ]

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
            "causes": dg.MetadataValue.md("\n".join(f"- {line}" for line in lines)),
        }
        if self._failures:
            metadata["failures_by_class"] = failures_in_words(self._failures)
        if logs := {str(f.log_file) for f in self.failed if f.log_file is not None}:
            metadata["logs"] = dg.MetadataValue.json(sorted(logs))
        raise dg.Failure(
            description=f"{len(failed_partitions)} partitions not done in recipe {self._recipe.name}:\n"
            + "\n".join(lines[:50]),
            metadata=metadata,
        )

    @contextmanager
    def _flushing(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._flush()

    def _flush(self) -> None:
        if self._recorder is not None:
            self._recorder.flush()

    def _record(self, unit: WorkUnit, output: Output, facts: Mapping[str, Any]) -> None:
        if self._recorder is not None:
            self._recorder.record(unit, output, reused=bool(facts.get("reused")), facts=facts)


def failed_in_words(failed: Iterable[FailedResult]) -> list[str]:
    """One line a cause, with the partitions and assets it kept from being done."""
    grouped: dict[str, list[FailedResult]] = {}
    for result in failed:
        grouped.setdefault(result.cause, []).append(result)
    lines = []
    for cause, results in grouped.items():
        keys = sorted({r.partition_key for r in results})
        named = ", ".join(keys) if len(keys) <= 5 else f"{keys[0]} … {keys[-1]} ({len(keys)} partitions)"
        lines.append(f"{named} ({', '.join(dict.fromkeys(r.asset for r in results))}): {cause}")
    return lines


@contextmanager
def _as_failure() -> Iterator[None]:
    """Turns our errors into a Dagster Failure with the same text: the message is for the user, the traceback is not."""
    try:
        yield
    except KdAssetsError as e:
        raise dg.Failure(description=f"{type(e).__name__}: {e}", allow_retries=False) from e
