"""The HTTP side: who may ask, how much, and which answers there are. Answers themselves come from other processes, so
that this one only waits and copies.

Of a request nothing is read before it is known who asks, and no more than the limits say. Errors are JSON, and tell
nothing of what went wrong inside.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import BrokenExecutor, Executor

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kd_assets.errors import RefusedRequestError
from kd_assets.replay import metrics as counted
from kd_assets.replay.answering import COMPLETIONS, SEQUENCE_LOGPROBS, Answer, answer_here
from kd_assets.replay.connections import abort_connection
from kd_assets.replay.metrics import Metrics
from kd_assets.replay.requests import Limits
from kd_assets.replay.vllm_protocol import ModelNames, error_body, model_list

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

OPEN_ROUTES = ("/health", "/health/")
"""They say that the server is up and nothing else, so that a load balancer needs no token."""

_COME_AGAIN_S = 1
_PIECE_BYTES = 1 << 20
_JSON = "application/json"
_NO_ANSWER_STATUS = 499
"""Of a client that went away before it had said all: nginx's number, for the counters alone."""


class ReplayApp:
    """The ASGI application of one server."""

    def __init__(
        self,
        pool: Executor,
        *,
        names: ModelNames,
        longest: int,
        limits: Limits,
        metrics: Metrics,
        token: str | None,
        on_lost_process: Callable[[], None],
    ) -> None:
        """`pool`: of processes that `start_answering` made; `on_lost_process` is called when one of them has died."""
        self._pool = pool
        self._names = names
        self._longest = longest
        self._limits = limits
        self._metrics = metrics
        self._token_digest = None if token is None else hashlib.sha256(token.encode()).digest()
        self._on_lost_process = on_lost_process
        self._n_in_flight = 0
        self._started_at = int(time.time())
        routes: dict[str, tuple[str, Handler]] = {
            "/health": ("GET", self._health),
            "/health/": ("GET", self._health_of_trl),
            "/v1/models": ("GET", self._models),
            "/metrics": ("GET", self._show_metrics),
            COMPLETIONS: ("POST", self._answer),
            SEQUENCE_LOGPROBS: ("POST", self._answer),
        }
        self._routes = tuple(routes)
        self.asgi = Starlette(
            routes=[
                Route(path, self._counted(path, handler), methods=[method])
                for path, (method, handler) in routes.items()
            ],
            exception_handlers={HTTPException: self._no_such_route, Exception: _failed},
        )
        self.asgi.router.redirect_slashes = False

    def _counted(self, route: str, handler: Handler) -> Handler:
        async def handle(request: Request) -> Response:
            started = time.perf_counter()
            try:
                if route not in OPEN_ROUTES and not self._may_ask(request):
                    response = _error("this server needs a token: send it as Authorization: Bearer", 401)
                    response.headers["WWW-Authenticate"] = "Bearer"
                else:
                    response = await handler(request)
            except RefusedRequestError as e:
                response = _error(str(e), e.status)
            except asyncio.CancelledError:
                # The server ends, and the time for what was under way is over. Nothing waits for this task to be
                # cancelled: uvicorn goes on with whatever comes of it.
                response = _error("the server ends: ask again when it is back", 503)
            except ClientDisconnect:
                response = Response(status_code=_NO_ANSWER_STATUS)
            except Exception:
                self._metrics.finished(route, 500, time.perf_counter() - started)
                raise
            self._metrics.finished(route, response.status_code, time.perf_counter() - started)
            return response

        return handle

    async def _answer(self, request: Request) -> Response:
        if self._n_in_flight >= self._limits.in_flight:
            response = _error("too many requests are under way: ask again", 503)
            response.headers["Retry-After"] = str(_COME_AGAIN_S)
            return response
        self._change_in_flight(1)
        try:
            body = await self._body(request)
            answer_id = f"cmpl-{uuid.uuid4().hex}"
            loop = asyncio.get_running_loop()
            answer: Answer = await loop.run_in_executor(
                self._pool, answer_here, request.url.path, body, int(time.time()), answer_id
            )
        except BrokenExecutor:
            self._change_in_flight(-1)
            self._on_lost_process()
            return _error("a process that answers has died: the server ends", 503)
        except BaseException:
            self._change_in_flight(-1)
            raise
        self._metrics.answered(answer)
        timeout_s = self._limits.answer_timeout_s
        return _SentInPieces(answer, timeout_s=timeout_s, on_end=lambda: self._change_in_flight(-1))

    def _change_in_flight(self, by: int) -> None:
        self._n_in_flight += by
        self._metrics.in_flight.set(self._n_in_flight)

    async def _body(self, request: Request) -> bytes:
        """Raises RefusedRequestError for a body that is too large, or too slow."""
        limit = self._limits.body_bytes
        said = request.headers.get("content-length", "0")
        if not said.isdecimal() or int(said[:20]) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        n_bytes = 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                async for part in request.stream():
                    n_bytes += len(part)
                    if n_bytes > limit:
                        raise _too_large(limit)
                    parts.append(part)
        except TimeoutError as e:
            raise RefusedRequestError(
                f"the body did not arrive within {self._limits.body_timeout_s:g} s", status=408
            ) from e
        return b"".join(parts)

    def _may_ask(self, request: Request) -> bool:
        """Whether the request carries the token: as a bearer, or as the password of basic authentication, which is what
        clients make of a token in an address (http://any:TOKEN@host)."""
        if self._token_digest is None:
            return True
        scheme, _, said = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                said = base64.b64decode(said, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                said = ""
        elif scheme.lower() != "bearer":
            said = ""
        # Digests, so that neither the length nor the first differing byte shows in the time that it takes.
        digest = hashlib.sha256(said.strip().encode(errors="surrogateescape")).digest()
        return hmac.compare_digest(digest, self._token_digest)

    async def _health(self, _: Request) -> Response:
        return Response()

    async def _health_of_trl(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, _: Request) -> Response:
        return JSONResponse(model_list(self._names, longest=self._longest, created=self._started_at))

    async def _show_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": counted.CONTENT_TYPE})

    async def _no_such_route(self, _: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        self._metrics.finished(counted.OTHER, status, 0.0)
        there = ", ".join(self._routes)
        return _error(f"there is no answer to this method at this address: this server has {there}", status)


class _SentInPieces(Response):
    """An answer that is sent as fast as its client takes it, so that what a slow one has not taken lies here once.

    It is given up after a time; `on_end` is called then, or when all is sent.
    """

    def __init__(self, answer: Answer, *, timeout_s: float, on_end: Callable[[], None]) -> None:
        super().__init__(answer.body, status_code=answer.status, media_type=_JSON)
        self._timeout_s = timeout_s
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                for start in range(0, len(self.body), _PIECE_BYTES):
                    piece = bytes(self.body[start : start + _PIECE_BYTES])
                    rest = start + _PIECE_BYTES < len(self.body)
                    await send({"type": "http.response.body", "body": piece, "more_body": rest})
        except (TimeoutError, asyncio.CancelledError) as e:
            within = f"within {self._timeout_s:g} s" if isinstance(e, TimeoutError) else "before the server ended"
            log.warning("an answer was not read %s: its connection is closed", within)
            abort_connection(scope)
            # Until the server knows that it is closed, it would take an answer that ends early for a fault of ours.
            with contextlib.suppress(asyncio.CancelledError):  # a loop that ends says so to every task again
                while (await receive())["type"] != "http.disconnect":
                    pass
        finally:
            self._on_end()


def _too_large(limit: int) -> RefusedRequestError:
    return RefusedRequestError(f"the body is larger than {limit} bytes: send fewer sequences at a time", status=413)


def _error(message: str, status: int) -> Response:
    return Response(error_body(message, status=status), status_code=status, media_type=_JSON)


async def _failed(_: Request, __: Exception) -> Response:
    return _error("the server failed: see its log", 500)
