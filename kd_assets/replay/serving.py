"""A server from start to end: the index is made, processes that answer are forked off, and requests are taken until a
signal comes. Those that are under way then have some time to be finished.

The invariant: no address but the loopback one is listened on without a token.
"""

from __future__ import annotations

import contextlib
import ipaddress
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from kd_assets.errors import KdAssetsError, MissingInputError, RecipeError
from kd_assets.replay.answering import Desk, process_id, start_answering
from kd_assets.replay.app import ReplayApp
from kd_assets.replay.cache import NotKept, OnProgress, ReplayCache, open_cache
from kd_assets.replay.connections import http_server
from kd_assets.replay.metrics import Metrics
from kd_assets.replay.requests import TOKEN_VARIABLE, Limits
from kd_assets.replay.tokens import open_tokens
from kd_assets.replay.vllm_protocol import ModelNames

SHORTEST_TOKEN = 16

_IDLE_ENDS_WITHIN_S = 2.0
"""A process that is told to end, unless it is answering."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """What is served, and where."""

    recipe_folder: Path
    variant: str | None = None
    partition_keys: list[str] | None = None
    not_kept: NotKept = "refuse"
    tokenizer: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    """0: one that is free."""
    processes: int = 2
    """That answer; one more takes requests."""
    limits: Limits = field(default_factory=Limits)


def serve(
    options: ServeOptions, *, token: str | None, say: Callable[[str], None], on_progress: OnProgress | None = None
) -> None:
    """Answer requests until SIGTERM or SIGINT. `say` is told where, once requests are taken.

    Raises RecipeError for a host that needs a token and has none, MissingInputError for an address that cannot be
    listened on, KdAssetsError when a process that answers dies, and what `open_cache` raises.
    """
    require_token(options.host, token)
    listening = _listening(options.host, options.port)
    with listening:
        cache = open_cache(
            options.recipe_folder,
            variant=options.variant,
            partition_keys=options.partition_keys,
            not_kept=options.not_kept,
            on_progress=on_progress,
        )
        tokens = open_tokens(options.tokenizer, cache.provenance)
        names = model_names(cache)
        desk = Desk(cache=cache, tokens=tokens, names=names, limits=options.limits)
        with _pool(desk, options.processes, listening) as pool:
            _take_requests(pool, desk, listening, options, token=token, say=say)


def require_token(host: str, token: str | None) -> None:
    """Raise RecipeError for an address that others reach without a token, and for a token that can be guessed."""
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isprintable() or " " in token):
        raise RecipeError(
            f"{TOKEN_VARIABLE} must be at least {SHORTEST_TOKEN} printable characters without spaces: "
            "openssl rand -hex 32 makes one"
        )
    if token is None and not _is_loopback(host):
        raise RecipeError(
            f"--host {host} is reached by others: set {TOKEN_VARIABLE} to a secret that clients send as a bearer token "
            "(openssl rand -hex 32 makes one), or listen on 127.0.0.1"
        )


def model_names(cache: ReplayCache) -> ModelNames:
    """The recipe's name, and the teacher's as the recipe has it, unless that is a folder."""
    teacher = cache.provenance.get("teacher")
    names = [teacher] if isinstance(teacher, str) and not Path(teacher).is_absolute() else []
    return ModelNames(known=tuple(dict.fromkeys([cache.recipe, *names])))


def _take_requests(
    pool: ProcessPoolExecutor,
    desk: Desk,
    listening: socket.socket,
    options: ServeOptions,
    *,
    token: str | None,
    say: Callable[[str], None],
) -> None:
    index = desk.cache.index
    lost: list[bool] = []

    def end() -> None:
        lost.append(True)
        server.should_exit = True

    app = ReplayApp(
        pool,
        names=desk.names,
        longest=index.longest,
        limits=options.limits,
        metrics=Metrics(documents=len(index), index_bytes=index.n_bytes),
        token=token,
        on_lost_process=end,
    )
    server = http_server(app.asgi, options.limits)
    listening.listen(options.limits.connections)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    say(f"{address}: {desk.cache.description}; partitions that are added are seen after a restart")
    # uvicorn raises the signal that ended it once more when it has ended: it ends here, with status 0.
    before = {number: signal.signal(number, _ended) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if lost:
        raise KdAssetsError("a process that answers has died (out of memory?): see above, and start the server again")


@contextlib.contextmanager
def _pool(desk: Desk, processes: int, listening: socket.socket) -> Iterator[ProcessPoolExecutor]:
    """Processes that answer, all of them started: what is forked off later would hold the connections of clients.

    They end with the context, also where one is still at work: whoever asked has been told that there is no answer.
    """
    of_others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=start_answering,
        initargs=(desk, os.getpid(), listening),
    )
    pool.submit(process_id).result()
    answering = [child for child in multiprocessing.active_children() if child not in of_others]
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + _IDLE_ENDS_WITHIN_S
        for child in answering:
            child.join(max(end - time.monotonic(), 0.0))
        for child in answering:
            child.terminate()
        for child in answering:
            child.join(_IDLE_ENDS_WITHIN_S)


def _listening(host: str, port: int) -> socket.socket:
    """A bound socket that takes no connections yet."""
    try:
        if not 0 <= port < 1 << 16:
            raise OSError("ports are from 0 to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as e:
        raise MissingInputError(
            f"port {port} of {host} cannot be listened on ({e}): give another --port or --host"
        ) from e
    return bound


def _is_loopback(host: str) -> bool:
    """Of a name other than localhost nothing is believed; of that, what it stands for here."""
    try:
        named = [found[4][0] for found in socket.getaddrinfo(host, None)] if host == "localhost" else [host]
        return all(ipaddress.ip_address(address).is_loopback for address in named)
    except (OSError, ValueError):
        return False


def _ended(_: int, __: FrameType | None) -> None:
    """A signal that has done its work."""
