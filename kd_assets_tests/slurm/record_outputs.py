"""Writes down what a real SLURM says in the cases that parsers must know: `kd_assets_tests/scheduler/slurm_outputs`.

    python -m kd_assets_tests.slurm.record_outputs

makes them anew for the SLURM at hand, in a folder named after its version, in five minutes. A file's first line is the
command and its exit status, the rest is its output to the letter: standard output, or standard error when that is
empty. Of a case `requeued`: `requeued.squeue.txt` and so on. Times, node names and job ids differ from run to run.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kd_assets_tests.slurm.cluster import ClusterError, ClusterOptions, SlurmCluster, slurm_version, wait_until

OUTPUTS = Path(__file__).parents[1] / "scheduler/slurm_outputs"
SEPARATOR = "|27f20ed438da|"
QUEUE_FIELDS = (
    "ArrayJobID", "ArrayTaskID", "State", "Reason", "NodeList", "RestartCnt", "exit_code",
    "SubmitTime", "StartTime", "EndTime", "Name", "Comment",
)  # fmt: skip
ACCOUNTING_FIELDS = (
    "JobID", "JobName", "Comment", "State", "Reason", "ExitCode", "NodeList",
    "Submit", "Start", "End", "ElapsedRaw", "TotalCPU", "NCPUS", "MaxRSS",
)  # fmt: skip
# As the scheduler asks: times since the epoch, lists of indices that are not cut off.
ENVIRONMENT = ("env", "LC_ALL=C", "SLURM_TIME_FORMAT=%s", "SLURM_BITSTR_LEN=0")
QUEUE = ("squeue", "--me", "--all", "--states=all", f"--Format={','.join(f'{f}:{SEPARATOR}' for f in QUEUE_FIELDS)}")
ACCOUNTING = (
    "sacct", "--duplicates", "--noheader", "--parsable2", f"--delimiter={SEPARATOR}", "--starttime=uts1000000000",
    f"--format={','.join(ACCOUNTING_FIELDS)}",
)  # fmt: skip


class Recorder:
    """Submits jobs to one cluster and writes down what is said of them."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self._folder = cluster, folder

    def submit(self, case: str, script: str, *options: str) -> str:
        """A job whose name is the case's; returns its id."""
        return self.cluster.sbatch(
            f"--job-name=kd-{case}", "--comment=kd_assets 0123", "-o", "/dev/null", *options, "--wrap", script
        )

    def write(self, name: str, *argv: str) -> str:
        """What a command says goes to `name`.txt, and is returned."""
        done = self.cluster.run(*ENVIRONMENT, *argv, timeout_s=90)
        said = done.stdout or done.stderr
        head = f"# exit status {done.returncode}: {shlex.join(argv)}"
        (self._folder / f"{name}.txt").write_text(f"{head}\n{said}")
        return said

    def write_queue(self, case: str, *, array: bool = True) -> None:
        """An array also as --array tells it."""
        self.write(f"{case}.squeue", *QUEUE, f"--name=kd-{case}")
        if array:
            self.write(f"{case}.squeue-array", *QUEUE, "--array", f"--name=kd-{case}")

    def write_all(self, case: str, job: str, *accounted: str) -> None:
        """Once sacct has these states, what squeue and sacct say of the job; its name must be the case's."""
        known: list[str] = []

        def complete() -> bool:
            known[:] = sorted(s.split()[0] for s in self.cluster.accounted_states(job))
            return known == sorted(accounted)

        try:
            wait_until("sacct knows them", complete, timeout_s=10)
        except ClusterError:  # versions differ; a reader of the files judges
            print(f"{case}: sacct has {known}, expected {sorted(accounted)}", flush=True)
        time.sleep(5)  # asked for by name, sacct shows a job some seconds later than by id
        self.write_queue(case, array=False)
        self.write(f"{case}.sacct", *ACCOUNTING, f"--name=kd-{case}")


