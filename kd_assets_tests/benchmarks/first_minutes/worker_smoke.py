"""The real worker on this machine's device: a shard, all three caches, a stop in the middle, and the CPU's numbers.

What runs is what a cluster's node runs: a job file and `python -m kd_assets.worker`, in bfloat16, with a small random
teacher and real English text. Checked is what a GPU must not break: every result verifies, its recomputed sample
passes, a task that USR1 stops goes on to the same bytes, and what is stored is near to a plain float32 forward on the
CPU.

Blocks are not compiled here: that is a matter of its own, with tests and the benchmark; this is the first to run.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kd_assets.contract import Asset, JobFile, event_file, read_events
from kd_assets.store import Manifest, read_manifest, verify
from kd_assets.teacher.model.load import as_teacher
from kd_assets.teacher.recompute import Comparison, reference, stored_row
from kd_assets_tests.benchmarks.figures import Figures
from kd_assets_tests.benchmarks.first_minutes.bounded import tail_of
from kd_assets_tests.benchmarks.first_minutes.smoke_inputs import (
    make_teacher,
    shards_job,
    teacher_job,
    teacher_params,
    write_source,
)
from kd_assets_tests.teacher.tiny import part_bytes

N_COMPARED = 12
"""Documents that are computed again on the CPU, each of another part."""
CPU_OVER_TOLERANCE = 3.0
"""How far a stored number may be from float32, over the tolerance of the recomputation check. That one compares two
forwards in bfloat16 that share most roundings; these share none (a CPU's bfloat16 and float32 come to 1.2)."""
POLL_S = 0.005
STOPPED = 75
"""The worker's exit status after USR1 (slurm/task.sbatch)."""


class Worker:
    """`python -m kd_assets.worker` at one job, in a process of its own, which ends with this one."""

    def __init__(self, job: JobFile, *, deadline: float) -> None:
        self._job, self._deadline = job, deadline
        folder = Path(job.events_folder).parent
        folder.mkdir(exist_ok=True)
        job_file = folder / "job.json"
        job_file.write_text(job.to_json())
        self._log = folder / "worker.log"
        self._began = time.monotonic()
        argv = [sys.executable, "-m", "kd_assets.worker", str(job_file)]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        self.seconds = 0.0

    def wait(self, *, expected: int) -> list[str]:
        """Until it ends; what is wrong with its exit status, with the end of its log."""
        try:
            status = self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)  # it says where it is (see `bounded`)
            time.sleep(1.0)
            self._process.kill()
            return [f"the worker of {self._job.key} did not end in time: {tail_of(self._log)}"]
        self.seconds = round(time.monotonic() - self._began, 1)
        if status == expected:
            return []
        return [f"the worker of {self._job.key} ended with {status}, not {expected}: {tail_of(self._log)}"]

    def stop_after_its_first_part(self) -> None:
        """USR1 as soon as a part of a cache is on disk."""
        while self._process.poll() is None and time.monotonic() < self._deadline:
            if any(n_parts(self._job)):
                self._process.send_signal(signal.SIGUSR1)
                return
            time.sleep(POLL_S)


def n_parts(job: JobFile) -> list[int]:
    """Parts on disk, of each result."""
    return [len(list(Path(output.path).glob("part-*"))) for unit in job.units for output in unit.outputs]


def last_event(job: JobFile, event_type: str) -> dict[str, Any]:
    events = [event for _, event in read_events(event_file(Path(job.events_folder), 0)) if not isinstance(event, str)]
    return [event.data for event in events if event.type == event_type][-1]


def manifests(job: JobFile) -> Iterator[tuple[Asset, Manifest]]:
    (unit,) = job.units
    for output in unit.outputs:
        yield output.asset, read_manifest(Path(output.path))


