"""The HTTP server, with the two limits that uvicorn has not: a time for a request's head, and an end of connections
whose client reads no more.

The invariant: a connection is idle, or has a request that is not yet whole, for a bounded time only; as connections are
counted and limited, whoever holds some that ask for nothing would keep everybody else out.

Of uvicorn's protocol class, besides the methods that asyncio calls, `handle_events`, `conn`, `cycle.response_complete`,
`loop`, `transport` and `app_state` are used: `test_connections` fails where a version has one of them otherwise.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from kd_assets.replay.requests import Limits

_KEEP_ALIVE_S = 30
_ABORT = "abort_connection"


class _TimedProtocol(H11Protocol):
    """A connection that is closed unless a request's head is whole in time.

    uvicorn's own timer is for connections that have had an answer, and ends with the first byte that comes after it.
    """

    head_timeout_s: float
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Of this connection alone; what uvicorn gives is for all of them.
        self.app_state = {**self.app_state, _ABORT: transport.abort}
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        if not self._is_asking():
            self._start_head_timer()
        super().data_received(data)

    def handle_events(self) -> None:
        # Called with each piece that is read, and after an answer with what was sent along with its request.
        super().handle_events()
        if self._is_asking():
            self._stop_head_timer()
        elif self.conn.trailing_data[0]:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def _is_asking(self) -> bool:
        """Whether a request's head is whole, and its answer is not."""
        return self.cycle is not None and not self.cycle.response_complete

    def _start_head_timer(self) -> None:
        """Further bytes of the same head do not prolong it."""
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def http_server(app: ASGIApp, limits: Limits) -> uvicorn.Server:
    """A server of this application that has yet to be run."""

    class Protocol(_TimedProtocol):
        head_timeout_s = limits.head_timeout_s

    return uvicorn.Server(
        uvicorn.Config(
            app,
            # h11 is what uvicorn always has: it behaves the same whatever else is installed.
            http=Protocol,
            loop="asyncio",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=limits.shutdown_s,
            limit_concurrency=limits.connections,
        )
    )


def abort_connection(scope: Scope) -> None:
    """Close a request's connection at once: what its client has not read is dropped, and holds nothing here."""
    state: dict[str, Any] = scope["state"]
    state[_ABORT]()
