"""The server over real HTTP: who may ask, how much, what it counts, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from kd_assets import cli
from kd_assets.errors import RecipeError
from kd_assets.replay.serving import require_token
from kd_assets_tests.export import made_up
from kd_assets_tests.export.made_up import Truth
from kd_assets_tests.patience import PATIENCE_S
from kd_assets_tests.replay.desks import KEYS, expected_positions, prefixes
from kd_assets_tests.replay.servers import (
    TOKEN,
    Server,
    command,
    gone,
    listening_socket,
    served,
    slow_command,
    sockets_of,
)


@pytest.fixture(scope="module")
def truths() -> list[Truth]:
    return [truth for key in KEYS for truth in made_up.truths(0, key, n=30)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, truths: list[Truth]) -> Path:
    store = tmp_path_factory.mktemp("store")
    for key in KEYS:
        made_up.commit(store, [t for t in truths if t.partition_key == key], assets=("topk_cache",))
    return store / made_up.RECIPE


@pytest.fixture(scope="module")
def server(recipe: Path) -> Iterator[Server]:
    with served(recipe) as running:
        yield running


def asking(truth: Truth, n: int | None = None, k: int = 5) -> Any:
    return {"prompt": truth.ids_L[:n].tolist(), "max_tokens": 1, "prompt_logprobs": k, "temperature": 1.0}


def test_many_clients_at_once_get_their_own_answers(server: Server, truths: list[Truth]) -> None:
    there = list(prefixes(truths))
    before = server.metrics()

    def ask(number: int) -> tuple[int, int]:
        truth, n = there[number % len(there)]
        said = requests.post(f"{server.url}/v1/completions", json=asking(truth, n), timeout=PATIENCE_S).json()
        assert said["choices"][0]["prompt_logprobs"] == expected_positions(truth, n, 5)
        return 1, n - 1

    with ThreadPoolExecutor(16) as threads:
        asked = list(threads.map(ask, range(400)))
    after = server.metrics()
    counted = 'kd_replay_requests_total{route="/v1/completions",status="200"}'
    assert after[counted] - before.get(counted, 0.0) == 400
    positions = "kd_replay_positions_total"
    assert after[positions] - before[positions] == sum(n for _, n in asked)
    assert after["kd_replay_documents"] == len(truths)
    assert after["kd_replay_in_flight"] == 0
    assert after['kd_replay_request_seconds_count{route="/v1/completions"}'] >= 400


def test_the_process_that_takes_requests_is_not_held_up_by_those_that_answer(recipe: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with served(recipe, started_by=slow_command(recipe, gate=gate)) as server, ThreadPoolExecutor(4) as threads:
        assert len(server.children()) == 2
        ask = partial(requests.post, f"{server.url}/v1/completions", json={}, timeout=PATIENCE_S)
        asked = [threads.submit(ask) for _ in range(4)]
        while server.metrics()["kd_replay_in_flight"] < 4:
            time.sleep(0.05)
        assert requests.get(f"{server.url}/health", timeout=PATIENCE_S).status_code == 200
        assert not any(one.done() for one in asked), "all the while both processes were at work"
        gate.touch()
        assert [one.result().status_code for one in asked] == [200] * 4


def test_models_health_and_addresses_that_are_not_there(server: Server) -> None:
    models = requests.get(f"{server.url}/v1/models", timeout=PATIENCE_S).json()
    assert models["object"] == "list"
    assert models["data"][0] | {"created": 0} == {
        **{"id": "made-up", "object": "model", "created": 0, "owned_by": "kd-assets", "root": "made-up"},
        **{"parent": None, "max_model_len": 23, "permission": []},
    }
    assert requests.get(f"{server.url}/health", timeout=PATIENCE_S).content == b""
    assert requests.get(f"{server.url}/health/", timeout=PATIENCE_S).json() == {"status": "ok"}
    for method, path, status in (
        ("POST", "/v1/chat/completions", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/health", 405),
    ):
        said = requests.request(method, f"{server.url}{path}", timeout=PATIENCE_S)
        assert said.status_code == status
        assert "this server has /health" in said.json()["error"]["message"]


def test_misses_are_counted(server: Server) -> None:
    before = server.metrics()["kd_replay_misses_total"]
    asked: Any = {"prompt": [1, 1, 1, 1, 1, 1], "max_tokens": 0, "prompt_logprobs": 1}
    assert requests.post(f"{server.url}/v1/completions", json=asked, timeout=PATIENCE_S).status_code == 404
    assert server.metrics()["kd_replay_misses_total"] == before + 1


def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_so(server: Server) -> None:
    large = b'{"prompt": [' + b"1," * (5 << 20) + b"1]}"

    def parts() -> Iterator[bytes]:
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    for body in (large, parts()):
        try:
            said = requests.post(f"{server.url}/v1/completions", data=body, timeout=PATIENCE_S)
        except requests.ConnectionError:
            continue  # it stopped reading, and the client was still sending
        assert said.status_code == 413
        assert "larger than 8388608 bytes" in said.json()["error"]["message"]
    said_only = {"Content-Length": str(10**30)}
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
        head = "".join(f"{name}: {value}\r\n" for name, value in said_only.items())
        raw.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
        assert raw.recv(100).split()[1] in (b"413", b"400")
    assert requests.get(f"{server.url}/health", timeout=PATIENCE_S).status_code == 200


def test_what_is_no_http_and_clients_that_leave_do_no_harm(server: Server, truths: list[Truth]) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00\x01", b"GET /" + b"a" * 100_000, b"POST /v1/completions HTTP/1.1\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
            raw.sendall(garbage)
    body = json.dumps(asking(truths[3])).encode()
    for sent in (10, len(body)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body[:sent])
    assert requests.post(f"{server.url}/v1/completions", json=asking(truths[3]), timeout=PATIENCE_S).status_code == 200
    assert server.metrics()["kd_replay_in_flight"] == 0


def test_a_token_is_asked_for_wherever_there_is_one(recipe: Path, truths: list[Truth]) -> None:
    with served(recipe, "--host", "0.0.0.0", token=TOKEN) as server:
        url = f"http://127.0.0.1:{server.port}"
        assert TOKEN not in server.said
        for header in (
            None,
            "Bearer",
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
            f"Token {TOKEN}",
            TOKEN,
            "Basic ????",
            "Bearer \xff",
        ):
            for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics")):
                headers = {} if header is None else {"Authorization": header.encode("latin-1")}
                said = requests.request(
                    method, f"{url}{path}", json=asking(truths[3]), headers=headers, timeout=PATIENCE_S
                )
                assert said.status_code == 401
                assert said.headers["WWW-Authenticate"] == "Bearer"
                assert said.json()["error"]["type"] == "AuthenticationError"
        assert requests.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
        with_token = {"headers": {"Authorization": f"Bearer {TOKEN}"}, "timeout": PATIENCE_S}
        assert requests.post(f"{url}/v1/completions", json=asking(truths[3]), **with_token).status_code == 200  # type: ignore[arg-type]
        in_address = f"http://any:{TOKEN}@127.0.0.1:{server.port}"
        assert requests.get(f"{in_address}/v1/models", timeout=PATIENCE_S).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])
def test_no_other_address_than_loopback_is_listened_on_without_a_token(
    recipe: Path, host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KD_SERVE_TOKEN", raising=False)
    assert cli.main(["serve", str(recipe), "--host", host, "--port", "0"]) == 2
    assert "is reached by others: set KD_SERVE_TOKEN to a secret" in capsys.readouterr().err


def test_tokens_that_can_be_guessed_are_refused() -> None:
    for token in ("short", "with spaces in it, long", "line\nbreak-in-the-token"):
        with pytest.raises(RecipeError, match="at least 16 printable characters"):
            require_token("127.0.0.1", token)
    for host in ("127.0.0.1", "localhost", "::1"):
        require_token(host, None)


def test_a_port_that_is_taken_is_named(server: Server, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(recipe), "--port", str(server.port)]) == 2
    assert f"port {server.port} of 127.0.0.1 cannot be listened on" in capsys.readouterr().err


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_requests_under_way(
    recipe: Path, truths: list[Truth], tmp_path: Path, end: signal.Signals
) -> None:
    body = json.dumps(asking(truths[3])).encode()
    with served(recipe, log=tmp_path / "log") as server:
        children = server.children()
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body[:20])
            while server.metrics()["kd_replay_in_flight"] < 1:  # it waits for the rest
                time.sleep(0.05)
            server.process.send_signal(end)
            time.sleep(0.5)
            raw.sendall(body[20:])
            answer = b""
            while part := raw.recv(1 << 16):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"prompt_logprobs"' in answer
        assert server.process.wait(timeout=PATIENCE_S) == 0
        assert gone(children)
    assert (tmp_path / "log").read_text() == ""


def test_processes_that_answer_do_not_hold_the_port(server: Server) -> None:
    listening = listening_socket(server.port)
    assert listening in sockets_of(server.process.pid)
    for child in server.children():
        assert listening not in sockets_of(child)


def test_processes_that_answer_do_not_outlive_a_server_that_is_killed(recipe: Path) -> None:
    with served(recipe) as server:
        children = server.children()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        assert gone(children)


def test_a_process_that_dies_ends_the_server_and_says_so(recipe: Path, truths: list[Truth], tmp_path: Path) -> None:
    with served(recipe, log=tmp_path / "log") as server:
        os.kill(server.children()[0], signal.SIGKILL)
        ask = partial(requests.post, f"{server.url}/v1/completions", json=asking(truths[3]), timeout=PATIENCE_S)
        while (said := ask()).status_code == 200:
            pass  # the other one answers, until it is seen that this one has died
        assert said.status_code == 503
        assert server.process.wait(timeout=PATIENCE_S) == 1
    assert "a process that answers has died" in (tmp_path / "log").read_text()


def test_more_requests_than_may_be_under_way_are_told_to_come_again(server: Server) -> None:
    waiting = []
    try:
        for _ in range(32):
            raw = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            waiting.append(raw)
        end = time.monotonic() + PATIENCE_S
        while server.metrics()["kd_replay_in_flight"] < 32 and time.monotonic() < end:
            time.sleep(0.05)
        said = requests.post(f"{server.url}/v1/completions", json={}, timeout=PATIENCE_S)
        assert said.status_code == 503
        assert said.headers["Retry-After"] == "1"
        assert requests.get(f"{server.url}/health", timeout=PATIENCE_S).status_code == 200
    finally:
        for raw in waiting:
            raw.close()
    end = time.monotonic() + PATIENCE_S
    while server.metrics()["kd_replay_in_flight"] and time.monotonic() < end:
        time.sleep(0.05)
    assert requests.post(f"{server.url}/v1/completions", json={}, timeout=PATIENCE_S).status_code == 400


def test_partitions_that_are_asked_for_are_those_that_are_served(recipe: Path, truths: list[Truth]) -> None:
    with served(recipe, "--partitions", KEYS[1], "--processes", "1") as server:
        assert "30 documents of 1 partitions" in server.said
        longest = {key: max((t for t in truths if t.partition_key == key), key=lambda t: t.length) for key in KEYS}
        statuses = [
            requests.post(f"{server.url}/v1/completions", json=asking(longest[key]), timeout=PATIENCE_S).status_code
            for key in KEYS
        ]
        assert statuses == [404, 200]


def test_recipes_and_options_that_cannot_be_served_are_refused_before_anything_is_listened_on(
    recipe: Path, tmp_path: Path
) -> None:
    for arguments, said in (
        ((tmp_path,), "is no recipe's folder in a store"),
        ((recipe, "--processes", "0"), "--processes 0 would answer nothing"),
        ((recipe, "--partitions", "made-up-00009"), "there is no partition 'made-up-00009'"),
        ((recipe, "--tokenizer", str(tmp_path)), "no tokenizer could be read from"),
        ((recipe, "--not-kept", "null"), "this one keeps all"),
        ((recipe, "--port", "123456"), "port 123456 of 127.0.0.1 cannot be listened on"),
    ):
        folder, *rest = arguments
        done = subprocess.run(
            command(Path(folder), *map(str, rest)), capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode != 0
        assert said in done.stderr
        assert "Traceback" not in done.stderr
