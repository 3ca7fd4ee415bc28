"""The batch script and the cluster profiles that come with this package.

Their home is `slurm/` at the top of the repository; a wheel has that folder inside the package.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def slurm_folder(package: Path | None = None) -> Path:
    """The folder with `task.sbatch` and `profiles/`: inside the installed package, else beside it in a checkout."""
    package = package or Path(str(files("kd_assets"))).resolve()
    inside = package / "slurm"
    return inside if inside.is_dir() else package.parent / "slurm"


SLURM_FOLDER = slurm_folder()
BATCH_SCRIPT = SLURM_FOLDER / "task.sbatch"
PROFILES_FOLDER = SLURM_FOLDER / "profiles"
