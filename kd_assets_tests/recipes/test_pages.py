"""What the README and docs/ show of recipes is what recipes take, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from kd_assets.components import TeacherCaches
from kd_assets.recipes.reference import reference
from kd_assets.sources.planning.make import check_recipe
from kd_assets.sources.spec import SourceSpec

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
PAGES = [PROJECT / "README.md", *sorted(DOCS.glob("*.md"))]


def yaml_of(page: Path) -> list[Any]:
    """The page's blocks of YAML."""
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)]


def anchors_of(page: Path) -> set[str]:
    """What `page.md#…` may name, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [PROJECT / "README.md", DOCS / "recipe.md"], ids=lambda page: page.name)
def test_the_recipe_that_is_shown_is_one(page: Path) -> None:
    (component,) = [block for block in yaml_of(page) if "attributes" in block]
    assert component["type"] == "kd_assets.TeacherCaches"
    assert TeacherCaches(**component["attributes"]).to_recipe().name == "my_teacher"


def test_the_sources_that_are_shown_are_those_of_a_recipe() -> None:
    (component,) = yaml_of(DOCS / "recipe.md")
    (sources,) = yaml_of(DOCS / "sources.md")
    recipe = TeacherCaches(**component["attributes"] | sources).to_recipe()
    specs: list[SourceSpec] = [source.spec for source in recipe.sources]
    check_recipe(specs, recipe.sharding, shard_prefix=recipe.name)
    assert [spec.weight for spec in specs] == [3, 1, 2]
    assert recipe.sharding.tokens_per_shard == 2_000_000
    assert recipe.tokenising.on_long == "split"


def test_the_jobs_that_are_shown_are_those_of_a_recipe() -> None:
    (component,) = yaml_of(DOCS / "recipe.md")
    (jobs,) = yaml_of(DOCS / "slurm.md")
    recipe = TeacherCaches(**component["attributes"] | jobs).to_recipe()
    assert recipe.tasks["teacher"].resources.gpus_per_node == 4


def test_the_reference_is_that_of_the_models() -> None:
    assert (DOCS / "recipe-reference.md").read_text() == reference(TeacherCaches), (
        "a field was changed: kd-assets fields > docs/recipe-reference.md"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors_of(target), f"{page.name} links to {link}"
