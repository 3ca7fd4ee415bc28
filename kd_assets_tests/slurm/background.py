"""A materialization that goes on while its test breaks something."""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

import dagster as dg

from kd_assets.contract import Event, event_file, read_events
from kd_assets.scheduler import Submission
from kd_assets_tests.orchestration.deployment import failure_text
from kd_assets_tests.patience import PATIENCE_S
from kd_assets_tests.slurm.cluster import ClusterError, wait_until
from kd_assets_tests.slurm.deployment import ALL, SlurmDeployment

RUN_S = 360.0
"""How long a run may take before its test fails. It takes seconds, or a minute where it waits for SLURM's rounds."""


class Background:
    """A run of the top-k cache in a thread of this process, for as long as the `with` block lasts."""

    def __init__(self, deployment: SlurmDeployment, keys: tuple[str, str] = ALL) -> None:
        self.deployment, self.cluster = deployment, deployment.cluster
        self._keys, self._tag = keys, uuid.uuid4().hex
        self._result: dg.ExecuteInProcessResult | None = None
        self._n_jobs = len(deployment.submissions())
        # A daemon: a run that waits for ever must not keep pytest from saying so.
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():  # the test failed: end what it left
            with contextlib.suppress(ClusterError):
                self.cluster.run("scancel", "--user", self.cluster.user)
            self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        self._result = self.deployment.run("topk_cache", partition_range=self._keys, tags={"kd/test": self._tag})

    # ------------------------------------------------------------------ its end

    def result(self, timeout_s: float = RUN_S) -> dg.ExecuteInProcessResult:
        """Waits for the run's end."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"the run goes on after {timeout_s:g} s:\n{self.log()[-4000:]}"
        assert self._result is not None, "the run raised: see the thread's traceback"
        return self._result

    def succeeds(self) -> dg.ExecuteInProcessResult:
        result = self.result()
        assert result.success, failure_text(result)
        return result

    def fails(self) -> str:
        """What its failure says."""
        result = self.result()
        assert not result.success
        return failure_text(result)

    # ------------------------------------------------------------------ what it has done so far

    @property
    def run_id(self) -> str:
        mine = dg.RunsFilter(tags={"kd/test": self._tag})
        wait_until("the run has begun", lambda: self.deployment.instance.get_runs_count(mine))
        (run,) = self.deployment.instance.get_runs(mine)
        return run.run_id

    def log(self) -> str:
        """What it has written into Dagster's log."""
        return "\n".join(entry.user_message for entry in self.deployment.instance.all_logs(self.run_id))

    def waits_for_log(self, text: str) -> None:
        wait_until(f"the run says {text!r}", lambda: text in self.log())

    def submission(self, number: int = 0) -> Submission:
        """The job that it submitted as its n-th, once it is there."""
        i = self._n_jobs + number

        def begun() -> list[Submission]:
            return [s for s in self.deployment.submissions() if s.spec_file.exists()]

        wait_until("a job is submitted", lambda: len(begun()) > i)
        return begun()[i]

    def task_id(self, task: int = 0, submission: int = 0) -> str:
        """SLURM's name for a task, once its array was accepted."""
        answer = self.submission(submission).folder / "arrays" / "0001.answer.json"
        wait_until(f"{answer} is there", answer.exists)
        return f"{json.loads(answer.read_text())['job_id']}_{task}"

    def keys_of(self, task: int, submission: int = 0) -> list[str]:
        """The partitions of a task, in the order of its work."""
        job = json.loads(self.submission(submission).job_file.read_text())
        return [job["units"][i]["partition_key"] for i in job["tasks"][task]]

    def started(self, task: int = 0, attempt: int = 0, submission: int = 0) -> Event:
        """What a task said of itself when this attempt began, once it has."""
        path = event_file(self.submission(submission).events_folder, task)
        found: list[Event] = []

        def has_started() -> bool:
            events = [event for _, event in read_events(path) if isinstance(event, Event)]
            found[:] = [e for e in events if e.type == "task_started" and e.attempt == attempt]
            return bool(found)

        wait_until(f"attempt {attempt} of task {task} has started", has_started)
        return found[0]

    def wait_for_parts(self, partition_key: str, n: int = 1) -> None:
        wait_until(f"{partition_key} has {n} parts", lambda: len(part_files(self.deployment, partition_key)) >= n)

    def wait_for_committed(self, partition_key: str) -> None:
        def committed() -> bool:
            return bool(list(store_of(self.deployment).glob(f"topk_cache/*/{partition_key}/*/manifest.json")))

        wait_until(f"{partition_key} is committed", committed)

    def start_soon(self, task_id: str) -> None:
        """A task that was requeued waits six seconds here (two minutes elsewhere); this one does not. Its node takes no
        task of the same id within the same second."""
        wait_until(f"{task_id} is requeued", lambda: self.cluster.state(task_id) == "PENDING")
        with contextlib.suppress(ClusterError):  # it has started meanwhile
            self.cluster.scontrol("update", f"JobId={task_id}", "StartTime=now+2")

    def job_metadata(self) -> list[dict[str, str]]:
        """What the run said of each job at its end, texts only."""
        records = self.deployment.instance.get_records_for_run(
            self.run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION
        ).records
        events = [r.event_log_entry.dagster_event for r in records]
        observations = [e.asset_observation_data.asset_observation for e in events if e is not None]
        return [
            {name: str(value.value) for name, value in o.metadata.items() if isinstance(value.value, str)}
            for o in observations
            if "job" in o.metadata
        ]


def store_of(deployment: SlurmDeployment) -> Path:
    return deployment.platform.recipe_folder("tiny")


def part_files(deployment: SlurmDeployment, partition_key: str = "*") -> list[Path]:
    """The parts of the top-k cache, of one partition or all."""
    return sorted(store_of(deployment).glob(f"topk_cache/*/{partition_key}/*/part-*"))


def parts(deployment: SlurmDeployment) -> dict[str, bytes]:
    """Everything that makes up the top-k cache: part file, named from the store on → its bytes."""
    return {str(p.relative_to(store_of(deployment))): p.read_bytes() for p in part_files(deployment)}
