"""A defs folder with something broken in it: that is named, and takes down itself alone."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext, DefinitionsLoadType

from kd_assets import load_defs_folder
from kd_assets.components import load_recipe, load_recipes
from kd_assets.errors import RecipeError
from kd_assets_tests.library.projects import add_recipe, make_project

OTHER = """
import dagster as dg

@dg.asset
def {name}() -> None:
    ...
"""
WITH_STATE = """
import dagster as dg
from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext

@dg.definitions
def of_state():
    DefinitionsLoadContext.get().get_defs_key_state_info("some_component")
    return dg.Definitions()
"""
OF_A_PROJECT = """
import dagster as dg

@dg.definitions
def of_the_project():
    @dg.asset(required_resource_keys={"platform"})
    def mine(context):
        return context.resources.platform

    theirs = {"platform": "the project's"}
    return dg.Definitions(assets=[mine], resources=theirs, executor=dg.multiprocess_executor)
"""
LOADER = """
import dagster as dg

class Mine(dg.Component):
    def build_defs(self, context):
        return dg.Definitions(assets=[dg.AssetSpec("of_a_component")])

@dg.component_instance
def load(context):
    return Mine()
"""


@pytest.fixture
def defs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The `defs` of a project with the recipe `good`, importable."""
    monkeypatch.setenv("KD_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(tmp_path / "src")
    made = make_project(tmp_path, "some_caches")
    add_recipe(made, "good")
    yield made
    for module in [module for module in sys.modules if module.partition(".")[0] == "some_caches"]:
        del sys.modules[module]


def broken(path: Path, *change: str) -> Path:
    old, new = change or ("licence:", "license:")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def loaded(defs: Path) -> dict[str, dg.AssetSpec]:
    """By key, what a code server gets of the project."""
    return {spec.key.to_user_string(): spec for spec in load_defs_folder(defs.parent).resolve_all_asset_specs()}


def not_loaded(specs: dict[str, dg.AssetSpec]) -> dict[str, str]:
    return {key: str(spec.description) for key, spec in specs.items() if "not_loaded" in key}


def test_a_folder_in_which_nothing_is_broken_is_what_dagster_makes_of_it(defs: Path) -> None:
    (defs / "other.py").write_text(OTHER.format(name="mine"))
    theirs = dg.load_from_defs_folder(path_within_project=defs)
    assert set(loaded(defs)) == {s.key.to_user_string() for s in theirs.resolve_all_asset_specs()}
    assert "mine" in loaded(defs)


@pytest.mark.parametrize(
    "change",
    [
        ("licence:", "license:"),
        ("caches:", "caches: ["),
        ("  recipe:", "  5: b\n  recipe:"),
        ("kd_assets.", "no.such."),
    ],
)
def test_a_broken_recipe_is_an_asset_that_says_why(defs: Path, change: tuple[str, str]) -> None:
    path = broken(add_recipe(defs, "one"), *change)
    specs = loaded(defs)
    assert "good/topk_cache" in specs
    assert {key for key in specs if key.startswith("one/")} == {"one/not_loaded"}
    assert f"{path}:" in str(specs["one/not_loaded"].description)
    assert specs["one/not_loaded"].group_name == "one"


def test_a_broken_recipe_may_lie_in_a_folder_of_any_name(defs: Path) -> None:
    for folder in ("my-teacher", "my_teacher", "70b, v1.5", "modèle"):
        broken(add_recipe(defs, "one", folder=folder))
    specs = loaded(defs)
    assert "good/topk_cache" in specs
    assert set(not_loaded(specs)) == {
        "my_teacher/not_loaded",
        "my_teacher/not_loaded_2",
        "70b_v1_5/not_loaded",
        "mod_le/not_loaded",
    }


def test_whatever_else_is_in_the_folder_stays(defs: Path) -> None:
    broken(add_recipe(defs, "one"))
    (defs / "other.py").write_text(OTHER.format(name="of_a_file"))
    for folder in ("extra", "by_component", "team"):
        (defs / folder).mkdir()
    (defs / "extra" / "deep.py").write_text(OTHER.format(name="of_a_folder"))
    (defs / "by_component" / "component.py").write_text(LOADER)
    add_recipe(defs / "team", "inner")
    two = broken(add_recipe(defs / "team", "two"))
    specs = loaded(defs)
    assert {"of_a_file", "of_a_folder", "of_a_component", "good/topk_cache", "inner/topk_cache"} <= set(specs)
    assert set(not_loaded(specs)) == {"one/not_loaded", "team/two/not_loaded"}
    assert f"{two}:" in not_loaded(specs)["team/two/not_loaded"]


def test_what_a_folder_says_of_its_parts_holds_for_those_that_are_left(defs: Path) -> None:
    (defs / "team").mkdir()
    tags = '{target: "*", attributes: {tags: {team: ours}}}'
    (defs / "team" / "defs.yaml").write_text(
        f"type: dagster.DefsFolderComponent\npost_processing: {{assets: [{tags}]}}\n"
    )
    add_recipe(defs / "team", "inner")
    broken(add_recipe(defs / "team", "two"))
    specs = loaded(defs)
    assert specs["inner/topk_cache"].tags["team"] == "ours"
    assert set(not_loaded(specs)) == {"team/two/not_loaded"}
    broken(defs / "team" / "defs.yaml", "post_processing", "postprocessing")
    assert set(not_loaded(loaded(defs))) == {"team/not_loaded"}


def test_python_that_raises_is_named_with_its_line(defs: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = defs / "other.py"
    path.write_text("import json\n\njson.loads('nothing')\n")
    with caplog.at_level(logging.WARNING):
        dg.get_dagster_logger().addHandler(caplog.handler)
        specs = loaded(defs)
        dg.get_dagster_logger().removeHandler(caplog.handler)
    assert f"{path}:3: Expecting value" in not_loaded(specs)["other/not_loaded"]
    assert "good/topk_cache" in specs
    assert f"{path}:3: Expecting value" in caplog.text
    assert "Traceback" in caplog.text, "of the first exception"


def test_where_ci_says_so_a_broken_part_fails_the_whole(defs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = broken(add_recipe(defs, "one"))
    (defs / "other.py").write_text("1 / 0\n")
    monkeypatch.setenv("KD_STRICT", "0")
    assert set(not_loaded(loaded(defs))) == {"one/not_loaded", "other/not_loaded"}
    monkeypatch.setenv("KD_STRICT", "1")
    with pytest.raises(RecipeError, match=r"2 parts of .* cannot be loaded") as raised:
        loaded(defs)
    assert f"{path}:5: there is no field license" in str(raised.value)
    assert f"{defs / 'other.py'}:1: division by zero" in str(raised.value)


def test_a_project_may_have_an_executor_and_a_resource_called_platform(defs: Path) -> None:
    (defs / "of_the_project.py").write_text(OF_A_PROJECT)
    found = load_defs_folder(defs.parent)
    repository = found.get_repository_def()
    assert "not_loaded" not in str(loaded(defs))
    job = repository.get_job("__ASSET_JOB")
    assert job.executor_def is dg.multiprocess_executor, "the project's, of what is materialized by hand"
    assert repository.get_job("good_caches").executor_def is dg.in_process_executor, "of the recipe's own jobs"
    result = job.execute_in_process(asset_selection=[dg.AssetKey("mine"), dg.AssetKey(["good", "shard_plan"])])
    assert result.output_for_node("mine") == "the project's"
    assert len(result.get_asset_materialization_events()) == 2


def test_without_an_executor_of_the_project_runs_are_one_process(defs: Path) -> None:
    assert load_defs_folder(defs.parent).executor is dg.in_process_executor
    assert dg.load_from_defs_folder(path_within_project=defs).executor is dg.in_process_executor


def test_definitions_are_loaded_once_until_something_changes(defs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Dagster command loads them up to six times, and waited seconds for it."""
    first = load_defs_folder(defs.parent)
    assert load_defs_folder(defs.parent) is first
    monkeypatch.setenv("KD_SLURM_PROFILE", "other")
    second = load_defs_folder(defs.parent)
    assert second is not first
    add_recipe(defs, "new")
    assert "new/topk_cache" in loaded(defs)
    (defs / "new" / "defs.yaml").unlink()
    assert "new/topk_cache" not in loaded(defs)


def test_definitions_of_state_that_dagster_keeps_are_loaded_each_time(defs: Path) -> None:
    (defs / "other.py").write_text(WITH_STATE)
    with DefinitionsLoadContext.scoped(DefinitionsLoadContext(DefinitionsLoadType.INITIALIZATION)):
        first = load_defs_folder(defs.parent)
        assert load_defs_folder(defs.parent) is not first


def test_a_recipe_may_say_how_old_its_plan_may_be(defs: Path) -> None:
    path = add_recipe(defs, "fresh")
    path.write_text(path.read_text() + "  fresh_within_hours: 36\n")
    policies = {key: spec.freshness_policy for key, spec in loaded(defs).items()}
    assert policies.pop("fresh/shard_plan") == dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=36))
    assert set(policies.values()) == {None}


def test_two_recipes_of_one_name_are_named(defs: Path) -> None:
    path = add_recipe(defs, "good", folder="other")
    add_recipe(defs, "third")
    said = not_loaded(specs := loaded(defs))
    assert f"{path}:4: recipe 'good' is also the name of {defs}/good/defs.yaml" in said["other/not_loaded"]
    assert {"good/topk_cache", "third/topk_cache"} <= set(specs)
    assert list(said) == ["other/not_loaded"]


def test_two_assets_of_one_key_are_named(defs: Path) -> None:
    for file in ("first.py", "second.py"):
        (defs / file).write_text(OTHER.format(name="mine"))
    said = not_loaded(specs := loaded(defs))
    assert "the asset mine is there twice" in said["second/not_loaded"]
    assert {"mine", "good/topk_cache"} <= set(specs)


def test_a_folder_with_nothing_but_a_broken_recipe_loads(defs: Path) -> None:
    broken(defs / "good" / "defs.yaml")
    assert set(loaded(defs)) == {"good/not_loaded"}


def test_the_page_on_ones_own_project_has_the_lines_that_do_it(defs: Path) -> None:
    broken(add_recipe(defs, "one"))
    found = importlib.import_module("some_caches.definitions").defs()
    keys = {spec.key.to_user_string() for spec in found.resolve_all_asset_specs()}
    assert {"good/topk_cache", "one/not_loaded"} <= keys


# ------------------------------------------------------------------------------------------------ by name


def test_a_recipe_is_found_beside_a_broken_one(defs: Path) -> None:
    """So commands about the one (plan, preview, recode) do not wait for somebody to mend the other."""
    broken(add_recipe(defs, "one"))
    (defs / "other.py").write_text("import no_such_package\n")
    add_recipe(defs, "twin")
    add_recipe(defs, "twin", folder="twin2")
    assert load_recipe("good", defs).name == "good"
    with pytest.raises(RecipeError, match=r"there is no recipe 'one'; there are good, twin in ") as e:
        load_recipe("one", defs)
    assert f"{defs}/one cannot be loaded (" in str(e.value)
    assert "defs/other.py cannot be loaded (No module named 'no_such_package')" in str(e.value)
    assert "`kd-assets check` names file and line" in str(e.value)
    with pytest.raises(RecipeError, match=r"two recipes of .* are called 'twin'"):
        load_recipe("twin", defs)
    with pytest.raises(RecipeError, match=r"the recipes of .* cannot be loaded"):
        load_recipes(defs)
