"""A real, throw-away SLURM cluster on one machine, in one folder: no systemd, no Docker, as root or as anybody.

As a fixture, or from a shell to try something out:

    with SlurmCluster(Path("/tmp/c"), ClusterOptions(nodes=4)) as cluster:
        cluster.run("sinfo")

    python -m kd_assets_tests.slurm.cluster start --root /tmp/c --nodes 4 --accounting
    python -m kd_assets_tests.slurm.cluster stop --root /tmp/c

It is made of the machine's SLURM, or, with KD_TEST_SLURM=FOLDER in the environment, of the one that `.ci/slurm-24.11`
put into that folder. Clients find the right one by `SlurmCluster.env`.

Owns the daemons (munged, slurmctld, a slurmd for each node; with accounting MariaDB and slurmdbd), finds every process
they leave behind, and breaks them on demand. Needs only the standard library and Debian's packages (`PACKAGES`); tried
with SLURM 22.05 and 24.11. Invariant: after `stop` no process and no cgroup of this cluster is left, and no other
cluster of this machine has noticed.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import secrets
import shlex
import shutil
import signal
import socket
import stat
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kd_assets_tests.patience import PATIENCE_S
from kd_assets_tests.ports import reserve_ports

# What .ci/install-slurm installs.
PACKAGES = "slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core"
SLURM_COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd")
DATABASE_COMMANDS = ("mariadbd", "mariadb-install-db")

# Only in the daemons' environment: which cluster a process belongs to.
MARK = "KD_SLURM_CLUSTER"
DAEMONS = {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd"}
# Variables by which a surrounding SLURM job would change what our commands do.
FOREIGN = ("SLURM_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SCANCEL_", "SACCT_", "SINFO_")
CGROUPS = Path("/sys/fs/cgroup")
# What a cluster's folder holds.
FOLDERS = ("munge", "state", "log", "run", "dev", "work", "spool", "db")
FILES = ("slurm.conf", "gres.conf", "cgroup.conf", "slurmdbd.conf", "db.sql", "prolog", "prolog-fails", "name")


class ClusterError(Exception):
    """The cluster could not be made, or did not do what was waited for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterOptions:
    """What a cluster is made of. Times in seconds."""

    nodes: int = 4
    cpus: int = 8
    """Of each node; they need not exist."""
    mem_mb: int = 4000
    """Of each node."""
    gpus: int = 4
    """Of each node: devices that exist, so that CUDA_VISIBLE_DEVICES is set, but nothing to compute on."""
    accounting: bool = False
    """MariaDB and slurmdbd, so that sacct and sacctmgr work."""
    enforce_limits: bool = False
    """AccountingStorageEnforce=limits,qos, with the current user in an account of its own; needs accounting."""
    prolog: bool = False
    """A Prolog that fails as long as `fail_prolog` says so: a launch fails, the job is held, its node drained."""
    min_job_age_s: int = 300
    """How long squeue still knows a job that has ended."""
    kill_wait_s: int = 2
    """From SIGTERM to SIGKILL."""
    slurmd_timeout_s: int = 300
    """A node that does not answer for so long is DOWN: none is because the machine is busy."""
    message_timeout_s: int = 30
    """How long clients wait for the answer of a controller that is there."""
    max_array_size: int = 10001
    """The largest array index and one."""
    slurm_conf: str = ""
    """More lines for slurm.conf. One that stands there already must not be repeated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """TCP ports on 127.0.0.1."""

    slurmctld: int
    slurmdbd: int
    mariadb: int
    slurmd: tuple[int, ...]


def slurm_folder() -> Path | None:
    """Where the SLURM is that KD_TEST_SLURM asks for; None: it is the machine's."""
    folder = os.environ.get("KD_TEST_SLURM")
    return Path(folder).resolve() if folder else None


def missing_commands() -> list[str]:
    """Which of the commands a cluster needs are not there."""
    folder = slurm_folder()
    slurm = search_path() if folder is None else str(folder / "bin")  # the machine's must not stand in for it
    wanted = [*((name, slurm) for name in SLURM_COMMANDS), *((name, search_path()) for name in DATABASE_COMMANDS)]
    return [name for name, path in wanted if shutil.which(name, path=path) is None]


