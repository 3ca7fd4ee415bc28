"""The dg project that somebody works in: recipes are read from it, and by default its `var` is KD_HOME.

Found as `dg` finds it: the nearest folder upwards with `[tool.dg]` in its pyproject.toml, or with a dg.toml. Where
there is none it is the checkout of this package, which is a dg project itself.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from kd_assets.errors import MissingInputError, RecipeError

PROJECT_FOLDER = Path(__file__).resolve().parents[2]
"""The checkout of this package, where it runs from one (see `is_checkout`)."""


def is_checkout(folder: Path = PROJECT_FOLDER) -> bool:
    """Whether a folder is a checkout of this package, and not where a wheel was installed."""
    return (folder / "slurm" / "task.sbatch").is_file() and (folder / "pyproject.toml").is_file()


def project_folder(start: Path | None = None, *, checkout: Path = PROJECT_FOLDER) -> Path:
    """The folder of the dg project around `start` (default: the working directory), else the checkout.

    Raises MissingInputError where there is neither.
    """
    start = (start or Path.cwd()).absolute()
    for folder in (start, *start.parents):
        if _project_settings(folder) is not None:
            return folder
    if is_checkout(checkout):
        return checkout
    raise MissingInputError(
        f"{start} is in no dg project (a folder whose pyproject.toml has [tool.dg]): change into yours, where its "
        "recipes are"
    )


def _project_settings(folder: Path) -> dict[str, Any] | None:
    """The table of `folder` that makes it a dg project. Raises RecipeError for a file that is not TOML."""
    for name, keys in (("dg.toml", ()), ("pyproject.toml", ("tool", "dg"))):
        try:
            table: Any = tomllib.loads((folder / name).read_text())
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise RecipeError(f"{folder / name} is not TOML: {e}") from e
        for key in keys:
            table = table.get(key, {})
        if table.get("directory_type") == "project":
            settings: dict[str, Any] = table.get("project", {})
            return settings
    return None
