"""Which results a reader of a recipe gets: what the plan names, what is current of it, and what that is worth.

A partition is read when the current plan names it (a recipe without a plan has all that is committed), its result was
made of the shard that the plan has now, and no recorded check of it failed. The others are missing: refused, unless the
caller says that they may be left out, and then they are named.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd_assets.contract import CACHES, EXPORTS
from kd_assets.durable import listing
from kd_assets.errors import (
    CorruptManifestError,
    FailedCheckError,
    NotCommittedError,
    StorageUnavailableError,
    StoreError,
    VariantConflictError,
)
from kd_assets.store.current_variants import chosen_variant
from kd_assets.store.fingerprint import INPUT_KEY
from kd_assets.store.layout import FOLDER_FINGERPRINT_LENGTH, is_result_folder_name, is_variant_name
from kd_assets.store.manifest import Manifest, head_fingerprint, read_head, read_manifest
from kd_assets.store.quarantine import still_put_aside
from kd_assets.store.reading.planned import PlannedPartitions, planned_partitions
from kd_assets.store.recorded_checks import failed_check

log = logging.getLogger(__name__)

Missing = Literal["refuse", "skip"]
"""What to do about planned partitions without a result that may be read."""

NOT_THERE = "it has no committed result"
UNPLANNED = "the current plan has no such partition"
_SHARDS = "shards_manifest"
PLANNED_ASSETS = (_SHARDS, *CACHES, *EXPORTS)
"""Whose partitions are those of the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The results of one variant of an asset that are to be read, and the partitions that are left out."""

    folders: tuple[Path, ...]
    manifests: tuple[Manifest, ...]
    left_out: Mapping[str, str]
    """Partition key → why: it is missing, or no longer planned."""
    plan_hash: str | None
    """Of the plan that named the partitions; None where there is none."""

    def only(self, partition_keys: Set[str], *, lacking: Set[str] = frozenset()) -> Chosen:
        """Of these partitions. `lacking`: others that should be here, and are not."""
        kept = [i for i, m in enumerate(self.manifests) if m.partition_key in partition_keys]
        return Chosen(
            folders=tuple(self.folders[i] for i in kept),
            manifests=tuple(self.manifests[i] for i in kept),
            left_out=dict.fromkeys(sorted(lacking), NOT_THERE) | dict(self.left_out),
            plan_hash=self.plan_hash,
        )


def choose(
    recipe_folder: Path,
    asset: str,
    *,
    variant: str | None = None,
    partition_keys: Iterable[str] | None = None,
    missing: Missing = "refuse",
    allow_failed: bool = False,
) -> Chosen:
    """The results to read, in the order of `partition_keys` (default: the plan's; without a plan sorted).

    Of several variants it is the one that the recipe's last run was of, unless another is named. Raises
    VariantConflictError where neither says which, FailedCheckError or NotCommittedError
    for a partition that is missing unless `missing` is "skip" or when nothing is left, CorruptPlanError, and
    CorruptManifestError for a result that is not where it belongs.
    """
    plan = planned_partitions(recipe_folder) if asset in PLANNED_ASSETS else None
    folder, there = _variant_folder(recipe_folder / asset, variant)
    wanted = _wanted(plan, partition_keys, there)
    found: dict[str, tuple[Path, Manifest]] = {}
    left_out: dict[str, str] = {}
    failed: set[str] = set()
    for key in wanted:
        if plan is not None and key not in plan.input_hashes:
            left_out[key] = UNPLANNED
            continue
        inputs = None if plan is None else _planned_inputs(recipe_folder, asset, plan, key)
        result = _result_of(folder / key, there.get(key), inputs, allow_failed=allow_failed)
        if isinstance(result, _None):
            left_out[key] = result.why
            failed |= {key} if result.failed else set()
        else:
            found[key] = result
    left_out = say_what_is_put_aside(recipe_folder, asset, folder.name, left_out)
    if left_out and (missing == "refuse" or not found):
        raise _missing(folder, left_out, failed, n_wanted=len(wanted))
    if partition_keys is None:
        left_out |= {key: UNPLANNED for key in there if key not in found and key not in left_out}
    _say(recipe_folder / asset, plan, left_out, n_read=len(found))
    return Chosen(
        folders=tuple(folder for folder, _ in found.values()),
        manifests=tuple(manifest for _, manifest in found.values()),
        left_out=left_out,
        plan_hash=None if plan is None else plan.plan_hash,
    )


def why_not_read(recipe_folder: Path, asset: str, plan: PlannedPartitions | None, manifest: Manifest) -> str | None:
    """Why a reader of the recipe leaves out a result that is its partition's current one; None where it reads it."""
    if plan is not None and manifest.partition_key not in plan.input_hashes:
        return UNPLANNED
    inputs = None if plan is None else _planned_inputs(recipe_folder, asset, plan, manifest.partition_key)
    return _why_not(manifest, inputs)


def require_place(folder: Path, manifest: Manifest) -> None:
    """Raise CorruptManifestError unless the manifest is of the result that the folders above it name.

    Of a copy outside a store only its own name can be compared.
    """
    absolute = folder.absolute()
    expected = [
        manifest.fingerprint[:FOLDER_FINGERPRINT_LENGTH],
        manifest.partition_key,
        manifest.variant,
        manifest.asset,
    ]
    found = [absolute.name, *(parent.name for parent in absolute.parents[:3])]
    if len(found) < len(expected) or not is_variant_name(found[2]):
        expected, found = expected[:1], found[:1]
    if expected != found:
        raise CorruptManifestError(
            f"{folder} holds the result {'/'.join(reversed(expected))}, which is not its place: move it there"
        )


def require_passed(folder: Path, manifest: Manifest) -> None:
    """Raise FailedCheckError for a result that is recorded to have failed a check."""
    if why := failed_check(manifest):
        raise FailedCheckError(f"{folder}: {why}; to read it all the same, say allow_failed=True")


def variants_of(asset_folder: Path) -> dict[str, dict[str, Path]]:
    """variant → partition key → folder of the current result; variants without one are left out."""
    found: dict[str, dict[str, Path]] = {}
    for variant in filter(is_variant_name, listing(asset_folder)):
        heads = {key: read_head(asset_folder / variant / key) for key in listing(asset_folder / variant)}
        if current := {key: head for key, head in heads.items() if head is not None}:
            found[variant] = current
    return found


@dataclass(frozen=True, slots=True)
class _None:
    """That a partition has no result to read."""

    why: str
    failed: bool = False


def _variant_folder(asset_folder: Path, variant: str | None) -> tuple[Path, Mapping[str, str | None]]:
    """The folder of the variant to read, and its partitions (see `_partitions_in`). Raises as `choose` does."""
    names = [name for name in listing(asset_folder) if is_variant_name(name)]
    committed = {name: there for name in names if (there := _partitions_in(asset_folder / name))}
    if variant is not None:
        filled = {name: there for name, there in committed.items() if name == variant}
    else:  # a variant of which nothing is current, as all of it failed, stands in nobody's way
        filled = {name: there for name, there in committed.items() if any(there.values())} or committed
    if len(filled) > 1 and (current := chosen_variant(asset_folder.parent, asset_folder.name, filled)) is not None:
        filled = {current: filled[current]}
    if len(filled) > 1:
        listed = "; ".join(f"{name}: {len(there)} partitions" for name, there in filled.items())
        raise VariantConflictError(
            f"{asset_folder} holds several variants, which are never mixed: name one with variant=… ({listed})"
        )
    if not filled:
        others = f"; committed are {', '.join(committed)}" if committed else ""
        named = "" if variant is None else f" of variant {variant}"
        raise NotCommittedError(f"no committed results{named} in {asset_folder}{others}: materialize them")
    ((name, there),) = filled.items()
    return asset_folder / name, there


def _partitions_in(variant_folder: Path) -> dict[str, str | None]:
    """Partition, sorted → the fingerprint of its current result; None where one is committed, and none is current."""
    heads = {key: head_fingerprint(variant_folder / key) for key in listing(variant_folder)}
    return {key: head for key, head in heads.items() if head is not None or _others(variant_folder / key, "")}


def say_what_is_put_aside(recipe_folder: Path, asset: str, variant: str, left_out: Mapping[str, str]) -> dict[str, str]:
    """`left_out`, with partitions that are not there and whose result of this variant is in quarantine saying so."""
    if NOT_THERE not in left_out.values():
        return dict(left_out)
    of_asset = still_put_aside(recipe_folder).get(asset, {})
    aside = {key: said.in_words for key, said in of_asset.items() if said.variant == variant}
    return {key: aside.get(key, why) if why == NOT_THERE else why for key, why in left_out.items()}


def _wanted(plan: PlannedPartitions | None, partition_keys: Iterable[str] | None, there: Iterable[str]) -> list[str]:
    if partition_keys is not None:
        wanted = list(partition_keys)
        if repeated := [key for key, n in Counter(wanted).items() if n > 1]:
            raise VariantConflictError(f"partition {repeated[0]!r} is given twice: its documents would count double")
        return wanted
    return list(there if plan is None else plan.input_hashes)


def _result_of(
    partition_folder: Path, current: str | None, inputs: Set[str] | None, *, allow_failed: bool
) -> tuple[Path, Manifest] | _None:
    """The result to read of a partition: the current one, or one that failed where that is allowed."""
    none = _None(NOT_THERE)
    if current is not None:
        folder = partition_folder / current[:FOLDER_FINGERPRINT_LENGTH]
        try:
            manifest = read_manifest(folder)
        except NotCommittedError as e:
            none = _None(str(e))
        else:
            require_place(folder, manifest)
            if manifest.fingerprint != current:
                raise CorruptManifestError(
                    f"the head in {partition_folder} points to {current}, and {folder} holds {manifest.fingerprint}: "
                    "materialize the partition again"
                )
            if (why := _why_not(manifest, inputs, allow_failed=allow_failed)) is None:
                return folder, manifest
            none = _None(why, failed=failed_check(manifest) is not None)
    for folder, manifest in _others(partition_folder, current or ""):
        if _why_not(manifest, inputs, allow_failed=True) is not None or (why := failed_check(manifest)) is None:
            continue
        if allow_failed:
            require_place(folder, manifest)
            return folder, manifest
        return _None(f"{folder}: {why}; to read it all the same, say allow_failed=True", failed=True)
    return none


def _others(partition_folder: Path, current: str) -> list[tuple[Path, Manifest]]:
    """The committed results of a partition that are not its current one, the latest first; without damaged ones."""
    found = []
    for name in listing(partition_folder):
        if is_result_folder_name(name) and name != current[:FOLDER_FINGERPRINT_LENGTH]:
            try:
                found.append((partition_folder / name, read_manifest(partition_folder / name)))
            except StorageUnavailableError:
                raise
            except StoreError:
                continue
    return sorted(found, key=lambda result: result[1].created_at, reverse=True)


def _why_not(manifest: Manifest, inputs: Set[str] | None, *, allow_failed: bool = False) -> str | None:
    """Why a result is not to be read. `inputs`: what it may have been made of; None: of anything."""
    if inputs is not None and manifest.identity.get(INPUT_KEY) not in inputs:
        return "it was made of another shard than the one that is planned now: materialize it again"
    return None if allow_failed else failed_check(manifest)


def _planned_inputs(recipe_folder: Path, asset: str, plan: PlannedPartitions, key: str) -> Set[str] | None:
    """What a partition's result may have been made of for it to be what the plan names; None where that cannot be told,
    as the shard itself is not there, or the result is made of caches."""
    if asset == _SHARDS:
        return {plan.input_hashes[key]}
    if asset in EXPORTS:
        return None
    shards = [
        manifest
        for variant in listing(recipe_folder / _SHARDS)
        if is_variant_name(variant)
        for _, manifest in _others(recipe_folder / _SHARDS / variant / key, "")
    ]
    if not shards:
        return None
    return {m.data_version for m in shards if m.identity.get(INPUT_KEY) == plan.input_hashes[key]}


def _missing(folder: Path, left_out: Mapping[str, str], failed: Set[str], *, n_wanted: int) -> StoreError:
    kind = FailedCheckError if failed else NotCommittedError
    key = min(failed) if failed else next(iter(left_out))
    return kind(
        f"{folder} has no committed result for partition {key!r} ({len(left_out)} missing of {n_wanted}): "
        f"{left_out[key]}. Materialize them, or read the others with missing='skip'"
    )


def _say(asset_folder: Path, plan: PlannedPartitions | None, left_out: Mapping[str, str], *, n_read: int) -> None:
    if plan is None:
        log.info(
            "%s: no shard plan says what should be there; all %d committed partitions are read", asset_folder, n_read
        )
    if left_out:
        named = "; ".join(f"{key}: {why}" for key, why in list(left_out.items())[:5])
        more = f"; and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        log.warning("%s: %d partitions are read, %d left out (%s%s)", asset_folder, n_read, len(left_out), named, more)
