"""A PostgreSQL that is away: who waits for it, how long, and what ends the wait. No server is needed for that."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from dagster_postgres.utils import create_pg_connection

from kd_assets.dagster_internals import interrupts_held_back
from kd_assets.dagster_storage.postgresql import PATIENCE_S, is_refused, wait_for_the_server
from kd_assets.errors import DatabaseUnavailableError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.while_asleep: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.while_asleep()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engines(clock: Clock) -> Iterator[list[sa.Engine]]:
    """Of one storage, at a port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"postgresql+psycopg2://me@127.0.0.1:{bound.getsockname()[1]}/mine"
        made = [sa.create_engine(url, poolclass=sa.NullPool) for _ in range(3)]
        wait_for_the_server(*made, clock=clock, sleep=clock.sleep)
        yield made


def waited_s(engine: sa.Engine, clock: Clock) -> float:
    began = clock()
    with pytest.raises(DatabaseUnavailableError, match="materialize again"), create_pg_connection(engine):
        pass
    return clock() - began


def test_all_connections_wait_together_and_give_up_once(engines: list[sa.Engine], clock: Clock) -> None:
    assert PATIENCE_S <= waited_s(engines[0], clock) < PATIENCE_S + 10
    # What else there is to be written fails at once.
    assert [waited_s(engine, clock) for engine in engines] == [0.0, 0.0, 0.0]


def test_the_next_outage_is_waited_for_again(engines: list[sa.Engine], clock: Clock) -> None:
    waited_s(engines[0], clock)
    clock.now += PATIENCE_S + 1
    assert waited_s(engines[1], clock) >= PATIENCE_S


def test_an_interrupt_ends_a_wait_also_where_it_is_held_back(engines: list[sa.Engine], clock: Clock) -> None:
    began = clock()
    clock.while_asleep = lambda: os.kill(os.getpid(), signal.SIGINT)

    def interrupted() -> None:
        with interrupts_held_back(), create_pg_connection(engines[0]):
            pass

    with pytest.raises(KeyboardInterrupt) as raised:
        interrupted()
    assert isinstance(raised.value.__context__, DatabaseUnavailableError)
    assert clock() - began < 1.0


AT = 'connection to server at "db" (10.0.0.1), port 5432 failed: '


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ('FATAL:  password authentication failed for user "me"', True),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.2", user "me", database "mine", no encryption', True),
        ('FATAL:  role "me" does not exist', True),
        ('FATAL:  role "me" is not permitted to log in', True),
        ('FATAL:  database "mine" does not exist\nDETAIL:  It seems to have just been dropped or renamed.', True),
        ("fe_sendauth: no password supplied", True),
        ("Connection refused\n\tIs the server running on that host and accepting TCP/IP connections?", False),
        ("FATAL:  the database system is starting up", False),
        ("FATAL:  sorry, too many clients already", False),
        # Of two addresses one is refused and the other, the one that matters, is away.
        (f'FATAL:  role "me" does not exist\n{AT}Connection refused', False),
        (f'FATAL:  role "me" does not exist\n{AT}FATAL:  role "me" does not exist', True),
    ],
)
def test_a_server_that_refuses_is_told_from_one_that_is_away(said: str, expected: bool) -> None:
    assert is_refused(Exception(AT + said + "\n")) is expected


@pytest.mark.parametrize(("code", "expected"), [("28P01", True), ("3D000", True), ("57P03", False)])
def test_where_the_driver_knows_the_code_it_is_taken(code: str, expected: bool) -> None:
    error = Exception("in whatever language")
    error.pgcode = code  # type: ignore[attr-defined]
    assert is_refused(error) is expected
