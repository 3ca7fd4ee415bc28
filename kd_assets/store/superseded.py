"""What lies in a store that nothing reads any more: for people to look at, and to delete if they will.

Nothing here deletes. Not listed are, where the plan reads them, the partitions' current results of the variant that
readers get who name none (that of the recipe's last run) and of the variant that was made last; where the first of
these has none of a partition, those of all; and what a live task is at. All else is listed, each with its reason.
A variant that was made before may still be the one that somebody wants, by naming it: it is theirs to say. A result
that holds exactly what all that stays of its partition holds rounded is marked.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd_assets.durable import listing, storage_errors
from kd_assets.errors import CorruptManifestError, NotCommittedError, ResultBusyError
from kd_assets.locks import Lease
from kd_assets.store.current_variants import chosen_variant
from kd_assets.store.layout import (
    FOLDER_FINGERPRINT_LENGTH,
    LEASE_NAME,
    QUARANTINE_NAME,
    is_result_folder_name,
    is_variant_name,
    require_folder,
)
from kd_assets.store.manifest import Manifest, head_fingerprint, read_manifest
from kd_assets.store.reading.chosen import PLANNED_ASSETS, UNPLANNED, why_not_read
from kd_assets.store.reading.planned import PLAN_FOLDER, PLAN_NAME, PlannedPartitions, planned_partitions
from kd_assets.store.recoding.sources import is_exact, same_but_for_codec
from kd_assets.store.recorded_checks import failed_check

Why = Literal[
    "replaced",  # its partition has a current result of the same variant
    "older variant",  # it is of neither the recipe's variant nor the last one, and the former has the partition
    "not planned",  # the plan does not name the partition
    "other shard",  # made of a shard that is not planned now
    "failed check",
    "unfinished",
    "put aside",
    "old plan",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Superseded:
    """A folder or file that nothing reads."""

    path: Path
    why: Why
    asset: str
    variant: str | None
    partition_key: str | None
    n_bytes: int
    """Of its files, as they are read."""
    disk_bytes: int
    """That deleting it would free: blocks, and nothing of a file with another name elsewhere."""
    is_only_exact_copy: bool = False
    """Without what is listed the partition's numbers are there only rounded, and of those none can be recoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    folder: Path
    asset: str
    variant: str
    partition_key: str
    manifest: Manifest | None
    """None of one that is unfinished or damaged."""
    is_current: bool


def superseded(recipe_folder: Path) -> list[Superseded]:
    """What could be deleted of a recipe, largest first within each reason. What a live task is at is left out.

    Raises MissingInputError where there is no such folder, CorruptPlanError, CorruptManifestError for a head that is
    none: of a partition whose current result is not known nothing can be said.
    """
    require_folder(recipe_folder)
    plan = planned_partitions(recipe_folder)
    results = list(_results(recipe_folder))
    unread = _unread(recipe_folder, results, plan)
    kept = _kept_variants(recipe_folder, results, unread)
    reasons = [(result, _why(result, kept, unread)) for result in results]
    stay: dict[tuple[str, str], list[Manifest]] = {}
    for result, why in reasons:
        if why is None and result.manifest is not None:
            stay.setdefault((result.asset, result.partition_key), []).append(result.manifest)
    found = [
        dataclasses.replace(
            _listed(result.folder, why, result.asset, result.variant, result.partition_key),
            is_only_exact_copy=_is_only_exact_copy(result, stay.get((result.asset, result.partition_key), [])),
        )
        for result, why in reasons
        if why is not None
    ]
    found += [_listed(path, "put aside", *_place(path, recipe_folder)) for path in _put_aside(recipe_folder)]
    found += [_listed(path, "old plan", PLAN_FOLDER, None, None) for path in _old_plans(recipe_folder)]
    return sorted(found, key=lambda item: (item.why, -item.disk_bytes, str(item.path)))


def _results(recipe_folder: Path) -> Iterator[_Result]:
    for asset, is_folder in listing(recipe_folder).items():
        if not is_folder or asset in (QUARANTINE_NAME, PLAN_FOLDER):
            continue
        for variant in filter(is_variant_name, listing(recipe_folder / asset)):
            for key in listing(recipe_folder / asset / variant):
                yield from _of_partition(recipe_folder / asset / variant / key, asset, variant)


def _of_partition(folder: Path, asset: str, variant: str) -> Iterator[_Result]:
    current = head_fingerprint(folder)
    for name, is_folder in listing(folder).items():
        if not is_folder or not is_result_folder_name(name):
            continue
        try:
            manifest = read_manifest(folder / name)
        except (NotCommittedError, CorruptManifestError):
            manifest = None
        yield _Result(
            folder=folder / name,
            asset=asset,
            variant=variant,
            partition_key=folder.name,
            manifest=manifest,
            is_current=current is not None and current[:FOLDER_FINGERPRINT_LENGTH] == name,
        )


