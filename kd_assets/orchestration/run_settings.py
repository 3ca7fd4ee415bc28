"""What may be set for one run, on the Launchpad or by `--config`: how its job is cut and what it asks for, and what is
made again.

None of it is in the identity of a result or changes one's bytes; all of it is checked before anything is put aside or
submitted, and all that is wrong is named at once. What belongs to the deployment is in the resource
`kd_assets_platform` and cannot be set here.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import dagster as dg
from pydantic import Field

from kd_assets.contract import Asset, JobKind
from kd_assets.errors import InputError, RecipeError, SchedulerError
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.retries import SMALLEST_TOKEN_BUDGET
from kd_assets.recipes.cluster_profile import find_profile, minutes_of, read_profile
from kd_assets.recipes.recipe import SHARDS_MANIFEST, Recipe, Tasks
from kd_assets.scheduler import Profile
from kd_assets.scheduler.shipped import PROFILES_FOLDER
from kd_assets.scheduler.slurm.commands.client import Slurm
from kd_assets.scheduler.slurm.commands.runners import command_runner_for

Recompute = Literal["never", "wrong", "all"]
MOST_TASKS = 100_000


class JobSettings(dg.Config):
    """What a run's job asks SLURM for; None: what the recipe and the cluster's profile say."""

    time: str | None = Field(default=None, description='Time limit of a task: "HH:MM:SS" or "D-HH:MM:SS".')
    slurm_partition: str | None = Field(default=None, description="SLURM partition of the job.")
    profile: str | None = Field(default=None, description="Name of the cluster profile that the run works with.")


class CachesSettings(JobSettings):
    """Of a run over caches. `time`, `slurm_partition`, `tasks` are of the job that asks the teacher; of every job, in a
    run without a cache."""

    recompute: Recompute = Field(
        default="never",
        description="never: what is committed is reused. wrong: results that failed a check or whose files are damaged "
        "are put aside and made again. all: every selected result is. Nothing is deleted.",
    )
    token_budget: int | None = Field(default=None, description="Tokens of a batch of the teacher.")
    tasks: int | None = Field(default=None, description="Array tasks of the job, at most.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """A recipe and a deployment as one run has them."""

    recipe: Recipe
    platform: Platform


def settle(
    settings: JobSettings,
    recipe: Recipe,
    platform: Platform,
    selected: Sequence[Asset],
    *,
    slurm_partitions: Callable[[Profile], list[str]] | None = None,
) -> Settled:
    """The recipe and the platform with a run's settings in them.

    `slurm_partitions`: asks a cluster for the names of its partitions; an empty answer: nobody knows.
    Raises InputError that names each field that is wrong, what was found and what is allowed.
    """
    found = _Checked(settings, recipe, platform, selected, slurm_partitions or partitions_of_cluster)
    if found.wrong:
        raise InputError("the settings of this run are wrong, and nothing was submitted: " + "; ".join(found.wrong))
    return Settled(recipe=found.recipe, platform=found.platform)


class _Checked:
    """Each field in turn; what is wrong is collected."""

    def __init__(
        self,
        settings: JobSettings,
        recipe: Recipe,
        platform: Platform,
        selected: Sequence[Asset],
        slurm_partitions: Callable[[Profile], list[str]],
    ) -> None:
        self.recipe, self.platform, self.wrong = recipe, platform, list[str]()
        self._is_local = platform.scheduler == "local"
        self._kinds = kinds_meant(recipe, selected)
        self._take_profile(settings.profile)
        self._take_time(settings.time)
        self._take_partition(settings.slurm_partition, slurm_partitions)
        if isinstance(settings, CachesSettings):
            self._take_tasks(settings.tasks)
            self._take_token_budget(settings.token_budget)

    def _refuse(self, field: str, found: object, allowed: str) -> None:
        self.wrong.append(f"{field}: found {found!r}, allowed is {allowed}")

    def _change_tasks(self, change: Callable[[Tasks], Tasks]) -> None:
        changed = {kind: change(self.recipe.tasks_of(kind)) for kind in self._kinds}
        self.recipe = dataclasses.replace(self.recipe, tasks={**self.recipe.tasks, **changed})

    def _ask_for(self, **resources: object) -> None:
        self._change_tasks(
            lambda tasks: dataclasses.replace(tasks, resources=dataclasses.replace(tasks.resources, **resources))  # type: ignore[arg-type]
        )

    def _is_of_slurm(self, field: str, value: object) -> bool:
        if self._is_local:
            self._refuse(field, value, "nothing: this deployment's jobs run without SLURM (KD_SCHEDULER=local)")
        return not self._is_local

    def _take_profile(self, name: str | None) -> None:
        if name is None or not self._is_of_slurm("profile", name):
            return
        ours = find_profile(self.platform.slurm_profile)
        files = profile_files(ours)
        if name not in files:
            # A path would have a run execute lines of whatever file somebody names.
            self._refuse("profile", name, f"one of {', '.join(sorted(files))}")
            return
        try:
            here, there = read_profile(ours), read_profile(files[name])
        except InputError as e:
            self.wrong.append(f"profile: {e}")
            return
        if (there.ssh, there.clusters) != (here.ssh, here.clusters):
            self._refuse("profile", name, "one of the same cluster: sensors and later runs look for jobs there")
            return
        self.platform = dataclasses.replace(self.platform, slurm_profile=str(files[name]))

    def _take_time(self, time: str | None) -> None:
        if time is None or not self._is_of_slurm("time", time):
            return
        try:
            minutes = minutes_of(time)
        except ValueError:  # whose words are of what YAML makes of a number
            self._refuse("time", time, 'a time above 0 as "HH:MM:SS" or "D-HH:MM:SS"')
            return
        self._ask_for(time_minutes=minutes)
        try:
            for kind in self._kinds:
                self.platform.resources(self.recipe, kind)
        except (ValueError, RecipeError) as e:
            self.wrong.append(f"time: found {time!r}: {e}")

    def _take_partition(self, name: str | None, slurm_partitions: Callable[[Profile], list[str]]) -> None:
        if name is None or not self._is_of_slurm("slurm_partition", name):
            return
        profile = self.platform.profile()
        assert profile is not None
        known = slurm_partitions(profile)
        if known and not set(name.split(",")) <= set(known):
            self._refuse("slurm_partition", name, f"one of {', '.join(known)}")
        elif not name or any(c.isspace() for c in name):
            self._refuse("slurm_partition", name, "the name of a partition of the cluster")
        else:
            self._ask_for(slurm_partition=name)

    def _take_tasks(self, n_tasks: int | None) -> None:
        if n_tasks is None:
            return
        if not 1 <= n_tasks <= MOST_TASKS:
            self._refuse("tasks", n_tasks, f"a number from 1 to {MOST_TASKS:,}")
        else:
            self._change_tasks(lambda tasks: dataclasses.replace(tasks, n_tasks=n_tasks))

    def _take_token_budget(self, token_budget: int | None) -> None:
        if token_budget is None:
            return
        if "teacher" not in self._kinds:
            self._refuse("token_budget", token_budget, "nothing: no cache is selected, so no teacher is asked")
        elif token_budget < SMALLEST_TOKEN_BUDGET:
            self._refuse("token_budget", token_budget, f"{SMALLEST_TOKEN_BUDGET} or more (or nothing: tasks find it)")
        else:
            teacher = dataclasses.replace(self.recipe.teacher, token_budget=token_budget)
            self.recipe = dataclasses.replace(self.recipe, teacher=teacher)


def kinds_meant(recipe: Recipe, selected: Sequence[Asset]) -> tuple[JobKind, ...]:
    """The kinds of jobs that a run's settings are of."""
    if any(asset in recipe.caches for asset in selected):
        return ("teacher",)
    found: list[JobKind] = []
    if SHARDS_MANIFEST in selected:
        found.append("shards")
    if any(asset in recipe.export_params for asset in selected):
        found.append("export")
    return tuple(found) or ("student",)


def profile_files(ours: Path) -> dict[str, Path]:
    """Profiles that a run may name: those that are shipped, and those beside the deployment's own."""
    return dict(_stems(PROFILES_FOLDER)) | dict(_stems(ours.parent)) | {ours.stem: ours}


def _stems(folder: Path) -> Iterator[tuple[str, Path]]:
    return ((path.stem, path) for path in sorted(folder.glob("*.yaml")))


def partitions_of_cluster(profile: Profile) -> list[str]:
    """What sinfo lists; nothing where the cluster does not answer: sbatch then has the word."""
    try:
        shapes = Slurm(command_runner_for(profile), timeout_s=profile.command_timeout_s).partitions()
    except SchedulerError:
        return []
    return sorted({shape.name for shape in shapes})
