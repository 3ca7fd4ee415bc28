"""Connections that ask for nothing, or take no answer: each ends in time, and keeps nobody else out."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import requests

from kd_assets.replay import answering
from kd_assets.replay.answering import Answer
from kd_assets.replay.app import ReplayApp
from kd_assets.replay.connections import http_server
from kd_assets.replay.metrics import Metrics
from kd_assets.replay.requests import Limits
from kd_assets.replay.vllm_protocol import ModelNames
from kd_assets_tests.patience import PATIENCE_S

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass(frozen=True)
class OneAnswer:
    """A desk that answers whatever is asked with so many bytes."""

    n_bytes: int

    def answer(self, route: str, body: bytes, now: int, answer_id: str) -> Answer:
        return Answer(status=200, body=b"1" * self.n_bytes)


@contextlib.contextmanager
def in_this_process(limits: Limits) -> Iterator[tuple[str, int]]:
    """Address of a server in a thread, with other limits than the command's."""
    with ThreadPoolExecutor(1) as pool, socket.create_server(("127.0.0.1", 0)) as listening:
        app = ReplayApp(
            pool,
            names=ModelNames(known=("it",)),
            longest=1,
            limits=limits,
            metrics=Metrics(documents=0, index_bytes=0),
            token=None,
            on_lost_process=lambda: None,
        )
        server = http_server(app.asgi, limits)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        thread.start()
        try:
            yield listening.getsockname()
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)


def test_a_body_that_never_ends_is_given_up() -> None:
    with in_this_process(Limits(body_timeout_s=0.3)) as address:
        with socket.create_connection(address, timeout=PATIENCE_S) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert raw.recv(100).startswith(b"HTTP/1.1 408")


def test_an_answer_that_is_not_read_is_under_way_until_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "_desk", OneAnswer(64 << 20))
    with in_this_process(Limits(answer_timeout_s=10.0, in_flight=1)) as (host, port):
        url = f"http://{host}:{port}"
        assert len(requests.post(f"{url}/v1/completions", data=b"{}", timeout=PATIENCE_S).content) == 64 << 20
        with socket.create_connection((host, port), timeout=PATIENCE_S) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            assert raw.recv(10) == b"HTTP/1.1 2"
            assert requests.post(f"{url}/v1/completions", data=b"{}", timeout=PATIENCE_S).status_code == 503
            end = time.monotonic() + PATIENCE_S
            while (said := requests.post(f"{url}/v1/completions", data=b"{}", timeout=PATIENCE_S)).status_code == 503:
                assert time.monotonic() < end
                time.sleep(0.1)
            assert said.status_code == 200


def is_closed(raw: socket.socket) -> bool:
    """Whether the server closes this connection; what it says before is read."""
    try:
        while raw.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_connections_on_which_no_request_begins_do_not_keep_others_out(sent: bytes) -> None:
    with in_this_process(Limits(connections=4, head_timeout_s=0.5)) as (host, port), contextlib.ExitStack() as held:
        raws = [held.enter_context(socket.create_connection((host, port), timeout=PATIENCE_S)) for _ in range(8)]
        for raw in raws:
            with contextlib.suppress(ConnectionError):  # one that is closed already
                raw.sendall(sent)
        assert all(is_closed(raw) for raw in raws)
        assert requests.get(f"http://{host}:{port}/health", timeout=PATIENCE_S).status_code == 200


def test_a_head_that_comes_byte_by_byte_has_no_more_time() -> None:
    with (
        in_this_process(Limits(head_timeout_s=0.5)) as address,
        socket.create_connection(address, timeout=PATIENCE_S) as raw,
    ):
        raw.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(int(PATIENCE_S / 0.05)):
                raw.sendall(b"x")
                time.sleep(0.05)
            raise AssertionError("the connection is still open")


def test_a_second_request_has_the_same_time_as_the_first() -> None:
    with (
        in_this_process(Limits(head_timeout_s=4.0)) as address,
        socket.create_connection(address, timeout=PATIENCE_S) as raw,
    ):
        for _ in range(2):
            raw.sendall(HEALTH)
            assert raw.recv(1 << 16).startswith(b"HTTP/1.1 200")
        raw.sendall(HEALTH[:-1])
        assert is_closed(raw), "uvicorn's own timer ended with the first byte"


def test_connections_between_two_requests_and_bodies_on_their_way_are_left_alone() -> None:
    limits = Limits(head_timeout_s=2.0, body_timeout_s=10 * PATIENCE_S)
    with in_this_process(limits) as address, contextlib.ExitStack() as held:
        idle, asking = (held.enter_context(socket.create_connection(address, timeout=PATIENCE_S)) for _ in range(2))
        idle.sendall(HEALTH)
        assert idle.recv(1 << 16).startswith(b"HTTP/1.1 200")
        asking.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{")
        time.sleep(2 * limits.head_timeout_s)
        asking.sendall(b"}")
        idle.sendall(HEALTH)
        assert idle.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert asking.recv(1 << 16).startswith(b"HTTP/1.1 500"), "no process answers here"


def test_requests_that_are_sent_together_are_all_answered() -> None:
    with (
        in_this_process(Limits(head_timeout_s=3.0)) as address,
        socket.create_connection(address, timeout=PATIENCE_S) as raw,
    ):
        raw.sendall(HEALTH * 3 + HEALTH[:10])
        answers = b""
        with contextlib.suppress(ConnectionResetError):
            while part := raw.recv(1 << 16):
                answers += part
        assert answers.count(b"HTTP/1.1 200") == 3


def test_an_answer_that_is_given_up_frees_its_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(answering, "_desk", OneAnswer(64 << 20))
    with in_this_process(Limits(answer_timeout_s=5, connections=2)) as (host, port):
        with socket.create_connection((host, port), timeout=PATIENCE_S) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            assert raw.recv(10) == b"HTTP/1.1 2"
            end = time.monotonic() + PATIENCE_S
            while requests.get(f"http://{host}:{port}/health", timeout=PATIENCE_S).status_code != 200:
                assert time.monotonic() < end, "its client still holds the connection, and reads nothing"
                time.sleep(0.1)
    said = [record.getMessage() for record in caplog.records if "concurrency" not in record.getMessage()]
    assert said == ["an answer was not read within 5 s: its connection is closed"]
