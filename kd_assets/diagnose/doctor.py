"""What keeps a deployment from working, found before a job does: `kd-assets doctor`.

Each check gives findings. Nothing is changed, but for a file in KD_HOME that is written and removed, and the probes'
folders (`node_probe`). No finding has a secret's value.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kd_assets.contract import JobKind
from kd_assets.diagnose.cluster import KINDS, check_commands, check_partitions, check_requests
from kd_assets.diagnose.compute_python import check_local_python
from kd_assets.diagnose.disk import check_space, check_teacher, check_weights
from kd_assets.diagnose.finding import Finding, Status, fail, ok, safely, warn
from kd_assets.diagnose.inputs import check_disk, check_licences, check_sources, check_variables
from kd_assets.diagnose.nodes import check_nodes
from kd_assets.durable import atomic_write, prepare_folder
from kd_assets.errors import KdAssetsError, RecipeError, StorageUnavailableError
from kd_assets.locks import try_locked
from kd_assets.orchestration.platform import Platform, secrets_set
from kd_assets.recipes.recipe import Recipe
from kd_assets.scheduler import Profile, Resources
from kd_assets.scheduler.slurm.commands.runners import command_runner_for

PART_SUFFIXES = (".parquet", ".arrow", ".safetensors")
"""Files of numbers, which no secret can have got into; they are nearly all of a store."""

SHORTEST_SECRET = 8


def examine(
    recipe: Recipe | None,
    platform: Platform,
    *,
    test_job: bool = True,
    wait_s: float = 120.0,
    verify_weights: bool = False,
) -> Iterator[Finding]:
    """All findings, each as soon as it is known. Without a recipe: what does not depend on one."""
    try:
        profile = platform.profile()
    except KdAssetsError as e:
        yield fail("scheduler", str(e))
        return
    named = "local" if profile is None else f"slurm, profile {profile.name}"
    yield ok("scheduler", f"{named} (KD_SCHEDULER, KD_SLURM_PROFILE)" if profile else f"{named} (KD_SCHEDULER)")
    yield from safely("KD_HOME", lambda: check_home(platform))
    if recipe is None:
        yield from safely("free space", lambda: check_disk(platform))
    else:
        yield from safely("variables", lambda: check_variables(recipe, platform))
        yield from check_sources(recipe, platform)
        yield from check_licences(recipe)
        yield from safely("free space", lambda: check_space(recipe, platform))
        yield from safely("weights", lambda: check_weights(recipe, platform, verify=verify_weights))
        yield from safely("teacher", lambda: check_teacher(recipe, platform))
    yield from safely("secrets", lambda: check_secrets(profile or Profile(name="local"), platform))
    if profile is None:
        yield from safely("compute python", lambda: check_local_python(platform))
    else:
        yield from check_cluster(recipe, platform, profile, test_job=test_job, wait_s=wait_s)


# ------------------------------------------------------------------------------------------------- folders and space


def check_home(platform: Platform) -> Iterator[Finding]:
    home = platform.home_folder
    try:
        prepare_folder(platform.jobs_folder)
        with tempfile.TemporaryDirectory(dir=platform.jobs_folder, prefix=".doctor-") as folder:
            atomic_write(Path(folder) / "file", b"x")
            with try_locked(Path(folder) / "lock"):
                pass
    except (OSError, StorageUnavailableError) as e:
        yield fail("KD_HOME", f"{home} cannot be written and locked ({e})", "name a folder that this user can write")
        return
    yield ok("KD_HOME", f"{home} can be written")


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


# ------------------------------------------------------------------------------------------------------ the cluster


def _optional(recipe: Recipe) -> dict[JobKind, bool]:
    """The kinds of jobs that a recipe may do without → whether it has them."""
    return {"student": recipe.student is not None, "export": bool(recipe.exports)}


def check_cluster(
    recipe: Recipe | None, platform: Platform, profile: Profile, *, test_job: bool, wait_s: float
) -> Iterator[Finding]:
    runner = command_runner_for(profile)
    findings = [*safely("SLURM commands", lambda: check_commands(runner, profile))]
    yield from findings
    if any(f.status is Status.FAIL for f in findings):
        return
    unused: set[JobKind] = {"recode"}  # asks for what exports or shards ask for
    if recipe is not None:
        unused |= {kind for kind, is_used in _optional(recipe).items() if not is_used}
    kinds = [kind for kind in KINDS if kind not in unused]
    wanted: dict[JobKind, Resources] = {}
    for kind in kinds:
        try:
            wanted[kind] = profile.resources(kind, Resources()) if recipe is None else platform.resources(recipe, kind)
        except RecipeError as e:
            yield fail(f"time limit for {kind}", str(e))
    yield from safely("partitions", lambda: check_partitions(runner, profile, wanted))
    yield from safely("requests", lambda: check_requests(runner, platform, profile, wanted))
    if test_job:
        yield from safely("test job", lambda: check_nodes(recipe, platform, profile, runner, wanted, wait_s=wait_s))
    else:
        yield warn("test job", "none was run (--no-job): what the nodes see is not known")
