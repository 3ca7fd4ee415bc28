"""sqlite, for one machine.

storage:
  custom:
    module: kd_assets.dagster_storage.sqlite
    class: SqliteStorage

It is in DAGSTER_HOME, unless `config` names another folder as `base_dir`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any, Self

import dagster as dg

from kd_assets.dagster_internals import (
    TMP_DAGSTER_HOME_PREFIX,
    DagsterSqliteStorage,
    SqliteEventLogStorage,
    event_logs_directory,
)
from kd_assets.dagster_storage.in_bulk import InBulk, have_batches_handed_over
from kd_assets.errors import InputError


class SqliteEventLog(InBulk, SqliteEventLogStorage):
    """Events in one file a run, and one of all."""

    dagster_home: str | None = None
    """Where the instance must be; None where it may be anywhere."""
    is_temporary = False
    """Of a command without a home."""

    def register_instance(self, instance: dg.DagsterInstance) -> None:
        root = Path(instance.root_directory)
        if self.is_temporary and not root.name.startswith(TMP_DAGSTER_HOME_PREFIX):
            raise InputError(
                "DAGSTER_HOME is not set, and the storage that dagster.yaml names is there: set it to the folder that "
                f"has this dagster.yaml, for every command (export DAGSTER_HOME={root})"
            )
        home = self.dagster_home
        if home is not None and os.path.realpath(home) != os.path.realpath(root):
            raise InputError(
                f"this Dagster instance is in {root}, and the storage of its dagster.yaml in DAGSTER_HOME, which is "
                f"{home}: set DAGSTER_HOME to that folder, or name a `base_dir` in the `config` of the storage"
            )
        super().register_instance(instance)


class SqliteStorage(DagsterSqliteStorage):
    """The files of Dagster's default storage, in the same places: `base_dir`, which is DAGSTER_HOME unless it is given.

    Without either it is a temporary folder, as all of Dagster is then: a command that only looks needs no home, and
    one that would make something is refused (`orchestration.kept_records`).
    """

    def __init__(self, base_dir: str, inst_data: Any = None) -> None:
        super().__init__(base_dir, inst_data)
        self._event_log_storage: SqliteEventLog = SqliteEventLog(event_logs_directory(base_dir))
        have_batches_handed_over()

    @classmethod
    def config_type(cls) -> Any:
        return {"base_dir": dg.Field(dg.StringSource, is_required=False)}

    @classmethod
    def from_config_value(cls, inst_data: Any, config_value: Any) -> Self:
        if base_dir := config_value.get("base_dir"):
            return cls._in(base_dir, inst_data)
        if home := os.environ.get("DAGSTER_HOME"):
            storage = cls._in(home, inst_data)
            storage._event_log_storage.dagster_home = str(Path(home).expanduser().absolute())
            return storage
        folder = tempfile.mkdtemp(prefix=TMP_DAGSTER_HOME_PREFIX)
        storage = cls._in(folder, inst_data)
        events = storage._event_log_storage  # the instance keeps it for as long as it lives
        events.is_temporary = True
        weakref.finalize(events, shutil.rmtree, folder, ignore_errors=True)
        return storage

    @classmethod
    def _in(cls, folder: str, inst_data: Any) -> Self:
        """As Dagster reads DAGSTER_HOME: a shell that expanded nothing may have left a `~` in it."""
        return cls.from_local(inst_data=inst_data, base_dir=str(Path(folder).expanduser().absolute()))
