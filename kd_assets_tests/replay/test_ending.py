"""A server that is told to end has a bounded time for what is under way, whatever that is."""

from __future__ import annotations

import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

from kd_assets_tests.export import made_up
from kd_assets_tests.patience import PATIENCE_S
from kd_assets_tests.replay.desks import KEYS
from kd_assets_tests.replay.servers import gone, served, slow_command


def recipe_in(store: Path) -> Path:
    made_up.commit(store, made_up.truths(0, KEYS[0]), assets=("topk_cache",))
    return store / made_up.RECIPE


def test_requests_that_would_take_longer_than_a_server_has_to_end_are_told_so(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    slow = slow_command(recipe, gate=tmp_path / "never")
    with served(recipe, log=tmp_path / "log", started_by=slow) as server, ThreadPoolExecutor(8) as threads:
        children = server.children()
        asked = [
            threads.submit(requests.post, f"{server.url}/v1/completions", json={}, timeout=2 * PATIENCE_S)
            for _ in range(8)
        ]
        while server.metrics()["kd_replay_in_flight"] < 8:
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=PATIENCE_S) == 0
        assert [said.result().status_code for said in asked] == [503] * 8
        assert asked[0].result().json()["error"]["message"].startswith("the server ends")
        assert gone(children)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_an_answer_that_nobody_reads_does_not_keep_a_server_from_its_end(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    slow = slow_command(recipe, gate=tmp_path, answer_bytes=64 << 20)
    with served(recipe, log=tmp_path / "log", started_by=slow) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            assert raw.recv(10) == b"HTTP/1.1 2"
            server.process.send_signal(signal.SIGTERM)
            # Less than the five minutes that a client has to read an answer.
            assert server.process.wait(timeout=PATIENCE_S) == 0
    log = (tmp_path / "log").read_text()
    assert "an answer was not read before the server ended: its connection is closed" in log
    assert "Traceback" not in log
