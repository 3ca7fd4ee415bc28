"""A failed run of a recipe, told to a webhook: what failed, of which partitions, and a command to look further.

The address is a secret (who has it may post): it comes from the environment variable `KD_FAILURE_WEBHOOK`, and no log,
tick or error has it. A server that cannot be reached, or that is busy or broken, is said on the tick and tried again at
the next; nothing waits for it for more than ANSWER_WITHIN_S. A message that was sent and not answered, or that is
refused, is said on the tick and not posted again: the first may have been taken, the second would be refused for ever.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from kd_assets.cards.words import counted
from kd_assets.errors import printable
from kd_assets.recipes.recipe import Recipe

WEBHOOK_VARIABLE = "KD_FAILURE_WEBHOOK"
INTERVAL_S = 60
ANSWER_WITHIN_S = 5.0
"""Of a whole tick, whatever the server does."""
LEAST_S = 2.0
"""Of that, for another message: with less it waits for the next tick."""
RUNS_A_TICK = 10
OVERLAP_S = 300.0
"""How far before the last failure that was told a tick looks: runs are not stored in the order of their times."""
REMEMBERED = 500
"""Runs that were told; more than fail within `OVERLAP_S`."""
NAMED = 5
"""Partitions that are named in the text."""
MOST_PARTITIONS, MOST_LOGS = 200, 20
"""In a message's parts; the number of the others stands beside them."""
REFUSED_FOR_NOW = (408, 429)
"""The other statuses from 400 to 499 are of the message or the address, and stay."""
LONGEST_ERROR = 300
WILL_RETRY_TAG = "dagster/will_retry"
SLACK_HOST = "hooks.slack.com"


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedRun:
    """What a message is made of."""

    recipe: str
    run_id: str
    job: str
    partitions: Sequence[str] = ()
    """Those that were not done; empty where the run failed before it knew any."""
    classes: str = ""
    """`node failure × 1`, as the run's tag has it."""
    error: str = ""
    """The first line of what it failed with."""
    logs: Sequence[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """What to type to look further."""
        return f"tail -n 50 {shlex.quote(self.logs[0])}" if self.logs else f"kd-assets doctor {self.recipe}"

    def text(self) -> str:
        n, named = len(self.partitions), ", ".join(self.partitions[:NAMED])
        lines = [f"{self.recipe}: run {self.run_id[:8]} of {self.job} failed"]
        if n:
            lines.append(f"{counted(n, 'partition')} not done: {named}{', …' if n > NAMED else ''}")
        if self.classes:
            lines.append(f"failures: {self.classes}")
        if self.error:
            lines.append(self.error)
        return "\n".join([*map(printable, lines), f"look further: {self.command}"])

    def payload(self, *, for_slack: bool) -> dict[str, Any]:
        """Slack takes `text` and no more; others find the parts beside it."""
        if for_slack:
            return {"text": self.text()}
        return {
            "text": self.text(),
            "recipe": self.recipe,
            "run_id": self.run_id,
            "job": self.job,
            "partitions": list(self.partitions[:MOST_PARTITIONS]),
            "partitions_left_out": max(0, len(self.partitions) - MOST_PARTITIONS),
            "failures": self.classes,
            "logs": list(self.logs[:MOST_LOGS]),
            "logs_left_out": max(0, len(self.logs) - MOST_LOGS),
            "command": self.command,
        }


def tell_of_failures(
    context: dg.SensorEvaluationContext,
    recipe: Recipe,
    *,
    environment: Mapping[str, str] = os.environ,
    now: Callable[[], float] = time.time,
) -> dg.SkipReason:
    """Post each failed run of the recipe that was not posted yet; of those before the sensor's first tick, none. A run
    that Dagster starts again by itself is not told of."""
    url = environment.get(WEBHOOK_VARIABLE, "")
    if not url:
        return dg.SkipReason(f"set {WEBHOOK_VARIABLE} where Dagster's code server runs: it names the webhook")
    told = _Told.of(context.cursor) or _Told(began=now())
    failed, until = _failed_since(context.instance, recipe, told), time.monotonic() + ANSWER_WITHIN_S
    n_told, n_posted, problems = 0, 0, list[str]()
    for record in failed[:RUNS_A_TICK]:
        run = record.dagster_run
        if run.tags.get(WILL_RETRY_TAG) != "true":
            message = failed_run(context.instance, recipe, run)
            if n_posted and until - time.monotonic() < LEAST_S:
                break
            n_posted += 1
            payload = message.payload(for_slack=f"://{SLACK_HOST}/" in url)
            answer = post(url, payload, within_s=until - time.monotonic())
            if answer.why_not and not answer.is_last:
                problems.append(f"{answer.why_not}; the failures since are told at the next tick")
                break
            if answer.why_not:
                problems.append(f"{answer.why_not}; run {run.run_id[:8]} is not told again")
            n_told += not answer.why_not
        told = told.with_run(run.run_id, record.update_timestamp.timestamp())
    context.update_cursor(told.cursor())
    said = f"{n_told} failed runs of {recipe.name} were told" if n_told else "no run has failed"
    if problems:
        problem = "; ".join(f"the webhook of {WEBHOOK_VARIABLE} {words}" for words in dict.fromkeys(problems))
        context.log.warning(problem)
        said = f"{problem}; {said}" if n_told else problem
    return dg.SkipReason(said)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Told:
    """The sensor's cursor."""

    began: float
    """When the sensor was turned on first, in seconds since the epoch: what failed before is nobody's news."""
    last: float = 0.0
    """When the last run failed that was told."""
    runs: tuple[str, ...] = ()

    @staticmethod
    def of(cursor: str | None) -> _Told | None:
        try:
            raw = json.loads(cursor or "")
            return _Told(began=float(raw["began"]), last=float(raw["last"]), runs=tuple(map(str, raw["runs"])))
        except (ValueError, LookupError, TypeError):
            return None

    def with_run(self, run_id: str, failed_at: float) -> _Told:
        runs = (*self.runs, run_id)[-REMEMBERED:]
        return _Told(began=self.began, last=max(self.last, failed_at), runs=runs)

    def cursor(self) -> str:
        return json.dumps({"began": self.began, "last": self.last, "runs": self.runs})


def _failed_since(instance: dg.DagsterInstance, recipe: Recipe, told: _Told) -> list[dg.RunRecord]:
    """Oldest first."""
    since = max(told.began, told.last - OVERLAP_S)
    records = instance.get_run_records(
        dg.RunsFilter(
            statuses=[dg.DagsterRunStatus.FAILURE],
            updated_after=datetime.datetime.fromtimestamp(since, datetime.UTC),
        ),
        order_by="update_timestamp",
        ascending=True,
    )
    return [r for r in records if r.dagster_run.run_id not in told.runs and concerns(r.dagster_run, recipe)]


def concerns(run: dg.DagsterRun, recipe: Recipe) -> bool:
    """Whether a run is of this recipe: of one of its jobs (`inputs`: the demo's), or of any of its assets or checks."""
    jobs = {f"{recipe.name}_{job}" for job in ("inputs", "plan", "caches", "student")}
    keys = {*(run.asset_selection or ()), *(check.asset_key for check in run.asset_check_selection or ())}
    return run.job_name in jobs or any(key.path[0] == recipe.name for key in keys)


def failed_run(instance: dg.DagsterInstance, recipe: Recipe, run: dg.DagsterRun) -> FailedRun:
    """What a run has said of its failure."""
    records = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE).records
    known: dict[str, Any] = {}
    error = ""
    for record in records:
        event = record.event_log_entry.dagster_event
        if event is None:
            continue
        failure = event.step_failure_data
        said = failure.user_failure_data
        if said is not None:
            known |= {name: value.value for name, value in said.metadata.items()}
        cause = failure.error
        while cause is not None and cause.cause is not None:  # Dagster's own around it says that a step failed
            cause = cause.cause
        words = (said.description if said is not None else None) or (cause.message if cause else "")
        # The first line counts partitions, which the message does itself.
        lines = [line for line in words.splitlines() if line.strip()]
        error = error or (lines[-1 if len(lines) == 1 else 1] if lines else "")
    return FailedRun(
        recipe=recipe.name,
        run_id=run.run_id,
        job=run.job_name,
        partitions=known.get("failed_partitions", ()),
        classes=str(known.get("failures_by_class", "")),
        error=error[:LONGEST_ERROR],
        logs=known.get("logs", ()),
    )