def search_path() -> str:
    """PATH with the folders that have the daemons, which an ordinary user's lacks."""
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    folder = slurm_folder()
    if folder is not None and str(folder / "bin") not in path:  # where it is, fakes of commands may stand before it
        path.insert(0, str(folder / "bin"))
    return os.pathsep.join([*path, "/usr/sbin", "/sbin"])


def slurm_version() -> str:
    """`22.05.8`."""
    text = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, env={"PATH": search_path()}).stdout
    return text.split()[-1]


def wait_until(what: str, condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Returns as soon as `condition()` holds; raises ClusterError naming `what` after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise ClusterError(f"waited {timeout_s:g} s in vain: {what}")
        time.sleep(0.03)


class SlurmCluster:
    """One cluster. `with` starts and stops it; what is not in `ClusterOptions` is chosen so that things happen fast.

    Partitions: `batch` (default), whose jobs are requeued for those of `high`.
    """

    def __init__(self, root: Path, options: ClusterOptions | None = None) -> None:
        self.root = root.resolve()
        self.options = options or ClusterOptions()
        # Node names are names of cgroups and so must differ between clusters on one machine; slurmdbd wants lower
        # case. No digits: SLURM would fold them into the node's number.
        self.name = "kd" + "".join(secrets.choice(string.ascii_lowercase) for _ in range(6))
        self.nodes = tuple(f"{self.name}{i}" for i in range(self.options.nodes))
        self.user = getpass.getuser()
        self.cgroup = _cgroups_are_writable()
        """Whether memory is limited by cgroups, so that a job that takes too much is OUT_OF_MEMORY."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._reserved = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Starting and stopping

    def start(self) -> None:
        """Starts everything and waits until all nodes are idle: 0.3 s, with accounting 3 s."""
        if self.options.enforce_limits and not self.options.accounting:
            raise ClusterError("enforce_limits needs accounting")
        # slurm.conf knows no quotes, and the path of a Unix socket is limited to 107 bytes.
        if len(str(self.root)) > 80 or any(c.isspace() for c in str(self.root)):
            raise ClusterError(f"a cluster's folder must have at most 80 characters and no spaces: {self.root}")
        if missing := missing_commands():
            raise ClusterError(f"not there: {', '.join(missing)}. See .ci/install-slurm, and .ci/slurm-24.11")
        self._clear_away_the_last_one()
        self._write_files()
        try:
            for daemon in self._daemon_names():
                self.start_daemon(daemon)
            self.wait_idle()
            if self.options.enforce_limits:
                self._register_user()
        except BaseException:
            self.stop()
            raise

    def _clear_away_the_last_one(self) -> None:
        """What a stopped cluster left in this folder; its state would be taken for this one's."""
        if not (self.root / "slurm.conf").exists():
            return
        if cluster_processes(self.root, (self.root / "name").read_text()):
            raise ClusterError(f"a cluster runs in {self.root}: stop it, or choose another folder")
        for left in (*FOLDERS, *FILES):
            path = self.root / left
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Kills everything, jobs included, in 0.2 s. The logs stay; another cluster can be started in the folder."""
        kill_cluster(self.root, self.name)
        for daemon in self._daemons.values():
            daemon.wait(PATIENCE_S)
        self._daemons.clear()
        self._reserved.close()
        _remove_cgroups(self.name)
        shutil.rmtree(self.root / "db", ignore_errors=True)  # a hundred megabytes; the logs stay

    def start_daemon(self, daemon: str) -> None:
        """Starts `munged`, `mariadbd`, `slurmdbd`, `slurmctld` or `slurmd0`, `slurmd1`, … (again), until it answers."""
        ports = self._ports
        if daemon == "munged":
            self._spawn(daemon, self._munged(), (self.root / "munge/socket").exists)
        elif daemon == "mariadbd":
            self._make_database()
            try:
                self._spawn(daemon, self._mariadbd(), lambda: _answers(ports.mariadb))
            except ClusterError as error:  # seen to end with a segmentation fault, once in hundreds of starts
                if self._daemons[daemon].poll() is None:
                    raise
                print(f"mariadbd is started a second time: {error}", file=sys.stderr)
                self._spawn(daemon, self._mariadbd(), lambda: _answers(ports.mariadb))
        elif daemon == "slurmdbd":
            self._spawn(daemon, ["slurmdbd", "-D"], lambda: _answers(ports.slurmdbd))
        elif daemon == "slurmctld":
            self._spawn(daemon, ["slurmctld", "-D"], lambda: _answers(ports.slurmctld))
        else:
            i = int(daemon.removeprefix("slurmd"))
            folder = slurm_folder()
            stepd = [] if folder is None else ["-d", str(folder / "bin/slurmstepd")]
            self._spawn(daemon, ["slurmd", "-D", "-N", self.nodes[i], *stepd], lambda: _answers(ports.slurmd[i]))

    # Breaking

    def kill(self, daemon: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends a daemon; jobs go on. `start_daemon` brings it back."""
        process = self._daemons.pop(daemon)
        process.send_signal(number)
        process.wait(PATIENCE_S)

    def pause(self, daemon: str) -> None:
        """The daemon answers nobody: clients connect, and wait for their MessageTimeout."""
        self._daemons[daemon].send_signal(signal.SIGSTOP)

    def unpause(self, daemon: str) -> None:
        """Undoes `pause`."""
        self._daemons[daemon].send_signal(signal.SIGCONT)

    def set_node(self, i: int, state: str) -> None:
        """What an administrator does: `down` (its jobs are requeued at once), `fail`, `drain`, `resume`."""
        self.scontrol("update", f"nodename={self.nodes[i]}", f"state={state}", "reason=test")

    def fail_prolog(self, failing: bool, *, once: bool = False) -> None:
        """Whether jobs fail to launch from now on, or the next one alone; needs the option `prolog`.

        The job becomes PENDING with the reason "launch failed requeued held" and its node drained: `resume_nodes`
        and `scontrol release` undo that.
        """
        assert self.options.prolog, "needs ClusterOptions(prolog=True)"
        if failing:
            (self.root / "prolog-fails").write_text("once" if once else "always")
        else:
            (self.root / "prolog-fails").unlink(missing_ok=True)

    def resume_nodes(self) -> None:
        """Every node takes jobs again."""
        states = self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %T").stdout.splitlines()
        for node, state in (line.split() for line in states):
            if state.startswith(("down", "drain", "fail")):
                self.scontrol("update", f"nodename={node}", "state=resume")

    def limit_submitted_jobs(self, limit: int) -> None:
        """At most so many jobs (each task of an array is one) of a user may be in the queue; needs `enforce_limits`."""
        # Every user's QOS.
        self._sacctmgr("modify", "qos", "normal", "set", f"MaxSubmitJobsPerUser={limit}")
        one_too_many = ["sbatch", "--test-only", f"--array=0-{limit}", "--wrap", "true"]
        wait_until(f"sbatch refuses {limit + 1} tasks", lambda: "QOS policy" in self.run(*one_too_many).stderr)

    # Using

    @property
    def env(self) -> dict[str, str]:
        """What has to be set to use this cluster: SLURM_CONF, and PATH with its commands first."""
        return {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": search_path()}

    def run(self, *argv: str | Path, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """Runs any command with this cluster's environment, in a folder of the cluster's. Raises nothing."""
        return subprocess.run(
            [str(a) for a in argv],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**_own_environment(), **self.env},
            cwd=self.root / "work",
        )

    def sbatch(self, *arguments: str | Path) -> str:
        """Submits and returns the job's id. Raises ClusterError with what sbatch said."""
        return self._checked("sbatch", "--parsable", *arguments).strip().split(";")[0]

    def scontrol(self, *arguments: str) -> str:
        """Raises ClusterError with what scontrol said."""
        return self._checked("scontrol", *arguments)

    def state(self, job: str) -> str | None:
        """squeue's word for a job or a task (`12`, `12_3`), ended ones included; None if squeue does not know it."""
        lines = self.run("squeue", "-h", "-a", "-r", "-t", "all", "-j", job, "-o", "%T").stdout.split()
        return lines[0] if lines else None

    def reason(self, job: str) -> str:
        """squeue's reason, as it writes it: `BeginTime`, `launch failed requeued held`; for a running job its nodes."""
        return self.run("squeue", "-h", "-a", "-r", "-t", "all", "-j", job, "-o", "%R").stdout.strip().strip("()")

    def accounted_states(self, job: str) -> list[str]:
        """sacct's states of every attempt of a job or a task, oldest first; empty as long as sacct knows none."""
        return self._checked("sacct", "-X", "-D", "-n", "-P", "-j", job, "-o", "State").split("\n")[:-1]

    def wait_for(self, job: str, *states: str, timeout_s: float = PATIENCE_S) -> str:
        """Waits until squeue has the job in one of `states`, and returns it."""
        seen: str | None = None

        def there() -> bool:
            nonlocal seen
            self._raise_if_a_daemon_ended()
            seen = self.state(job)
            return seen in states

        try:
            wait_until(f"job {job} is {' or '.join(states)}", there, timeout_s)
        except ClusterError as e:
            raise ClusterError(f"{e}; it is {seen} ({self.reason(job)})") from e
        assert seen is not None
        return seen

    def wait_idle(self) -> None:
        """Waits until every node is idle."""

        def idle() -> bool:
            self._raise_if_a_daemon_ended()
            return self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T").stdout.split() == ["idle"] * len(self.nodes)

        wait_until(f"all nodes of {self.root} are idle", idle)

    def end_job(self, job: str, after_s: int = 1) -> None:
        """The job's time is up `after_s` from now, and it becomes TIMEOUT at the next of slurmctld's 30 s ticks."""
        self.scontrol("update", f"jobid={job}", f"EndTime=now+{after_s}")

    def signal_job(self, job: str, name: str = "USR1") -> None:
        """A signal to the batch script alone, as `--signal=B:USR1@60` sends one before the end."""
        self._checked("scancel", f"--signal={name}", "--batch", job)

    def clear(self) -> None:
        """Cancels every job, resumes all nodes, and waits until they are idle."""
        # The first spares scripts that ignore SIGTERM their KillWait (--full would not); the second gets the others.
        self._checked("scancel", "--user", self.user, "--signal=KILL", "--batch")
        self._checked("scancel", "--user", self.user)
        wait_until("no jobs are left", lambda: not self._checked("squeue", "-h", "-a"))
        self.resume_nodes()
        self.wait_idle()

    # The daemons

    def _daemon_names(self) -> list[str]:
        database = ["mariadbd", "slurmdbd"] if self.options.accounting else []
        return ["munged", *database, "slurmctld", *(f"slurmd{i}" for i in range(len(self.nodes)))]

    def _spawn(self, daemon: str, argv: list[str], answers: Callable[[], bool]) -> None:
        # Its folder is how slurmstepd is found again: see cluster_processes.
        env = {**_own_environment(), **self.env, MARK: str(self.root)}
        with (self.root / f"log/{daemon}.out").open("ab") as out:
            self._daemons[daemon] = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True, cwd=self.root
            )

        def ready() -> bool:
            self._raise_if_a_daemon_ended()
            return answers()

        wait_until(f"{daemon} answers; see {self.root}/log", ready)

    def _raise_if_a_daemon_ended(self) -> None:
        for daemon, process in self._daemons.items():
            if process.poll() is not None:
                out = (self.root / f"log/{daemon}.out").read_text(errors="replace")
                raise ClusterError(f"{daemon} ended with {process.returncode}; see {self.root}/log\n{out[-1000:]}")

    def _munged(self) -> list[str]:
        # --force: pytest's folders are closed to others, which munged takes for a mistake; and it may be anybody's.
        munge = self.root / "munge"
        files = [f"--{f}-file={munge}/{f}" for f in ("key", "pid", "log", "seed")]
        return ["munged", "--foreground", "--force", *files, f"--socket={munge}/socket", "--num-threads=4"]

    def _make_database(self) -> None:
        if (self.root / "db").exists():
            return
        command = [
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={self.root}/db",
            f"--user={self.user}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            "--skip-name-resolve",
            "--innodb-log-file-size=8M",
        ]
        log = self.root / "log/db-install.out"
        for _ in range(2):  # seen to fail once in hundreds of starts, on a machine with four of them at a time
            with log.open("ab") as out:
                done = subprocess.run(command, stdout=out, stderr=out, env={**_own_environment(), **self.env})
            if done.returncode == 0:
                return
            shutil.rmtree(self.root / "db", ignore_errors=True)
        raise ClusterError(f"no database could be made:\n{log.read_text(errors='replace')[-1000:]}")

    def _mariadbd(self) -> list[str]:
        # mariadbd refuses to be root unless told to. The lock-wait time-out is what slurmdbd asks for.
        return [
            "mariadbd",
            "--no-defaults",
            f"--datadir={self.root}/db",
            f"--user={self.user}",
            f"--socket={self.root}/run/db.socket",
            f"--pid-file={self.root}/run/db.pid",
            f"--port={self._ports.mariadb}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            "--skip-log-bin",
            "--innodb-buffer-pool-size=64M",
            "--innodb-log-file-size=8M",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-lock-wait-timeout=900",
            f"--init-file={self.root}/db.sql",
        ]

    def _register_user(self) -> None:
        """With limits enforced, only who is in an account may submit."""
        self._sacctmgr("add", "account", "kd", f"cluster={self.name}")
        self._sacctmgr("add", "user", self.user, "account=kd", "defaultaccount=kd")
        wait_until(f"slurmctld knows {self.user}'s account", lambda: "Account=kd" in self._association())

    def _association(self) -> str:
        return self.scontrol("-o", "show", "assoc_mgr", "account=kd", f"user={self.user}", "flags=assoc")

    def _sacctmgr(self, *arguments: str) -> None:
        self._checked("sacctmgr", "--immediate", *arguments)

    def _checked(self, *argv: str | Path) -> str:
        done = self.run(*argv)
        if done.returncode != 0:
            raise ClusterError(f"{shlex.join(map(str, argv))} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    # The files

    def _write_files(self) -> None:
        for folder in (*(f for f in FOLDERS if f != "db"), *(f"spool/{node}" for node in self.nodes)):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        slurmctld, slurmdbd, mariadb, *slurmd = reserve_ports(3 + len(self.nodes), until=self._reserved)
        self._ports = Ports(slurmctld=slurmctld, slurmdbd=slurmdbd, mariadb=mariadb, slurmd=tuple(slurmd))
        self._write("name", self.name)
        (self.root / "munge/key").touch(0o600)
        (self.root / "munge/key").write_bytes(secrets.token_bytes(1024))
        self._write("gres.conf", self._gres_conf())
        self._write("cgroup.conf", self._cgroup_conf())
        self._write("prolog", _prolog(self.root / "prolog-fails"), mode=0o755)
        self._write("slurmdbd.conf", self._slurmdbd_conf(), mode=0o600)
        self._write("db.sql", self._db_sql())
        self._write("slurm.conf", self._slurm_conf())

    def _write(self, name: str, text: str, mode: int = 0o644) -> None:
        (self.root / name).touch(mode)
        (self.root / name).chmod(mode)
        (self.root / name).write_text(text)

    def _gres_conf(self) -> str:
        nodes = f"{self.name}[0-{len(self.nodes) - 1}]"
        devices = _fake_gpus(self.root / "dev", self.options.gpus)
        return "AutoDetect=off\n" + "".join(f"NodeName={nodes} Name=gpu File={device}\n" for device in devices)

    def _cgroup_conf(self) -> str:
        is_old = _version_number() < (23, 11)
        if self.cgroup:
            automount = "CgroupAutomount=no\n" if is_old else ""  # a newer one never mounts
            return (
                f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={CGROUPS}\n{automount}"
                "ConstrainRAMSpace=yes\nConstrainSwapSpace=no\nConstrainCores=no\nConstrainDevices=no\n"
            )
        # A newer slurmd starts the cgroup plugin even if nothing uses it; an older one knows no "disabled".
        return "" if is_old else "CgroupPlugin=disabled\n"

    def _plugins(self) -> str:
        if self.cgroup:
            return "ProctrackType=proctrack/cgroup\nTaskPlugin=task/cgroup\nJobAcctGatherType=jobacct_gather/cgroup"
        return (
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\n"
            "JobAcctGatherType=jobacct_gather/linux\nJobAcctGatherParams=OverMemoryKill"
        )

    def _accounting(self) -> str:
        if not self.options.accounting:
            return "AccountingStorageType=accounting_storage/none"
        enforce = "\nAccountingStorageEnforce=limits,qos" if self.options.enforce_limits else ""
        return (
            f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={self._ports.slurmdbd}\nAccountingStoragePass={self.root}/munge/socket\n"
            f"AccountingStorageTRES=gres/gpu\nAccountingStoreFlags=job_comment{enforce}"
        )

    def _node_lines(self) -> str:
        # All nodes are this host; the port tells them apart (Debian builds slurmd with --enable-multiple-slurmd).
        o = self.options
        gres = f"Gres=gpu:{o.gpus} " if o.gpus else ""
        return "\n".join(
            f"NodeName={node} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={port} CPUs={o.cpus} "
            f"RealMemory={o.mem_mb} {gres}State=UNKNOWN"
            for node, port in zip(self.nodes, self._ports.slurmd, strict=True)
        )

    def _slurm_conf(self) -> str:
        """Differs from a production cluster where that would make tests wait.

        - cred_expire=5: a requeued job waits for that and a second (121 s by default) before it may start again.
        - batch_sched_delay=0 and intervals of a second: a job starts 0.3 s after sbatch rather than 3 s.
        - config_overrides: nodes may have more CPUs and memory than the machine.
        - ReturnToService=1: a node that did not answer is used again once it does. With 2, one that was set down would
          be back within milliseconds.
        - NO_CONF_HASH: no complaints that the nodes' files differ.
        """
        o, root = self.options, self.root
        return f"""\
ClusterName={self.name}
SlurmctldHost={_host()}(127.0.0.1)
SlurmctldPort={self._ports.slurmctld}
SlurmUser={self.user}
SlurmdUser={self.user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
{_plugin_dir()}
{self._plugins()}
SwitchType=switch/none
MpiDefault=none
JobAcctGatherFrequency=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=64
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=1
GresTypes=gpu
{self._accounting()}
KillWait={o.kill_wait_s}
MinJobAge={o.min_job_age_s}
MaxArraySize={o.max_array_size}
MessageTimeout={o.message_timeout_s}
SlurmdTimeout={o.slurmd_timeout_s}
SlurmctldTimeout=10
InactiveLimit=0
Waittime=0
DebugFlags=NO_CONF_HASH
{self._node_lines()}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
{f"Prolog={root}/prolog" if o.prolog else ""}
{o.slurm_conf}
"""

    def _slurmdbd_conf(self) -> str:
        return f"""\
AuthType=auth/munge
AuthInfo=socket={self.root}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={self._ports.slurmdbd}
SlurmUser={self.user}
DebugLevel=info
LogFile={self.root}/log/slurmdbd.log
PidFile={self.root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={self._ports.mariadb}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CommitDelay=1
{_plugin_dir()}
"""

    def _db_sql(self) -> str:
        # mariadbd's --init-file takes one statement a line.
        return (
            "CREATE DATABASE IF NOT EXISTS slurm_acct_db;\n"
            "CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';\n"
            "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';\n"
        )


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _version_number() -> tuple[int, ...]:
    """(22, 5) of `22.05.8`."""
    return tuple(int(n) for n in slurm_version().split(".")[:2])


def _plugin_dir() -> str:
    folder = slurm_folder()
    return "" if folder is None else f"PluginDir={folder}/lib/slurm-wlm"


def _own_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}


def _cgroups_are_writable() -> bool:
    # Version 1 only. A container often shows them read-only, which access() tells also root.
    return (
        os.geteuid() == 0
        and os.access(CGROUPS / "memory/memory.limit_in_bytes", os.W_OK)
        and (CGROUPS / "freezer").is_dir()
    )


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.3):
        return True
    return False