def record_pending_arrays(r: Recorder) -> None:
    later = "--begin=now+3600"
    for case, indices in {
        "pending-range": "0-5",
        "pending-stepped": "0-20:2",
        "pending-stepped-limited": "0-20:2%3",
        "pending-two-steps": "0-8:2,30-60:10",
        "pending-mixed": "0-3,7,9-11",
    }.items():
        r.submit(case, "true", later, f"--array={indices}")
        r.write_queue(case)
    # Contiguous when it was submitted: what somebody cancelled leaves a step.
    job = r.submit("pending-every-second-cancelled", "true", later, "--array=0-9")
    r.cluster.run("scancel", *(f"{job}_{i}" for i in range(1, 10, 2)))
    r.write_queue("pending-every-second-cancelled")
    job = r.submit("limited", "sleep 600", "--array=0-20:2%2")
    r.cluster.wait_for(f"{job}_2", "RUNNING")
    r.write_queue("limited")
    # The first task fails, the second is requeued, the third held: all while others never started.
    job = r.submit("mixed", '[ "$SLURM_ARRAY_TASK_ID" != 0 ] || exit 3; sleep 600', "--array=0-7%2")
    r.cluster.wait_for(f"{job}_0", "FAILED")
    r.cluster.wait_for(f"{job}_2", "RUNNING")
    r.cluster.scontrol("requeue", f"{job}_1")
    r.cluster.scontrol("hold", f"{job}_4")
    wait_until("requeued", lambda: r.cluster.state(f"{job}_1") == "PENDING")
    r.write_queue("mixed")
    r.cluster.clear()


def record_requeued_and_held(r: Recorder) -> None:
    for case, words in {"requeued": "requeue", "requeued-held": "requeuehold"}.items():
        job = r.submit(case, "sleep 600", "--array=0-3", "--mem=10")
        for i in range(4):
            r.cluster.wait_for(f"{job}_{i}", "RUNNING")
        r.cluster.scontrol(words, f"{job}_1")
        wait_until("requeued", lambda task=f"{job}_1": r.cluster.state(task) == "PENDING")  # type: ignore[misc]
        r.write_queue(case)
    job = r.submit("held", "true", "--array=0-3", "--begin=now+3600")
    r.cluster.scontrol("hold", f"{job}_2")
    r.write_queue("held")
    r.cluster.clear()


def record_endings(r: Recorder) -> None:
    """Those that come at once, and what needs a running job."""
    r.write_all("completed", _ended(r, "completed", "true"), "COMPLETED")
    r.write_all("exit-3", _ended(r, "exit-3", "exit 3"), "FAILED")
    r.write_all("exit-137", _ended(r, "exit-137", "exit 137"), "FAILED")
    r.write_all("signal-9", _ended(r, "signal-9", "kill -9 $$"), "FAILED")
    r.write_all("no-log", _ended(r, "no-log", "true", "-o", "/proc/no/such/log"), "FAILED")
    r.write_all("no-log-folder", _ended(r, "no-log-folder", "true", "-o", "no/such/folder/log"), _last_state(r))
    if r.cluster.cgroup:
        take = "head -c 500M /dev/zero | tail -c 400M >/dev/null"
        r.write_all("out-of-memory", _ended(r, "out-of-memory", take, "--mem=50"), "OUT_OF_MEMORY")
    job = _running(r, "cancelled")
    r.cluster.run("scancel", job)
    r.cluster.wait_for(job, "CANCELLED")
    r.write_all("cancelled", job, "CANCELLED")
    job = r.submit("cancelled-pending", "true", "--array=0-3", "--begin=now+3600")
    r.cluster.run("scancel", f"{job}_1")
    r.cluster.run("scancel", "--user", r.cluster.user)
    r.cluster.wait_for(job, "CANCELLED")
    r.write_queue("cancelled-pending")
    r.cluster.clear()


def _last_state(r: Recorder) -> str:
    """Of the job that ended last: the versions disagree about some."""
    said = r.cluster.run("squeue", "-h", "-a", "-t", "all", "--sort=-i", "-o", "%T").stdout.split()
    return said[0]


def _ended(r: Recorder, case: str, script: str, *options: str) -> str:
    job = r.submit(case, script, *options)
    r.cluster.wait_for(job, "COMPLETED", "FAILED", "OUT_OF_MEMORY")
    return job


def _running(r: Recorder, case: str, *options: str) -> str:
    """A job that sacct knows to run."""
    job = r.submit(case, "sleep 600", *options)
    r.cluster.wait_for(job, "RUNNING")
    wait_until("sacct knows it", lambda: r.cluster.accounted_states(job) == ["RUNNING"])
    return job


