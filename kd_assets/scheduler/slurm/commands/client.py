"""SLURM's own commands as functions: sbatch, squeue, sacct, scancel, scontrol, sinfo. No decisions.

Their text is read by `parsing`, their state words by `states`.
"""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path

from kd_assets.errors import SchedulerError, SchedulerMisusedError, SchedulerUnreachableError
from kd_assets.scheduler.folder import SLURM_LOG_PATTERN
from kd_assets.scheduler.job import JobSpec, Resources
from kd_assets.scheduler.slurm.commands.parsing import (
    ACCOUNTING_FIELDS,
    PARTITION_FIELDS,
    QUEUE_FIELDS,
    UNANSWERED,
    AccountingRow,
    PartitionInfo,
    QueueRow,
    SubmitAnswer,
    Unknown,
    excluded_nodes,
    hides_an_index,
    parse_accounting,
    parse_live_indices,
    parse_node_states,
    parse_partitions,
    parse_queue,
    read_submit_answer,
)
from kd_assets.scheduler.slurm.commands.runners import Answer, CommandMissingError, CommandRunner
from kd_assets.scheduler.slurm.profile import Profile

_FIRST_UTS = 1_000_000_000  # sacct refuses times since the epoch of fewer digits

_NAMES_A_CALL = 500

_IDS_A_CALL = 1000

_REFUSALS = (
    "Access/permission denied",
    "Invalid job id",
    "Job/step already completing or completed",
    "Job is no longer pending execution",
    "Invalid user",
    "Requested node configuration is not available",
)
"""In the text of the other commands: an answer, and waiting does not change it."""

_NOT_UNDERSTOOD = re.compile(
    r"unrecognized option|invalid option -- |option .*requires an argument|option .*is ambiguous|invalid keyword|"
    r"invalid entity|Invalid field requested|Invalid (job|node) format specification|Invalid job state specified|"
    r"Invalid time specification|invalid entry for --|Update of this parameter is not supported",
    re.IGNORECASE,
)
"""In their standard error: the question is wrong, whoever answers. Of a wrong field squeue and sinfo only say so there,
and end with 0."""