def _prolog(fails: Path) -> str:
    """Slurm runs it on a node before a job's first step there."""
    return f"""\
#!/bin/sh
[ -e "{fails}" ] || exit 0
[ "$(cat "{fails}")" != once ] || rm "{fails}"
exit 1
"""


def _fake_gpus(folder: Path, n: int) -> list[Path]:
    """Character devices: with a plain file CUDA_VISIBLE_DEVICES stays unset, and without any file there is no GPU."""
    made = [folder / f"nvidia{i}" for i in range(n)]
    try:
        for path in made:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:  # not root, or in a container that may not: devices that every machine has
        made = [Path("/dev") / name for name in ("null", "zero", "full", "random", "urandom")]
        if n > len(made):
            raise ClusterError(f"{n} GPUs a node need root; without, at most {len(made)}") from None
    return made[:n]


# Finding and killing


def kill_cluster(root: Path, name: str) -> None:
    """Kills every process of the cluster `name` in `root`: daemons, slurmstepd, jobs; those of no other."""
    end = time.monotonic() + PATIENCE_S
    quiet = 0
    while quiet < 2 and time.monotonic() < end:  # twice: one that was just being forked was in nobody's list
        found = cluster_processes(root, name)
        # Stop them all first: none forks while the others are killed.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        quiet = 0 if found else quiet + 1
        time.sleep(0.03)


