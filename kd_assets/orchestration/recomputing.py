"""What a run with `recompute` puts aside before it makes it again: what is wrong, or all that was asked for.

A result is moved into the recipe's quarantine, which deletes nothing. What a run has made itself stays, also when
Dagster starts it again after a crash: results say by which run they were made. Whoever re-executes a run by hand asks
for its results anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import dagster as dg

from kd_assets.contract import CACHES, Output, WorkUnit
from kd_assets.errors import NO_ANSWER, ResultBusyError, StoreError
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.orchestration.run_settings import Recompute
from kd_assets.recipes.recipe import SHARDS_MANIFEST
from kd_assets.store import Manifest, ResultFiles, check_all, check_files, committed, failed_check, put_result_aside
from kd_assets.store.layout import recipe_folder_of

WHY_ALL = "recompute: all"
RETRY_NUMBER_TAG = "dagster/retry_number"
"""Of runs that Dagster's daemon starts in the place of one that crashed."""
NAMED = 5
_OURS = "this run has made it"


class Recomputing:
    """Puts results aside for one run."""

    def __init__(
        self, instance: dg.DagsterInstance, run: dg.DagsterRun, recompute: Recompute, *, say: Callable[[str], object]
    ) -> None:
        self._recompute, self._say = recompute, say
        self._run_id, self._attempts = run.run_id, attempts_of(instance, run)

    def first(self, work: PlannedWork) -> PlannedWork:
        """Put aside what is to be made again of `work`, and return `work`. What cannot be reached is not wrong; what a
        live task is at stays and is named in the log, as is how many results this run has made already."""
        if self._recompute == "never":
            return work
        n_ours, found = 0, list[tuple[Path, str]]()
        for unit in work.units:
            for output in unit.outputs:
                why = self._why(unit, output)
                if why == _OURS:
                    n_ours += 1
                elif why is not None:
                    found.append((Path(output.path), why))
        if n_ours:
            self._say(f"{work.kind}: {n_ours} results stay: this run, or an earlier attempt at it, has made them")
        self._put_aside(work.kind, found)
        return work

    def _put_aside(self, kind: str, found: Sequence[tuple[Path, str]]) -> None:
        reasons, busy = Counter[str](), list[str]()
        try:
            for folder, why in found:
                try:
                    put_result_aside(recipe_folder_of(folder), folder, why=f"run {self._run_id}: {why}")
                    reasons[why] += 1
                except ResultBusyError as e:
                    busy.append(str(e))
        finally:  # also when something else fails: what was moved is gone from its place
            if reasons:
                said = "; ".join(why if n == 1 else f"{why} ({n} of them)" for why, n in list(reasons.items())[:NAMED])
                self._say(f"{kind}: {reasons.total()} results are put aside and made again: {said}")
            if busy:
                more = f"; and {len(busy) - NAMED} more" if len(busy) > NAMED else ""
                self._say(f"{kind}: {len(busy)} results stay, though to be made again: {'; '.join(busy[:NAMED])}{more}")

    def _why(self, unit: WorkUnit, output: Output) -> str | None:
        """Why a result is to be made again; None for one that stays, or that there is none of; _OURS for one that stays
        since this run has made it."""
        folder = Path(output.path)
        try:
            manifest = committed(folder, output.fingerprint)
            if manifest is None:
                return None
            if manifest.provenance.get("dagster_run_id") in self._attempts:
                return _OURS
            return WHY_ALL if self._recompute == "all" else what_is_wrong(unit, output, manifest)
        except NO_ANSWER:
            return None
        except StoreError as e:
            return str(e)


def attempts_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> frozenset[str]:
    """The run and those that Dagster has started it again after, by itself: a run that somebody re-executes is another
    one, although it has the same root."""
    attempts = {run.run_id}
    attempt: dg.DagsterRun | None = run
    while attempt is not None and RETRY_NUMBER_TAG in attempt.tags and attempt.parent_run_id not in (None, *attempts):
        attempts.add(str(attempt.parent_run_id))
        attempt = instance.get_run_by_id(str(attempt.parent_run_id))
    return frozenset(attempts)


def what_is_wrong(unit: WorkUnit, output: Output, manifest: Manifest) -> str | None:
    """The first check that a committed result fails, of those that it recorded and of those that read its files."""
    if (why := failed_check(manifest)) is not None:
        return why
    result = ResultFiles(Path(output.path), manifest)
    checks = [check_files(result)]
    if checks[0].passed and output.asset in CACHES and (shards := unit.inputs.get(SHARDS_MANIFEST)):
        shard = ResultFiles(Path(shards[0]))
        # What is wrong with the shard is not what is wrong with the cache.
        checks += check_all(result, shard) if check_files(shard).passed else []
    return next((f"check {c.name} failed: {c.description}" for c in checks if not c.passed), None)
