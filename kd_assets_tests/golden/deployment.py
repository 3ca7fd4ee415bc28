"""The golden recipe in a deployment of its own: loaded from its `defs.yaml` as a project's recipes are, with the real
local scheduler and worker."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import dagster as dg

from kd_assets.components import load_recipe
from kd_assets.orchestration.assets import recipe_definitions
from kd_assets.orchestration.platform import Platform
from kd_assets_tests.golden.facts import RECIPE
from kd_assets_tests.orchestration.deployment import Deployment

ROOT_MODULE = "golden_project"
PYPROJECT = f"""
[tool.dg]
directory_type = "project"

[tool.dg.project]
root_module = "{ROOT_MODULE}"
"""


def write_project(project: Path, recipe_file: Path) -> None:
    """A Dagster project with one recipe. Its folder must be on `sys.path` when the recipe is loaded."""
    defs = project / ROOT_MODULE / "defs"
    (defs / RECIPE).mkdir(parents=True)
    (project / "pyproject.toml").write_text(PYPROJECT)
    for package in (defs.parent, defs):
        (package / "__init__.py").touch()
    shutil.copyfile(recipe_file, defs / RECIPE / "defs.yaml")


class GoldenDeployment(Deployment):
    """`home` is KD_HOME, with `teacher` and `sources` in it; the recipe is that of `project`."""

    def __init__(self, home: Path, project: Path, instance: dg.DagsterInstance) -> None:
        self.home, self.instance = home, instance
        self.platform = Platform(home=str(home))
        self.recipe = load_recipe(RECIPE, project)
        self.definitions = dg.Definitions.merge(
            recipe_definitions(self.recipe),
            dg.Definitions(resources={"kd_assets_platform": self.platform}, executor=dg.in_process_executor),
        )

    def say_what_went_without_saying(self) -> None:
        """Have the recipe say what recipes of then meant without it, and a plan of today asks for: of a source of an
        unknown licence why it may be used, and that control tokens in texts are those tokens."""
        sources = tuple(
            dataclasses.replace(
                source,
                spec=dataclasses.replace(source.spec, control_tokens="tokens", licence_accepted="made for this test"),
            )
            for source in self.recipe.sources
        )
        self.recipe = dataclasses.replace(self.recipe, sources=sources)
        self.definitions = dg.Definitions.merge(
            recipe_definitions(self.recipe),
            dg.Definitions(resources={"kd_assets_platform": self.platform}, executor=dg.in_process_executor),
        )

    @property
    def recipe_folder(self) -> Path:
        return self.platform.recipe_folder(RECIPE)

    @property
    def submissions(self) -> list[str]:
        """Every job that was ever submitted here."""
        return sorted(str(p.relative_to(self.home)) for p in self.home.glob("jobs/*/*-*/*"))