def cluster_processes(root: Path, name: str) -> set[int]:
    """The daemons of a cluster, what the nodes' cgroups hold, and everything below them."""
    parents: dict[int, int] = {}
    found = _in_cgroups(name)
    for folder in Path("/proc").iterdir():
        # Gone meanwhile, or somebody else's.
        with contextlib.suppress(OSError):
            if not folder.name.isdigit():
                continue
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z":
                continue
            parents[int(folder.name)] = int(parent)
            if _belongs(folder, root):
                found.add(int(folder.name))
    return _with_descendants(found, parents) - {os.getpid()}


def _belongs(process: Path, root: Path) -> bool:
    # slurmstepd wipes its environment (it writes its title there), but keeps the folder slurmd had.
    if (process / "comm").read_text().strip() in DAEMONS and (process / "cwd").readlink() == root:
        return True
    environment = (process / "environ").read_bytes().split(b"\0")
    if f"{MARK}={root}".encode() in environment:
        return True
    # A job's own process, whose slurmstepd may be dead. A client of the cluster's has no job id.
    of_cluster = f"SLURM_CONF={root}/slurm.conf".encode() in environment
    return of_cluster and any(variable.startswith(b"SLURM_JOB_ID=") for variable in environment)


def _in_cgroups(name: str) -> set[int]:
    """The surest list, where there are cgroups: nobody gets out of one, whatever becomes of its parent."""
    found: set[int] = set()
    for node in (CGROUPS / "freezer").glob(f"slurm_{name}*"):
        for tasks in node.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in tasks.read_text().split()}
    return found


