"""What keeps a deployment from working, found before a job does: `kd-assets doctor`.

Each check gives findings, one line each, and a finding that is no `ok` names what to do. Nothing is changed, but for a
file in KD_HOME that is written and removed, and the probes' folders (`node_probe`). No finding has a secret's value.
"""

from __future__ import annotations

import enum
import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import kd_assets
from kd_assets.contract import JobKind
from kd_assets.errors import (
    InputError,
    KdAssetsError,
    MissingInputError,
    NotCommittedError,
    SchedulerUnreachableError,
)
from kd_assets.identity import model_folder
from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.node_probe import PYTHON_PROGRAM, Probe, small, start_probe, wait_for_probes
from kd_assets.orchestration.platform import Platform, secrets_set
from kd_assets.orchestration.preview import BYTES_A_TOKEN, UNKNOWN_KEY, resources_in_words
from kd_assets.orchestration.recipe import SHARDS_MANIFEST, Recipe
from kd_assets.scheduler import JobSpec, Profile, Resources, SlurmScheduler
from kd_assets.scheduler.command import CommandMissingError, CommandRunner, runner_for
from kd_assets.scheduler.slurm import PartitionInfo, Slurm
from kd_assets.scheduler.submissions import make_folder
from kd_assets.sources.plan import ShardPlan, resolve_path
from kd_assets.store.summary import inspect

KINDS: tuple[JobKind, ...] = get_args(JobKind)
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacct")
IMPORT_TIMEOUT_S = 300.0
SPACE_MARGIN = 1.2
MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file, by its format."""
PART_SUFFIXES = (".parquet", ".arrow", ".safetensors")
"""Files of numbers, which no secret can have got into; they are nearly all of a store."""
SHORTEST_SECRET = 8


class Status(enum.Enum):
    OK = "ok"
    WARN = "warn"
    """It works, or could not be looked at."""
    FAIL = "FAIL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    status: Status
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        """One line."""
        fix = f" → {self.fix}" if self.fix else ""
        return " ".join(f"{self.status.value:<4} {self.what}: {self.found}{fix}".split("\n"))


def ok(what: str, found: str) -> Finding:
    return Finding(status=Status.OK, what=what, found=found)


def warn(what: str, found: str, fix: str = "") -> Finding:
    return Finding(status=Status.WARN, what=what, found=found, fix=fix)


def fail(what: str, found: str, fix: str = "") -> Finding:
    return Finding(status=Status.FAIL, what=what, found=found, fix=fix)


def examine(
    recipe: Recipe | None, platform: Platform, *, test_job: bool = True, wait_s: float = 120.0
) -> Iterator[Finding]:
    """All findings, each as soon as it is known. Without a recipe: what does not depend on one."""
    try:
        profile = platform.profile()
    except KdAssetsError as e:
        yield fail("scheduler", str(e))
        return
    named = "local" if profile is None else f"slurm, profile {profile.name}"
    yield ok("scheduler", f"{named} (KD_SCHEDULER, KD_SLURM_PROFILE)" if profile else f"{named} (KD_SCHEDULER)")
    yield from _safely("KD_HOME", lambda: check_home(platform))
    if recipe is not None:
        yield from _safely("free space", lambda: check_space(recipe, platform))
        yield from _safely("weights", lambda: check_weights(recipe, platform))
    yield from _safely("secrets", lambda: check_secrets(profile or Profile(name="local"), platform))
    if profile is None:
        yield from _safely("compute python", lambda: check_local_python(platform))
    else:
        yield from check_cluster(recipe, platform, profile, test_job=test_job, wait_s=wait_s)


def _safely(what: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; an error of ours is a finding, and says itself what to do."""
    try:
        yield from check()
    except (KdAssetsError, OSError) as e:
        yield fail(what, str(e))


# ------------------------------------------------------------------------------------------------- folders and space


def check_home(platform: Platform) -> Iterator[Finding]:
    home = platform.home_folder
    try:
        make_folder(platform.jobs_folder)
        with tempfile.TemporaryFile(dir=platform.jobs_folder) as f:
            f.write(b"x")
            f.flush()
            os.fsync(f.fileno())
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        yield fail("KD_HOME", f"{home} cannot be written and locked ({e})", "name a folder that this user can write")
        return
    yield ok("KD_HOME", f"{home} can be written")


