"""What a card says, gathered from a recipe's folder in a store: a pure function of what is committed there.

Each current manifest is read once (see `current`), the audit log once from its beginning to its end (see `passes`), and
no part, but for the few documents that are shown. Nothing here asks Dagster, a scheduler or the clock, so that equal
stores have equal cards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from kd_assets.cards.current import Coverage, CurrentResults
from kd_assets.cards.passes import Passes, Work
from kd_assets.contract import CACHES, EXPORTS
from kd_assets.errors import NotCommittedError
from kd_assets.store import Manifest, read_manifest
from kd_assets.store.current_variants import chosen_variant
from kd_assets.store.layout import require_folder, result_folders
from kd_assets.store.ragged_topk import mean_kept_mass
from kd_assets.store.reading.planned import PLAN_FOLDER, PLAN_NAME, PlanFile, planned_partitions, read_plan_file
from kd_assets.store.reading.summary import CacheSummary

ORDER: tuple[str, ...] = ("shards_manifest", *CACHES, *EXPORTS)
"""Of the partitioned assets on a card."""
STUDENT = "student_smoke"
NIGHT = timedelta(hours=24)
"""What counts as the last night's work: all that was committed in so long before the newest result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheCard:
    """One asset of the recipe."""

    summary: CacheSummary
    coverage: Mapping[str, Coverage]
    """Of every planned partition, in the plan's order; of those that are there where there is no plan."""
    n_other_variants: int
    """Variants of other parameters or teachers beside it."""
    kept_mass: float | None
    """What a position's kept probabilities add up to on average; None where that was not counted."""

    @property
    def asset(self) -> str:
        return self.summary.asset

    def n(self, state: Coverage) -> int:
        return sum(found == state for found in self.coverage.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What was measured of a partition when its cache was made; None is not known."""

    partition_key: str
    tokens_per_s: float | None
    largest_difference: float | None
    """In how many tolerances: the largest that the check `recomputed` found of any number."""
    kept_mass: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentResult:
    """A student that was trained from the caches."""

    created_at: str
    first_loss: float
    last_loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a card says of a recipe."""

    recipe: str
    folder: Path
    caches: tuple[CacheCard, ...]
    never_made: Mapping[str, int]
    """Assets of the recipe of which nothing is there, in `ORDER` → how many partitions are planned."""
    sources: tuple[Mapping[str, Any], ...]
    """Of the plan: name, licence, revision, n_records, …; of the newest cache where there is no plan."""
    provenance: Mapping[str, Any]
    """Of the cache that was committed last."""
    vocab_size: int | None
    in_all: Work
    last_night: Work
    students: tuple[StudentResult, ...]
    """In the order of their making."""
    updated_at: str
    """When the newest of the results was committed: UTC, ISO 8601."""
    measured: tuple[Measured, ...] = ()
    """Of each current partition of the first of the teacher's caches, in the order of their names."""

    @property
    def of_documents(self) -> CacheCard:
        """The one that says how many documents and tokens there are: the shards, where they are still there."""
        return self.caches[0]

    @property
    def teacher_caches(self) -> tuple[CacheCard, ...]:
        return tuple(cache for cache in self.caches if cache.asset in CACHES)


def contents_of(
    recipe_folder: Path,
    *,
    is_of_recipe: Callable[[Manifest], bool] | None = None,
    of_recipe: Sequence[str] = (),
) -> Contents:
    """Gather what is committed in a recipe's folder.

    `is_of_recipe` tells results of the recipe as it is now from those of other parameters, and is asked of one of each
    variant; without it the variant counts that readers get who name none. Of several the one with the newest result
    counts. `of_recipe`: the assets that the recipe has, whether anything of them is there or not; from a folder alone
    nobody knows them.

    Raises MissingInputError where there is no such folder, NotCommittedError where nothing is committed,
    CorruptPlanError, CorruptManifestError and StorageUnavailableError.
    """
    require_folder(recipe_folder)
    passes, vocabulary = Passes(), list[tuple[str, int]]()
    masses: list[Mapping[str, float]] = []
    measured: dict[str, list[Measured]] = {}
    passes.add_log(recipe_folder)

    def seen(manifest: Manifest) -> None:
        if manifest.asset in CACHES:
            passes.add(manifest)
            measured.setdefault(manifest.asset, []).append(measured_of(manifest))
            masses.extend(_mass(part.stats) for part in manifest.parts if "n_kept_mass" in part.stats)
            if isinstance(size := manifest.facts.get("vocab_size"), int):
                vocabulary[:] = [max([(manifest.created_at, size), *vocabulary])]

    plan = read_plan_file(recipe_folder / PLAN_FOLDER / PLAN_NAME)
    current = CurrentResults(recipe_folder=recipe_folder, plan=planned_partitions(recipe_folder))

    def newest_in(asset: str, variant: str) -> str:
        return passes.newest.get((asset, variant)) or current.newest_in(asset, variant)

    caches, never_made = [], dict[str, int]()
    for asset in ORDER:
        variants = current.variants(asset)
        chosen = [name for name, one in variants.items() if is_of_recipe is None or is_of_recipe(one)]
        if not chosen:
            if asset in of_recipe and current.plan is not None:
                never_made[asset] = len(current.plan.input_hashes)
            continue
        named = chosen_variant(recipe_folder, asset, chosen) if is_of_recipe is None else None
        variant = named or (chosen[0] if len(chosen) == 1 else max(chosen, key=lambda name: newest_in(asset, name)))
        summary, coverage = current.summary(asset, variant, seen)
        caches.append(
            CacheCard(
                summary=summary,
                coverage=coverage,
                n_other_variants=len(variants) - 1,
                kept_mass=mean_kept_mass(masses) if asset == "topk_cache" else None,
            )
        )
    if not caches:
        raise NotCommittedError(f"{recipe_folder} holds no result of the recipe as it is now: materialize its caches")
    newest = max((c.summary for c in caches), key=lambda s: s.last_created_at)
    of_teacher = [c.summary for c in caches if c.asset in CACHES]
    provenance = max(of_teacher, key=lambda s: s.last_created_at).provenance if of_teacher else newest.provenance
    return Contents(
        recipe=newest.recipe,
        folder=recipe_folder,
        caches=tuple(caches),
        never_made=never_made,
        sources=_sources(plan, provenance),
        provenance=provenance,
        vocab_size=vocabulary[0][1] if vocabulary else None,
        in_all=passes.work(),
        last_night=passes.work(since=_before(newest.last_created_at, NIGHT)),
        students=_students(recipe_folder),
        updated_at=newest.last_created_at,
        measured=tuple(next((measured[asset] for asset in CACHES if asset in measured), ())),
    )


def measured_of(manifest: Manifest) -> Measured:
    recomputed = manifest.checks.get("recomputed")
    return Measured(
        partition_key=manifest.partition_key,
        tokens_per_s=_finite(manifest.facts.get("tokens_per_s")),
        largest_difference=_finite(recomputed.get("worst_over_tolerance")) if isinstance(recomputed, Mapping) else None,
        kept_mass=mean_kept_mass(part.stats for part in manifest.parts),
    )


def _finite(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]


def _mass(stats: Mapping[str, float]) -> dict[str, float]:
    return {name: stats[name] for name in ("n_kept_mass", "n_positions")}


def _students(recipe_folder: Path) -> tuple[StudentResult, ...]:
    found = []
    for folder in result_folders(recipe_folder / STUDENT):
        with contextlib.suppress(NotCommittedError):
            found.append(_student_result(read_manifest(folder)))
    return tuple(sorted(found, key=lambda s: s.created_at))


def _student_result(manifest: Manifest) -> StudentResult:
    first, last = (float(manifest.facts.get(name) or float("nan")) for name in ("first_loss", "last_loss"))
    return StudentResult(created_at=manifest.created_at, first_loss=first, last_loss=last)


def _sources(plan: PlanFile | None, provenance: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    raw = provenance.get("sources") if plan is None else plan.head.get("sources")
    return tuple(source for source in raw if isinstance(source, Mapping)) if isinstance(raw, Sequence) else ()


def _before(time: str, span: timedelta) -> str:
    return (datetime.fromisoformat(time) - span).isoformat()
