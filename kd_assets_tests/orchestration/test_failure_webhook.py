"""A failed run is told to a webhook: a real HTTP server, and real runs on a real instance."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from kd_assets.orchestration import failure_webhook
from kd_assets.orchestration.failure_webhook import (
    WEBHOOK_VARIABLE,
    FailedRun,
    concerns,
    failed_run,
    post,
    tell_of_failures,
)
from kd_assets_tests.orchestration.deployment import SHARDS, Deployment
from kd_assets_tests.patience import PATIENCE_S

SECRET = "T0KEN-of-the-webhook"


class Server:
    """Answers with `status`, and 400 to what is of the run `refused`; while `holds` is set it does not answer."""

    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []
        self.status = 200
        self.refused = ""
        self.holds = threading.Event()
        self.let_go = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if server.holds.is_set():
                    server.let_go.wait(PATIENCE_S)
                    return
                status = 400 if server.refused and body.get("run_id") == server.refused else server.status
                if status == 200:
                    server.posted.append(body)
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *args: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/hooks/{SECRET}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()


@pytest.fixture(autouse=True)
def every_answer_comes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where a test says otherwise."""
    monkeypatch.setattr(failure_webhook, "ANSWER_WITHIN_S", PATIENCE_S)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.let_go.set()
    made.http.shutdown()
    made.thread.join()
    made.http.server_close()


class Sensor:
    """The sensor of a deployment, tick by tick, with what it says."""

    def __init__(self, deployment: Deployment, environment: dict[str, str]) -> None:
        self.deployment, self.environment = deployment, environment
        self.cursor: str | None = None

    def tick(self) -> str:
        with dg.build_sensor_context(instance=self.deployment.instance, cursor=self.cursor) as context:
            answer = tell_of_failures(context, self.deployment.recipe, environment=self.environment)
            self.cursor = context.cursor
        assert SECRET not in f"{answer.skip_message}{self.cursor}"
        return str(answer.skip_message)


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """One whose runs fail at once: it has no plan."""
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        made = Deployment(tmp_path, tmp_path / "no teacher", instance)
        instance.add_dynamic_partitions("tiny_shards", list(SHARDS))
        yield made


def fail(deployment: Deployment) -> dg.ExecuteInProcessResult:
    """A run that has failed."""
    result = deployment.run("topk_cache", partition=SHARDS[0])
    assert not result.success
    return result


def test_each_failed_run_is_told_once_and_none_from_before_the_sensor(deployment: Deployment, server: Server) -> None:
    fail(deployment)
    sensor = Sensor(deployment, {WEBHOOK_VARIABLE: server.url})
    assert sensor.tick() == "no run has failed"
    failed = [fail(deployment).run_id, fail(deployment).run_id]
    assert sensor.tick() == "2 failed runs of tiny were told"
    assert sensor.tick() == "no run has failed"
    assert [posted["run_id"] for posted in server.posted] == failed
    assert server.posted[0]["text"].startswith(f"tiny: run {failed[0][:8]} of ")
    assert "materialize tiny/shard_plan first" in server.posted[0]["text"]


def test_a_server_that_does_not_take_it_is_said_on_the_tick_and_tried_again(
    deployment: Deployment, server: Server
) -> None:
    sensor = Sensor(deployment, {WEBHOOK_VARIABLE: server.url})
    sensor.tick()
    fail(deployment)
    server.status = 503
    assert f"the webhook of {WEBHOOK_VARIABLE} answers with status 503" in sensor.tick()
    server.status = 302
    assert "status 302" in sensor.tick(), "what is posted goes nowhere else"
    server.status = 200
    assert sensor.tick() == "1 failed runs of tiny were told"
    assert len(server.posted) == 1


def test_a_message_that_was_sent_and_not_answered_is_not_sent_again_nor_is_another_begun_that_cannot_end(
    deployment: Deployment, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_webhook, "ANSWER_WITHIN_S", 4.0)  # enough to send it
    sensor = Sensor(deployment, {WEBHOOK_VARIABLE: server.url})
    sensor.tick()
    first, second = fail(deployment).run_id, fail(deployment).run_id
    server.holds.set()
    said = sensor.tick()
    assert said == (f"the webhook of {WEBHOOK_VARIABLE} has not answered within 4 s; run {first[:8]} is not told again")
    server.holds.clear()
    monkeypatch.setattr(failure_webhook, "ANSWER_WITHIN_S", PATIENCE_S)
    assert sensor.tick() == "1 failed runs of tiny were told"
    assert [posted["run_id"] for posted in server.posted] == [second]


def test_a_message_that_is_refused_is_said_and_blocks_no_other(deployment: Deployment, server: Server) -> None:
    sensor = Sensor(deployment, {WEBHOOK_VARIABLE: server.url})
    sensor.tick()
    first = fail(deployment).run_id
    for status in (408, 429):
        server.status = status
        assert f"status {status}; the failures since are told at the next tick" in sensor.tick()
    second = fail(deployment).run_id
    server.status, server.refused = 200, first
    refused = f"the webhook of {WEBHOOK_VARIABLE} answers with status 400; run {first[:8]} is not told again"
    assert sensor.tick() == f"{refused}; 1 failed runs of tiny were told"
    assert [posted["run_id"] for posted in server.posted] == [second]
    assert sensor.tick() == "no run has failed"