def check_space(recipe: Recipe, platform: Platform) -> Iterator[Finding]:
    """Free space against what the plan's caches will take, as an upper bound: before compression."""
    free = shutil.disk_usage(platform.home_folder).free
    try:
        hidden_size = hidden_size_of(teacher_folder(recipe, platform))
        n_tokens, n_documents, source = size_of_the_plan(recipe, platform)
    except InputError as e:
        yield warn("free space", f"{_bytes(free)} free; what is needed is not known: {e}")
        return
    needed = bytes_needed(recipe, n_tokens, n_documents, hidden_size)
    there = bytes_there(platform.recipe_folder(recipe.name))
    left = max(sum(needed.values()) - there, 0)
    each = ", ".join(f"{asset} {_bytes(n)}" for asset, n in needed.items())
    found = (
        f"{_bytes(free)} free in {platform.home_folder}; {n_tokens:,} tokens of {source} take at most "
        f"{_bytes(sum(needed.values()))} ({each}), of which {_bytes(there)} are there"
    )
    if free < left:
        yield fail(
            "free space", found, "move KD_HOME to a larger disk, or keep fewer blocks, a smaller k or shorter documents"
        )
    elif free < SPACE_MARGIN * left:
        yield warn("free space", found, "it is close: watch the disk")
    else:
        yield ok("free space", found)


def bytes_there(folder: Path) -> int:
    """Of a recipe's current results."""
    try:
        return sum(cache.n_bytes for cache in inspect(folder).caches)
    except (MissingInputError, NotCommittedError):
        return 0


