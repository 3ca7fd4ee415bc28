"""The recipes of this project by name, as their `defs.yaml` have them."""

from __future__ import annotations

import warnings
from pathlib import Path

import dagster as dg

from kd_assets.components.teacher_caches import TeacherCaches
from kd_assets.errors import RecipeError
from kd_assets.orchestration.platform import PROJECT_FOLDER
from kd_assets.orchestration.recipe import Recipe


def load_recipe(name: str, project: Path = PROJECT_FOLDER) -> Recipe:
    """Raises RecipeError, listing the recipes that there are, for a name that none has."""
    recipes = load_recipes(project)
    if name not in recipes:
        raise RecipeError(f"there is no recipe {name!r}; there are {', '.join(sorted(recipes)) or 'none'}")
    return recipes[name]


def load_recipes(project: Path = PROJECT_FOLDER) -> dict[str, Recipe]:
    """Every recipe under `defs/`, without building its assets. Raises RecipeError for a file with something wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        try:
            found = dg.ComponentTree.for_project(project).get_all_components(of_type=TeacherCaches)
        except Exception as e:
            raise RecipeError(
                f"the recipes of {project} cannot be loaded ({_innermost(e)}): "
                "`dg check yaml kd_assets/defs/<recipe>` names file and line"
            ) from e
        return {component.recipe: component.to_recipe() for component in found}


def _innermost(error: BaseException) -> str:
    """What is really wrong: Dagster wraps it in the tree of everything that was being loaded."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())
