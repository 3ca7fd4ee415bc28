"""Where this deployment keeps things, and which scheduler runs its jobs. The thin resource at the edge."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import dagster as dg

from kd_assets.errors import RecipeError
from kd_assets.identity import DigestCache
from kd_assets.scheduler import LocalScheduler

PROJECT_FOLDER = Path(__file__).resolve().parents[2]


class Platform(dg.ConfigurableResource):  # type: ignore[type-arg]
    """One deployment: `home` holds the store, the jobs and the digests of large files."""

    home: str
    scheduler: str = "local"
    compute_python: str = sys.executable
    """The Python of the compute environment, as the cluster's nodes see it."""

    @staticmethod
    def from_environment() -> Platform:
        """KD_HOME (default: `var` in the checkout), KD_SCHEDULER (default: local), KD_COMPUTE_PYTHON (default: this
        Python)."""
        return Platform(
            home=str(Path(os.environ.get("KD_HOME") or PROJECT_FOLDER / "var").absolute()),
            scheduler=os.environ.get("KD_SCHEDULER") or "local",
            compute_python=os.environ.get("KD_COMPUTE_PYTHON") or sys.executable,
        )

    @property
    def home_folder(self) -> Path:
        return Path(self.home).absolute()

    def recipe_folder(self, recipe_name: str) -> Path:
        return self.home_folder / "store" / recipe_name

    def digests(self) -> DigestCache:
        return DigestCache(self.home_folder / "digests.json")

    def make_scheduler(self) -> LocalScheduler:
        """Raises RecipeError for a scheduler this version does not have."""
        if self.scheduler != "local":
            raise RecipeError(f"KD_SCHEDULER={self.scheduler}: this version runs jobs with 'local' only; unset it")
        return LocalScheduler(
            self.home_folder / "jobs", script=PROJECT_FOLDER / "slurm" / "task.sbatch", python=self.compute_python
        )

    def variables(self) -> dict[str, str]:
        """What `$NAME` in a recipe's paths stands for: the environment, and KD_HOME."""
        return {**os.environ, "KD_HOME": str(self.home_folder)}


@cache
def code_commit() -> str:
    """The commit this code was checked out at, `-dirty` when files differ; the version where there is no checkout."""
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
