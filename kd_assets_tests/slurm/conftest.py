"""Real SLURM clusters, and a real ssh login to one. Nothing global is set (but PATH, where
KD_TEST_SLURM asks for another SLURM than the machine's): tests pass on `cluster.env`.

`slurm` and `slurm_accounting` are shared by all tests of a session, each started by the first that asks for it. After
each test its jobs are cancelled and its nodes resumed; what breaks more than that (a killed slurmctld) makes a cluster
of its own with `make_cluster`.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from kd_assets_tests.orchestration.deployment import make_tiny_teacher
from kd_assets_tests.patience import PATIENCE_S
from kd_assets_tests.ports import reserve_ports
from kd_assets_tests.slurm.cluster import (
    PACKAGES,
    ClusterOptions,
    SlurmCluster,
    missing_commands,
    search_path,
    slurm_folder,
    slurm_version,
    wait_until,
)
from kd_assets_tests.slurm.deployment import SlurmDeployment

SSH_PACKAGES = "openssh-server openssh-client"
SHARED = ("slurm", "slurm_accounting")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests, and only those: pytest hands over the whole session's."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slurm)


def pytest_report_header() -> str:
    """Printed where this folder or one of its files is named on the command line."""
    return f"SLURM of {slurm_folder() or 'this machine'}: {'incomplete' if missing_commands() else slurm_version()}"


def pytest_runtest_setup() -> None:
    """A hook, not a fixture: what is skipped here counts as skipped by this line, so the summary has one for all."""
    missing = [*missing_commands(), *(c for c in ("ssh", "sshd") if not shutil.which(c, path=search_path()))]
    if not missing:
        return
    install = f"apt-get install -y --no-install-recommends {PACKAGES} {SSH_PACKAGES}"
    message = f"the SLURM tests did not run: no {', '.join(missing)}. As root: {install}"
    if (folder := slurm_folder()) is not None:
        message += f"; and as anybody: .ci/slurm-24.11 '{folder}'"
    if os.environ.get("CI") or folder:
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


@pytest.fixture(scope="session", autouse=True)
def _the_slurm_asked_for_is_on_path() -> Iterator[None]:
    """For what is looked up in PATH before it gets a cluster's: fakes of commands."""
    with pytest.MonkeyPatch.context() as patch:
        if slurm_folder() is not None:
            patch.setenv("PATH", search_path())
        yield


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Four nodes, no sacct."""
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Four nodes with sacct."""
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), ClusterOptions(accounting=True)) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _shared_clusters_are_left_idle(request: pytest.FixtureRequest) -> Iterator[None]:
    clusters = [request.getfixturevalue(name) for name in SHARED if name in request.fixturenames]
    yield
    for cluster in clusters:
        cluster.clear()


@pytest.fixture
def make_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., SlurmCluster]]:
    """Starts a cluster for one test, with any of `ClusterOptions`."""
    with ExitStack() as stack:

        def make(**options: Any) -> SlurmCluster:
            cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"), ClusterOptions(**options))
            return stack.enter_context(cluster)

        yield make


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def deploy(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., SlurmDeployment]]:
    """Makes deployments on a cluster (the first argument; the others are those of `SlurmDeployment`), on one Dagster
    instance, each in a folder of this test's; this process and those that it starts use that cluster from then on."""
    (tmp_path / "instance").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "instance")) as instance:

        def make(cluster: SlurmCluster, *, home: str = "home with a space", **settings: Any) -> SlurmDeployment:
            for name, value in cluster.env.items():
                monkeypatch.setenv(name, value)
            return SlurmDeployment(tmp_path / home, tiny_teacher, instance, cluster, **settings)

        yield make


@dataclass(frozen=True, kw_only=True, slots=True)
class SshLogin:
    """How to log in: `ssh *options target command`."""

    options: list[str]
    target: str


@pytest.fixture
def make_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[SlurmCluster], SshLogin]]:
    """Makes this machine the login node of a cluster: a real sshd, whose sessions have the cluster's SLURM_CONF."""
    with ExitStack() as stack:

        def make(cluster: SlurmCluster) -> SshLogin:
            folder = tmp_path_factory.mktemp("ssh")
            (port,) = reserve_ports(1, until=stack)
            for key in ("host_key", "user_key"):
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
            (folder / "sshd_config").write_text(_sshd_config(folder, port, cluster))
            (folder / "ssh_config").write_text(_ssh_config(folder, port))
            (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
            stack.callback(_stop, _start_sshd(folder, port))
            return SshLogin(options=["-F", str(folder / "ssh_config")], target=f"{getpass.getuser()}@login-node")

        yield make


@pytest.fixture
def sshd(make_sshd: Callable[[SlurmCluster], SshLogin], slurm: SlurmCluster) -> SshLogin:
    """The login node of `slurm`."""
    return make_sshd(slurm)


def _start_sshd(folder: Path, port: int) -> subprocess.Popen[bytes]:
    if os.geteuid() == 0:  # where it puts itself while it does not yet know who is there
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    program = shutil.which("sshd", path=search_path())
    assert program is not None  # Seen to before. It starts itself again for each session, and so wants its whole path.
    argv = [program, "-D", "-f", str(folder / "sshd_config"), "-E", str(folder / "sshd.log")]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
    wait_until(f"sshd answers; see {folder}/sshd.log", lambda: process.poll() is not None or _answers(port))
    assert process.returncode is None, (folder / "sshd.log").read_text()
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(PATIENCE_S)


def _sshd_config(folder: Path, port: int, cluster: SlurmCluster) -> str:
    # UsePAM and StrictModes would ask for a real login and for folders that nobody else can enter.
    return f"""\
ListenAddress 127.0.0.1:{port}
HostKey "{folder}/host_key"
AuthorizedKeysFile "{folder}/user_key.pub"
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
SetEnv {" ".join(f'"{name}={value}"' for name, value in cluster.env.items())}
"""


def _ssh_config(folder: Path, port: int) -> str:
    return f"""\
Host login-node
    HostName 127.0.0.1
    Port {port}
    IdentityFile "{folder}/user_key"
    IdentitiesOnly yes
    UserKnownHostsFile "{folder}/known_hosts"
    StrictHostKeyChecking yes
    BatchMode yes
    LogLevel ERROR
"""


def _answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0
