"""The worker with a stub in the teacher's place: real tasks, leases, events, parts and commits, and no model.

It says so: it is a fake, for what happens to jobs and not to numbers. It writes real part files of top-k caches, coded
where the recipe asks for it, whose every token is equally likely, two documents a part, slowly if asked to, and fails
as told. What it is told stands in `KD_HOME/stub.json`:

    {"part_s": 0.2, "units": {"tiny-00001": "fail" | "host_memory" | "device_memory" | "take_memory" | "hang"}}

and with `"gate": "/a/file"` a process begins no part before that file is there, but for its first `"before_gate": 1`:
then what happens to it in the midst of its work does so however slow the machine is.

Run in the place of `python` (see `write_python`):   python -m kd_assets_tests.slurm.stub_teacher JOB.json ...
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kd_assets.contract import JobFile, Reporter, WorkUnit
from kd_assets.errors import InterruptedTaskError, OutOfDeviceMemoryError, OutOfHostMemoryError, TeacherError
from kd_assets.store import Documents, ResultWriter, coded, encode_topk, part_stats, plan_parts, read_shard
from kd_assets.worker.main import main
from kd_assets.worker.provenance import task_provenance
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.task import Runner, runner_for
from kd_assets_tests.store.examples import RECOMPUTED

DOCUMENTS_PER_PART = 2
TAKEN_MIB = 600
"""What `take_memory` allocates."""
SMALL_BUDGET = 256
"""Tokens of the largest batch that `device_memory` has room for."""
FOUND_BUDGET = 1024
"""What it says it has measured, where the recipe leaves the token budget to the teacher."""


class StubTeacher:
    """See `kd_assets.worker.task.Runner`."""

    def __init__(self, job: JobFile, report: Reporter, stop: StopFlag) -> None:
        self._job, self._report, self._stop = job, report, stop
        home = Path(job.recipe_folder).parent.parent
        told = home / "stub.json"
        self._told: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {}
        self._n_parts = 0
        assert job.teacher is not None
        self._token_budget = job.teacher.token_budget or FOUND_BUDGET
        report.emit(
            "teacher_loaded", load_s=0.0, device="none", gpu=None, n_parameters=0, token_budget=self._token_budget
        )

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        print(f"stub teacher at {unit.partition_key}", flush=True)
        self._misbehave(unit.partition_key)
        shard = read_shard(Path(unit.inputs["shards_manifest"][0]))
        plans = plan_parts(shard.n_tokens_D, max_documents=DOCUMENTS_PER_PART, max_tokens=10**9)
        for output in unit.outputs:
            with ResultWriter(
                output,
                recipe=self._job.recipe,
                recipe_folder=Path(self._job.recipe_folder),
                partition_key=unit.partition_key,
            ) as result:
                for plan in plans:
                    if plan.index not in result.finished:
                        self._pause(unit.partition_key)
                        part = shard.slice(plan.first_document, plan.n_documents)
                        params = output.identity["params"]
                        made = coded(evenly_likely(part, k=int(params["k"])), params.get("codec", "plain"))
                        stats = part_stats(output.asset, made.decoded) | made.error
                        result.write_part(plan.index, made.stored, n_tokens=part.n_tokens, stats=stats)
                        self._n_parts += 1
                where = self._job.provenance | task_provenance()
                result.commit(parts=len(plans), checks={"recomputed": RECOMPUTED}, provenance=where)
        return {"partition_key": unit.partition_key}

    def close(self) -> None:
        return None

    def _misbehave(self, partition_key: str) -> None:
        match self._told.get("units", {}).get(partition_key):
            case "fail":
                raise TeacherError(f"{partition_key}: the stub was told to fail")
            case "host_memory":
                raise OutOfHostMemoryError("the stub was told that the node's memory is full")
            case "device_memory":
                if self._token_budget > SMALL_BUDGET:
                    raise OutOfDeviceMemoryError(f"batches of {self._token_budget} tokens are too large")
            case "take_memory":
                self._taken = b"x" * (TAKEN_MIB << 20)  # the cgroup ends us here, when it allows less
            case "hang":
                while True:
                    self._pause(partition_key)
            case _:
                pass

    def _pause(self, partition_key: str) -> None:
        """Wait, and stop when asked to, as a teacher does between batches."""
        until = time.monotonic() + float(self._told.get("part_s", 0.0))
        while True:
            if self._stop:
                raise InterruptedTaskError(f"{partition_key}: stopped by {self._stop.signal_name}")
            if time.monotonic() >= until and self._may_begin():
                return
            time.sleep(0.02)

    def _may_begin(self) -> bool:
        if "gate" not in self._told or self._n_parts < self._told.get("before_gate", 0):
            return True
        return Path(self._told["gate"]).exists()


def evenly_likely(documents: Documents, *, k: int) -> pa.Table:
    """Rows of a top-k cache of a teacher that holds 2 k tokens for equally likely."""
    n = documents.n_tokens - documents.n_documents
    logprob = -np.log(2 * k)
    return encode_topk(
        documents,
        topk_ids_Mk=np.tile(np.arange(k, dtype=np.uint32), (n, 1)),
        topk_logprobs_Mk=np.full((n, k), logprob, dtype=np.float16),
        logsumexp_M=np.zeros(n, dtype=np.float32),
        target_logprob_M=np.full(n, logprob, dtype=np.float32),
    )


def make_runner(job: JobFile, report: Reporter, stop: StopFlag) -> Runner:
    return StubTeacher(job, report, stop) if job.kind == "teacher" else runner_for(job, report, stop)


def write_python(path: Path) -> Path:
    """A program to be named as the compute Python: `-m kd_assets.worker` becomes this module."""
    python = shlex.quote(sys.executable)
    path.write_text(
        "#!/bin/bash\n"
        f'if [ "$2" = kd_assets.worker ]; then shift 2; exec {python} -m {__spec__.name} "$@"; fi\n'
        f'exec {python} "$@"\n'
    )
    path.chmod(0o755)
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv, make_runner=make_runner))
