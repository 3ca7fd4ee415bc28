"""Results that somebody does not trust any more, put aside so that the next materialization makes them again.

Nothing is deleted: a result's folder is renamed into `<recipe>/quarantine/<time>/<asset>/<variant>/<partition>/`, where
nobody looks for results but who is told to. The order makes it safe: the audit log says what is about to happen, then
the partition's head goes (from here on readers have nothing of it), then the folder. A kill in between leaves a result
without a head, and the same call again does the rest.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_assets.durable import listing, prepare_folder, remove_file, storage_errors, sync_folder
from kd_assets.errors import CorruptManifestError, NotCommittedError, StoreError, VariantConflictError
from kd_assets.locks import Lease
from kd_assets.store.layout import (
    FOLDER_FINGERPRINT_LENGTH,
    HEAD_NAME,
    LEASE_NAME,
    MANIFEST_NAME,
    QUARANTINE_NAME,
    check_partition_key,
    is_result_folder_name,
    is_variant_name,
)
from kd_assets.store.manifest import (
    COMMIT_EVENT,
    QUARANTINE_EVENT,
    append_audit,
    audited_events,
    head_fingerprint,
    read_manifest,
)
from kd_assets.store.recorded_checks import codec_name, failed_check
from kd_assets.store.writing.writer import lease_holder, utc_now

_NAMED = 5
"""Partitions that are named; more are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantined:
    """A result that was put aside."""

    asset: str
    partition_key: str
    variant: str
    was: Path
    folder: Path
    """Where it is now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PutAside:
    """What the audit log says of a result that is in quarantine."""

    variant: str
    time: str
    why: str
    folder: str
    """Where it is, in the recipe's folder: another one each time that the partition is put aside."""

    @property
    def in_words(self) -> str:
        return f"its result was put aside on {self.time} ({self.why}), and has not been made again"


PutAsideByAsset = Mapping[str, Mapping[str, PutAside]]
"""Asset → partition → what was put aside and not made again."""


def put_aside(
    recipe_folder: Path,
    partition_keys: Sequence[str],
    assets: Sequence[str],
    *,
    why: str,
    variant: str | None = None,
    all_variants: bool = False,
    clock: Callable[[], datetime.datetime] = utc_now,
) -> list[Quarantined]:
    """Put the results of these partitions aside: of each asset the current one, those that failed a check, and, where
    there is no current one, all that are committed.

    All is looked at before anything is moved. Raises NotCommittedError for a partition that has none of the assets,
    VariantConflictError where an asset has results of several variants and none is named, unless all are asked for
    (`all_variants`), InputError for what is no
    partition's name, ResultBusyError for a result that a live task is computing.
    """
    found: list[Path] = []
    for key in partition_keys:
        check_partition_key(key)
        of_partition = [
            folder for asset in assets for folder in _to_move(recipe_folder / asset, key, variant, all_variants)
        ]
        if not of_partition:
            raise NotCommittedError(
                f"partition {key!r} of {recipe_folder} has no committed result of {', '.join(assets)} to put aside; "
                "nothing was moved"
            )
        found += of_partition
    now = clock()
    return [_moved(recipe_folder, folder, now, why) for folder in found]


def put_result_aside(
    recipe_folder: Path, folder: Path, *, why: str, clock: Callable[[], datetime.datetime] = utc_now
) -> Quarantined:
    """Put one result aside, whichever variant it is of and whether it is current or not.

    Raises ResultBusyError where a live task is computing it.
    """
    return _moved(recipe_folder, folder, clock(), why)


def still_put_aside(recipe_folder: Path) -> dict[str, dict[str, PutAside]]:
    """Asset → the partitions of which a result was put aside, and none was made since; of each the last that was."""
    if not audited_events(recipe_folder, mentioning=f'"{QUARANTINE_EVENT}"'):
        return {}
    found: dict[str, dict[str, PutAside]] = {}
    for event in audited_events(recipe_folder):
        parts = Path(event["path"]).parts
        if len(parts) != 4:
            continue
        asset, variant, partition_key, _ = parts
        if event["event"] == COMMIT_EVENT:
            found.get(asset, {}).pop(partition_key, None)
        elif event["event"] == QUARANTINE_EVENT and not _is_there(recipe_folder / event["path"]):
            why, folder = str(event.get("why", "no reason is known")), str(event.get("to", event["path"]))
            said = PutAside(variant=variant, time=event["time"], why=why, folder=folder)
            found.setdefault(asset, {})[partition_key] = said
    return found


