"""A cluster's profile: what a site wants of every job, and how its scheduler is reached. Pure data.

Written by an administrator as `slurm/profiles/<name>.yaml`, read by `kd_assets.recipes.cluster_profile`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kd_assets.contract import JobKind
from kd_assets.errors import RecipeError
from kd_assets.scheduler.job import Resources

LEAST_BEFORE_WARNING_S = 120
"""Least time of a task before it is told to stop; SLURM may say so up to a minute early (sbatch(1), --signal)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One SLURM cluster as this deployment uses it."""

    name: str
    clusters: str | None = None
    """The cluster that all commands are about, where SLURM's own configuration has another one in mind."""
    ssh: str | None = None
    """`user@login`: run SLURM's commands there; None: here."""
    ssh_options: tuple[str, ...] = ()
    """Before the host on ssh's command line (`-F`, `/etc/kd/ssh_config`); the user's own configuration holds anyway."""
    defaults: Resources = field(default_factory=Resources)
    kinds: Mapping[JobKind, Resources] = field(default_factory=dict)
    """What jobs of a kind ask for, where a recipe does not say."""
    array_concurrency: int | None = None
    """Most tasks of one job at once, whatever a recipe asks for."""
    setup: str = ""
    """Lines of Bash that every task runs first: modules, environment. No secrets."""
    secrets: tuple[str, ...] = ("HF_TOKEN",)
    """Names of environment variables that tasks get through a 0600 file, never in any other way."""
    poll_interval_s: float = 30.0
    command_timeout_s: float = 30.0
    """For each call of a SLURM command."""
    visibility_grace_s: float = 30.0
    """How long the shared file system may take to show what a node wrote."""
    absence_grace_s: float = 60.0
    """How long a task may be unknown to a scheduler that answers before it counts as lost."""
    signal_s: int = 300
    """USR1 comes this many seconds before the time limit."""

    def resources(self, kind: JobKind, wanted: Resources) -> Resources:
        """What a job asks for: the recipe's word first, then the profile's for its kind, then its defaults.

        Only None leaves a field to the next: `exclusive: false`, `gpus_per_node: 0` and `sbatch_options: []` are words.
        Memory is one word, of a node, a processor or a GPU. What each excludes adds up.
        Raises RecipeError for a time limit that leaves no time to work.
        """
        merged: dict[str, object] = {}
        for layer in (self.defaults, self.kinds.get(kind, Resources()), wanted):
            said = {f.name: getattr(layer, f.name) for f in dataclasses.fields(Resources)}
            if layer.memory_gib is not None or layer.memory_of is not None:
                merged.pop("memory_gib", None)
                if merged.pop("memory_of", None) != layer.memory_of:
                    merged.pop("max_memory_gib", None)
            excluded = [node for node in (merged.get("exclude"), layer.exclude) if node is not None]
            merged |= {name: value for name, value in said.items() if value is not None}
            if excluded:
                merged["exclude"] = ",".join(map(str, excluded))
        resources = Resources(**merged)  # type: ignore[arg-type]
        self._require_time_to_work(kind, resources)
        return resources

    def _require_time_to_work(self, kind: JobKind, resources: Resources) -> None:
        least_minutes = math.ceil((self.signal_s + LEAST_BEFORE_WARNING_S) / 60)
        if resources.time_minutes is not None and resources.time_minutes < least_minutes:
            raise RecipeError(
                f"{kind} jobs: a `time` of {resources.time_minutes} minutes leaves no time to work: a task is told "
                f"to stop {self.signal_s} s before its time is up (`signal_s` in the profile {self.name}), and would "
                f"be started again and again. Give it {least_minutes} minutes or more in the recipe or the profile, or "
                "make `signal_s` smaller"
            )
