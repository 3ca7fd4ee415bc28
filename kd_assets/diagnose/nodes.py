"""What the doctor finds on a cluster's nodes, by small test jobs (`node_probe`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from kd_assets.contract import JobKind
from kd_assets.diagnose.cluster import test_job_spec
from kd_assets.diagnose.compute_python import python_facts, python_findings
from kd_assets.diagnose.disk import teacher_folder
from kd_assets.diagnose.finding import Finding, fail, ok, warn
from kd_assets.diagnose.node_probe import Probe, small, start_probe, wait_for_probes
from kd_assets.errors import MissingInputError
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.recipe import Recipe
from kd_assets.scheduler import Profile, Resources, SlurmScheduler
from kd_assets.scheduler.slurm.commands.runners import CommandRunner

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
            environment_text=scheduler.environment_text(test_job_spec(kind, place)),
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
        yield from python_findings(what, f"{node}: {platform.compute_python}", answer["python"])
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
    seen, by_driver = python_facts(answer.get("python", "")).get("gpus", []), int(answer.get("nvidia_smi") or 0)
    if seen:
        yield ok(what, f"{node} has {', '.join(seen)} for torch (asked for one)")
    elif by_driver:
        found = f"{node}: nvidia-smi shows {by_driver} GPUs, torch none"
        yield fail(what, found, "install the CUDA build of torch there, one that suits the driver")
    else:
        devices = answer.get("devices") or "nothing"
        found = f"{node}: no GPU visible (CUDA_VISIBLE_DEVICES is {devices})"
        yield fail(what, found, "is gres/gpu set up there, and is this the GPU partition?")
