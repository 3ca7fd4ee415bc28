"""The campaign at services: a daemon, a web server, runs, supervisors and workers, killed at random moments.

A round launches a run over everything, of a recipe whose caches are plain or coded in turn, kills some of what is
there, starts killed services again as systemd would, and then nobody helps. The scheduler is the local one and the
teacher a tiny real one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from kd_assets.scheduler import Submission
from kd_assets.scheduler.local.scheduler import process_group
from kd_assets_tests.campaign.ledger import Record
from kd_assets_tests.campaign.outcome import outcome
from kd_assets_tests.orchestration.command_line import CommandLine
from kd_assets_tests.orchestration.deployment import Deployment, make_tiny_teacher
from kd_assets_tests.orchestration.machine import Machine, everything_is_recorded

ROUND_S = 300.0
"""How long it may take until all is done and recorded; undisturbed it takes half a minute."""
JOB = "tiny_caches"
CODED_CACHES = {
    "topk": {"k": 4, "max_length": 64, "codec": "compact"},
    "hidden_states": {"blocks": [1], "max_length": 8, "codec": "split"},
    "embeddings": {"max_length": 64},
}
"""Of every second round."""


class ServiceRounds:
    name = "services"

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)

    def rounds(self, numbers: Iterator[int]) -> Generator[Record]:
        """Without end, as long as there are numbers. Leave it at any time."""
        logging.disable(logging.CRITICAL)  # Dagster's own of each run
        teacher = self._folder / "teacher"
        if not teacher.exists():
            make_tiny_teacher(teacher)
        expected: dict[bool, dict[str, str]] = {}
        for number in numbers:
            is_coded = number % 2 == 1
            if is_coded not in expected:
                expected[is_coded] = ServiceRound(self._folder / "home", teacher, is_coded=is_coded).undisturbed()
            began = time.monotonic()
            rng = random.Random(f"{self._seed}/{self.name}/{number}")
            names = rng.choices(sorted(DISTURBANCES), k=rng.randrange(1, 4))
            round_ = ServiceRound(self._folder / "home", teacher, is_coded=is_coded)
            record = round_.disturbed(rng, names, expected[is_coded])
            record["what"] = f"{'coded' if is_coded else 'plain'}: {record['what']}"
            wall_s = round(time.monotonic() - began, 4)
            yield {"campaign": self.name, "round": number, "wall_s": wall_s, "class": names[0], **record}


class ServiceRound:
    """A deployment of its own, new; always in one folder, so that all results have the same names."""

    def __init__(self, folder: Path, teacher: Path, *, is_coded: bool = False) -> None:
        """`is_coded`: of a recipe whose caches are of codecs."""
        self._folder, self._teacher = folder, teacher
        self._changes: dict[str, Any] = {"caches": CODED_CACHES} if is_coded else {}

    @contextlib.contextmanager
    def deployed(self) -> Iterator[None]:
        shutil.rmtree(self._folder, ignore_errors=True)
        for name in ("instance", "home"):
            (self._folder / name).mkdir(parents=True)
        with dg.DagsterInstance.local_temp(str(self._folder / "instance")) as instance:
            self.deployment = Deployment(self._folder / "home", self._teacher, instance, **self._changes)
            self.deployment.plan()
            self.machine = Machine(CommandLine(self.deployment))
            try:
                yield
            finally:
                self.machine.close()
                for group in self.groups():
                    _kill_group(group)

    def undisturbed(self) -> dict[str, str]:
        with self.deployed():
            self.start()
            assert self.is_done(time.monotonic() + ROUND_S), self.machine.said()[-4000:]
            return self.parts()

    def disturbed(self, rng: random.Random, names: list[str], expected: dict[str, str]) -> Record:
        with self.deployed():
            self.start()
            for name in names:
                time.sleep(rng.uniform(1.0, 12.0))
                DISTURBANCES[name](self, rng)
            record: Record = {"what": ", ".join(names), "rounds": 1, "kills": len(names), "bad": []}
            if not self.is_done(time.monotonic() + ROUND_S):
                runs = [(run.run_id[:8], run.status.value) for run in self.deployment.instance.get_runs()]
                return record | {"stuck": 1, "bad": [f"not done after {ROUND_S:g} s: {runs}"]}
            return record | self.judged(expected)

    def start(self) -> None:
        self.machine.start("daemon")
        self.machine.start("web server")
        self.machine.launch(JOB)

    def is_done(self, deadline: float) -> bool:
        live = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING])
        while not everything_is_recorded(self.deployment) or self.deployment.instance.get_runs_count(live):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def parts(self) -> dict[str, str]:
        store = self.deployment.platform.recipe_folder("tiny")
        return {str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest() for p in store.rglob("part-*")}

    def judged(self, expected: dict[str, str]) -> Record:
        store = self.deployment.platform.recipe_folder("tiny")
        commits = Counter(json.loads(line)["path"] for line in (store / "audit.jsonl").read_text().splitlines())
        return outcome(expected, self.parts(), commits, store)

    # ------------------------------------------------------------------ whom it strikes

    def groups(self) -> list[int]:
        """Process groups of jobs that live: a supervisor and its tasks."""
        folders = [path.parent for path in (self.deployment.home / "jobs").glob("tiny/*/*/group")]
        found = [process_group(Submission(folder=folder)) for folder in folders]
        return [group for group in found if group is not None and _group_lives(group)]


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _kill_job(round_: ServiceRound, rng: random.Random) -> None:
    for group in round_.groups()[:1]:
        _kill_group(group)


def _kill_supervisor(round_: ServiceRound, rng: random.Random) -> None:
    for group in round_.groups()[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(group, signal.SIGKILL)


def _kill_worker(round_: ServiceRound, rng: random.Random) -> None:
    starts = round_.deployment.job_events("task_started")
    with contextlib.suppress(ProcessLookupError):
        if starts and round_.groups():
            os.kill(int(starts[-1].data["pid"]), signal.SIGKILL)


def _kill_run(round_: ServiceRound, rng: random.Random) -> None:
    """The process of the latest run, which Dagster's log names."""
    for run in round_.deployment.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]), limit=1):
        said = "\n".join(entry.user_message for entry in round_.deployment.instance.all_logs(run.run_id))
        for pid in re.findall(r"Executing steps in process \(pid: (\d+)\)", said)[-1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _kill_service(service: str, *, alone: bool) -> Callable[[ServiceRound, random.Random], None]:
    def kill(round_: ServiceRound, rng: random.Random) -> None:
        round_.machine.kill(service, alone=alone)
        time.sleep(rng.uniform(0.0, 3.0))
        round_.machine.start(service)

    return kill


def _power_off(round_: ServiceRound, rng: random.Random) -> None:
    for group in round_.groups():
        _kill_group(group)
    round_.machine.power_off()
    for group in round_.groups():
        _kill_group(group)
    round_.machine.start("daemon")
    round_.machine.start("web server")


DISTURBANCES: dict[str, Callable[[ServiceRound, random.Random], None]] = {
    "job killed": _kill_job,
    "supervisor killed": _kill_supervisor,
    "worker killed": _kill_worker,
    "run killed": _kill_run,
    "daemon killed": _kill_service("daemon", alone=True),
    "daemon and its runs killed": _kill_service("daemon", alone=False),
    "web server killed": _kill_service("web server", alone=False),
    "everything killed": _power_off,
}
