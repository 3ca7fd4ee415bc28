"""Runs the commands of a scheduler, here or on a login node over ssh, and says plainly when there was no answer.

A command is an argv; no shell reads it on this machine. Each call has a time limit, after which its whole process group
is killed, so that a controller that does not answer neither blocks a run nor leaves processes behind.

SLURM's commands get a small environment of their own, not the caller's: sbatch hands its environment to the job
(`--export=ALL`, see `client.sbatch_argv`), and a token in the environment of a Dagster process must not get there. The
same environment fixes what the parsers rely on: `SLURM_TIME_FORMAT`, `SLURM_BITSTR_LEN` and the locale.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from kd_assets.errors import SchedulerError, SchedulerUnreachableError
from kd_assets.scheduler.slurm.profile import Profile

FOR_COMMANDS_ONLY = ("LD_LIBRARY_PATH", "SLURM_JWT")
"""What SLURM's commands may need of the caller's environment, to be loaded and to be let in. sbatch hands it on to the
jobs, which begin by forgetting it (see `SlurmSubmitter.environment_text`): the libraries are this machine's, and the
token is nobody else's."""

KEPT_VARIABLES = ("HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "TZ", "SLURM_CONF", *FOR_COMMANDS_ONLY)
"""What SLURM's commands, and through sbatch the jobs, see of the caller's environment. Of the rest SLURM_CLUSTERS
counts, too: see `command_runner_for`."""

OWN_VARIABLES = {
    "SLURM_TIME_FORMAT": "%s",  # seconds since the epoch: no time zone, no hour that comes twice in autumn
    "SLURM_BITSTR_LEN": "0",  # `14_[0-3,7]` is cut after 64 characters otherwise
}
_OF_A_CLUSTER = frozenset({"sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo"})
CONNECT_TIMEOUT_S = 10
_NOT_STARTED_FOR_NOW = frozenset(
    {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETXTBSY, errno.ETIMEDOUT}
)
"""A machine that is full of processes, or whose mount with SLURM's programs is away: it passes."""
_PATH = "/usr/local/bin:/usr/bin:/bin"
_REAP_S = 5.0


class CommandMissingError(SchedulerError):
    """The command is not installed where it was to run. It did nothing."""


UMASK = 0o027
"""SLURM hands it on to the job, whose logs may quote documents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a command that ran to its end said. `status` is its exit status, negative for a signal."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str


class CommandRunner(Protocol):
    """Where SLURM's commands run."""

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Answer:
        """Run a command to its end, whatever its exit status.

        Raises SchedulerUnreachableError when there is no answer: nobody knows then whether the command took effect.
        Raises CommandMissingError when the command is not installed; it did nothing then.
        """
        ...


class LocalRunner:
    """Runs commands on this machine."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """`environment` is what is chosen from (see `KEPT_VARIABLES`); None: this process's own."""
        self._environment = clean_environment(os.environ if environment is None else environment)

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Answer:
        return _run(argv, timeout_s=timeout_s, environment=self._environment)


class SshRunner:
    """Runs commands on a login node, as `ssh target`, with the user's own ssh configuration, keys and agent.

    What is sent is `/bin/sh`, and on its standard input one line of script: so whatever login shell the user has there
    never reads our words, and only `/bin/sh`'s quoting counts (`shlex`). The command runs in the same small environment
    as on this machine, built from the login node's own, and under `timeout`: when the connection is lost or given up,
    the command is gone by then too, and an unanswered sbatch cannot succeed minutes later. A call may take
    CONNECT_TIMEOUT_S longer than its limit.

    Its output comes back between two marks drawn for this call. Chatter of start-up files stays outside of them; and
    the second mark carries the exit status. So a command that ends with 255 (sbatch does) is told from an ssh that
    failed, which ends with 255 as well: without the second mark there was no answer.
    """

    def __init__(
        self, target: str, options: tuple[str, ...] = (), *, environment: Mapping[str, str] | None = None
    ) -> None:
        """`target`: `user@login` or a name of ~/.ssh/config. `options` go before it on ssh's command line.

        `environment` is ssh's own; None: this process's (ssh needs its agent's socket). Nothing of it reaches the login
        node, unless the user's configuration says SendEnv; and nothing at all of it reaches a job.
        Raises SchedulerError for a target that ssh would take for an option.
        """
        if not target or target.startswith("-") or not target.isprintable() or " " in target:
            raise SchedulerError(
                f"{target!r} is no target for ssh: set ssh to user@host, or to a name of ~/.ssh/config"
            )
        self._target, self._options = target, options
        self._environment = dict(os.environ if environment is None else environment)

    def ssh_argv(self) -> list[str]:
        """The command line on this machine. Of each setting ssh takes the first: ours for BatchMode, since nobody is
        there to type a password; the profile's before our default for ConnectTimeout."""
        ours = ["-o", "BatchMode=yes", "-T", "-x"]
        default = ["-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}"]
        return ["ssh", *ours, *self._options, *default, "--", self._target, "/bin/sh"]

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Answer:
        mark = f"kd-{secrets.token_hex(8)}"
        answer = _run(
            self.ssh_argv(),
            timeout_s=timeout_s + CONNECT_TIMEOUT_S,
            environment=self._environment,
            stdin=remote_script(argv, timeout_s=timeout_s, mark=mark),
            said=f"{argv[0]} on {self._target}",
        )
        head, began, rest = answer.stdout.partition(f"{mark} begins\n")
        stdout, ended, status = rest.rpartition(f"{mark} ends ")
        if not (began and ended and status.endswith("\n")):
            raise SchedulerUnreachableError(
                f"ssh {self._target} gave no answer (exit status {answer.status}): "
                f"{_words(answer.stderr) or _words(head)}. Try `ssh -o BatchMode=yes {self._target} true`"
            )
        if (code := int(status)) == 127:
            raise CommandMissingError(
                f"{argv[0]} was not found on {self._target}: its folder must be in the PATH of commands run by ssh, or "
                "in that of /etc/profile"
            )
        if code == 137:  # `timeout` kills the command and itself; 137 is also what anybody else's kill -9 gives
            raise SchedulerUnreachableError(f"{argv[0]} on {self._target} gave no answer within {timeout_s:g} s")
        return Answer(argv=tuple(argv), status=code, stdout=stdout, stderr=answer.stderr)


def command_runner_for(profile: Profile, environment: Mapping[str, str] = os.environ) -> CommandRunner:
    """Where a profile wants SLURM's commands to run, and about which cluster: the profile's word, else SLURM_CLUSTERS.

    Raises SchedulerError where that names several: a job would be on any of them, and is looked for on one.
    """
    runner = LocalRunner() if profile.ssh is None else SshRunner(profile.ssh, profile.ssh_options)
    cluster = cluster_asked(profile, environment)
    if "," in cluster or cluster == "all":
        raise SchedulerError(
            f"SLURM_CLUSTERS is {cluster!r}, and a job is followed on one cluster: name it as `clusters` in the "
            f"profile {profile.name}, or unset SLURM_CLUSTERS where Dagster runs"
        )
    return ClusterRunner(runner, cluster) if cluster else runner


def cluster_asked(profile: Profile, environment: Mapping[str, str] = os.environ) -> str:
    """The profile's word, else SLURM_CLUSTERS, which counts on this machine only; empty: SLURM's own."""
    return profile.clusters or ("" if profile.ssh else environment.get("SLURM_CLUSTERS", ""))


class ClusterRunner:
    """Runs commands about one cluster, whichever SLURM's configuration has in mind."""

    def __init__(self, runner: CommandRunner, cluster: str) -> None:
        self._runner, self._option = runner, f"--clusters={cluster}"

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Answer:
        """See `CommandRunner`."""
        command, *rest = argv
        says_it = any(word.startswith("--clusters=") for word in rest)
        about = [] if says_it or command not in _OF_A_CLUSTER or rest == ["--version"] else [self._option]
        return self._runner.run([command, *about, *rest], timeout_s=timeout_s)


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What SLURM's commands get of an environment: `KEPT_VARIABLES`, and what our parsers rely on."""
    kept = {name: environment[name] for name in KEPT_VARIABLES if name in environment}
    return {"PATH": _PATH} | kept | {"LC_ALL": "C"} | OWN_VARIABLES


def remote_script(argv: Sequence[str], *, timeout_s: float, mark: str) -> str:
    """One line of POSIX shell that runs `argv` on a login node; see `SshRunner` for what it prints.

    Raises SchedulerError for a NUL, which no argument can hold.
    """
    if any("\0" in word for word in argv):
        raise SchedulerError(f"no command takes an argument with a NUL character: {argv!r}")
    kept = " ".join(f'${{{name}+"{name}=${name}"}}' for name in KEPT_VARIABLES)
    own = shlex.join(f"{name}={value}" for name, value in ({"LC_ALL": "C"} | OWN_VARIABLES).items())
    # Some sites put SLURM into the PATH of login shells only. In a subshell, since a profile may print, read or exit.
    path = 'p=$(. /etc/profile >/dev/null 2>&1 </dev/null; printf %s "$PATH")'
    look = f'command -v {shlex.quote(argv[0])} >/dev/null 2>&1 || {{ {path}; PATH="${{p:-$PATH}}"; }}'
    command = f"env -i {kept} {own} timeout -s KILL {timeout_s:g} {shlex.join(argv)} </dev/null"
    # In braces: a line that was cut off by a lost connection is a syntax error, not half a command.
    return (
        f"{{ umask {UMASK:03o}; {look}; printf '%s begins\\n' {mark}; {command}; printf '%s ends %d\\n' {mark} $?; }}\n"
    )


def _run(
    argv: Sequence[str], *, timeout_s: float, environment: Mapping[str, str], stdin: str = "", said: str = ""
) -> Answer:
    """Run a command in a process group of its own, with files for its output.

    Files, not pipes: ssh may leave a master connection behind (ControlPersist) that holds its standard error open, and
    reading a pipe to its end would wait for that.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin.encode(errors="surrogateescape"))
        given.seek(0)
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=given,
                stdout=out,
                stderr=err,
                env=dict(environment),
                start_new_session=True,
                umask=UMASK,
            )
        except FileNotFoundError as e:
            package = "openssh-client" if argv[0] == "ssh" else "slurm-client"
            raise CommandMissingError(
                f"{argv[0]} is not installed here (not in PATH={environment.get('PATH', '')}): install the package "
                f"{package}, or set `ssh:` in the profile to a login node that has it"
            ) from e
        except ValueError as e:  # a NUL in an argument
            raise SchedulerError(f"{argv[0]} cannot be run with {argv[1:]!r}: {e}") from e
        except OSError as e:
            said_so = f"{argv[0]} could not be started: {e}"
            if e.errno in _NOT_STARTED_FOR_NOW:
                raise SchedulerUnreachableError(said_so) from e
            raise SchedulerError(said_so) from e  # an argument that is too long, a file that is no program
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired as e:
            _kill_group(process)
            raise SchedulerUnreachableError(
                f"{said or argv[0]} gave no answer within {timeout_s:g} s and was killed: {_words(_text(err))}".rstrip(
                    ": "
                )
            ) from e
        except BaseException:  # interrupted: nobody would learn what a command left running does
            _kill_group(process)
            raise
        return Answer(argv=tuple(argv), status=status, stdout=_text(out), stderr=_text(err))


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that was not yet waited for (so its id is still its own) and all of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process in uninterruptible sleep goes when its disk does
        process.wait(_REAP_S)


def _text(file: IO[bytes]) -> str:
    """All that was written; other users' job names may be any bytes."""
    file.seek(0)
    return file.read().decode(errors="replace")


def _words(text: str, limit: int = 500) -> str:
    """The end of an error text, on one line."""
    return " ".join(text.split())[-limit:]
