"""What the README shows of recipes is what recipes take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from kd_assets.components import TeacherCaches
from kd_assets.sources.planning.make import check_recipe
from kd_assets.sources.spec import SourceSpec

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks_of(heading: str) -> list[Any]:
    """The YAML under a heading of the README."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", section, re.MULTILINE | re.DOTALL)]


def test_the_recipe_of_the_readme_is_one() -> None:
    (component,) = blocks_of("A recipe")
    assert component["type"] == "kd_assets.components.TeacherCaches"
    assert TeacherCaches(**component["attributes"]).to_recipe().name == "my_teacher"


def test_the_sources_of_the_readme_are_those_of_a_recipe() -> None:
    (component,) = blocks_of("A recipe")
    (sources,) = blocks_of("Sources")
    recipe = TeacherCaches(**component["attributes"] | sources).to_recipe()
    specs: list[SourceSpec] = [source.spec for source in recipe.sources]
    check_recipe(specs, recipe.sharding, shard_prefix=recipe.name)
    assert [spec.weight for spec in specs] == [3, 1, 2]
    assert recipe.sharding.tokens_per_shard == 2_000_000
    assert recipe.tokenising.on_long == "split"