def smoke(folder: Path, figures: Figures, *, device: str, deadline: float) -> list[str]:
    """All of it; what was found wrong."""
    began = time.monotonic()
    teacher, source = folder / "teacher", folder / "documents.jsonl"
    make_teacher(teacher)
    write_source(source)
    figures.add(made_s=round(time.monotonic() - began, 1))

    shards = shards_job(folder / "shards", source, teacher)
    worker = Worker(shards, deadline=deadline)
    if problems := worker.wait(expected=0):
        return problems
    shard = Path(shards.units[0].outputs[0].path)
    figures.add(shards_s=worker.seconds, n_documents=read_manifest(shard).n_documents)

    params = teacher_params(teacher)
    whole, stopped = (teacher_job(folder / name, shard, params) for name in ("whole", "stopped"))
    at_whole, at_stopped = Worker(whole, deadline=deadline), Worker(stopped, deadline=deadline)
    at_stopped.stop_after_its_first_part()
    problems = [*at_stopped.wait(expected=STOPPED), *at_whole.wait(expected=0)]
    figures.add(whole_s=at_whole.seconds, stopped_s=at_stopped.seconds, parts_when_stopped=n_parts(stopped))
    if problems:
        return problems
    figures.add(**loaded_facts(whole), **cost_facts(whole))
    problems += (
        device_problems(whole, device) + recomputed_problems(whole, figures) + cpu_problems(whole, teacher, figures)
    )

    at_resumed = Worker(stopped, deadline=deadline)
    problems += at_resumed.wait(expected=0)
    figures.add(resumed_s=at_resumed.seconds, parts=n_parts(stopped))
    problems += difference_problems(whole, stopped)
    return problems + [problem for job in (shards, whole, stopped) for problem in verify_problems(job)]


def loaded_facts(job: JobFile) -> dict[str, Any]:
    loaded = last_event(job, "teacher_loaded")
    return {name: loaded[name] for name in ("device", "gpu", "head", "attention", "compiled", "token_budget", "load_s")}


def cost_facts(job: JobFile) -> dict[str, Any]:
    """What the partition cost, NVML's figures among them where it has any."""
    _, manifest = next(manifests(job))
    names = ("tokens_per_s", "recompute_s", "peak_memory_gib", "n_gpus", "joules", "gpu_power_watts")
    return {name: manifest.facts.get(name) for name in names}


def device_problems(job: JobFile, device: str) -> list[str]:
    used = last_event(job, "teacher_loaded")["device"]
    return [] if used.startswith(device) else [f"the teacher ran on {used}, expected {device}"]


def recomputed_problems(job: JobFile, figures: Figures) -> list[str]:
    """Of the check that each cache's manifest keeps."""
    checks = {asset: manifest.checks["recomputed"] for asset, manifest in manifests(job)}
    figures.add(recomputed_over_tolerance={asset: round(c["worst_over_tolerance"], 4) for asset, c in checks.items()})
    return [
        f"{asset}: the recomputed sample is beyond its tolerance: {c}" for asset, c in checks.items() if not c["passed"]
    ]


def cpu_problems(job: JobFile, teacher: Path, figures: Figures) -> list[str]:
    """Stored documents against a plain forward of the same weights in float32 on the CPU."""
    assert job.teacher is not None
    assert job.teacher.hidden_states is not None
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    on_cpu = as_teacher(model, device=torch.device("cpu"))
    found: dict[Asset, dict[str, Any]] = {}
    (unit,) = job.units
    for output in unit.outputs:
        folder = Path(output.path)
        comparison = Comparison(asset=output.asset, dtype=torch.bfloat16, seed=job.teacher.seed)
        parts = read_manifest(folder).parts[:N_COMPARED]
        for part in parts:
            row = stored_row(folder / part.name, 0)
            comparison.add(row, reference(on_cpu, row["input_ids"], job.teacher.hidden_states.blocks))
        found[output.asset] = comparison.result(part.name for part in parts)
    figures.add(cpu_over_tolerance={asset: round(c["worst_over_tolerance"], 4) for asset, c in found.items()})
    return [
        f"{asset}: not what float32 on the CPU gives: {c}"
        for asset, c in found.items()
        if not c["worst_over_tolerance"] <= CPU_OVER_TOLERANCE
    ]


def difference_problems(whole: JobFile, stopped: JobFile) -> list[str]:
    """Between a job that ran through and one that was stopped and resumed."""
    ours, theirs = part_bytes(whole.units[0]), part_bytes(stopped.units[0])
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    return [f"after the stop these parts have other bytes: {', '.join(differing)}"] if differing else []


def verify_problems(job: JobFile) -> list[str]:
    return [problem.message for problem in verify(Path(job.recipe_folder)).problems]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True, help="where the teacher must run")
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, required=True)
    options = parser.parse_args()
    figures = Figures(options.figures)
    folder = options.folder / "worker"
    folder.mkdir()
    problems = smoke(folder, figures, device=options.device, deadline=time.monotonic() + options.time_limit)
    figures.add(problems=problems)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
