"""What the doctor finds of a SLURM cluster by asking its commands: versions, partitions, whether it takes our jobs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from kd_assets.contract import JobKind
from kd_assets.diagnose.finding import Finding, fail, ok, warn
from kd_assets.diagnose.preview import UNKNOWN_KEY, resources_in_words
from kd_assets.errors import SchedulerError, SchedulerMisusedError, SchedulerUnreachableError
from kd_assets.orchestration.platform import Platform
from kd_assets.scheduler import JobSpec, Profile, Resources, SlurmScheduler
from kd_assets.scheduler.slurm.commands.client import Slurm
from kd_assets.scheduler.slurm.commands.parsing import PartitionInfo, parse_queue
from kd_assets.scheduler.slurm.commands.runners import CommandMissingError, CommandRunner

KINDS: tuple[JobKind, ...] = get_args(JobKind)

NO_JOB, NO_NODE = "4000000000", "kd-doctor"
"""What no cluster has: an answer that they are unknown shows that the question was understood."""

NOT_UNDERSTOOD = "this version of SLURM is not supported, docs/slurm.md and docs/production.md say which are"

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacct")


def check_commands(runner: CommandRunner, profile: Profile) -> Iterator[Finding]:
    """That they are there, that the controller answers, and whether there is accounting."""
    where = f"on {profile.ssh}" if profile.ssh else "here"
    client, missing = "", []
    for command in COMMANDS:
        try:
            answer = runner.run([command, "--version"], timeout_s=profile.command_timeout_s)
        except CommandMissingError:
            missing.append(command)
            continue
        if command == "sbatch" and (match := re.search(r"\d+\.\d+\S*", answer.stdout)):
            client = match[0]
    if fatal := [command for command in missing if command != "sacct"]:
        yield fail(
            "SLURM commands",
            f"{', '.join(fatal)} not found {where}",
            "install slurm-client, or set `ssh:` in the profile",
        )
        return
    yield ok("SLURM commands", f"version {client or 'unknown'} {where}")
    try:
        config = runner.run(["scontrol", "show", "config"], timeout_s=profile.command_timeout_s)
    except SchedulerUnreachableError as e:
        yield fail("controller", str(e), "is slurmctld up (scontrol ping), and SLURM_CONF set where Dagster runs?")
        return
    if config.status != 0:
        said = " ".join(config.stderr.split())
        yield fail("controller", said, "is slurmctld up (scontrol ping), and SLURM_CONF set where Dagster runs?")
        return
    match = re.search(r"^SLURM_VERSION\s*=\s*(\S+)", config.stdout, re.MULTILINE)
    controller = match[1] if match else "unknown"
    if client.split(".")[:2] != controller.split(".")[:2]:
        fix = "install the same release: SLURM promises two older ones at most"
        yield warn("controller", f"answers, of version {controller}, the commands are {client}", fix)
    else:
        yield ok("controller", f"answers, version {controller}")
    yield from _queries(Slurm(runner, timeout_s=profile.command_timeout_s))
    yield from _accounting(runner, profile)


def _queries(slurm: Slurm) -> Iterator[Finding]:
    """Ask SLURM what a run asks, by the very same command lines: whether a version knows them, only it can say."""
    queries: dict[str, Callable[[], object]] = {
        "squeue": lambda: (slurm.queue(), parse_queue(slurm.folded_queue_text())),
        "scontrol show config": slurm.max_array_size,
        "scontrol show job": lambda: slurm.excluded_nodes(NO_JOB),
        "sinfo": lambda: (slurm.node_states([NO_NODE]), slurm.partitions()),
    }
    for name, ask in queries.items():
        try:
            ask()
        except SchedulerMisusedError as e:
            yield fail(name, str(e), NOT_UNDERSTOOD)
        except SchedulerUnreachableError as e:
            yield fail(name, str(e), "is slurmctld up (scontrol ping)?")
        except SchedulerError as e:
            if "Invalid job id" in str(e):  # of `NO_JOB`
                yield ok(name, "understands what runs ask")
            elif "MaxArraySize" in str(e):  # it says itself what to do
                yield fail(name, str(e))
            else:
                yield fail(name, str(e), "may this user ask it?")
        else:
            yield ok(name, "understands what runs ask")


def _accounting(runner: CommandRunner, profile: Profile) -> Iterator[Finding]:
    try:
        rows = Slurm(runner, timeout_s=profile.command_timeout_s).accounting(["kd-doctor"], 0.0)
    except SchedulerMisusedError as e:
        yield fail("accounting", str(e), NOT_UNDERSTOOD)
        return
    except SchedulerUnreachableError as e:
        yield warn("accounting", f"sacct does not answer: {e}", "runs go on without it")
        return
    if rows is None:
        found = "none (no sacct or no slurmdbd): ends are told from squeue, results and reports"
        yield warn("accounting", found, "nothing to do; memory and CPU time of tasks are not recorded")
    else:
        yield ok("accounting", "sacct answers")


def check_partitions(runner: CommandRunner, profile: Profile, wanted: Mapping[JobKind, Resources]) -> Iterator[Finding]:
    """That each kind's SLURM partition is there, is up, and has nodes that the request fits."""
    shapes = Slurm(runner, timeout_s=profile.command_timeout_s).partitions()
    names = sorted({shape.name for shape in shapes})
    marked = runner.run(["sinfo", "--noheader", "--format=%P"], timeout_s=profile.command_timeout_s).stdout.split()
    default = next((name.rstrip("*") for name in marked if name.endswith("*")), None)
    for kind, resources in wanted.items():
        what = f"partition for {kind}"
        asked = resources.slurm_partition or default
        if asked is None:
            yield fail(what, "none is named, and the cluster has no default", f"name one of {', '.join(names)}")
            continue
        for name in asked.split(","):
            here = [shape for shape in shapes if shape.name == name]
            if not here:
                yield fail(what, f"there is no partition {name}", f"name one of {', '.join(names)}")
            elif all(shape.state != "up" for shape in here):
                yield fail(what, f"{name} is {here[0].state}", "ask its administrator, or name another")
            elif misfits := fewest_misfits(here, resources):
                yield fail(what, f"no node of {name} fits: {'; '.join(misfits)}", "ask for less, or name another")
            else:
                n_nodes = sum(shape.n_nodes for shape in here if not misfits_of(shape, resources))
                yield ok(what, f"{name}: {n_nodes} nodes fit {resources_in_words(resources)}")