def test_with_little_time_left_the_rest_waits_for_the_next_tick_and_nothing_is_wrong(
    deployment: Deployment, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_webhook, "LEAST_S", failure_webhook.ANSWER_WITHIN_S)
    sensor = Sensor(deployment, {WEBHOOK_VARIABLE: server.url})
    sensor.tick()
    fail(deployment)
    fail(deployment)
    assert [sensor.tick() for _ in range(3)] == ["1 failed runs of tiny were told"] * 2 + ["no run has failed"]


def test_what_was_given_up_before_it_was_sent_is_not_sent_afterwards(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a name takes long to be found."""
    found, ended, connect = threading.Event(), threading.Event(), socket.create_connection

    def slow(*args: Any, **kwargs: Any) -> socket.socket:
        found.wait(PATIENCE_S)
        try:
            return connect(*args, **kwargs)
        finally:
            ended.set()

    monkeypatch.setattr(socket, "create_connection", slow)
    before = set(threading.enumerate())
    answer = post(server.url, {}, within_s=0.05)
    assert not answer.is_last
    (late,) = (t for t in set(threading.enumerate()) - before if t.daemon)
    found.set()
    late.join(PATIENCE_S)
    assert ended.is_set()
    assert server.posted == []


def test_runs_of_checks_alone_and_of_the_demos_inputs_are_of_a_recipe(deployment: Deployment) -> None:
    recipe, check = deployment.recipe, dg.AssetCheckKey(deployment.recipe.key("topk_cache"), "finite")
    of_another = dg.AssetCheckKey(dg.AssetKey(["another", "topk_cache"]), "finite")

    def is_ours(**run: Any) -> bool:
        return concerns(dg.DagsterRun(job_name=run.pop("job_name", "__ASSET_JOB"), run_id="1", **run), recipe)

    assert is_ours(asset_check_selection=frozenset({check}))
    assert not is_ours(asset_check_selection=frozenset({of_another}))
    assert is_ours(job_name="tiny_inputs")
    assert not is_ours(job_name="another_inputs")


def test_the_message_of_an_exception_is_its_own_and_not_dagsters(deployment: Deployment) -> None:
    @dg.asset(key=["tiny", "of_ours"])
    def of_ours() -> None:
        raise ValueError("what it led to") from KeyError("the cause of it")

    result = dg.materialize([of_ours], instance=deployment.instance, raise_on_error=False)
    run = deployment.instance.get_run_by_id(result.run_id)
    assert run is not None
    assert failed_run(deployment.instance, deployment.recipe, run).error == "KeyError: 'the cause of it'"


def test_a_message_has_a_part_of_many_partitions_and_logs_and_the_number_of_the_rest() -> None:
    many = [str(n) for n in range(10_000)]
    payload = FailedRun(recipe="demo", run_id="1", job="j", partitions=many, logs=many).payload(for_slack=False)
    assert (len(payload["partitions"]), payload["partitions_left_out"]) == (200, 9_800)
    assert (len(payload["logs"]), payload["logs_left_out"]) == (20, 9_980)
    assert "10,000 partitions not done" in payload["text"]


def test_a_run_that_dagster_starts_again_and_one_of_another_recipe_are_not_told(
    deployment: Deployment, server: Server
) -> None:
    sensor = Sensor(deployment, {WEBHOOK_VARIABLE: server.url})
    sensor.tick()
    again = fail(deployment)
    deployment.instance.add_run_tags(again.run_id, {"dagster/will_retry": "true"})

    @dg.asset
    def of_another() -> None:
        raise ValueError("not ours")

    dg.materialize([of_another], instance=deployment.instance, raise_on_error=False)
    assert sensor.tick() == "no run has failed"
    assert server.posted == []


def test_without_an_address_the_tick_says_which_variable_to_set(deployment: Deployment) -> None:
    assert WEBHOOK_VARIABLE in Sensor(deployment, {}).tick()


def test_a_message_names_classes_partitions_and_a_command() -> None:
    failed = FailedRun(
        recipe="demo",
        run_id="1f2e3d4c-aaaa",
        job="demo_caches",
        partitions=[f"demo-{n}" for n in range(7)],
        classes="node failure × 1",
        error="first \x1b[31m",
        logs=["/jobs/a b/0.log"],
    )
    assert failed.text().splitlines() == [
        "demo: run 1f2e3d4c of demo_caches failed",
        "7 partitions not done: demo-0, demo-1, demo-2, demo-3, demo-4, …",
        "failures: node failure × 1",
        "first \\x1b[31m",
        "look further: tail -n 50 '/jobs/a b/0.log'",
    ]
    assert failed.payload(for_slack=True) == {"text": failed.text()}
    assert failed.payload(for_slack=False)["partitions"] == [f"demo-{n}" for n in range(7)]
    assert FailedRun(recipe="demo", run_id="1", job="j").command == "kd-assets doctor demo"


@pytest.mark.parametrize(
    "url",
    [f"ftp://127.0.0.1/{SECRET}", SECRET, f"http://127.0.0.1:port/{SECRET}", f"http://[{SECRET}", f"http:///{SECRET}"],
)
def test_no_error_has_the_address(url: str) -> None:
    answer = post(url, {}, within_s=5.0)
    assert answer.why_not
    assert SECRET not in answer.why_not
    assert not answer.is_last, "the address may be mended"


def test_the_sensor_ships_stopped(deployment: Deployment) -> None:
    sensor = deployment.definitions.resolve_sensor_def("tiny_failures")
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
