"""Where this deployment keeps things, and which scheduler runs its jobs. The thin resource at the edge.

Secrets are named here and never held: their values go from the environment into one file that only this user can read,
and no field, repr, log line or error has them.
"""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import dagster as dg

from kd_assets.contract import JobKind
from kd_assets.durable import atomic_write
from kd_assets.errors import RecipeError, SchedulerError, StorageUnavailableError
from kd_assets.model_files.digests import DigestCache
from kd_assets.recipes.cluster_profile import find_profile, read_profile
from kd_assets.recipes.project import PROJECT_FOLDER, is_checkout, project_folder
from kd_assets.recipes.recipe import Recipe
from kd_assets.scheduler import LocalScheduler, Profile, Resources, Scheduler, SlurmScheduler
from kd_assets.scheduler.shipped import BATCH_SCRIPT

__all__ = ["BATCH_SCRIPT", "PROJECT_FOLDER", "SCHEDULERS", "Platform", "code_commit", "secrets_set"]

SCHEDULERS = ("local", "slurm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """One deployment: `home` holds the store, the jobs and the digests of large files.

    A plain object and no configurable resource of Dagster's: its fields are the deployment's, from the environment or
    the project's code, and on no run's Launchpad, where whoever starts a run could set another store or Python.
    """

    home: str
    scheduler: str = "local"
    slurm_profile: str = "default"
    """A name in `slurm/profiles`, or a path; see `cluster_profile.find_profile`."""
    compute_python: str = sys.executable
    """The Python of the compute environment, as the cluster's nodes see it."""

    @staticmethod
    def from_environment(project: Path | None = None) -> Platform:
        """KD_HOME (default: `var` in the dg project, found from the working directory where none is given),
        KD_SCHEDULER (local), KD_SLURM_PROFILE (default), and KD_COMPUTE_PYTHON (this Python).

        The same object for the same settings: definitions that several recipes bring are merged only then. Raises
        MissingInputError without KD_HOME outside of any project.
        """
        return _platform(
            home=str(Path(os.environ.get("KD_HOME") or (project or project_folder()) / "var").absolute()),
            scheduler=os.environ.get("KD_SCHEDULER") or "local",
            slurm_profile=os.environ.get("KD_SLURM_PROFILE") or "default",
            compute_python=os.environ.get("KD_COMPUTE_PYTHON") or sys.executable,
        )

    def as_resource(self) -> dg.ResourceDefinition:
        """What definitions give their assets as `kd_assets_platform`: it takes no config, and is the same object for
        equal settings."""
        return _resource(self)

    @property
    def home_folder(self) -> Path:
        return Path(self.home).absolute()

    def recipe_folder(self, recipe_name: str) -> Path:
        return self.home_folder / "store" / recipe_name

    def digests(self) -> DigestCache:
        return DigestCache(self.home_folder / "digests.json")

    @property
    def jobs_folder(self) -> Path:
        return self.home_folder / "jobs"

    def profile(self) -> Profile | None:
        """The cluster profile that holds here, read from its file; None for the local scheduler.

        Whoever needs it more than once hands it on: a run works with one profile, whatever is written meanwhile.

        Raises RecipeError for a scheduler that does not exist or a profile with something wrong in it,
        MissingInputError for a profile that is not there.
        """
        if self.scheduler not in SCHEDULERS:
            raise RecipeError(f"KD_SCHEDULER={self.scheduler}: there is no such scheduler; set it to local or slurm")
        return None if self.scheduler == "local" else read_profile(find_profile(self.slurm_profile))

    def make_scheduler(self, *, submits: bool = True, profile: Profile | None = None) -> Scheduler:
        """The scheduler of this deployment. With `submits=False` no secrets file is written.

        `profile`: what `profile()` gave, where that was asked already.

        Raises what `profile` and `secrets_file` raise.
        """
        if (profile := profile or self.profile()) is None:
            return LocalScheduler(self.jobs_folder, script=BATCH_SCRIPT, python=self.compute_python)
        return SlurmScheduler(
            self.jobs_folder,
            profile=profile,
            script=BATCH_SCRIPT,
            python=self.compute_python,
            secrets_file=self.secrets_file(profile) if submits else self._named_secrets_file(profile),
        )

    def resources(self, recipe: Recipe, kind: JobKind, *, profile: Profile | None = None) -> Resources:
        """What each task of a recipe's jobs of a kind asks for: the recipe's word, else the cluster profile's."""
        wanted = recipe.tasks_of(kind).resources
        profile = profile or self.profile()
        return wanted if profile is None else profile.resources(kind, wanted)

    def secrets_path(self) -> Path:
        return self.home_folder / "secrets" / f"{_user_name()}.env"

    def _named_secrets_file(self, profile: Profile) -> Path | None:
        """What `secrets_file` would return; nothing is written."""
        return self.secrets_path() if secrets_set(profile) else None

    def secrets_file(self, profile: Profile | None = None) -> Path | None:
        """Write the cluster profile's secrets, as they are in this environment now, for tasks to read.

        Returns the file (0600, in a folder 0700, lines `NAME='value'` for Bash); None when none of them is set: what an
        earlier submission wrote stays, since its tasks may still wait. Raises SchedulerError when it cannot be written.
        """
        profile = profile or self.profile()
        values = {} if profile is None else secrets_set(profile)
        if not values:
            return None
        path = self.secrets_path()
        lines = "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.parent.chmod(0o700)
            atomic_write(path, os.fsencode(lines), mode=0o600)
        except (OSError, StorageUnavailableError) as e:
            # Without its cause, which is harmless, but whose traceback some tools print with local variables.
            why = str(e)
        else:
            return path
        raise SchedulerError(
            f"{path} cannot be written ({why}): its folder must be this user's, on a disk that the nodes see"
        )

    def variables(self) -> dict[str, str]:
        """What `$NAME` in a recipe's paths stands for: the environment, and KD_HOME."""
        return {**os.environ, "KD_HOME": str(self.home_folder)}


@cache
def _platform(*, home: str, scheduler: str, slurm_profile: str, compute_python: str) -> Platform:
    return Platform(home=home, scheduler=scheduler, slurm_profile=slurm_profile, compute_python=compute_python)


@cache
def _resource(platform: Platform) -> dg.ResourceDefinition:
    return dg.ResourceDefinition(
        resource_fn=lambda context: platform,
        config_schema={},
        description=f"Store and jobs in {platform.home}; scheduler: {platform.scheduler}"
        + (f", profile {platform.slurm_profile}" if platform.scheduler == "slurm" else "")
        + f"; Python of the nodes: {platform.compute_python}. From the environment: KD_HOME, KD_SCHEDULER, "
        "KD_SLURM_PROFILE, KD_COMPUTE_PYTHON.",
    )


@cache
def code_commit() -> str:
    """The commit this code was checked out at, `-dirty` when files differ; the version where there is no checkout."""
    if not is_checkout():  # git would answer for whatever repository the environment lies in
        return f"kd-assets {version('kd-assets')}"
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=PROJECT_FOLDER,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return f"kd-assets {version('kd-assets')}"
    return described.stdout.strip() or f"kd-assets {version('kd-assets')}"


def secrets_set(profile: Profile) -> dict[str, str]:
    """The profile's secrets that are set here, by name."""
    return {name: value for name in profile.secrets if (value := os.environ.get(name))}


def _user_name() -> str:
    """Not from the environment: it names the file that a task of this user looks for."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user without an entry
        return str(os.getuid())
