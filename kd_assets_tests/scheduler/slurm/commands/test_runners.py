"""Running commands with real processes. ssh's place is taken by a program that does what sshd does with its words."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kd_assets.errors import SchedulerError, SchedulerUnreachableError
from kd_assets.scheduler.slurm.commands.runners import (
    Answer,
    CommandMissingError,
    LocalRunner,
    SshRunner,
    clean_environment,
    command_runner_for,
    remote_script,
)
from kd_assets.scheduler.slurm.profile import Profile
from kd_assets_tests.patience import PATIENCE_S

HOSTILE = (
    "",
    " ",
    "two  spaces",
    "it's",
    'say "hi"',
    "$(touch pwned)",
    "`touch pwned`",
    "$HOME ${PATH}",
    "a;touch pwned",
    "a&touch pwned",
    "a|touch pwned",
    "> pwned",
    "line\nend",
    "tab\tand\rreturn",
    "back\\slash\\",
    "*?[a-z]",
    "~root",
    "!history",
    "--option=1",
    "-",
    "%A_%a",
    "#comment",
    "né→中",
    "'; touch pwned; '",
    "}; touch pwned; {",
)
LONG = f"3141{os.getpid()}."
"""What a process sleeps that is looked for by it: of this test's process alone."""

MakeSsh = Callable[..., dict[str, str]]


@pytest.fixture
def make_ssh(tmp_path: Path) -> MakeSsh:
    """A program `ssh` that runs its command as sshd does: all words joined, read by the login shell's `-c`."""

    def make(body: str = "", login_shell: str = "/bin/sh") -> dict[str, str]:
        program = tmp_path / "bin" / "ssh"
        program.parent.mkdir()
        program.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\n{body}\n'
            f'while [ "$1" != -- ]; do shift; done; shift 2\ncd {tmp_path}; exec {login_shell} -c "$*"\n'
        )
        program.chmod(0o755)
        return {"PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}

    return make


def listed(columns: str) -> list[str]:
    return subprocess.run(["ps", "-eo", columns], capture_output=True, text=True, check=True).stdout.splitlines()


def wait_until_gone(word: str) -> None:
    """Until no process has this in its command line: who is killed is there until it has its turn to end."""
    end = time.monotonic() + PATIENCE_S
    while found := [line for line in listed("args") if word in line]:
        assert time.monotonic() < end, found
        time.sleep(0.02)


def test_a_command_says_its_status_and_both_streams() -> None:
    answer = LocalRunner().run(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=PATIENCE_S)
    assert (answer.status, answer.stdout, answer.stderr) == (3, "out\n", "err\n")


def test_a_command_that_is_killed_has_a_negative_status() -> None:
    assert LocalRunner().run(["sh", "-c", "kill -9 $$"], timeout_s=PATIENCE_S).status == -9


def test_no_shell_reads_the_words_of_a_local_command(tmp_path: Path) -> None:
    answer = LocalRunner().run(["printf", "%s\\0", *HOSTILE], timeout_s=PATIENCE_S)
    assert answer.stdout.split("\0")[:-1] == list(HOSTILE)
    assert not list(tmp_path.iterdir())


def test_bytes_that_are_no_text_do_not_break_an_answer() -> None:
    assert LocalRunner().run(["printf", r"a\377b\n"], timeout_s=PATIENCE_S).stdout == "a�b\n"


def test_a_command_has_nothing_to_read() -> None:
    assert LocalRunner().run(["cat"], timeout_s=PATIENCE_S).stdout == ""


def test_commands_see_no_variable_of_ours_that_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    monkeypatch.setenv("SLURM_JOB_ID", "12")  # we may run inside a job ourselves
    monkeypatch.setenv("SLURM_CONF", "/etc/other/slurm.conf")
    seen = LocalRunner().run(["env"], timeout_s=PATIENCE_S).stdout
    assert "hf_secret" not in seen
    assert not {"SBATCH_PARTITION", "SLURM_JOB_ID"} & {line.partition("=")[0] for line in seen.splitlines()}
    assert {"SLURM_CONF=/etc/other/slurm.conf", "SLURM_TIME_FORMAT=%s", "SLURM_BITSTR_LEN=0"} <= set(seen.splitlines())


def test_an_environment_without_path_still_finds_commands() -> None:
    assert LocalRunner({}).run(["true"], timeout_s=PATIENCE_S).status == 0


def test_a_missing_command_names_its_package_and_the_way_out() -> None:
    with pytest.raises(CommandMissingError, match=r"squeue is not installed here .* package slurm-client.* `ssh:`"):
        LocalRunner({"PATH": "/nonexistent"}).run(["squeue"], timeout_s=PATIENCE_S)


def test_a_word_that_no_command_can_take_is_refused() -> None:
    with pytest.raises(SchedulerError, match="null byte"):
        LocalRunner().run(["echo", "a\0b"], timeout_s=PATIENCE_S)
    with pytest.raises(SchedulerError, match="could not be started"):
        LocalRunner().run(["echo", "a" * 3_000_000], timeout_s=PATIENCE_S)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE, errno.ENOMEM, errno.ESTALE])
