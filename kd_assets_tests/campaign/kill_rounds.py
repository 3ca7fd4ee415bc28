"""The kill campaign at workers and runs, warm: each is a fork of this process and costs milliseconds.

A round begins with a plan and no results (or with the shards), disturbs a few attempts, one after the other or two at a
time, and then lets things go on undisturbed, as whoever started it first would: nobody repairs anything. In the end all
must be as in the undisturbed home.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import dagster as dg

from kd_assets import errors
from kd_assets.contract import Event, JobFile, read_events
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.scheduler import JobSpec, Submission
from kd_assets.store import set_head
from kd_assets.worker.main import main as worker
from kd_assets_tests.campaign import children
from kd_assets_tests.campaign.children import Lost, Say, in_children
from kd_assets_tests.campaign.comparison import Comparison, Undisturbed, compare, undisturbed_facts
from kd_assets_tests.campaign.dagster_runs import (
    CampaignDeployment,
    InlineScheduler,
    failure_of,
    materialize_all,
    recorded,
    remembering,
)
from kd_assets_tests.campaign.file_operations import Disturbance, How, install
from kd_assets_tests.campaign.ledger import Record
from kd_assets_tests.campaign.mirror import Mirror
from kd_assets_tests.campaign.production import ASSETS, KEYS, Home, make_home, make_inputs, outputs_of

ATTEMPT_S = 180.0
"""How long an attempt may take; on idle cores it takes 50 ms."""
MOST_STARTS = 4
"""Of a task that is requeued: after five that add nothing the worker gives up, as it should."""
KILLS: tuple[How, ...] = ("kill before", "kill after", "kill half")
FAULTS: tuple[How, ...] = ("ENOSPC", "ENOSPC from then on", "EIO", "ESTALE")
ANSWERS = {name for name, value in vars(errors).items() if isinstance(value, type)} | {"OutOfHostMemoryError"}
"""Names of errors that are answers to a user."""
CLASSES = (
    *("worker, exact kill",) * 8,
    *("worker, kill at a random moment",) * 2,
    *("worker, failing file operation",) * 4,
    *("two copies, one killed",) * 2,
    *("run, its worker killed",) * 2,
    *("run, killed itself",) * 2,
)


@dataclass
class Trouble:
    """What a round did, and what went wrong besides the results."""

    kills: int = 0
    faults: int = 0
    stuck: list[str] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    """What was disturbed, in words."""


@dataclass(frozen=True, kw_only=True)
class _Ground:
    home: Home
    mirrors: dict[str, Mirror]
    """Of the home as a round may begin: `plan` or `shards`."""
    instance: Path
    instance_mirror: Mirror
    undisturbed: Undisturbed
    remembered: dict[str, Path]
    operations: dict[tuple[str, str], list[str]]
    """(kind of job, or `run`; reads or writes) → the names of the file operations of an undisturbed process."""


class KillRounds:
    name = "kills"

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self._ground: _Ground | None = None

    def rounds(self, numbers: Iterator[int]) -> Generator[Record]:
        """Without end, as long as there are numbers. Leave it at any time."""
        while batch := list(islice(numbers, 500)):
            yield from self._batch(batch)

    def _batch(self, numbers: Sequence[int]) -> Iterator[Record]:
        began = time.monotonic()
        for number, outcome in in_children(numbers, self._round, log=self._folder / "log"):
            record: Record
            if isinstance(outcome, Lost):
                record = {"class": CLASSES[number % len(CLASSES)], "what": outcome.at, "rounds": 1, "stuck": 1}
                record["bad"] = [outcome.words]
            else:
                record = outcome
            now = time.monotonic()
            yield {"campaign": self.name, "round": number, "wall_s": round(now - began, 4), **record}
            began = now

    # ------------------------------------------------------------------ one round

    def _round(self, number: int, say: Say) -> Record:
        ground = self._ground = self._ground or self._make_ground()
        rng, name = random.Random(f"{self._seed}/{self.name}/{number}"), CLASSES[number % len(CLASSES)]
        say(name, 10 * ATTEMPT_S)
        computed = self._folder / "computed"
        computed.write_text("")
        begins_with = rng.choice(sorted(ground.mirrors))
        ground.mirrors[begins_with].restore()
        trouble = Trouble()
        if name.startswith("run"):
            self._disturb_run(ground, rng, name, trouble)
        else:
            for kind in ("shards", "teacher"):
                self._disturb_workers(ground, rng, name, kind, trouble)
            self._finish(ground, trouble)
        found = compare(ground.home, ground.undisturbed, computed)
        return self._record(name, begins_with, trouble, found)

    def _record(self, name: str, begins_with: str, trouble: Trouble, found: Comparison) -> Record:
        lost = [*found.lost, *trouble.lost]
        bad = [f"bytes differ: {words}" for words in found.bytes_differing]
        bad += [f"made twice: {words}" for words in found.made_twice]
        bad += [f"lost: {words}" for words in lost]
        bad += [f"left over: {words}" for words in found.litter]
        bad += [f"stuck: {words}" for words in trouble.stuck] + [f"bare: {words}" for words in trouble.bare]
        return {
            "class": name,
            "what": f"from {begins_with}: {'; '.join(trouble.done)}",
            "rounds": 1,
            "kills": trouble.kills,
            "faults": trouble.faults,
            "bytes_differing": len(found.bytes_differing),
            "made_twice": len(found.made_twice),
            "lost": len(lost),
            "litter": len(found.litter),
            "stuck": len(trouble.stuck),
            "bare": len(trouble.bare),
            "bad": bad,
        }

    # ------------------------------------------------------------------ workers

    def _disturb_workers(self, ground: _Ground, rng: random.Random, name: str, kind: str, trouble: Trouble) -> None:
        """Attempts at one kind of job, of which the first few are disturbed, until one is through."""
        n_disturbed, n_starts, job = rng.randint(1, 5), 0, self._job(ground, kind, "0")
        for attempt in range(n_disturbed + 8):
            if job is None:
                return
            if n_starts >= MOST_STARTS or rng.random() < 0.3:  # a new submission, not a requeue
                n_starts, job = 0, self._job(ground, kind, f"{attempt}")
                if job is None:
                    return
            plan = self._draw(ground, rng, name, kind) if attempt < n_disturbed else None
            other = self._draw(ground, rng, "worker, exact kill", kind) if name.startswith("two copies") else None
            pair = [self._start(ground, job, plan, n_starts, "1")]
            if name.startswith("two copies") and plan is not None:
                pair.append(self._start(ground, job, other, 0, rng.choice("12")))
            if name == "worker, kill at a random moment" and plan is not None:
                time.sleep(rng.uniform(0, 0.15))
                os.kill(pair[0], signal.SIGKILL)
            codes = [self._end(child, kind, trouble) for child in pair]
            n_starts += 1
            if trouble.stuck:
                return
            if codes[0] == 0 and plan is None:
                self._job(ground, kind, "last")  # the next run finds everything
                return
        trouble.stuck.append(f"{kind}: not through after {n_disturbed + 8} attempts")

    def _draw(self, ground: _Ground, rng: random.Random, name: str, kind: str) -> Disturbance:
        how: How = rng.choice(FAULTS if name == "worker, failing file operation" else KILLS)
        of = "reads" if how == "ESTALE" or (how == "EIO" and rng.random() < 0.5) else "writes"
        if name == "worker, kill at a random moment":
            how = "only count"
        nth = _some(rng, ground.operations[kind, of])
        return Disturbance(
            below=f"{ground.home.folder}/",
            nth=nth,
            how=how,
            of=of,  # type: ignore[arg-type]
            done_file="" if how == "only count" else str(self._folder / "done"),
        )

    def _start(self, ground: _Ground, job: Path, plan: Disturbance | None, restarts: int, slurm_job_id: str) -> int:
        (self._folder / "done").unlink(missing_ok=True)
        make_runner = remembering(ground.remembered, self._folder / "computed")
        environment = {**os.environ, "SLURM_JOB_ID": slurm_job_id, "SLURM_RESTART_COUNT": str(restarts)}

        def attempt() -> None:
            if plan is not None:
                install(plan)
            raise SystemExit(worker(["worker", str(job)], environment, make_runner=make_runner))

        return children.fork(attempt, log=self._folder / "attempt.log")

    def _end(self, child: int, kind: str, trouble: Trouble) -> int:
        """Wait for an attempt, and note how it ended; its exit code, negative for a signal."""
        status = children.wait(child, ATTEMPT_S)
        if status is None:
            children.end(child)
            trouble.stuck.append(f"a {kind} worker goes on after {ATTEMPT_S:g} s")
            return -signal.SIGKILL
        code, done = os.waitstatus_to_exitcode(status), self._folder / "done"
        if done.exists():
            happened = done.read_text().splitlines()
            trouble.done.append(f"{kind} {happened[0]}")
            trouble.faults += code != -signal.SIGKILL
            done.unlink()
        trouble.kills += code == -signal.SIGKILL
        if code not in (0, 1, 2, 75, -signal.SIGKILL):
            trouble.bare.append(f"a {kind} worker {children.in_words(status)}")
        self._look_for_tracebacks(self._folder / "attempt.log", trouble)
        return code

    def _look_for_tracebacks(self, log: Path, trouble: Trouble) -> None:
        """An exception that the worker did not turn into an answer is printed with its traceback."""
        if not log.exists():
            return
        if words := traceback_in(log.read_text(errors="replace")):
            trouble.bare.append(f"after {trouble.done[-1:]}: {words}")
        log.unlink()

    def _finish(self, ground: _Ground, trouble: Trouble) -> None:
        """What the next materialization does with what is there, and what the events of all attempts said."""
        for path in sorted((ground.home.folder / "jobs").glob("*/*/events/*.jsonl")):
            for _, event in read_events(path):
                if isinstance(event, Event) and event.type == "partition_failed" and event.data["error"] not in ANSWERS:
                    trouble.bare.append(f"partition failed with {event.data['error']}: {event.data['message']}")

    def _job(self, ground: _Ground, kind: str, number: str) -> Path | None:
        """The job file that a run would write now, in a new submission; None when nothing is missing."""
        home = ground.home
        survey = (home.shards_work() if kind == "shards" else home.teacher_work()).survey()
        for _, output in survey.committed:  # as a run does with what it finds
            set_head(Path(output.path))
        work = survey.missing
        return write_job(home, work, home.folder / "jobs" / kind / number) if work.units else None

    # ------------------------------------------------------------------ runs

    def _disturb_run(self, ground: _Ground, rng: random.Random, name: str, trouble: Trouble) -> None:
        """Materializations, of which the first few or their workers are disturbed, until one succeeds."""
        ground.instance_mirror.restore()
        n_disturbed = rng.randint(1, 3)
        for attempt in range(n_disturbed + 3):
            disturbed = attempt < n_disturbed
            said = self._folder / "said"
            said.unlink(missing_ok=True)

            def run(disturbed: bool = disturbed, said: Path = said) -> None:
                if disturbed and name == "run, killed itself":
                    nth = _some(rng, ground.operations["run", "writes"])
                    below, done_file = f"{ground.home.folder}/", str(self._folder / "done")
                    install(Disturbance(below=below, nth=nth, how=rng.choice(KILLS), done_file=done_file))
                plans = rng if disturbed and name == "run, its worker killed" else None
                said.write_text(json.dumps(self._materialize(ground, plans)))

            child = children.fork(run, log=self._folder / "run.log")
            rng.random()  # the child drew from a copy
            status = children.wait(child, 3 * ATTEMPT_S)
            if status is None:
                children.end(child)
                trouble.stuck.append(f"a run goes on after {3 * ATTEMPT_S:g} s")
                return
            code, done = os.waitstatus_to_exitcode(status), self._folder / "done"
            if done.exists():
                happened = done.read_text().splitlines()
                trouble.done += happened
                trouble.kills += len(happened)
                done.unlink()
            if code == -signal.SIGKILL:
                continue
            if code or not said.exists():
                trouble.bare.append(f"a run {children.in_words(status)}: {_tail(self._folder / 'run.log')}")
                continue
            succeeded, words, is_answer = json.loads(said.read_text())
            if succeeded:
                trouble.lost += self._not_recorded(ground)
                return
            if not is_answer:
                trouble.bare.append(words[:600])
        trouble.stuck.append(f"no run succeeded in {n_disturbed + 3}: {words[:500] if 'words' in locals() else ''}")

    def _materialize(self, ground: _Ground, plans: random.Random | None) -> tuple[bool, str, bool]:
        computed, done = self._folder / "computed", self._folder / "done"
        scheduler = DisturbedScheduler(ground, computed, done, plans)
        with dg.DagsterInstance.local_temp(str(ground.instance)) as instance:
            result = materialize_all(CampaignDeployment(ground.home, instance, scheduler))
            return (result.success, *failure_of(result))

    def _not_recorded(self, ground: _Ground) -> list[str]:
        """What Dagster does not know after a run that succeeded."""
        with dg.DagsterInstance.local_temp(str(ground.instance)) as instance:
            deployment = CampaignDeployment(ground.home, instance, InlineScheduler(ground.home, remembering({}, None)))
            (last,) = instance.get_runs(limit=1)
            there = recorded(deployment, last.run_id)
        return [f"Dagster has no {a}/{k}" for a in ASSETS for k in KEYS if (a, k) not in there]

    # ------------------------------------------------------------------ what a child begins with

    def _make_ground(self) -> _Ground:
        logging.disable(logging.CRITICAL)  # Dagster's own of each run
        for name in ("home", "undisturbed", "instance"):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        # The shards of this machine's libraries, the caches of the golden store: all are of equal names and bytes.
        whole, home = make_home(self._folder / "undisturbed"), make_inputs(self._folder / "home")
        remembered = {o.fingerprint: Path(o.path) for o in outputs_of(whole).values()}
        mirrors = {"plan": Mirror(home.folder)}
        instance = self._folder / "instance"
        instance.mkdir()
        with dg.DagsterInstance.local_temp(str(instance)) as dagster:
            dagster.add_dynamic_partitions(str(home.recipe.partitions.name), list(KEYS))
        ground = _Ground(
            home=home,
            mirrors=mirrors,
            instance=instance,
            instance_mirror=Mirror(instance),
            undisturbed=undisturbed_facts(whole),
            remembered=remembered,
            operations={},
        )
        for kind, begins_with in (("shards", "plan"), ("teacher", "shards")):
            for of in ("writes", "reads"):
                mirrors[begins_with].restore()
                ground.operations[kind, of] = self._count(ground, kind, of)
            if kind == "shards":
                self._job(ground, kind, "0")
                shutil.rmtree(home.folder / "jobs")
                mirrors["shards"] = Mirror(home.folder)
        mirrors["plan"].restore()
        ground.operations["run", "writes"] = self._count_run(ground)
        return ground

    def _count(self, ground: _Ground, kind: str, of: str) -> list[str]:
        """The file operations of a worker that makes everything."""
        job = self._job(ground, kind, "0")
        assert job is not None
        done = self._folder / "counted"
        done.write_text("")
        plan = Disturbance(below=f"{ground.home.folder}/", nth=0, how="only count", of=of, done_file=str(done))  # type: ignore[arg-type]
        status = children.wait(self._start(ground, job, plan, 0, "1"), ATTEMPT_S)
        assert status == 0, _tail(self._folder / "attempt.log")
        return _names(done)

    def _count_run(self, ground: _Ground) -> list[str]:
        done = self._folder / "counted"
        done.write_text("")

        def run() -> None:
            install(Disturbance(below=f"{ground.home.folder}/", nth=0, how="only count", done_file=str(done)))
            assert self._materialize(ground, None)[0]

        status = children.wait(children.fork(run, log=self._folder / "run.log"), 3 * ATTEMPT_S)
        assert status == 0, _tail(self._folder / "run.log")
        return _names(done)


class DisturbedScheduler(InlineScheduler):
    """Whose first tasks are killed, each at an operation of its own."""

    def __init__(self, ground: _Ground, computed: Path, done: Path, plans: random.Random | None) -> None:
        super().__init__(ground.home, remembering(ground.remembered, computed))
        self._ground, self._done, self._plans = ground, done, plans
        self._n_left = 0 if plans is None else plans.randint(1, 3)

    def _task(self, spec: JobSpec, submission: Submission, index: int) -> None:
        plan = self._plan_of_this_task
        if plan is not None:
            install(plan)
        super()._task(spec, submission, index)

    def _start(self, spec: JobSpec, submission: Submission, lock: int) -> None:
        self._plan_of_this_task = None
        if self._plans is not None and self._n_left:
            self._n_left -= 1
            operations = self._ground.operations[spec.kind, "writes"]
            self._plan_of_this_task = Disturbance(
                below=f"{self._ground.home.folder}/",
                nth=_some(self._plans, operations),
                how=self._plans.choice(KILLS),
                done_file=str(self._done),
            )
        super()._start(spec, submission, lock)

    _plan_of_this_task: Disturbance | None = None


def write_job(home: Home, work: PlannedWork, folder: Path) -> Path:
    """One task over all that is to be made, as the driver writes it."""
    planner = home.planner()
    (folder / "events").mkdir(parents=True, exist_ok=True)
    job = JobFile(
        kind=work.kind,
        recipe=home.recipe.name,
        key="0" * 32,
        recipe_folder=str(planner.recipe_folder),
        events_folder=str(folder / "events"),
        tasks=(tuple(range(len(work.units))),),
        units=work.units,
        shards=planner.shards_params() if work.kind == "shards" else None,
        teacher=planner.teacher_params() if work.kind == "teacher" else None,
        provenance=planner.provenance(work.kind),
    )
    path = folder / "job.json"
    path.write_text(dataclasses.replace(job).to_json())
    return path


def traceback_in(text: str) -> str | None:
    """The innermost line of ours and the exception of the last traceback in a log; None when there is none."""
    if "Traceback (most recent call last)" not in text:
        return None
    lines = text[text.rindex("Traceback (most recent call last)") :].splitlines()[1:]
    ours = [line.strip() for line in lines if line.startswith("  File") and "/kd_assets/" in line]
    exception = next((line for line in lines if line and not line.startswith(" ")), "")
    return f"{exception} {ours[-1] if ours else ''}".strip()


def _names(counted: Path) -> list[str]:
    """Of the operations that were counted, in order."""
    return [line.split()[1] for line in counted.read_text().splitlines()]


def _some(rng: random.Random, operations: Sequence[str]) -> int:
    """The number of an operation, from 1: each name as likely as any other, however often it is used. Half of them
    earlier than that, for processes that find some of the work done."""
    name = rng.choice(sorted(set(operations)))
    nth = 1 + rng.choice([i for i, other in enumerate(operations) if other == name])
    return rng.choice([nth, rng.randint(1, nth)])


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:] if path.exists() else ""