def size_of_the_plan(recipe: Recipe, platform: Platform) -> tuple[int, int, str]:
    """Tokens and documents of all shards, and where the numbers come from.

    From the shard plan, else from the sizes of the sources, where a document count is a guess. Raises MissingInputError
    for sources that are not there.
    """
    planner = planner_of(recipe, platform)
    try:
        plan: ShardPlan = planner.current_plan()
    except MissingInputError:
        paths = [
            resolve_path(s.spec.path, platform.home_folder, what=s.spec.name, environment=platform.variables())
            for s in recipe.sources
        ]
        if missing := [path for path in paths if not path.is_file()]:
            raise MissingInputError(f"the source {missing[0]} is not there, and no shard plan is made") from None
        n_tokens = sum(path.stat().st_size for path in paths) // BYTES_A_TOKEN
        return n_tokens, max(n_tokens // 500, 1), "the sources (no shard plan yet)"
    return sum(s.n_bytes for s in plan.shards) // BYTES_A_TOKEN, sum(s.n_records for s in plan.shards), "the shard plan"


def bytes_needed(recipe: Recipe, n_tokens: int, n_documents: int, hidden_size: int) -> dict[str, int]:
    """Asset → bytes at most, from the columns of FORMAT.md: every cache carries ids (4) and mask (1) of its tokens."""
    per_token = {SHARDS_MANIFEST: 5.0}
    per_document = {SHARDS_MANIFEST: 100.0}
    kept = {SHARDS_MANIFEST: recipe.max_length}
    if (topk := recipe.topk) is not None:
        per_token["topk_cache"] = 5 + topk.k * (4 + 2) + 8
        kept["topk_cache"] = topk.max_length
    if (hidden := recipe.hidden_states) is not None:
        per_token["hidden_state_cache"] = 5 + len(hidden.blocks) * hidden_size * 2
        kept["hidden_state_cache"] = hidden.max_length
    if (embeddings := recipe.embeddings) is not None:
        per_token["embedding_cache"], per_document["embedding_cache"] = 5.0, 2 * hidden_size * 4
        kept["embedding_cache"] = embeddings.max_length
    return {
        str(asset): int(
            min(n_tokens, n_documents * kept[asset]) * a_token + n_documents * per_document.get(asset, 100.0)
        )
        for asset, a_token in per_token.items()
    }


# ------------------------------------------------------------------------------------------------------- the teacher


def teacher_folder(recipe: Recipe, platform: Platform) -> Path:
    """Raises MissingInputError when it is not on this machine."""
    model = recipe.teacher.model
    if model.startswith((".", "/", "~", "$")):
        home, variables = platform.home_folder, platform.variables()
        model = str(resolve_path(model, home, what="teacher", environment=variables))
    return model_folder(model, recipe.teacher.revision)


def hidden_size_of(folder: Path) -> int:
    """From the model's configuration, whose text part may be nested. Raises InputError where it is not there."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return int((config if "hidden_size" in config else config["text_config"])["hidden_size"])
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise InputError(f"{folder}/config.json tells no hidden_size ({e})") from e


def check_weights(recipe: Recipe, platform: Platform) -> Iterator[Finding]:
    """Every file that the index names, as long as its own header says. Nothing is hashed: that takes minutes."""
    try:
        folder = teacher_folder(recipe, platform)
    except MissingInputError as e:
        made_by = recipe.teacher.made_by
        yield fail("weights", str(e), "" if made_by is None else f"materialize {made_by}")
        return
    files = sorted(folder.glob("*.safetensors"))
    problems = [problem for path in files if (problem := safetensors_problem(path))]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_bytes()).get("weight_map", {}).values())
        problems += [f"{name} is missing" for name in sorted(named - {path.name for path in files})]
    if not files:
        problems.append("no *.safetensors is there")
    if problems:
        yield fail("weights", f"{folder}: {'; '.join(problems[:3])}", "download the model again: hf download")
        return
    size = _bytes(sum(path.stat().st_size for path in files))
    yield ok("weights", f"{len(files)} files, {size}, complete in {folder}")


def safetensors_problem(path: Path) -> str | None:
    """What is wrong with a file by its header: 8 bytes of its length, then JSON with the offsets of each tensor."""
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            n_header = int.from_bytes(f.read(8), "little")
            if not 2 <= n_header <= min(MAX_HEADER_BYTES, max(size - 8, 0)):
                return f"{path.name} is no whole safetensors file ({_bytes(size)})"
            header: Mapping[str, Any] = json.loads(f.read(n_header))
            ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except OSError as e:
        return f"{path.name} cannot be read ({e.strerror})"
    except (ValueError, LookupError, TypeError):
        return f"{path.name} has no header of the safetensors format"
    expected = 8 + n_header + max(ends, default=0)
    return None if size == expected else f"{path.name} has {size:,} bytes and should have {expected:,}"


# ----------------------------------------------------------------------------------------------------------- secrets


def check_secrets(profile: Profile, platform: Platform) -> Iterator[Finding]:
    """That no secret's value stands in a file of ours but the one that is meant for it, and that one is private."""
    path = platform.secrets_path()
    if path.exists():
        modes = {path: 0o600, path.parent: 0o700}
        for place, wanted in modes.items():
            mode = stat.S_IMODE(place.stat().st_mode)
            if mode != wanted:
                yield fail("secrets", f"{place} has mode {mode:04o}", f"chmod {wanted:o} {place}")
    values = secrets_set(profile)
    searched = {name: value for name, value in values.items() if len(value) >= SHORTEST_SECRET}
    if short := sorted(set(values) - set(searched)):
        yield warn("secrets", f"{', '.join(short)} is too short to be searched for", "is it the whole secret?")
    if not searched:
        yield ok("secrets", f"none is set here ({', '.join(profile.secrets) or 'the profile names none'})")
        return
    folders = [platform.jobs_folder, platform.home_folder / "store", platform.home_folder / "doctor"]
    n_files, holders = search_files(folders, {name: os.fsencode(value) for name, value in searched.items()})
    for name, path in holders[:10]:
        yield fail("secrets", f"the value of {name} stands in {path}", f"revoke {name}, and take it out of the file")
    if not holders:
        yield ok("secrets", f"{', '.join(searched)}: in none of {n_files:,} files of jobs and store")


def search_files(folders: Sequence[Path], values: Mapping[str, bytes]) -> tuple[int, list[tuple[str, Path]]]:
    """How many files were read, and which hold which value. Files of numbers are left out."""
    n_files, found = 0, []
    longest = max(map(len, values.values()))
    for path in (p for folder in folders for p in sorted(folder.rglob("*"))):
        if path.suffix in PART_SUFFIXES or path.is_symlink() or not path.is_file():
            continue
        n_files += 1
        wanted, tail = dict(values), b""
        try:
            with path.open("rb") as f:
                while wanted and (chunk := f.read(1 << 20)):
                    text = tail + chunk
                    for name in [n for n, value in wanted.items() if value in text]:
                        found.append((name, path))
                        del wanted[name]
                    tail = text[-longest:]
        except OSError:  # gone meanwhile, or somebody else's
            continue
    return n_files, found


# ---------------------------------------------------------------------------------------------- the compute environment


def check_local_python(platform: Platform) -> Iterator[Finding]:
    python = platform.compute_python
    try:
        run = subprocess.run(
            [python, "-c", PYTHON_PROGRAM], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        yield fail("compute python", f"{python} does not run ({e})", "set KD_COMPUTE_PYTHON")
        return
    yield from _python_findings("compute python", python, run.stdout if run.returncode == 0 else run.stderr)
    gpus = _facts(run.stdout).get("gpus", [])
    if gpus:
        yield ok("GPU", ", ".join(gpus))
    elif run.returncode == 0:
        yield warn("GPU", "none is visible here", "the teacher runs on the CPU: enough for the demo")


def _python_findings(what: str, python: str, output: str) -> Iterator[Finding]:
    facts = _facts(output)
    if not facts:
        said = output.strip().rpartition("\n")[2] or "it said nothing"
        yield fail(what, f"{python}: {said}", "install kd-assets[compute] there, or set KD_COMPUTE_PYTHON")
    elif facts["kd_assets"] != kd_assets.__version__:
        yield fail(
            what,
            f"{python} has kd_assets {facts['kd_assets']}, this is {kd_assets.__version__}",
            "install the same version in both environments",
        )
    else:
        versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers", "kd_assets"))
        yield ok(what, f"{python} has {versions}")


def _facts(output: str) -> Mapping[str, Any]:
    """What `PYTHON_PROGRAM` printed; empty when it did not come so far."""
    try:
        facts = json.loads(output.strip().rpartition("\n")[2])
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) and "torch" in facts else {}


# ------------------------------------------------------------------------------------------------------ the cluster


def check_cluster(
    recipe: Recipe | None, platform: Platform, profile: Profile, *, test_job: bool, wait_s: float
) -> Iterator[Finding]:
    runner = runner_for(profile)
    findings = [*_safely("SLURM commands", lambda: check_commands(runner, profile))]
    yield from findings
    if any(f.status is Status.FAIL for f in findings):
        return
    kinds = [kind for kind in KINDS if recipe is None or kind != "student" or recipe.student is not None]
    wanted = {
        kind: profile.resources(kind, Resources()) if recipe is None else platform.resources(recipe, kind)
        for kind in kinds
    }
    yield from _safely("partitions", lambda: check_partitions(runner, profile, wanted))
    yield from _safely("requests", lambda: check_requests(runner, platform, profile, wanted))
    if test_job:
        yield from _safely("test job", lambda: check_nodes(recipe, platform, profile, runner, wanted, wait_s=wait_s))
    else:
        yield warn("test job", "none was run (--no-job): what the nodes see is not known")


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
    yield from _accounting(runner, profile)


def _accounting(runner: CommandRunner, profile: Profile) -> Iterator[Finding]:
    try:
        rows = Slurm(runner, timeout_s=profile.command_timeout_s).accounting(["kd-doctor"], 0.0)
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


def _spec(kind: JobKind, resources: Resources) -> JobSpec:
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
    if (resources.memory_gib or 0) > shape.memory_gib:
        misfits.append(f"{resources.memory_gib:g} GiB asked for, {shape.memory_gib:g} there")
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
        sbatch, *options = scheduler.preview(_spec(kind, resources))[0]
        answer = runner.run([sbatch, "--test-only", *options], timeout_s=profile.command_timeout_s)
        said = " ".join(answer.stderr.split()).removeprefix("sbatch: ")
        if answer.status == 0:
            yield ok(f"request for {kind}", f"SLURM would take it: {said}")
        else:
            yield fail(f"request for {kind}", said, "change the recipe's `jobs:` or the profile: kd-assets preview")


# ----------------------------------------------------------------------------------------------------------- test jobs


def check_nodes(
    recipe: Recipe | None,
    platform: Platform,
    profile: Profile,
    runner: CommandRunner,
    wanted: Mapping[JobKind, Resources],
    *,
    wait_s: float,
) -> Iterator[Finding]:
    """One small job for each distinct place that jobs are sent to, all at once."""
    scheduler = platform.make_scheduler(submits=False)
    assert isinstance(scheduler, SlurmScheduler)
    model = None if recipe is None else _teacher_folder_if_there(recipe, platform)
    secrets_file = platform.secrets_path() if platform.secrets_path().exists() else None
    probes: dict[Resources, Probe] = {}
    for kind, resources in wanted.items():
        place = small(resources)
        if place in probes:
            probes[place].name += f", {kind}"
            continue
        probes[place] = start_probe(
            runner,
            kind,
            home=platform.home_folder,
            resources=place,
            environment_text=scheduler.environment_text(_spec(kind, place)),
            model_folder=model,
            secrets_file=secrets_file,
            timeout_s=profile.command_timeout_s,
        )
    wait_for_probes(
        runner,
        list(probes.values()),
        wait_s=wait_s,
        visibility_grace_s=profile.visibility_grace_s,
        timeout_s=profile.command_timeout_s,
    )
    for place, probe in probes.items():
        yield from probe_findings(probe, place, platform, wait_s, n_weights=_n_weights(model), model=model)


def _teacher_folder_if_there(recipe: Recipe, platform: Platform) -> Path | None:
    try:
        return teacher_folder(recipe, platform)
    except MissingInputError:
        return None


def _n_weights(model: Path | None) -> int:
    return 0 if model is None else len(list(model.glob("*.safetensors")))


def probe_findings(
    probe: Probe, asked: Resources, platform: Platform, wait_s: float, *, n_weights: int, model: Path | None
) -> Iterator[Finding]:
    """What a test job's end and answer say."""
    what, answer = f"node for {probe.name}", probe.answer
    if probe.refused:
        yield fail(what, f"the test job was refused: {probe.refused}", "change the profile or the recipe's `jobs:`")
        return
    if not answer:
        yield _silent(what, probe, platform, wait_s)
        return
    node = answer.get("node", probe.node)
    if answer.get("nonce") == probe.nonce:
        yield ok(what, f"{node} sees {platform.home_folder}, and what it writes is seen here")
    else:
        found = f"{node} does not read what was written here in {probe.folder}"
        yield fail(what, found, "KD_HOME must be one shared folder")
    if asked.gpus_per_node:
        yield from _gpu_findings(what, node, answer)
    if model is not None and "weights" in answer:
        if int(answer["weights"]) < n_weights:
            found = f"{node} reads {answer['weights']} of the {n_weights} weight files in {model}"
            yield fail(what, found, "put the model on a shared disk, and HF_HOME into the profile's setup")
        else:
            yield ok(what, f"{node} reads the {n_weights} weight files")
    if answer.get("secrets", "0") != "0":
        found = f"{node} cannot read {platform.secrets_path()} as its owner"
        yield fail(what, found, "jobs must run as the user who submits them")
    if "python" in answer:
        yield from _python_findings(what, f"{node}: {platform.compute_python}", answer["python"])
    elif probe.is_over:
        found = f"{node} did not finish importing torch within the test job's minute ({probe.state})"
        yield warn(what, found, f"a slow shared disk? See {probe.log_file}")
    else:
        yield warn(what, f"{node} was still importing torch after {wait_s:.0f} s", "try again: it may be cached now")


def _silent(what: str, probe: Probe, platform: Platform, wait_s: float) -> Finding:
    """A test job without a word."""
    job = f"test job {probe.job_id}"
    if probe.is_over:
        found = (
            f"{job} ended on {probe.node or 'no node'} ({probe.state}, {probe.reason}) and nothing of it is seen here"
        )
        return fail(what, found, f"is {platform.home_folder} the same folder on the nodes? See {probe.log_file}")
    if probe.state in ("", "PENDING"):
        waits = f"{job} did not start within {wait_s:.0f} s ({probe.reason or 'no reason given'}) and was cancelled"
        return warn(what, waits, "try again when the queue is shorter, or wait longer with --wait")
    found = f"{job} runs on {probe.node} and wrote nothing within {wait_s:.0f} s"
    return fail(what, found, f"is {platform.home_folder} the same folder on the nodes? See {probe.log_file}")


def _gpu_findings(what: str, node: str, answer: Mapping[str, str]) -> Iterator[Finding]:
    seen, by_driver = _facts(answer.get("python", "")).get("gpus", []), int(answer.get("nvidia_smi") or 0)
    if seen:
        yield ok(what, f"{node} has {', '.join(seen)} for torch (asked for one)")
    elif by_driver:
        found = f"{node}: nvidia-smi shows {by_driver} GPUs, torch none"
        yield fail(what, found, "install the CUDA build of torch there, one that suits the driver")
    else:
        devices = answer.get("devices") or "nothing"
        found = f"{node}: no GPU visible (CUDA_VISIBLE_DEVICES is {devices})"
        yield fail(what, found, "is gres/gpu set up there, and is this the GPU partition?")


def _bytes(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError
