"""The sick-cluster campaign: a real SLURM, real runs of the dagster command line, and at random moments something dies.

The worker has a stub in the teacher's place, since what happens to jobs is asked and not what a teacher computes. A
round begins with tokenised shards, disturbs a run a few times, and goes on as its user would: a run whose own process
was killed is started again, any other has to come to its end by itself. Where a reply must be lost or a command must
fail, a script stands before SLURM's command, and says so by its name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import dagster as dg
import pytest

from kd_assets_tests.campaign.ledger import Record
from kd_assets_tests.campaign.outcome import outcome
from kd_assets_tests.orchestration.command_line import CommandLine
from kd_assets_tests.orchestration.deployment import make_tiny_teacher
from kd_assets_tests.patience import PATIENCE_S
from kd_assets_tests.slurm.background import parts
from kd_assets_tests.slurm.cluster import ClusterError, ClusterOptions, SlurmCluster
from kd_assets_tests.slurm.deployment import ALL, SlurmDeployment
from kd_assets_tests.slurm.fakes import put_first

RUN_S = 300.0
"""How long a run may take from its last disturbance on; undisturbed it takes fifteen seconds."""
MOST_RUNS = 4
CODED_EVERY = 4
"""Every so many rounds are of coded caches: the fourth, which a minute does not reach."""
PART_S = 0.15
"""What the stub takes for a part: a run of 36 parts in three tasks is at work for some seconds."""


class ClusterRounds:
    name = "cluster"

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)

    def rounds(self, numbers: Iterator[int]) -> Generator[Record]:
        """Without end, as long as there are numbers. Leave it at any time."""
        logging.disable(logging.CRITICAL)  # Dagster's own of each run
        shutil.rmtree(self._folder / "slurm", ignore_errors=True)
        teacher = self._folder / "teacher"
        if not teacher.exists():
            make_tiny_teacher(teacher)
        # What is away is noticed within seconds, as there is a time for each round.
        options = ClusterOptions(slurmd_timeout_s=5, message_timeout_s=5)
        with SlurmCluster(self._folder / "slurm", options) as cluster:
            expected: dict[bool, dict[str, bytes]] = {}
            for number in numbers:
                is_coded = number % CODED_EVERY == CODED_EVERY - 1
                if is_coded not in expected:
                    undisturbed = ClusterRound(self._folder / "undisturbed", cluster, teacher, is_coded=is_coded)
                    expected[is_coded] = undisturbed.undisturbed()
                began = time.monotonic()
                rng = random.Random(f"{self._seed}/{self.name}/{number}")
                names = rng.choices(sorted(DISTURBANCES), k=rng.randrange(1, 4))
                round_ = ClusterRound(self._folder / "home", cluster, teacher, is_coded=is_coded)
                record = round_.disturbed(rng, names, expected[is_coded])
                _heal(cluster)
                yield {
                    "campaign": self.name,
                    "round": number,
                    "wall_s": round(time.monotonic() - began, 4),
                    "class": names[0],
                    **record,
                }


class ClusterRound:
    """A deployment of its own on the cluster, new."""

    def __init__(self, folder: Path, cluster: SlurmCluster, teacher: Path, *, is_coded: bool = False) -> None:
        """`is_coded`: of a recipe whose top-k is compact."""
        self._folder, self.cluster, self._teacher = folder, cluster, teacher
        self._caches = {"topk": {"k": 4, "max_length": 64, "codec": "compact"}} if is_coded else None
        self.process: subprocess.Popen[str] | None = None
        self.run_was_killed = False
        self.fakes = folder / "fakes"
        self.sick = folder / "sick"
        """Holds a file for each node that lacks its mounts: what starts there ends at once."""

    @contextlib.contextmanager
    def _deployed(self) -> Iterator[tuple[SlurmDeployment, CommandLine]]:
        shutil.rmtree(self._folder, ignore_errors=True)
        (self._folder / "instance").mkdir(parents=True)
        with (
            pytest.MonkeyPatch.context() as self.patch,
            dg.DagsterInstance.local_temp(str(self._folder / "instance")) as instance,
        ):
            for name, value in self.cluster.env.items():
                self.patch.setenv(name, value)
            sick = f'[ ! -e "{self.sick}/$SLURMD_NODENAME" ] || KD_PYTHON=/not-mounted/bin/python\n'
            deployment = SlurmDeployment(
                self._folder / "home",
                self._teacher,
                instance,
                self.cluster,
                told={"part_s": PART_S},
                profile={"setup": sick, "command_timeout_s": 10},
                caches=self._caches,
            )
            yield deployment, CommandLine(deployment)

    def undisturbed(self) -> dict[str, bytes]:
        with self._deployed() as (deployment, command_line):
            status, text = command_line.run("topk_cache", partition=("--partition-range", "...".join(ALL)))
            assert status == 0, text[-4000:]
            return parts(deployment)

    def disturbed(self, rng: random.Random, names: list[str], expected: dict[str, bytes]) -> Record:
        with self._deployed() as (self.deployment, command_line):
            record: Record = {"what": ", ".join(names), "rounds": 1, "kills": len(names), "bad": []}
            for n_runs in range(MOST_RUNS):
                self.run_was_killed = False
                self.process = command_line.start("topk_cache", partition=("--partition-range", "...".join(ALL)))
                if n_runs == 0:
                    self._wait_for_work()
                    for name in names:
                        time.sleep(rng.uniform(0.0, 2.0))
                        DISTURBANCES[name](self, rng)
                status, text = self._end()
                if status is None:
                    record["stuck"] = 1
                    record["bad"].append(f"the run does not end: {text[-600:]}")
                    return record
                if status == 0:
                    break
                if not self.run_was_killed:
                    record["lost"] = 1
                    record["bad"].append(f"the run failed: {text[-600:]}")
                    return record
            store = self.deployment.platform.recipe_folder("tiny")
            return record | outcome(expected, parts(self.deployment), self.deployment.n_made(), store)

    def _wait_for_work(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.deployment.job_events("task_started") and time.monotonic() < deadline:
            time.sleep(0.05)

    def _end(self) -> tuple[int | None, str]:
        assert self.process is not None
        try:
            text, _ = self.process.communicate(timeout=RUN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return None, self.process.communicate()[0]
        return self.process.returncode, text

    # ------------------------------------------------------------------ whom it strikes

    def worker(self, rng: random.Random) -> int | None:
        """Process of a task at work."""
        ended = {(e.task, e.attempt) for e in self.deployment.job_events("task_finished")}
        live = [e for e in self.deployment.job_events("task_started") if (e.task, e.attempt) not in ended]
        return int(rng.choice(live).data["pid"]) if live else None

    def task_id(self, rng: random.Random) -> str | None:
        running = [line.split()[0] for line in self.deployment.alive()]
        return rng.choice(running) if running else None


def _kill_worker(round_: ClusterRound, rng: random.Random) -> None:
    if (pid := round_.worker(rng)) is not None:
        _kill(pid)


def _kill_batch_script(round_: ClusterRound, rng: random.Random) -> None:
    if (pid := round_.worker(rng)) is not None:
        with contextlib.suppress(OSError):
            _kill(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]))


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kill_run(round_: ClusterRound, rng: random.Random) -> None:
    assert round_.process is not None
    round_.process.kill()
    round_.run_was_killed = True


def _kill_daemon(name: str) -> Callable[[ClusterRound, random.Random], None]:
    def kill(round_: ClusterRound, rng: random.Random) -> None:
        daemon = name if name == "slurmctld" else f"slurmd{rng.randrange(len(round_.cluster.nodes))}"
        round_.cluster.kill(daemon)
        time.sleep(rng.uniform(0.0, 4.0))
        round_.cluster.start_daemon(daemon)

    return kill


def _pause_controller(round_: ClusterRound, rng: random.Random) -> None:
    round_.cluster.pause("slurmctld")
    time.sleep(rng.uniform(0.5, 8.0))
    round_.cluster.unpause("slurmctld")


def _requeue(round_: ClusterRound, rng: random.Random) -> None:
    _of_a_task(round_, rng, ("requeue", "{task}"), ("update", "JobId={task}", "StartTime=now+2"))


def _rename(round_: ClusterRound, rng: random.Random) -> None:
    _of_a_task(round_, rng, ("update", "JobId={task}", "name=renamed"))


def _of_a_task(round_: ClusterRound, rng: random.Random, *commands: tuple[str, ...]) -> None:
    if (task := round_.task_id(rng)) is not None:
        with contextlib.suppress(ClusterError):  # it has ended meanwhile
            for words in commands:
                round_.cluster.scontrol(*(word.format(task=task) for word in words))


def _node_down(round_: ClusterRound, rng: random.Random) -> None:
    node = rng.randrange(len(round_.cluster.nodes))
    round_.cluster.set_node(node, "down")
    time.sleep(rng.uniform(0.5, 3.0))
    round_.cluster.set_node(node, "resume")


def _black_hole(round_: ClusterRound, rng: random.Random) -> None:
    """One node only: what fails on three is taken for the work's own fault."""
    round_.sick.mkdir(exist_ok=True)
    (round_.sick / round_.cluster.nodes[0]).touch()
    _kill_worker(round_, rng)