def _kept_variants(
    recipe_folder: Path, results: list[_Result], unread: Mapping[Path, str]
) -> Mapping[tuple[str, str], Collection[str]]:
    """Asset and partition → the variants of which a current result of it stays: the recipe's and the one that was
    committed last, where the former (without a word of a run, the latter) has one that is read. `unread`: see
    `_unread`."""
    latest: dict[str, tuple[str, str]] = {}
    variants: dict[str, set[str]] = {}
    for result in results:
        if result.manifest is not None and result.is_current:
            found = (result.manifest.created_at, result.variant)
            latest[result.asset] = max(latest.get(result.asset, found), found)
            variants.setdefault(result.asset, set()).add(result.variant)
    of_readers = {
        asset: chosen_variant(recipe_folder, asset, names) or latest[asset][1] for asset, names in variants.items()
    }
    return {
        (result.asset, result.partition_key): {of_readers[result.asset], latest[result.asset][1]}
        for result in results
        if result.manifest is not None
        and result.is_current
        and result.variant == of_readers[result.asset]
        and failed_check(result.manifest) is None
        and result.folder not in unread
    }


def _unread(recipe_folder: Path, results: list[_Result], plan: PlannedPartitions | None) -> Mapping[Path, str]:
    """Folders of current results that a reader of their variant leaves out, each with the reason."""
    found = {}
    for result in results:
        if result.manifest is not None and result.is_current:
            planned = plan if result.asset in PLANNED_ASSETS else None
            if (why := why_not_read(recipe_folder, result.asset, planned, result.manifest)) is not None:
                found[result.folder] = why
    return found


def _is_only_exact_copy(result: _Result, stay: Sequence[Manifest]) -> bool:
    """Whether a result that is good, and loses nothing, is of numbers that all that stays of its partition rounds."""
    manifest = result.manifest
    if manifest is None or failed_check(manifest) is not None or not is_exact(manifest):
        return False
    same = [other for other in stay if same_but_for_codec(other, manifest)]
    return bool(same) and not any(is_exact(other) for other in same)


def _why(result: _Result, kept: Mapping[tuple[str, str], Collection[str]], unread: Mapping[Path, str]) -> Why | None:
    """Why nothing reads a result; None for one that is read, or that a live task is at."""
    if _is_busy(result.folder):
        return None
    why: Why | None = None
    of_partition = kept.get((result.asset, result.partition_key))
    if result.manifest is None:
        why = "unfinished"
    elif failed_check(result.manifest) is not None:
        why = "failed check"
    elif not result.is_current:
        why = "replaced"
    elif of_partition is not None and result.variant not in of_partition:
        why = "older variant"
    elif (why_not := unread.get(result.folder)) is not None:
        why = "not planned" if why_not == UNPLANNED else "other shard"
    return why


def _is_busy(folder: Path) -> bool:
    try:
        Lease(folder / LEASE_NAME).raise_if_busy()
    except ResultBusyError:
        return True
    return False


def _put_aside(recipe_folder: Path) -> Iterator[Path]:
    root = recipe_folder / QUARANTINE_NAME
    for time in listing(root):
        for asset in listing(root / time):
            for variant in listing(root / time / asset):
                for key in listing(root / time / asset / variant):
                    yield from (
                        root / time / asset / variant / key / name
                        for name in listing(root / time / asset / variant / key)
                    )


def _place(path: Path, recipe_folder: Path) -> tuple[str, str, str]:
    _, _, asset, variant, partition_key, _ = path.relative_to(recipe_folder).parts
    return asset, variant, partition_key


def _old_plans(recipe_folder: Path) -> Iterator[Path]:
    """Plans that are not the current one. A run that began with one still needs it: it is for people to know."""
    folder = recipe_folder / PLAN_FOLDER
    current = planned_partitions(recipe_folder)
    for name, is_folder in listing(folder).items():
        is_plan = not is_folder and name.endswith(".json") and name != PLAN_NAME
        if is_plan and (current is None or not current.plan_hash.startswith(name.removesuffix(".json"))):
            yield folder / name


def _listed(path: Path, why: Why, asset: str, variant: str | None, partition_key: str | None) -> Superseded:
    n_bytes, disk_bytes = _sizes(path)
    return Superseded(
        path=path,
        why=why,
        asset=asset,
        variant=variant,
        partition_key=partition_key,
        n_bytes=n_bytes,
        disk_bytes=disk_bytes,
    )


def _sizes(path: Path) -> tuple[int, int]:
    """Bytes of all files at or below a path, links not followed; and those that deleting them would free."""
    with storage_errors(path, "look at"):
        status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        is_only_name = status.st_nlink == 1
        return status.st_size, status.st_blocks * 512 if is_only_name else 0
    n_bytes = disk_bytes = 0
    for name in listing(path):
        below = _sizes(path / name)
        n_bytes, disk_bytes = n_bytes + below[0], disk_bytes + below[1]
    return n_bytes, disk_bytes