# ------------------------------------------------------------------------------------------------ posting


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of a message."""

    why_not: str = ""
    """Why it was not taken, in words that follow "the webhook" and have nothing of its address; empty where it was."""
    is_last: bool = True
    """It is not posted again: it was taken, or may have been, or would be refused again."""


@dataclass(frozen=True, slots=True)
class _Sending:
    """How far a message is."""

    sent: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)
    """It is not sent any more."""

    def not_answered(self) -> Answer:
        return Answer(why_not=f"has not answered within {ANSWER_WITHIN_S:g} s", is_last=self.sent.is_set())


def post(url: str, payload: Mapping[str, Any], *, within_s: float) -> Answer:
    """Post JSON."""
    answers, sending = list[Answer](), _Sending()
    # In a thread, which is given up on: the library's time limit is of each read, and a name may take long to be found.
    thread = threading.Thread(target=lambda: answers.append(_post(url, payload, within_s, sending)), daemon=True)
    thread.start()
    thread.join(max(0.0, within_s))
    sending.given_up.set()
    return answers[0] if answers else sending.not_answered()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What was posted is not posted to whom else an answer names."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Watched(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Says when a message was sent whole, and sends none that was given up."""

    def __init__(self, sending: _Sending) -> None:
        super().__init__()
        self._sending = sending

    def do_open(self, http_class: Any, req: Any, **arguments: Any) -> Any:
        sending = self._sending

        class Connection(http_class):  # type: ignore[misc]
            def connect(self) -> None:
                super().connect()
                if sending.given_up.is_set():
                    raise TimeoutError

            def getresponse(self) -> Any:
                sending.sent.set()
                return super().getresponse()

        return super().do_open(Connection, req, **arguments)


def _post(url: str, payload: Mapping[str, Any], within_s: float, sending: _Sending) -> Answer:
    try:
        request = urllib.request.Request(  # noqa: S310 - the scheme is looked at below
            url, json.dumps(payload).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        if request.type not in ("http", "https"):
            return Answer(why_not="is no address of http or https", is_last=False)
        with urllib.request.build_opener(_NoRedirect, _Watched(sending)).open(request, timeout=max(0.1, within_s)):
            return Answer()
    except urllib.error.HTTPError as e:
        is_refused = 400 <= e.code < 500 and e.code not in REFUSED_FOR_NOW
        return Answer(why_not=f"answers with status {e.code}", is_last=is_refused)
    except urllib.error.URLError as e:
        why = e.reason.strerror if isinstance(e.reason, OSError) and e.reason.strerror else type(e.reason).__name__
        return Answer(why_not=f"cannot be reached ({why})", is_last=False)
    except TimeoutError:
        return sending.not_answered()
    except Exception as e:  # noqa: BLE001 - the text of an error may have the address
        words = "gives no answer" if sending.sent.is_set() else "cannot be asked"
        return Answer(why_not=f"{words} ({type(e).__name__})", is_last=sending.sent.is_set())