def _answers_fail(command: str) -> Callable[[ClusterRound, random.Random], None]:
    """The command's answers are lost for a while, after the fact or before it: for runs that are started from now on,
    so the run is killed and started again."""

    def fail(round_: ClusterRound, rng: random.Random) -> None:
        until = time.time() + rng.uniform(5.0, 12.0)
        before = "" if rng.random() < 0.5 else 'real "$@" >/dev/null 2>&1;'
        words = rng.choice(["Socket timed out on send/recv operation", "I/O error writing script/environment to file"])
        body = f"[ $(date +%s) -ge {until:.0f} ] || {{ {before} echo '{command}: error: {words}' >&2; exit 1; }}"
        put_first(round_.fakes, command, body, round_.patch)
        _kill_run(round_, rng)

    return fail


DISTURBANCES: dict[str, Callable[[ClusterRound, random.Random], None]] = {
    "worker killed": _kill_worker,
    "batch script killed": _kill_batch_script,
    "run killed": _kill_run,
    "slurmd killed": _kill_daemon("slurmd"),
    "slurmctld killed": _kill_daemon("slurmctld"),
    "slurmctld hangs": _pause_controller,
    "task requeued": _requeue,
    "task renamed": _rename,
    "node down": _node_down,
    "node without its mounts": _black_hole,
    "run killed, sbatch's answers lost": _answers_fail("sbatch"),
    "run killed, squeue's answers lost": _answers_fail("squeue"),
}


def _heal(cluster: SlurmCluster) -> None:
    """As the next round wants it: idle, every node there."""
    with contextlib.suppress(ClusterError):
        cluster.clear()
