"""PostgreSQL, for production: any number of machines, and thousands of partitions. Needs the extra `postgres`.

storage:
  custom:
    module: kd_assets.dagster_storage.postgresql
    class: PostgresqlStorage
    config:
      postgres_url: {env: DAGSTER_POSTGRES_URL}
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import sqlalchemy as sa
from dagster_postgres import DagsterPostgresStorage, PostgresEventLogStorage
from dagster_postgres.utils import get_token_provider_from_config, pg_url_from_config

from kd_assets.dagster_internals import interrupt_is_held_back
from kd_assets.dagster_storage.in_bulk import InBulk, have_batches_handed_over
from kd_assets.errors import DatabaseUnavailableError

PATIENCE_S = 600.0
"""How long runs and the daemon wait for a server that is away: as long as runs wait for files."""
LONGEST_PAUSE_S = 5.0

ADVICE = "See to it, and materialize again: what is committed is kept, and is recorded then"

REFUSED = re.compile(
    r"authentication failed for user|pg_hba\.conf|no password supplied|is not permitted to log in"
    r"|(role|database) .* does not exist"
)
"""The server's words for SQLSTATE 28… and 3D000: psycopg2 has no code for a connection that never was. A server that
speaks another language is not understood, and is waited for."""


class PostgresqlEventLog(InBulk, PostgresEventLogStorage):  # type: ignore[misc]
    """Events of all runs in one table."""


class PostgresqlStorage(DagsterPostgresStorage):  # type: ignore[misc]
    """The tables of `dagster_postgres`, with the same settings.

    A process that has had an answer once waits for the server when it is away (a restart, a failover): Dagster itself
    gives up after a few tries, and with it a run whose jobs compute. The web server does not wait: it has connections
    of its own, and says at once that there is no answer.
    """

    def __init__(
        self,
        postgres_url: str,
        should_autocreate_tables: bool = True,
        inst_data: Any = None,
        token_provider: Any = None,
    ) -> None:
        url = with_driver(postgres_url)
        super().__init__(url, should_autocreate_tables, inst_data, token_provider)
        self._event_log_storage = PostgresqlEventLog(  # type: ignore[no-untyped-call]
            url,
            should_autocreate_tables,
            token_provider=token_provider,  # type: ignore[call-arg]
        )
        storages = (self._run_storage, self._event_log_storage, self._schedule_storage)
        wait_for_the_server(*(storage._engine for storage in storages))
        have_batches_handed_over()

    @classmethod
    def from_config_value(cls, inst_data: Any, config_value: Any) -> Self:
        return cls(
            inst_data=inst_data,
            postgres_url=pg_url_from_config(config_value),
            should_autocreate_tables=config_value.get("should_autocreate_tables", True),
            token_provider=get_token_provider_from_config(config_value),
        )


def with_driver(url: str) -> str:
    """SQLAlchemy takes another driver than the one that `dagster_postgres` installs for an address that names none."""
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", url)


def wait_for_the_server(
    *engines: sa.Engine,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Have connections of these engines wait for PATIENCE_S, all together, for a server that is away: not
    for one that refuses them, nor while an interrupt is held back.

    After that each fails at once until one succeeds: a run that gives up has several things to write about it, and
    would wait as often. When nobody has asked for PATIENCE_S the next failure begins an outage of its own.
    """
    failing_since, last_failed = math.inf, -math.inf

    def connect(dialect: Any, record: object, arguments: Sequence[Any], settings: Mapping[str, Any]) -> Any:
        nonlocal failing_since, last_failed
        pause_s = 0.2
        while True:
            asked_at = clock()
            try:
                connection = dialect.loaded_dbapi.connect(*arguments, **settings)
            except dialect.loaded_dbapi.OperationalError as e:
                # What is raised is no error of the driver's: with those Dagster tries six times more.
                if is_refused(e):
                    raise DatabaseUnavailableError(
                        f"Dagster's database takes no login: {in_one_line(e)}. {ADVICE}"
                    ) from e
                if asked_at < failing_since or asked_at - last_failed >= PATIENCE_S:
                    failing_since = asked_at
                    # Not to the run's log, which is in that database.
                    logging.getLogger(__name__).warning("Dagster's database is away, and is waited for: %s", e)
                last_failed = clock()
                away = f"Dagster's database has been away for {(last_failed - failing_since) / 60:.0f} minutes"
                if last_failed - failing_since >= PATIENCE_S:
                    raise DatabaseUnavailableError(f"{away} ({in_one_line(e)}). {ADVICE}") from e
                if interrupt_is_held_back():
                    raise DatabaseUnavailableError(f"{away}, and is waited for no longer: interrupted") from e
            else:
                failing_since = math.inf
                return connection
            sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    for engine in engines:
        sa.event.listen(engine, "do_connect", connect)


def is_refused(e: Any) -> bool:
    """Whether a server is there, and says what no waiting changes; of several addresses, whether each says so."""
    if (code := getattr(e, "pgcode", None)) is not None:
        return str(code).startswith("28") or code == "3D000"
    attempts = [line for line in str(e).splitlines() if " failed: " in line] or [str(e)]
    return all(REFUSED.search(attempt) for attempt in attempts)


def in_one_line(e: Exception) -> str:
    return " ".join(str(e).split())