def test_job_spec(kind: JobKind, resources: Resources) -> JobSpec:
    return JobSpec(key=UNKNOWN_KEY, recipe="doctor", kind=kind, n_tasks=1, concurrency=1, resources=resources)


def fewest_misfits(shapes: Sequence[PartitionInfo], resources: Resources) -> list[str]:
    """What the best of them lacks; empty when one fits."""
    return min((misfits_of(shape, resources) for shape in shapes), key=len)


def misfits_of(shape: PartitionInfo, resources: Resources) -> list[str]:
    gpus, minutes = gpus_of(shape.gres), shape.max_time_minutes
    misfits = []
    if (resources.gpus_per_node or 0) > gpus:
        misfits.append(f"{resources.gpus_per_node} GPUs asked for, {gpus} there")
    if (resources.cpus or 0) > shape.cpus:
        misfits.append(f"{resources.cpus} CPUs asked for, {shape.cpus} there")
    if (resources.memory_of_node_gib or 0) > shape.memory_gib:
        misfits.append(f"{resources.memory_of_node_gib:g} GiB asked for, {shape.memory_gib:g} there")
    if minutes is not None and (resources.time_minutes or 0) > minutes:
        misfits.append(f"{resources.time_minutes} min asked for, {minutes} allowed")
    return misfits


def gpus_of(gres: str) -> int:
    """GPUs of a node, from sinfo's words: `gpu:h100:4(S:0-1),gpu:1,nvme:2` has 5."""
    counts = re.findall(r"(?:^|,)gpu(?::[^:,(]+)??(?::(\d+))?(?=[(,]|$)", gres)
    return sum(int(count or 1) for count in counts)


def check_requests(
    runner: CommandRunner, platform: Platform, profile: Profile, wanted: Mapping[JobKind, Resources]
) -> Iterator[Finding]:
    """Ask SLURM itself, with the very command line of a job: accounts, QOS and limits are nobody else's to judge."""
    scheduler = platform.make_scheduler(submits=False)
    assert isinstance(scheduler, SlurmScheduler)
    for kind, resources in wanted.items():
        sbatch, *options = scheduler.preview(test_job_spec(kind, resources))[0]
        answer = runner.run([sbatch, "--test-only", *options], timeout_s=profile.command_timeout_s)
        said = " ".join(answer.stderr.split()).removeprefix("sbatch: ")
        if answer.status == 0:
            yield ok(f"request for {kind}", f"SLURM would take it: {said}")
        else:
            yield fail(f"request for {kind}", said, "change the recipe's `jobs:` or the profile: kd-assets preview")