def record_node_failures_and_preemption(r: Recorder) -> None:
    node = r.cluster.nodes[1]
    job = _running(r, "node-fail", "--no-requeue", "-w", node)
    requeued = _running(r, "node-fail-requeued", "--requeue", "-w", node)
    r.cluster.set_node(1, "down")
    r.cluster.wait_for(job, "NODE_FAIL")
    r.write_all("node-fail", job, "NODE_FAIL")
    r.write_all("node-fail-requeued", requeued, "NODE_FAIL", "PENDING")
    waits = r.submit("node-down", "true", "-w", node)
    wait_until("it waits for its node", lambda: "UnavailableNodes" in r.cluster.reason(waits))
    r.write_all("node-down", waits, "PENDING")
    r.cluster.clear()
    whole = ("--exclusive", "--mem=0", "-w", r.cluster.nodes[0])
    job = _running(r, "preempted", "--no-requeue", *whole)
    high = r.submit("high", "sleep 600", "-p", "high", *whole)
    r.cluster.wait_for(job, "PREEMPTED")
    r.write_all("preempted", job, "PREEMPTED")
    r.cluster.run("scancel", high)
    job = _running(r, "preempted-requeued", "--requeue", *whole)
    r.submit("high", "sleep 600", "-p", "high", *whole)
    r.cluster.wait_for(job, "PENDING")
    wait_until("requeued", lambda: r.cluster.reason(job) in ("BeginTime", "Resources", "Priority"))
    r.write_all("preempted-requeued", job, "PREEMPTED", "PENDING")
    r.cluster.clear()


def record_time_limits(r: Recorder) -> None:
    """All at the same of slurmctld's ticks, half a minute apart."""
    usr1 = "--signal=B:USR1@60"
    cases = {"timeout": _running(r, "timeout"), "timeout-usr1": _running(r, "timeout-usr1", usr1)}
    for job in cases.values():
        r.cluster.end_job(job)
    for case, job in cases.items():
        state = r.cluster.wait_for(job, "TIMEOUT", "FAILED", "COMPLETED", timeout_s=90)
        r.write_all(case, job, state)


def record_refusals(r: Recorder) -> None:
    """What sbatch and others say to what cannot be."""
    for name, options in {
        "cpus": ["--cpus-per-task=1000"],
        "memory": ["--mem=100T"],
        "gpus": ["--gpus-per-node=100"],
        "gpu-type": ["--gpus-per-node=none:1"],
        "partition": ["--partition=none"],
        "constraint": ["--constraint=none"],
        "node": ["--nodelist=none"],
        "array-too-large": ["--array=0-10001"],
        "option": ["--no-such-option"],
        "time": ["--time=soon"],
    }.items():
        r.write(f"refused.{name}.sbatch", "sbatch", "--parsable", *options, "--wrap", "true")
    r.write("array-unique.squeue", "squeue", "--array-unique")
    r.write("unknown.scontrol", "scontrol", "--oneliner", "show", "job", "99999")
    r.write("unknown.scancel", "scancel", "99999")
    r.write("unknown.release", "scontrol", "release", "99999")
    r.write("sinfo", "sinfo", "--noheader", "--exact", "--format=%a|%D|%l|%c|%m|%G|%R")
    r.write("version.squeue", "squeue", "--version")
    r.cluster.clear()


def record_launch_failure(r: Recorder) -> None:
    """A prolog that fails: requeued and held."""
    r.cluster.fail_prolog(True)
    job = r.submit("launch-failed", "true", "--array=0-1")
    wait_until("held", lambda: r.cluster.reason(f"{job}_0") == "launch failed requeued held")
    wait_until("both are held", lambda: r.cluster.reason(f"{job}_1") == "launch failed requeued held")
    r.write_queue("launch-failed")
    r.cluster.fail_prolog(False)
    r.cluster.clear()


def record_a_controller_that_is_away(r: Recorder) -> None:
    waits = r.submit("waits", "true", "--begin=now+3600")
    r.cluster.kill("slurmctld")
    for name, argv in {
        "squeue": ("squeue", "--me"),
        "sbatch": ("sbatch", "--parsable", "--wrap", "true"),
        "scancel": ("scancel", waits),
        "scontrol": ("scontrol", "show", "job", waits),
        "sinfo": ("sinfo",),
    }.items():
        r.write(f"no-controller.{name}", *argv)
    r.cluster.kill("slurmdbd")
    r.write("no-slurmdbd.sacct", *ACCOUNTING)


STEPS: tuple[Callable[[Recorder], None], ...] = (
    record_pending_arrays,
    record_requeued_and_held,
    record_endings,
    record_node_failures_and_preemption,
    record_time_limits,
    record_refusals,
    record_launch_failure,
    record_a_controller_that_is_away,
)


def main() -> None:
    """Records every case on a cluster of its own."""
    folder = OUTPUTS / ".".join(slurm_version().split(".")[:2])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="kd-") as root:
        with SlurmCluster(Path(root), ClusterOptions(accounting=True, prolog=True, nodes=4)) as cluster:
            for step in STEPS:
                print(step.__name__, flush=True)
                step(Recorder(cluster, folder))
    print(f"SLURM {slurm_version()}: {len(list(folder.iterdir()))} files in {folder}")


if __name__ == "__main__":
    main()