class Slurm:
    """A cluster's commands. Each raises SchedulerUnreachableError when there is no answer within `timeout_s`, and
    SchedulerMisusedError when SLURM does not understand what it is asked."""

    def __init__(self, run: CommandRunner, *, timeout_s: float) -> None:
        self._runner, self._timeout_s = run, timeout_s
        self._max_array_size: int | None = None

    def submit(self, argv: Sequence[str]) -> SubmitAnswer:
        """Run an sbatch command line that asks for `--parsable` output. Never raises for want of an answer."""
        try:
            return read_submit_answer(self._run(argv))
        except SchedulerUnreachableError as e:
            return Unknown(text=str(e))

    def queue_texts(self) -> list[str]:
        """One squeue call for all of this user's jobs, or two, as texts that `parse_queue` reads in any process."""
        # Without --array squeue folds a task that was requeued or held into its array's row of those that never
        # started, with their restart count of 0. (Only 22.05 knows --array-unique, which would not.)
        texts = [self._squeue("--array", "--states=all")]
        if hides_an_index(parse_queue(texts[0])):
            texts.append(self.folded_queue_text())
        return texts

    def queue(self) -> list[QueueRow]:
        """All of this user's jobs whose name is one of ours, ended ones until SLURM forgets them (MinJobAge)."""
        return parse_queue(*self.queue_texts())

    def folded_queue_text(self) -> str:
        """squeue's answer for what waits, arrays as ranges: the only one that has every index (`hides_an_index`)."""
        return self._squeue("--states=PENDING")

    def _squeue(self, *options: str) -> str:
        separator = _new_separator()
        fields = ",".join(f"{field}:{separator}" for field in QUEUE_FIELDS)
        return self._answer(["squeue", "--me", "--all", *options, f"--Format={fields}"]).stdout

    def accounting(self, names: Sequence[str], since: float) -> list[AccountingRow] | None:
        """Every attempt of the jobs with these names that lived at `since` (epoch) or later, oldest first.

        None where the site has no accounting. A new job takes up to five seconds to appear.
        """
        rows: list[AccountingRow] = []
        for i in range(0, len(names), _NAMES_A_CALL):
            separator = _new_separator()
            argv = [
                "sacct", "--duplicates", "--noheader", "--parsable2", f"--delimiter={separator}",
                f"--starttime=uts{max(int(since), _FIRST_UTS)}", f"--name={','.join(names[i : i + _NAMES_A_CALL])}",
                f"--format={','.join(ACCOUNTING_FIELDS)}",
            ]  # fmt: skip
            try:
                answer = self._run(argv)
            except CommandMissingError:
                return None
            if answer.status != 0:
                if "accounting storage is disabled" in answer.stderr:
                    return None
                raise _no_answer(answer)
            rows += parse_accounting(answer.stdout, separator)
        return rows

    def cancel(self, ids: Sequence[str]) -> None:
        """Ask for the end of jobs (`14`) or array tasks (`14_3`), and return before they are gone.

        One that SLURM does not know any more is no error.
        """
        for i in range(0, len(ids), _IDS_A_CALL):
            answer = self._run(["scancel", *ids[i : i + _IDS_A_CALL]])
            gone = [line for line in answer.stderr.splitlines() if "Invalid job id" in line]
            if answer.status != 0 and (not gone or len(gone) < len(answer.stderr.splitlines())):
                raise _no_answer(answer)

    def release(self, task_id: str) -> None:
        """Let a held task start. Raises SchedulerError when it may not, or is no longer there."""
        answer = self._run(["scontrol", "release", task_id])
        if answer.status != 0:
            raise _no_answer(answer)

    def exclude(self, task_id: str, nodes: Sequence[str], *, of: str | None = None) -> None:
        """Keep a task that waits from these nodes, too; or, `of` a list of tasks that are kept from the same nodes as
        this one, all. Raises SchedulerError when one no longer waits, or when no node would be left."""
        update = f"ExcNodeList={','.join([*self.excluded_nodes(task_id), *nodes])}"
        self._answer(["scontrol", "update", f"JobId={of or task_id}", update])

    def excluded_nodes(self, task_id: str) -> list[str]:
        """Which nodes a task is kept from, as SLURM folds them. Raises SchedulerError for one that it does not know."""
        return excluded_nodes(self._answer(["scontrol", "--oneliner", "show", "job", task_id]).stdout)

    def live_indices(self, job_id: int, folder: Path) -> set[int | None]:
        """Which tasks live of the job with this id; none where the cluster knows no such job, or one that does not work
        in `folder`: a controller that lost its state gives ids again, and a name can be changed."""
        answer = self._run(["scontrol", "--oneliner", "show", "job", str(job_id)])
        if answer.status != 0:
            if "Invalid job id" in answer.stderr:
                return set()
            raise _no_answer(answer)
        return parse_live_indices(answer.stdout, str(folder))

    def node_states(self, nodes: Sequence[str]) -> dict[str, str]:
        """Node → sinfo's word for it (see `states.is_bad_node`); without those that SLURM does not know."""
        argv = ["sinfo", "--noheader", "--all", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T"]
        return parse_node_states(self._answer(argv).stdout)

    def max_array_size(self) -> int:
        """One more than the largest index of an array, at least 1. Asked once.

        Raises SchedulerError where the cluster forbids arrays.
        """
        if self._max_array_size is None:
            text = self._answer(["scontrol", "show", "config"]).stdout
            match = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
            size = int(match[1]) if match else 1001  # SLURM's default
            if size < 1:
                raise SchedulerError(
                    f"this cluster forbids job arrays (MaxArraySize={size} in its slurm.conf), and kd_assets submits "
                    "every job as one: ask its administrators to set MaxArraySize (SLURM's default is 1001)"
                )
            self._max_array_size = size
        return self._max_array_size

    def partitions(self) -> list[PartitionInfo]:
        """What sinfo lists, one entry for each shape of node in a partition."""
        return parse_partitions(
            self._answer(["sinfo", "--noheader", "--exact", "--format=" + "|".join(PARTITION_FIELDS)]).stdout
        )

    def _answer(self, argv: Sequence[str]) -> Answer:
        answer = self._run(argv)
        if answer.status != 0:
            raise _no_answer(answer)
        return answer

    def _run(self, argv: Sequence[str]) -> Answer:
        answer = self._runner.run(argv, timeout_s=self._timeout_s)
        if argv[0] != "sbatch" and _NOT_UNDERSTOOD.search(answer.stderr):
            raise SchedulerMisusedError(
                f"SLURM does not understand `{shlex.join(argv)}` (exit status {answer.status}): "
                f"{' '.join(answer.stderr.split())[:500]}. This version of SLURM is not one that kd_assets knows: "
                "see `kd-assets doctor`"
            )
        return answer


def sbatch_argv(
    *,
    profile: Profile,
    spec: JobSpec,
    name: str,
    comment: str,
    array: str,
    log_folder: Path,
    script: str,
    arguments: Sequence[str],
    folder: Path,
) -> list[str]:
    """The command line that submits an array, every option on it; `slurm/task.sbatch` has none of its own.

    Each task's output is appended to a file of its own in `log_folder` (`Submission.slurm_log`); it starts in `folder`.

    The command's own environment becomes the jobs' (see `runners`): typed into a shell, put `env -i` and what the job
    may see before it. Raises SchedulerError for a folder whose name sbatch cannot express.
    """
    wanted = spec.resources
    options = {
        "clusters": profile.clusters,
        "job-name": name,
        "comment": comment,
        "array": array,
        "chdir": str(folder),
        "output": f"{_literal(str(log_folder))}/{SLURM_LOG_PATTERN}",
        "open-mode": "append",
        "signal": f"B:USR1@{profile.signal_s}",
        # Not a list of names, nor NONE: both make the node run `su - user` for the login environment, which may stall
        # or fail, and hand the same narrow list on to every srun. ALL is small here, see `runners.KEPT_VARIABLES`.
        "export": "ALL",
        "partition": wanted.slurm_partition,
        "account": wanted.account,
        "qos": wanted.qos,
        "constraint": wanted.constraint,
        "gpus-per-node": wanted.gpus_per_node or None,
        "cpus-per-task": wanted.cpus,
        **memory_option(wanted),
        "time": wanted.time_minutes,
        "nodelist": wanted.nodelist,
        "exclude": ",".join([*filter(None, [wanted.exclude]), *spec.excluded_nodes]) or None,
    }
    flags = ["--requeue", *(["--exclusive"] if wanted.exclusive else [])]
    given = [f"--{option}={value}" for option, value in options.items() if value is not None]
    return ["sbatch", "--parsable", *given, *flags, *(wanted.sbatch_options or ()), script, *arguments]


def memory_option(wanted: Resources) -> dict[str, str]:
    """sbatch's option for memory and its value; none where the site is to say. A whole node has all of its memory (0):
    SLURM alone would give it the site's default."""
    if wanted.memory_of == "site":
        return {}
    if wanted.memory_gib is None:
        return {"mem": "0"} if wanted.exclusive else {}
    option = "mem" if wanted.memory_of is None else f"mem-per-{wanted.memory_of}"
    return {option: f"{round(wanted.memory_gib * 1024)}M"}


def _new_separator() -> str:
    """Drawn for one call, so that no name or comment can hold it."""
    return f"|{secrets.token_hex(6)}|"


def _literal(path: str) -> str:
    """A folder in sbatch's `--output`, where `%` starts a symbol.

    Raises SchedulerError for a backslash: one anywhere makes sbatch take all symbols literally, so all tasks of an
    array would write one file.
    """
    if "\\" in path or not path.isprintable():
        raise SchedulerError(
            f"SLURM cannot write logs under {path!r}: choose a KD_HOME without backslashes and line ends"
        )
    return path.replace("%", "%%")


def _no_answer(answer: Answer) -> SchedulerError:
    """The error for a command that failed: unreachable, unless the controller clearly said no."""
    text = " ".join((answer.stderr or answer.stdout).split())[-500:]
    said = f"{answer.argv[0]} failed (exit status {answer.status}): {text or 'without a word'}"
    if any(phrase in text for phrase in _REFUSALS) and not any(phrase in text.lower() for phrase in UNANSWERED):
        return SchedulerError(said)
    return SchedulerUnreachableError(said)
