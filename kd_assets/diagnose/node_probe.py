"""A one-minute job that writes down what a node sees: `kd-assets doctor`'s way to look at the cluster from inside.

Each probe is a folder under `KD_HOME/doctor`. The node appends what it finds to a file there, line by line, so that a
node that gets stuck has still said where; that this file is seen here at all is what proves the shared folder.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kd_assets.durable import prepare_folder
from kd_assets.errors import SchedulerUnreachableError
from kd_assets.scheduler import Resources
from kd_assets.scheduler.slurm.commands.client import memory_option
from kd_assets.scheduler.slurm.commands.parsing import Accepted, read_submit_answer
from kd_assets.scheduler.slurm.commands.runners import CommandRunner
from kd_assets.scheduler.slurm.commands.states import ENDED_STATES, base_state

GONE = "GONE"
"""Our word for a job that SLURM has forgotten."""
POLL_S = 1.0
MEMORY_GIB = 2.0
"""What importing torch takes, with room; some sites give less to a job that does not say."""
PYTHON_PROGRAM = (
    "import json, kd_assets, torch, transformers; print(json.dumps({'torch': torch.__version__, "
    "'transformers': transformers.__version__, 'kd_assets': kd_assets.__version__, "
    "'gpus': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}))"
)
"""Its last line of output is one JSON object."""

_SCRIPT = """\
#!/bin/bash
# What this node sees, for `kd-assets doctor`. Run as: probe.sh FOLDER MODEL_FOLDER SECRETS_FILE ("-": none)
folder=$1 model=$2 secrets=$3
exec 3>>"$folder/answer" || exit 1
say() { printf '%s=%s\\n' "$1" "$(tail -n 1 <<<"$2" | tr -d '\\r')" >&3; }
say node "$(hostname)"
say nonce "$(cat "$folder/nonce" 2>&1)"
source "$folder/environment.sh"
set +eux
say nvidia_smi "$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')"
say devices "${CUDA_VISIBLE_DEVICES:-}"
if [ "$model" != - ]; then
    n=0
    for file in "$model"/*.safetensors; do head -c 8 "$file" >/dev/null 2>&1 && n=$((n + 1)); done
    say weights "$n"
fi
[ "$secrets" = - ] || { [ -O "$secrets" ] && [ -r "$secrets" ]; say secrets $?; }
output=$("$KD_PYTHON" -c "$(cat "$folder/program.py")" 2>&1)
status=$?
[ "$status" -le 128 ] || output="killed by signal $((status - 128)): did the test job's memory not suffice?"
say python "$output"
say done 1
"""


@dataclass(slots=True)
class Probe:
    """One job and what is known of it."""

    name: str
    """Of the kind of job it stands for."""
    folder: Path
    nonce: str
    job_id: int | None = None
    refused: str = ""
    state: str = ""
    """SLURM's word for it, seen last."""
    reason: str = ""
    node: str = ""
    answer: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_answered(self) -> bool:
        return "done" in self.answer

    @property
    def is_over(self) -> bool:
        """No longer waiting or running, as far as SLURM knows; nothing is said of its answer."""
        return self.state == GONE or base_state(self.state) in ENDED_STATES

    @property
    def log_file(self) -> Path:
        return self.folder / "job.log"


def small(wanted: Resources) -> Resources:
    """What a probe asks for where a job would ask for `wanted`: to be put in the same place, and no more than a GPU."""
    return Resources(
        slurm_partition=wanted.slurm_partition,
        account=wanted.account,
        qos=wanted.qos,
        constraint=wanted.constraint,
        gpus_per_node=1 if wanted.gpus_per_node else None,
        memory_gib=None if wanted.memory_of == "site" else min(wanted.memory_gib or MEMORY_GIB, MEMORY_GIB),
        memory_of=wanted.memory_of,
        exclude=wanted.exclude,
        nodelist=wanted.nodelist,
        sbatch_options=wanted.sbatch_options,
    )


def start_probe(
    run: CommandRunner,
    name: str,
    *,
    home: Path,
    resources: Resources,
    environment_text: str,
    model_folder: Path | None,
    secrets_file: Path | None,
    timeout_s: float,
) -> Probe:
    """Submit one. What SLURM refuses is in `Probe.refused`.

    It asks for little (see `small`): any node of the partition shows the same folder, and a small job starts sooner.
    Raises SchedulerUnreachableError; then the job may have been submitted, and ends within its minute.
    """
    probe = Probe(name=name, folder=home / "doctor" / f"{name}-{secrets.token_hex(4)}", nonce=secrets.token_hex(8))
    prepare_folder(probe.folder)
    files = {
        "nonce": probe.nonce,
        "environment.sh": environment_text,
        "program.py": PYTHON_PROGRAM,
        "probe.sh": _SCRIPT,
    }
    for file_name, text in files.items():
        (probe.folder / file_name).write_text(text)
    argv = probe_argv(probe, resources, model_folder=model_folder, secrets_file=secrets_file)
    answer = read_submit_answer(run.run(argv, timeout_s=timeout_s))
    if isinstance(answer, Accepted):
        probe.job_id = answer.job_id
    else:
        probe.refused = answer.text
    return probe


def probe_argv(
    probe: Probe, resources: Resources, *, model_folder: Path | None, secrets_file: Path | None
) -> list[str]:
    options = {
        # Not `kd-`: that is how jobs begin that have results to look after.
        "job-name": f"doctor-{probe.folder.name}",
        "chdir": str(probe.folder),
        "output": "job.log",
        "time": 1,
        "export": "ALL",
        "partition": resources.slurm_partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "gpus-per-node": resources.gpus_per_node,
        "cpus-per-task": 1,
        **memory_option(resources),
        "nodelist": resources.nodelist,
        "exclude": resources.exclude,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    arguments = [str(path or "-") for path in (probe.folder, model_folder, secrets_file)]
    script = str(probe.folder / "probe.sh")
    return ["sbatch", "--parsable", *given, "--no-requeue", *(resources.sbatch_options or ()), script, *arguments]


def wait_for_probes(
    run: CommandRunner,
    probes: Sequence[Probe],
    *,
    wait_s: float,
    visibility_grace_s: float,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Until each has answered, or ended without (plus the grace of a lagging file system), or time is up. What has not
    ended then is cancelled. Not being able to ask SLURM meanwhile is no end."""
    deadline = clock() + wait_s
    over_since: dict[int, float] = {}
    try:
        while waiting := [p for p in probes if p.job_id is not None and not p.has_answered]:
            for probe in waiting:
                _look_at(run, probe, timeout_s)
                if probe.is_over:
                    over_since.setdefault(id(probe), clock())
            given_up = [p for p in waiting if clock() - over_since.get(id(p), clock()) > visibility_grace_s]
            if clock() >= deadline or len(given_up) == len([p for p in waiting if not p.has_answered]):
                break
            sleep(POLL_S)
    finally:
        if ids := [str(p.job_id) for p in probes if p.job_id is not None and not (p.has_answered or p.is_over)]:
            run.run(["scancel", *ids], timeout_s=timeout_s)


def _look_at(run: CommandRunner, probe: Probe, timeout_s: float) -> None:
    argv = ["squeue", "--noheader", "--states=all", f"--jobs={probe.job_id}", "--format=%T|%N|%r"]
    try:
        answer = run.run(argv, timeout_s=timeout_s)
        if answer.status == 0 and "|" in answer.stdout:
            probe.state, probe.node, probe.reason = answer.stdout.strip().split("|", 2)
        elif "Invalid job id" in answer.stderr:
            probe.state, probe.reason = GONE, "SLURM no longer knows it"
    except SchedulerUnreachableError as e:
        probe.reason = str(e)
    probe.answer = read_answer(probe.folder / "answer")


def read_answer(path: Path) -> dict[str, str]:
    """The complete lines so far; empty where there are none."""
    try:
        with path.open("rb") as f:  # opened anew each time: a network file system looks again then
            lines = f.read().decode(errors="replace").splitlines(keepends=True)
    except OSError:  # not there yet, or on a share that is away for a moment: looked at again
        return {}
    words = (line.rstrip("\n").partition("=") for line in lines if line.endswith("\n"))
    return {name: value for name, _, value in words}