def _with_descendants(pids: Iterable[int], parents: dict[int, int]) -> set[int]:
    found = set(pids)
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return found


def _remove_cgroups(name: str) -> None:
    """Leaves none behind: each would cost the machine memory until it is rebooted."""

    def gone() -> bool:
        for node in CGROUPS.glob(f"*/slurm_{name}*"):
            for folder, _, _ in os.walk(node, topdown=False):
                with contextlib.suppress(OSError):  # busy, until init has collected who died in it
                    Path(folder).rmdir()
        return not any(CGROUPS.glob(f"*/slurm_{name}*"))

    with contextlib.suppress(ClusterError):
        wait_until("cgroups are empty", gone, timeout_s=30)


# From a shell


def main() -> None:
    """Starts a cluster that outlives this command, or stops one."""
    parser = argparse.ArgumentParser(prog="python -m kd_assets_tests.slurm.cluster", description=main.__doc__)
    parser.add_argument("what", choices=["start", "stop"])
    parser.add_argument("--root", type=Path, required=True, help="the cluster's folder")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--accounting", action="store_true", help="with sacct")
    arguments = parser.parse_args()
    root: Path = arguments.root.resolve()
    try:
        if arguments.what == "start":
            SlurmCluster(root, ClusterOptions(nodes=arguments.nodes, accounting=arguments.accounting)).start()
            print(f"export SLURM_CONF={root}/slurm.conf")
            if (folder := slurm_folder()) is not None:
                print(f'export PATH="{folder}/bin:$PATH"')
        else:
            _stop_found(root)
    except ClusterError as error:
        sys.exit(str(error))


def _stop_found(root: Path) -> None:
    if not (root / "name").exists():
        raise ClusterError(f"{root} holds no cluster")
    name = (root / "name").read_text()
    kill_cluster(root, name)
    _remove_cgroups(name)
    shutil.rmtree(root / "db", ignore_errors=True)


if __name__ == "__main__":
    main()