def test_a_machine_that_cannot_start_a_command_for_now_gives_no_answer(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*args: object, **settings: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", full)
    with pytest.raises(SchedulerUnreachableError, match="squeue could not be started"):
        LocalRunner().run(["squeue"], timeout_s=1)


def test_no_answer_in_time_names_the_command_and_the_seconds_and_leaves_no_process() -> None:
    with pytest.raises(SchedulerUnreachableError, match=r"sh gave no answer within 3 s and was killed. waiting"):
        LocalRunner().run(["sh", "-c", f"trap '' TERM; echo waiting >&2; sleep {LONG}1 & sleep {LONG}2"], timeout_s=3)
    wait_until_gone(f"sleep {LONG}")


def test_a_process_that_keeps_our_output_open_does_not_hold_us_up() -> None:
    # As ssh's ControlPersist leaves its master connection behind.
    answer = LocalRunner().run(["sh", "-c", f"setsid sleep {LONG}6 & echo done"], timeout_s=PATIENCE_S)
    assert answer.stdout == "done\n"
    (line,) = [line for line in listed("pid,args") if f"sleep {LONG}6" in line]
    os.kill(int(line.split()[0]), signal.SIGKILL)  # it lives on, and was not waited for


def test_an_interrupted_call_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = subprocess.Popen.wait, []

    def wait(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        LocalRunner().run(["sleep", f"{LONG}3"], timeout_s=PATIENCE_S)
    wait_until_gone(f"sleep {LONG}3")


def test_many_calls_at_once_keep_their_answers_apart() -> None:
    answers: dict[int, str] = {}

    def ask(i: int) -> None:
        answers[i] = LocalRunner().run(["echo", str(i)], timeout_s=PATIENCE_S).stdout

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: f"{i}\n" for i in range(8)}


# Over ssh


@pytest.mark.parametrize("word", HOSTILE)
def test_a_remote_shell_changes_no_word(word: str, tmp_path: Path) -> None:
    script = remote_script(["printf", "%s|", word, "end"], timeout_s=10, mark="mark")
    done = subprocess.run(["/bin/sh"], input=script.encode(), capture_output=True, cwd=tmp_path)
    assert done.stdout.decode() == f"mark begins\n{word}|end|mark ends 0\n"
    assert not list(tmp_path.iterdir())


def test_a_script_that_was_cut_off_runs_nothing(tmp_path: Path) -> None:
    script = remote_script(["touch", "pwned"], timeout_s=10, mark="mark")
    for length in range(len(script) - 2):
        subprocess.run(["/bin/sh"], input=script[:length].encode(), capture_output=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_ssh_gets_our_settings_then_the_profiles_then_the_target(make_ssh: MakeSsh, tmp_path: Path) -> None:
    runner = SshRunner("me@login", ("-F", "/etc/kd/ssh config"), environment=make_ssh())
    assert runner.run(["echo", "hi"], timeout_s=PATIENCE_S).stdout == "hi\n"
    assert (tmp_path / "words").read_text().splitlines() == [
        "-o", "BatchMode=yes", "-T", "-x", "-F", "/etc/kd/ssh config", "-o", "ConnectTimeout=10", "--", "me@login",
        "/bin/sh",
    ]  # fmt: skip


def test_hostile_words_pass_through_ssh(make_ssh: MakeSsh, tmp_path: Path) -> None:
    answer = SshRunner("login", environment=make_ssh()).run(["printf", "%s\\0", *HOSTILE], timeout_s=PATIENCE_S)
    assert answer.stdout.split("\0")[:-1] == list(HOSTILE)
    assert {p.name for p in tmp_path.iterdir()} == {"bin", "words"}


def test_a_remote_command_has_a_small_environment_and_nothing_to_read(make_ssh: MakeSsh) -> None:
    runner = SshRunner("login", environment=make_ssh())
    seen = {line.partition("=")[0] for line in runner.run(["env"], timeout_s=PATIENCE_S).stdout.splitlines()}
    assert seen == {"HOME", "PATH", "LC_ALL", "SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN"}
    assert runner.run(["cat"], timeout_s=PATIENCE_S).stdout == ""


def test_a_remote_exit_status_of_255_is_an_answer(make_ssh: MakeSsh) -> None:
    # sbatch ends with 255 for an option it does not know: waiting would not change that.
    answer = SshRunner("login", environment=make_ssh()).run(["sh", "-c", "echo no >&2; exit 255"], timeout_s=PATIENCE_S)
    assert (answer.status, answer.stdout, answer.stderr) == (255, "", "no\n")


def test_an_ssh_that_fails_is_no_answer(make_ssh: MakeSsh) -> None:
    environment = make_ssh("echo 'ssh: connect to host login port 22: Connection refused' >&2; exit 255")
    with pytest.raises(
        SchedulerUnreachableError, match=r"ssh login gave no answer .*255.*Connection refused.*Try `ssh"
    ):
        SshRunner("login", environment=environment).run(["true"], timeout_s=PATIENCE_S)


def test_a_connection_that_breaks_is_no_answer_whatever_came_before(make_ssh: MakeSsh) -> None:
    runner = SshRunner("login", environment=make_ssh())
    with pytest.raises(SchedulerUnreachableError, match="gave no answer"):
        runner.run(
            ["sh", "-c", "echo half; kill -9 $(ps -o ppid= $PPID)"], timeout_s=PATIENCE_S
        )  # the shell around `timeout`


def test_chatter_of_start_up_files_is_no_part_of_an_answer(make_ssh: MakeSsh) -> None:
    runner = SshRunner("login", environment=make_ssh("echo Welcome to the cluster; echo 17"))
    assert runner.run(["echo", "14"], timeout_s=PATIENCE_S).stdout == "14\n"


def test_a_remote_command_that_does_not_answer_is_killed_there(make_ssh: MakeSsh) -> None:
    with pytest.raises(SchedulerUnreachableError, match=r"sleep on login gave no answer within 0.3 s"):
        SshRunner("login", environment=make_ssh()).run(["sleep", f"{LONG}4"], timeout_s=0.3)
    wait_until_gone(f"sleep {LONG}4")


def test_an_ssh_that_hangs_is_killed(make_ssh: MakeSsh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_assets.scheduler.slurm.commands.runners.CONNECT_TIMEOUT_S", 0)
    with pytest.raises(SchedulerUnreachableError, match=r"squeue on login gave no answer within 0.3 s"):
        SshRunner("login", environment=make_ssh(f"sleep {LONG}5")).run(["squeue"], timeout_s=0.3)
    wait_until_gone(f"sleep {LONG}5")


def test_a_command_that_is_not_on_the_login_node_is_said_so(make_ssh: MakeSsh) -> None:
    with pytest.raises(CommandMissingError, match="kd_no_such was not found on login: its folder must"):
        SshRunner("login", environment=make_ssh()).run(["kd_no_such"], timeout_s=PATIENCE_S)


def test_any_login_shell_will_do(make_ssh: MakeSsh, tmp_path: Path) -> None:
    (tmp_path / "csh").write_text(
        '#!/bin/sh\n[ "$2" = /bin/sh ] || exit 99\nexec /bin/sh "$@"\n'
    )  # reads one word only
    (tmp_path / "csh").chmod(0o755)
    runner = SshRunner("login", environment=make_ssh(login_shell=str(tmp_path / "csh")))
    assert runner.run(["echo", "it's\n!"], timeout_s=PATIENCE_S).stdout == "it's\n!\n"


@pytest.mark.parametrize("target", ["", "-oProxyCommand=touch pwned", "a b", "a\nb"])
def test_a_target_that_ssh_would_not_take_for_one_is_refused(target: str) -> None:
    with pytest.raises(SchedulerError, match="is no target for ssh"):
        SshRunner(target)


def test_a_missing_ssh_names_its_package() -> None:
    with pytest.raises(CommandMissingError, match=r"ssh is not installed here .* openssh-client"):
        SshRunner("login", environment={"PATH": "/nonexistent"}).run(["true"], timeout_s=PATIENCE_S)


def test_a_profile_says_where_commands_run() -> None:
    assert isinstance(command_runner_for(Profile(name="here")), LocalRunner)
    runner = command_runner_for(Profile(name="there", ssh="me@login", ssh_options=("-p", "2222")))
    assert isinstance(runner, SshRunner)
    assert shlex.join(runner.ssh_argv()) == (
        "ssh -o BatchMode=yes -T -x -p 2222 -o ConnectTimeout=10 -- me@login /bin/sh"
    )


@pytest.mark.parametrize(
    ("clusters", "environment", "expected"),
    [
        (None, {}, "sbatch --parsable"),
        ("c1", {}, "sbatch --clusters=c1 --parsable"),
        (None, {"SLURM_CLUSTERS": "c2"}, "sbatch --clusters=c2 --parsable"),
        ("c1", {"SLURM_CLUSTERS": "c2"}, "sbatch --clusters=c1 --parsable"),
    ],
)
def test_every_command_is_about_the_cluster_of_the_profile_or_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, clusters: str | None, environment: dict[str, str], expected: str
) -> None:
    asked: list[str] = []

    def run(self: LocalRunner, argv: Sequence[str], *, timeout_s: float) -> Answer:
        asked.append(shlex.join(argv))
        return Answer(argv=tuple(argv), status=0, stdout="", stderr="")

    monkeypatch.setattr(LocalRunner, "run", run)
    runner = command_runner_for(Profile(name="here", clusters=clusters), environment)
    runner.run(["sbatch", "--parsable"], timeout_s=1)
    runner.run(["sbatch", "--version"], timeout_s=1)
    runner.run(["true"], timeout_s=1)
    assert asked == [expected, "sbatch --version", "true"]
    for command in ("squeue", "sacct", "scancel", "scontrol", "sinfo"):
        runner.run([command, "x"], timeout_s=1)
        assert asked[-1] == expected.replace("sbatch", command).replace("--parsable", "x")


def test_several_clusters_in_the_environment_are_refused() -> None:
    with pytest.raises(SchedulerError, match=r"SLURM_CLUSTERS is 'c1,c2', .* name it as `clusters` in the prof"):
        command_runner_for(Profile(name="here"), {"SLURM_CLUSTERS": "c1,c2"})


def test_what_slurms_commands_need_to_be_loaded_and_let_in_reaches_them() -> None:
    needed = {"LD_LIBRARY_PATH": "/opt/slurm/lib", "SLURM_JWT": "secret", "SLURM_CONF": "/etc/x.conf"}
    assert clean_environment(needed).items() >= needed.items()


def test_the_clean_environment_keeps_what_jobs_need() -> None:
    kept = clean_environment({"HOME": "/home/me", "USER": "me", "PATH": "/opt/slurm/bin", "AWS_SECRET_ACCESS_KEY": "x"})
    assert kept == {
        "HOME": "/home/me", "USER": "me", "PATH": "/opt/slurm/bin", "LC_ALL": "C",
        "SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0",
    }  # fmt: skip