def quarantine_in_words(
    recipe_folder: Path, assets: Collection[str], partition_keys: Container[str] | None = None
) -> list[str]:
    """A line for each of these assets of which something is in quarantine: of all partitions, or of these."""
    lines = []
    for asset, of_asset in still_put_aside(recipe_folder).items():
        keys = [key for key in of_asset if partition_keys is None or key in partition_keys]
        if keys and asset in assets:
            named = ", ".join(f"{key} ({of_asset[key].why})" for key in keys[:_NAMED])
            more = f" and {len(keys) - _NAMED:,} more" if len(keys) > _NAMED else ""
            lines.append(f"{asset}: {len(keys):,} in quarantine, to be made again: {named}{more}")
    return lines


def _is_there(folder: Path) -> bool:
    return MANIFEST_NAME in listing(folder)


def _to_move(asset_folder: Path, partition_key: str, variant: str | None, all_variants: bool) -> list[Path]:
    by_variant = {
        name: folders
        for name in listing(asset_folder)
        if is_variant_name(name)
        and variant in (None, name)
        and (folders := _of_partition(asset_folder / name / partition_key))
    }
    if len(by_variant) > 1 and not all_variants:
        named = "; ".join(f"{name}, {_in_words(folders[0])}" for name, folders in sorted(by_variant.items()))
        raise VariantConflictError(
            f"{asset_folder} has results of partition {partition_key!r} in several variants ({named}): name one with "
            "--variant VARIANT and its asset with --assets, or put all of them aside with --all-variants"
        )
    return [folder for folders in by_variant.values() for folder in folders]


def _in_words(folder: Path) -> str:
    """The codec of a result, and what it was recoded from, as far as its manifest can be read."""
    try:
        manifest = read_manifest(folder)
    except StoreError:
        return "damaged"
    source = manifest.provenance.get("recoded_from")
    return codec_name(manifest) + (f" recoded from {source.get('codec')}" if isinstance(source, dict) else "")


def _of_partition(partition_folder: Path) -> list[Path]:
    names = [name for name, is_folder in listing(partition_folder).items() if is_folder and is_result_folder_name(name)]
    committed = [partition_folder / name for name in sorted(names) if _is_there(partition_folder / name)]
    try:
        current = head_fingerprint(partition_folder)
    except CorruptManifestError:  # it says nothing of which is current
        current = None
    if current is None:
        return _without_head(partition_folder, committed)
    return [f for f in committed if f.name == current[:FOLDER_FINGERPRINT_LENGTH] or _failed(f)]


def _without_head(partition_folder: Path, committed: list[Path]) -> list[Path]:
    """Of a partition without a current result: what a killed call has left, or all that is committed; nothing of one
    whose current result was put aside, as what is left had been replaced by that."""
    recipe_folder = partition_folder.parents[2]
    put_aside = {
        recipe_folder / event["path"]
        for event in audited_events(recipe_folder, mentioning=f'"{QUARANTINE_EVENT}"')
        if event["event"] == QUARANTINE_EVENT and (recipe_folder / event["path"]).parent == partition_folder
    }
    if not put_aside:
        return committed
    return [folder for folder in committed if folder in put_aside]


def _failed(folder: Path) -> bool:
    try:
        return failed_check(read_manifest(folder)) is not None
    except StoreError:  # a damaged manifest: nobody reads it
        return True


def _moved(recipe_folder: Path, folder: Path, now: datetime.datetime, why: str) -> Quarantined:
    """Put one result aside; the lease keeps tasks away meanwhile."""
    path = folder.relative_to(recipe_folder)
    to = _free_place(recipe_folder / QUARANTINE_NAME, f"{now:%Y%m%dT%H%M%SZ}", path)
    lease = Lease(folder / LEASE_NAME)
    lease.acquire(lease_holder())
    try:
        append_audit(
            recipe_folder,
            {
                "event": QUARANTINE_EVENT,
                "time": now.isoformat(timespec="seconds"),
                "path": str(path),
                "to": str(to.relative_to(recipe_folder)),
                "why": why,
            },
        )
        if _is_current(folder):
            remove_file(folder.parent / HEAD_NAME)
        prepare_folder(to.parent)
        with storage_errors(folder, "move"):
            os.rename(folder, to)
            sync_folder(to.parent)
            sync_folder(folder.parent)
    finally:
        lease.release()
    asset, variant, partition_key, _ = path.parts
    return Quarantined(asset=asset, partition_key=partition_key, variant=variant, was=folder, folder=to)


def _is_current(folder: Path) -> bool:
    try:
        current = head_fingerprint(folder.parent)
    except CorruptManifestError:
        return True
    return current is not None and current[:FOLDER_FINGERPRINT_LENGTH] == folder.name


def _free_place(quarantine_folder: Path, time: str, path: Path) -> Path:
    """The first of `<time>`, `<time>-1`, … in which there is no such result yet: a partition may be put aside twice
    within a second."""
    places = (quarantine_folder / (f"{time}-{n}" if n else time) / path for n in range(10_000))
    return next(place for place in places if not place.exists())
