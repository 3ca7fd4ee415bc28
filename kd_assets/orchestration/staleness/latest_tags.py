"""The tags of each partition's last materialization, of which each is read from Dagster once.

Reading one takes half a millisecond, a hundred thousand partitions of four assets three minutes. A materialization
never changes, so what was read of it, or recorded on this machine, is kept in a file beside the instance, under its
storage id; then only new ones are read. The file is a convenience: without it, or with a damaged one, all are read
again.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg

from kd_assets.dagster_internals import CheckTarget, version_tags
from kd_assets.errors import StorageUnavailableError

READ_AT_ONCE = 1000
"""Materializations of one query: Dagster makes each a variable of it, and databases limit these."""
READ_WITHOUT_FILE = 20_000
"""Materializations that are read in a sensor's minute, where no file keeps what was read."""
FILE = Path("kd_assets") / "materialization_tags.sqlite"
"""In the instance's folder, since storage ids are of one instance."""

_TABLE = """
create table if not exists tags (
    asset text not null, partition text not null, storage_id integer not null,
    run_id text not null, timestamp real not null, tags text not null, primary key (asset, partition)
) without rowid
"""


def latest_tags(
    instance: dg.DagsterInstance, key: dg.AssetKey, partition_keys: Sequence[str]
) -> dict[str, dict[str, str]]:
    """The tags of each partition's last materialization that say what it was made of.

    One query says which these are, and only those are read that were never read before. (Dagster can also give tags
    without their materializations, but only the data version's: it keeps no others by themselves.)
    """
    wanted = _last_ids(instance, key, partition_keys)
    try:
        with _file(instance) as file:
            return _read(instance, key, wanted, file)
    except (sqlite3.Error, OSError):
        return _read(instance, key, wanted, None)


def read_ahead(
    instance: dg.DagsterInstance,
    keys: Sequence[dg.AssetKey],
    partition_keys: Sequence[str],
    *,
    until: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Read what `latest_tags` would have to, until a time; returns how many are left for the next call.

    Raises StorageUnavailableError where the file cannot be used and so many are to be read that no call would end.
    """
    n_left = 0
    for key in keys:
        wanted = _last_ids(instance, key, partition_keys)
        try:
            with _file(instance) as file:
                if file is None:
                    continue
                new = _not_in_file(instance, key, wanted, file)
                for page in _pages(new):
                    if clock() >= until:
                        break
                    _read_page(instance, key, page, file)
                    n_left -= len(page)
                n_left += len(new)
        except (sqlite3.Error, OSError) as e:
            if len(wanted) > READ_WITHOUT_FILE:
                path = Path(instance.root_directory) / FILE
                raise StorageUnavailableError(f"{path} cannot be read or written ({e}): remove it, or free it") from e
    return n_left


def remember(instance: dg.DagsterInstance, recorded: Sequence[tuple[dg.AssetMaterialization, CheckTarget]]) -> None:
    """Keep what was just recorded of partitions, and where it is stored, so that nobody has to read it again."""
    rows = [
        _row(materialization.asset_key, str(materialization.partition), at, version_tags(materialization.tags or {}))
        for materialization, at in recorded
    ]
    with suppress(sqlite3.Error, OSError), _file(instance) as file:
        if file is not None:
            _keep(file, rows)


def _last_ids(instance: dg.DagsterInstance, key: dg.AssetKey, partition_keys: Sequence[str]) -> dict[str, int]:
    ids = instance.get_latest_storage_id_by_partition(key, dg.DagsterEventType.ASSET_MATERIALIZATION)
    return {partition_key: ids[partition_key] for partition_key in partition_keys if partition_key in ids}


def _read(
    instance: dg.DagsterInstance, key: dg.AssetKey, wanted: Mapping[str, int], file: sqlite3.Connection | None
) -> dict[str, dict[str, str]]:
    new = list(wanted.values()) if file is None else _not_in_file(instance, key, wanted, file)
    found: dict[str, dict[str, str]] = {}
    for page in _pages(new):
        found |= _read_page(instance, key, page, file)
    if file is not None and len(found) < len(wanted):
        rows = file.execute("select partition, storage_id, tags from tags where asset = ?", (key.to_user_string(),))
        for partition_key, storage_id, tags in rows:
            if wanted.get(partition_key) == storage_id and partition_key not in found:
                found[partition_key] = json.loads(tags)
    return found


def _read_page(
    instance: dg.DagsterInstance, key: dg.AssetKey, page: Sequence[int], file: sqlite3.Connection | None
) -> dict[str, dict[str, str]]:
    filters = dg.AssetRecordsFilter(asset_key=key, storage_ids=list(page))
    found, rows = {}, []
    for record in instance.fetch_materializations(filters, limit=len(page)).records:
        if record.asset_materialization is not None:
            tags = version_tags(record.asset_materialization.tags or {})
            found[str(record.partition_key)] = tags
            rows.append(_row(key, str(record.partition_key), record, tags))
    if file is not None:
        _keep(file, rows)
    return found


def _row(
    key: dg.AssetKey, partition_key: str, at: dg.EventLogRecord | CheckTarget, tags: Mapping[str, str]
) -> tuple[Any, ...]:
    return key.to_user_string(), partition_key, at.storage_id, at.run_id, at.timestamp, json.dumps(tags)


def _keep(file: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    with file:
        file.executemany("insert or replace into tags values (?, ?, ?, ?, ?, ?)", rows)


def _not_in_file(
    instance: dg.DagsterInstance, key: dg.AssetKey, wanted: Mapping[str, int], file: sqlite3.Connection
) -> list[int]:
    """The storage ids that were not read yet.

    Databases give the last ids anew once their events are deleted. So the last event that is in the file is looked at:
    where it is another one now, or gone, all that was read of the asset is forgotten.
    """
    asset = key.to_user_string()
    last = file.execute(
        "select storage_id, run_id, timestamp from tags where asset = ? order by storage_id desc limit 1", (asset,)
    ).fetchone()
    if last is None:
        return list(wanted.values())
    filters = dg.AssetRecordsFilter(asset_key=key, storage_ids=[last[0]])
    there = [(r.storage_id, r.run_id, r.timestamp) for r in instance.fetch_materializations(filters, limit=1).records]
    if there != [last]:
        with file:
            file.execute("delete from tags where asset = ?", (asset,))
    in_file = dict(file.execute("select partition, storage_id from tags where asset = ?", (asset,)))
    return [storage_id for partition_key, storage_id in wanted.items() if in_file.get(partition_key) != storage_id]


def _pages(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), READ_AT_ONCE):
        yield ids[start : start + READ_AT_ONCE]


@contextmanager
def _file(instance: dg.DagsterInstance) -> Iterator[sqlite3.Connection | None]:
    """None for an instance that has no folder."""
    if instance.is_ephemeral:
        yield None
        return
    path = Path(instance.root_directory) / FILE
    path.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(path)) as file:
        try:
            file.execute(_TABLE)
            yield file
        except sqlite3.OperationalError:  # locked, full, not writable
            raise
        except sqlite3.DatabaseError:  # damaged
            path.unlink(missing_ok=True)
            raise
