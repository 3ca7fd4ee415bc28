"""The throw-away cluster and the login node that the other tests of this folder rely on."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_assets_tests.patience import PATIENCE_S
from kd_assets_tests.slurm.cluster import (
    CGROUPS,
    ClusterError,
    ClusterOptions,
    SlurmCluster,
    cluster_processes,
    slurm_folder,
    slurm_version,
    wait_until,
)
from kd_assets_tests.slurm.conftest import SshLogin

MakeCluster = Callable[..., SlurmCluster]


def batch(cluster: SlurmCluster, script: str, *options: str) -> str:
    return cluster.sbatch("-o", "/dev/null", *options, "--wrap", script)


def stubborn(cluster: SlurmCluster, *options: str) -> Path:
    """Starts a job that ignores SIGTERM; a file that exists as long as its script lives (a zombie has no `exe`)."""
    script = "trap '' TERM; echo $$; while :; do sleep 1; done"
    output = cluster.root / "work" / f"pid.{cluster.sbatch('-o', 'pid.%j', *options, '--wrap', script)}"
    wait_until(f"{output} names a process", lambda: output.exists() and output.read_text().endswith("\n"))
    return Path("/proc", output.read_text().strip(), "exe")


def test_a_job_runs_on_four_nodes(slurm: SlurmCluster) -> None:
    job = slurm.sbatch("-N4", "--gpus-per-node=2", "-o", "out", "--wrap", "srun sh -c 'echo $CUDA_VISIBLE_DEVICES'")
    assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert (slurm.root / "work/out").read_text() == "0,1\n" * 4


def test_daemons_and_commands_are_of_one_slurm_the_one_that_was_asked_for(slurm: SlurmCluster) -> None:
    folder = slurm_folder()
    for command in ("sbatch", "squeue", "sinfo", "scontrol"):
        assert slurm.run(command, "--version").stdout.split()[-1] == slurm_version()
    assert f"= {slurm_version()}\n" in slurm.scontrol("show", "config")
    batch(slurm, "sleep 600")
    wait_until("slurmstepd runs", lambda: "slurmstepd" in programs(slurm))
    for daemon in ("munged", "slurmctld", "slurmd", "slurmstepd"):
        program, libraries = programs(slurm)[daemon]
        if folder is not None:
            # nsswitch.conf names modules, and those that the folder has not are this machine's (mdns, sss, …).
            own = {library for library in libraries if not library.name.startswith("libnss_")}
            assert {program.parent, *(library.parent for library in own)} <= {
                folder / "bin",
                folder / "lib",
                folder / "lib/slurm-wlm",
            }


def programs(cluster: SlurmCluster) -> dict[str, tuple[Path, set[Path]]]:
    """The name of each of its daemons → its program and the libraries that are loaded."""
    found: dict[str, tuple[Path, set[Path]]] = {}
    for pid in cluster_processes(cluster.root, cluster.name):
        process = Path("/proc", str(pid))
        with contextlib.suppress(OSError):  # gone meanwhile
            mapped = {line.split()[-1] for line in (process / "maps").read_text().splitlines() if ".so" in line}
            name = (process / "comm").read_text().strip()
            found[name] = (process / "exe").readlink(), {Path(path) for path in mapped}
    return found


def test_nothing_of_a_stopped_cluster_is_left(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2)
    scripts = [stubborn(cluster, "-w", node) for node in cluster.nodes]
    cluster.kill("slurmd1")
    assert all(script.exists() for script in scripts)
    cluster.stop()
    assert not any(script.exists() for script in scripts)
    assert not cluster_processes(cluster.root, cluster.name)
    assert not list(CGROUPS.glob(f"*/slurm_{cluster.name}*"))


def test_a_cluster_starts_where_one_was_stopped_and_knows_nothing_of_it(make_cluster: MakeCluster) -> None:
    first = make_cluster(nodes=2)
    (first.root / "notes.txt").write_text("mine")
    batch(first, "sleep 600")
    first.stop()
    with SlurmCluster(first.root, ClusterOptions(nodes=1)) as second:
        assert second.run("squeue", "-h", "-a").stdout == ""
        second.wait_for(batch(second, "true"), "COMPLETED")
        with pytest.raises(ClusterError, match=r"a cluster runs in .*: stop it"):
            SlurmCluster(first.root).start()
    assert (first.root / "notes.txt").read_text() == "mine"


def test_a_stopped_cluster_leaves_the_one_beside_it_alone(slurm: SlurmCluster, make_cluster: MakeCluster) -> None:
    script = stubborn(slurm)
    other = make_cluster(nodes=1)
    others_script = stubborn(other)
    other.stop()
    assert script.exists()
    assert not others_script.exists()
    slurm.wait_for(batch(slurm, "true"), "COMPLETED")  # which also wants every daemon alive


def test_accounting_shows_an_ended_job(slurm_accounting: SlurmCluster) -> None:
    job = batch(slurm_accounting, "exit 3")
    wait_until("sacct shows it", lambda: slurm_accounting.accounted_states(job) == ["FAILED"])


def test_a_restarted_controller_knows_its_jobs(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1)
    job = batch(cluster, "sleep 600")
    cluster.wait_for(job, "RUNNING")
    cluster.kill("slurmctld", signal.SIGTERM)
    cluster.start_daemon("slurmctld")
    assert cluster.state(job) == "RUNNING"


def test_a_failing_prolog_holds_the_job_and_drains_its_node(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, prolog=True)
    cluster.fail_prolog(True)
    job = batch(cluster, "true")
    wait_until("held", lambda: cluster.reason(job) == "launch failed requeued held")
    assert cluster.state(job) == "PENDING"
    assert cluster.run("sinfo", "-h", "-p", "batch", "-o", "%T").stdout == "drained\n"
    cluster.fail_prolog(False)
    cluster.resume_nodes()
    cluster.scontrol("release", job)
    wait_until("released", lambda: cluster.reason(job) == "BeginTime")
    cluster.wait_idle()


def test_a_user_has_a_limit_of_submitted_jobs(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, accounting=True, enforce_limits=True)
    cluster.limit_submitted_jobs(3)
    batch(cluster, "sleep 600", "--array=0-2")
    with pytest.raises(ClusterError, match="QOSMaxSubmitJobPerUserLimit"):
        batch(cluster, "true")


def test_a_login_runs_a_command_with_any_argument(sshd: SshLogin, slurm: SlurmCluster, tmp_path: Path) -> None:
    hostile = ["", "two  words", "it's", '"', "$HOME", "`id`", "*", "\\", ";", "ä\n-x", "!!"]
    program = tmp_path / "arguments"
    program.write_text("import sys\nprint(ascii(sys.argv[1:]))\n")

    def login(*command: str) -> str:
        argv = ["ssh", *sshd.options, sshd.target, shlex.join(command)]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout

    assert login(sys.executable, str(program), *hostile) == ascii(hostile) + "\n"
    assert slurm.name in login("sinfo")


def test_the_command_starts_a_cluster_that_the_next_one_stops(tmp_path: Path) -> None:
    def command(*arguments: str) -> str:
        argv = [sys.executable, "-m", "kd_assets_tests.slurm.cluster", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout

    root = tmp_path / "cluster"
    try:
        export = command("start", "--root", str(root), "--nodes", "1")
        script = f"{export}\nsinfo -h -p batch -o %T"
        assert subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout == "idle\n"
    finally:
        command("stop", "--root", str(root))
    assert not cluster_processes(root, (root / "name").read_text())
