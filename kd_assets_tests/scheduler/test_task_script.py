"""The batch script itself, as SLURM calls it: what it passes on, what it refuses, when it asks to be requeued.

The worker's place is taken by small shell programs, and `scontrol` by a fake that notes how it was called (the real one
is another test's subject). The script is run as SLURM runs it: by its own first line, with files as arguments.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kd_assets_tests.patience import PATIENCE_S

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "task.sbatch"
SECRET = "hf_VerySecretValue'with a quote"
FAKE_SCONTROL = """#!/bin/bash
# A fake scontrol: notes its arguments, and fails as often as the file `failures` says.
echo "$*" >> {folder}/requeues
echo "this is a fake scontrol" >&2
left=$(cat {folder}/failures 2>/dev/null || echo 0)
[ "$left" -gt 0 ] || exit 0
echo $((left - 1)) > {folder}/failures
exit 1
"""
LISTENS = """
    trap 'echo flushed; exit 75' USR1 TERM
    echo ready
    while :; do sleep 0.02; done
"""


class Script:
    """One start of the batch script under what it takes for SLURM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {
            "SLURM_CLUSTER_NAME": "made_up",
            "SLURM_JOB_ID": "14",
            "SLURM_ARRAY_JOB_ID": "14",
            "SLURM_ARRAY_TASK_ID": "3",
        }
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "bin").mkdir()
        self._program("bin/scontrol", FAKE_SCONTROL.format(folder=shlex.quote(str(folder))))
        # The pauses between two calls of scontrol are for real controllers.
        self._program("bin/sleep", "#!/bin/bash\n# A fake sleep: no longer than 0.02 s.\nexec /bin/sleep 0.02\n")

    def _program(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(
        self,
        worker: str,
        *,
        environment: str = "",
        secrets: Path | None = None,
        offset: int = 0,
        wait_for: str = "ready",
    ) -> None:
        """Start it with `worker` as the Python of the compute environment; returns once it has said `wait_for`."""
        python = self._program("python", "#!/bin/bash\n" + textwrap.dedent(worker))
        environment_file = self.folder / "environment file.sh"
        environment_file.write_text(f"export KD_PYTHON={shlex.quote(str(python))}\n{environment}\n")
        arguments = ["job file.json", str(offset), str(environment_file), str(secrets or "-")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [SCRIPT, *arguments],
                env={"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "HOME": str(self.folder)} | self.variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE_S
        while wait_for not in self.log and self.process.poll() is None:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def requeues(self) -> list[str]:
        path = self.folder / "requeues"
        return path.read_text().splitlines() if path.exists() else []

    def send(self, number: signal.Signals) -> None:
        """To the script alone, as `--signal=B:` does."""
        assert self.process is not None
        self.process.send_signal(number)

    def status(self) -> int:
        assert self.process is not None
        return self.process.wait(PATIENCE_S)

    def run(self, worker: str, **options: object) -> int:
        self.start(worker, **options)  # type: ignore[arg-type]
        return self.status()

    def fail_scontrol(self, times: int) -> None:
        (self.folder / "failures").write_text(str(times))

    def secrets(self, text: str, mode: int = 0o600) -> Path:
        path = self.folder / "secrets.env"
        path.write_text(text)
        path.chmod(mode)
        return path


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    folder = tmp_path / "a folder with spaces & 'quotes'"
    folder.mkdir()
    made = Script(folder)
    yield made
    if made.process is not None and made.process.poll() is None:
        os.killpg(made.process.pid, signal.SIGKILL)
        made.process.wait(PATIENCE_S)


# ---------------------------------------------------------------------- arguments and environment


def test_the_worker_gets_the_job_file_and_the_offset(script: Script) -> None:
    assert script.run('printf "<%s>" "$@"') == 0
    assert script.log == "<-m><kd_assets.worker><job file.json>"
    script.run('printf "<%s>" "$@"', offset=1001)
    assert script.log.endswith("<-m><kd_assets.worker><job file.json><--task-offset><1001>")


def test_the_environment_file_may_do_what_sites_do(script: Script) -> None:
    """Unset variables, failing commands, exit-on-error and tracing left on: none of it reaches the rest."""
    lines = 'export SITE="x${NOT_SET_AT_ALL}"\nfalse\nset -ex\nexport LAST=1'
    assert script.run('echo "$SITE $LAST"', environment=lines) == 0
    assert script.log.splitlines()[-1] == "x 1"
    assert "+ [" not in script.log, "tracing is off again"


def test_an_environment_file_that_cannot_be_read_is_named(script: Script) -> None:
    script.start("true")
    script.status()
    run = subprocess.run([SCRIPT, "job.json", "0", "/not/there.sh", "-"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "the environment file /not/there.sh cannot be read" in run.stderr


def test_a_python_that_is_not_on_this_node_ends_the_task_with_127(script: Script) -> None:
    assert script.run("true", environment="export KD_PYTHON=/not/on/this/node") == 127
    assert "/not/on/this/node" in script.log


# ---------------------------------------------------------------------- secrets


def test_a_secret_reaches_the_worker_and_nothing_that_is_written(script: Script) -> None:
    secrets = script.secrets(f"HF_TOKEN={shlex.quote(SECRET)}\n")
    worker = f'[ "$HF_TOKEN" = {shlex.quote(SECRET)} ] && echo it is there; echo "args: $*"'
    assert script.run(worker, secrets=secrets, environment="set -x") == 0
    assert "it is there" in script.log
    assert "VerySecretValue" not in script.log


def test_a_traced_script_does_not_show_a_secret(script: Script) -> None:
    script.variables["SHELLOPTS"] = "xtrace"  # every bash traces, as if by `bash -x`
    secrets = script.secrets(f"HF_TOKEN={shlex.quote(SECRET)}\n")
    assert script.run("set +x; true", secrets=secrets) == 0
    assert "VerySecretValue" not in script.log


@pytest.mark.parametrize("mode", [0o640, 0o644, 0o660, 0o700])
def test_a_secrets_file_of_another_mode_is_refused(script: Script, mode: int) -> None:
    secrets = script.secrets(f"HF_TOKEN={shlex.quote(SECRET)}\n", mode)
    assert script.run("echo the worker ran", secrets=secrets) == 2
    assert f"has mode 0{mode:o}, expected 0600: chmod 600 it" in script.log
    assert "the worker ran" not in script.log
    assert "VerySecretValue" not in script.log


def test_a_secrets_file_that_is_none_is_refused(script: Script) -> None:
    real = script.secrets("HF_TOKEN=x\n")
    link = script.folder / "link.env"
    link.symlink_to(real)
    for path in (link, script.folder, script.folder / "missing"):
        assert script.run("echo the worker ran", secrets=path) == 2
    assert script.log.count("is not a regular file") == 3
    assert "the worker ran" not in script.log


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_secrets_file_of_another_user_is_refused(script: Script) -> None:
    secrets = script.secrets("HF_TOKEN=x\n")
    os.chown(secrets, 12345, -1)
    assert script.run("echo the worker ran", secrets=secrets) == 2
    assert "is not of user root" in script.log


@pytest.mark.parametrize("text", [f"{SECRET}\n", "HF_TOKEN hf_VerySecretValue\n", "HF_TOKEN=$(hf_VerySecretValue\n"])
def test_a_malformed_secrets_file_is_refused_without_quoting_it(script: Script, text: str) -> None:
    assert script.run("echo the worker ran", secrets=script.secrets(text)) == 2
    assert "is not made of lines NAME='value'" in script.log
    assert "VerySecretValue" not in script.log


# ---------------------------------------------------------------------- signals and requeueing


def test_usr1_lets_the_worker_flush_and_requeues_this_one_task_of_the_array(script: Script) -> None:
    """By array and index: SLURM_JOB_ID of an array's last task is that of the whole array."""
    script.start(LISTENS)
    script.send(signal.SIGUSR1)
    assert script.status() == 75
    assert script.requeues == ["requeue 14_3"]
    assert "flushed" in script.log


def test_a_job_that_is_no_array_is_requeued_by_its_id(script: Script) -> None:
    del script.variables["SLURM_ARRAY_JOB_ID"], script.variables["SLURM_ARRAY_TASK_ID"]
    script.start(LISTENS)
    script.send(signal.SIGUSR1)
    assert script.status() == 75
    assert script.requeues == ["requeue 14"]


def test_a_controller_that_does_not_answer_at_once_is_asked_again(script: Script) -> None:
    script.fail_scontrol(2)
    script.start(LISTENS)
    script.send(signal.SIGUSR1)
    assert script.status() == 75
    assert len(script.requeues) == 3
    assert "could not be requeued" not in script.log


def test_a_task_that_cannot_be_requeued_says_so_and_ends_resumable(script: Script) -> None:
    script.fail_scontrol(100)
    script.start(LISTENS)
    script.send(signal.SIGUSR1)
    assert script.status() == 75
    assert len(script.requeues) == 5
    assert "task 14_3 could not be requeued" in script.log


def test_term_lets_the_worker_flush_and_never_requeues(script: Script) -> None:
    script.start(LISTENS)
    script.send(signal.SIGTERM)
    assert script.status() == 75
    assert script.requeues == []
    assert "flushed" in script.log


@pytest.mark.parametrize("order", [(signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR1)])
def test_term_has_the_last_word_whichever_came_first(script: Script, order: tuple[signal.Signals, ...]) -> None:
    flush = 'while [ ! -e "$HOME/gate" ]; do /bin/sleep 0.02; done; exit 75'
    script.start(f"trap '{flush}' USR1 TERM; echo ready; while :; do sleep 0.02; done")
    for number in order:
        script.send(number)
        time.sleep(0.1)
    (script.folder / "gate").touch()
    assert script.status() == 75
    assert script.requeues == []


@pytest.mark.parametrize(("status", "text"), [(0, "exit 0"), (1, "exit 1"), (2, "exit 2"), (137, "kill -9 $$")])
def test_a_worker_that_ends_otherwise_after_usr1_is_not_requeued(script: Script, status: int, text: str) -> None:
    script.start(f"trap '{text}' USR1; echo ready; while :; do sleep 0.02; done")
    script.send(signal.SIGUSR1)
    assert script.status() == status
    assert script.requeues == []


def test_the_local_scheduler_starts_its_tasks_again_itself(script: Script) -> None:
    script.variables["SLURM_CLUSTER_NAME"] = "local"
    script.start(LISTENS)
    script.send(signal.SIGUSR1)
    assert script.status() == 75
    assert script.requeues == []


def test_usr1_while_the_environment_is_set_up_requeues_and_starts_nothing(script: Script) -> None:
    script.start("echo the worker ran", environment='echo ready; while [ ! -e "$HOME/gate" ]; do /bin/sleep 0.02; done')
    script.send(signal.SIGUSR1)
    (script.folder / "gate").touch()
    assert script.status() == 75
    assert script.requeues == ["requeue 14_3"]
    assert "the worker ran" not in script.log


def test_a_worker_that_usr1_kills_before_it_listens_is_requeued(script: Script) -> None:
    script.start("echo ready; exec /bin/sleep 300")
    script.send(signal.SIGUSR1)
    assert script.status() == 75
    assert script.requeues == ["requeue 14_3"]


# ---------------------------------------------------------------------- several processes of one task

FOUR = "export KD_N_PROCESSES=4"


def test_each_of_several_processes_knows_which_it_is(script: Script) -> None:
    assert script.run('echo "process_index $KD_PROCESS_INDEX of $KD_N_PROCESSES"', environment=FOUR) == 0
    assert sorted(script.log.splitlines()) == [f"process_index {process_index} of 4" for process_index in range(4)]


def test_usr1_reaches_all_processes_and_requeues_once_all_have_flushed(script: Script) -> None:
    script.start(LISTENS.replace("echo ready", 'echo "ready-$KD_PROCESS_INDEX"'), environment=FOUR, wait_for="ready-3")
    while script.log.count("ready-") < 4:
        time.sleep(0.01)
    script.send(signal.SIGUSR1)
    assert script.status() == 75
    assert script.log.count("flushed") == 4
    assert script.requeues == ["requeue 14_3"]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((0, 0, 0, 0), 0),
        ((0, 1, 0, 0), 1),
        ((0, 2, 0, 0), 2),
        ((2, 1, 2, 0), 1),
        ((1, 0, 137, 2), 137),
        ((1, 75, 137, 0), 75),
    ],
)
def test_the_status_of_several_processes_is_that_of_the_worst(
    script: Script, statuses: tuple[int, ...], expected: int
) -> None:
    worker = f"statuses=({' '.join(map(str, statuses))}); exit ${{statuses[KD_PROCESS_INDEX]}}"
    assert script.run(worker, environment=FOUR) == expected


def test_one_process_that_fails_leaves_the_others_at_work(script: Script) -> None:
    worker = '[ "$KD_PROCESS_INDEX" = 0 ] && kill -9 $$; /bin/sleep 0.3; echo "process $KD_PROCESS_INDEX is done"'
    assert script.run(worker, environment=FOUR) == 137
    assert [f"process {i} is done" in script.log for i in range(4)] == [
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("ranks", ["0", "four", "-1", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(script: Script, ranks: str) -> None:
    assert script.run("echo the worker ran", environment=f"export KD_N_PROCESSES={ranks}") == 2
    assert f"KD_N_PROCESSES is '{ranks}', expected a number of processes" in script.log
