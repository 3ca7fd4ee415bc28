"""A recipe's name belongs to one project in a deployment: projects that share KD_HOME share asset keys and the store.

The first run of a recipe notes its project in KD_HOME/recipes; another project's recipe of the same name is refused
then, before its plan could become the current one of the first one's caches. Whatever else works on what is there
(`kd-assets recode`, sensors and schedules) asks the same, and notes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import dagster as dg

from kd_assets.durable import atomic_write, prepare_folder, read_if_there
from kd_assets.errors import KdAssetsError, RecipeError
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.recipe import Recipe


def require_one_project(recipe: Recipe, platform: Platform) -> None:
    """Raises RecipeError where this deployment has a recipe of this name from another project; else it is this one's
    from now on.

    A recipe that nobody said a project of (built in a program) is not asked.
    """
    require_no_other_project(recipe, platform)
    path = _note(recipe, platform)
    if recipe.project is not None and read_if_there(path) is None:
        prepare_folder(path.parent)
        atomic_write(path, json.dumps({"project": recipe.project}).encode())


def require_no_other_project(recipe: Recipe, platform: Platform) -> None:
    """The same, and writes nothing."""
    path = _note(recipe, platform)
    if recipe.project is None or (written := read_if_there(path)) is None:
        return
    try:
        other = json.loads(written)["project"]
    except (ValueError, KeyError, TypeError) as e:
        raise RecipeError(f"{path} does not say which project the recipe is of: remove it") from e
    if other != recipe.project:
        raise RecipeError(
            f"the recipe {recipe.name} of project {recipe.project} has the name of one of project {other!r}, and both "
            f"share {platform.home_folder}: give it another name, or another KD_HOME; where it has moved from "
            f"{other!r}, remove {path}"
        )


def skip_of_another_project(recipe: Recipe, platform: Platform) -> dg.SkipReason | None:
    """What a sensor or schedule says where the recipe's name is another project's, or nobody knows whose: its jobs and
    runs are not this one's to settle or to ask for. None where it may go on."""
    try:
        require_no_other_project(recipe, platform)
    except (KdAssetsError, OSError) as e:
        return dg.SkipReason(f"nothing is done: {e}")
    return None


def _note(recipe: Recipe, platform: Platform) -> Path:
    return platform.home_folder / "recipes" / f"{recipe.name}.json"
