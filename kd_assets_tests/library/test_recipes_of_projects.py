"""Recipes in projects of their users: found, scaffolded, and side by side in one deployment."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

import kd_assets
from kd_assets import cli
from kd_assets.components import TeacherCaches, load_recipe, load_recipes
from kd_assets.errors import MissingInputError, RecipeError
from kd_assets.orchestration.one_project import require_one_project
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.project import PROJECT_FOLDER, is_checkout, project_folder
from kd_assets.recipes.scaffold import RecipeScaffolder, RecipeToBeginWith, recipe_name
from kd_assets.scheduler.shipped import slurm_folder
from kd_assets_tests.library.projects import GOLDEN, add_recipe, make_project


@pytest.fixture
def projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """Two projects (name → the folder of its `defs`), importable, that share KD_HOME."""
    before = set(sys.modules)
    monkeypatch.setenv("KD_HOME", str(tmp_path / "home"))
    made = {}
    for name in ("first_caches", "second_caches"):
        made[name] = make_project(tmp_path / name, name)
        monkeypatch.syspath_prepend(tmp_path / name / "src")
    yield made
    for module in set(sys.modules) - before:
        if module.startswith(("first_caches", "second_caches")):
            del sys.modules[module]


def folder_of(defs: Path) -> Path:
    return defs.parents[2]


def definitions_of(defs: Path) -> dg.Definitions:
    return dg.load_from_defs_folder(path_within_project=defs)


# ------------------------------------------------------------------------------------------------ found


def test_recipes_are_those_of_the_project_around_the_working_directory(
    projects: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_recipe(projects["first_caches"], "mine")
    monkeypatch.chdir(projects["first_caches"] / "mine")
    assert list(load_recipes()) == ["mine"]
    assert load_recipe("mine").project == "first_caches"
    with pytest.raises(RecipeError, match=r"there is no recipe 'demo'; there are mine in .*first_caches"):
        load_recipe("demo")


def test_outside_of_any_project_recipes_are_those_of_the_checkout(tmp_path: Path) -> None:
    assert is_checkout()
    assert project_folder(tmp_path) == PROJECT_FOLDER
    with pytest.raises(MissingInputError, match=r"is in no dg project .*: change into yours"):
        project_folder(tmp_path, checkout=tmp_path)


def test_a_pyproject_that_is_none_of_dagsters_is_no_project(tmp_path: Path) -> None:
    inner = tmp_path / "library"
    make_project(tmp_path, "outer_project")
    inner.mkdir()
    (inner / "pyproject.toml").write_text("[project]\nname = 'library'\n")
    assert project_folder(inner) == tmp_path
    (inner / "dg.toml").write_text('directory_type = "project"\n[project]\nroot_module = "library"\n')
    assert project_folder(inner) == inner
    (inner / "dg.toml").write_text("directory_type")
    with pytest.raises(RecipeError, match=r"library/dg.toml is not TOML"):
        project_folder(inner)


def test_a_project_that_is_not_installed_is_named_with_the_remedy(tmp_path: Path) -> None:
    add_recipe(make_project(tmp_path / "mine", "never_installed"), "mine")
    with pytest.raises(RecipeError, match=r"No module named 'never_installed'.*pip install --editable .*mine"):
        load_recipes(tmp_path / "mine")


def test_a_recipe_of_before_names_the_type_by_its_module(projects: dict[str, Path]) -> None:
    add_recipe(projects["first_caches"], "old", type_name="kd_assets.components.TeacherCaches")
    add_recipe(projects["first_caches"], "new")
    assert sorted(load_recipes(folder_of(projects["first_caches"]))) == ["new", "old"]


def test_without_kd_home_a_project_keeps_its_results_in_var(
    projects: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_recipe(projects["first_caches"], "mine")
    monkeypatch.delenv("KD_HOME")
    found = definitions_of(projects["first_caches"]).resources or {}
    with dg.build_resources(found) as resources:
        assert resources.kd_assets_platform.home_folder == folder_of(projects["first_caches"]) / "var"


def test_the_batch_script_is_inside_an_installed_package_and_beside_it_in_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "kd_assets"
    assert slurm_folder(package) == tmp_path / "slurm"
    (package / "slurm").mkdir(parents=True)
    assert slurm_folder(package) == package / "slurm"


def test_the_version_of_the_package_is_in_no_identity(
    projects: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden results say that another version made them, and `test_golden_deployment` reuses every one."""
    add_recipe(projects["first_caches"], "mine")
    recipe = load_recipe("mine", folder_of(projects["first_caches"]))
    assets = ("shard_plan", *recipe.partitioned)
    before = [recipe.code_version(asset) for asset in assets]
    monkeypatch.setattr(kd_assets, "__version__", "9.9.9")
    assert [recipe.code_version(asset) for asset in assets] == before
    assert dataclasses.replace(recipe, project=None).code_version("shard_plan") == before[0], "nor is the project"
    manifests = [json.loads(path.read_bytes()) for path in GOLDEN.glob("store/**/manifest.json")]
    assert {manifest["provenance"]["kd_assets"] for manifest in manifests} == {"0.1.0"}


# ------------------------------------------------------------------------------------------------ scaffolded


def scaffolded(folder: Path, *, append_to: Path | None = None, **words: str) -> None:
    request = dg.ScaffoldRequest(
        type_name="kd_assets.TeacherCaches",
        target_path=append_to or folder,
        scaffold_format="yaml",
        project_root=None,
        params=RecipeToBeginWith(**words),
        append=append_to is not None,
    )
    RecipeScaffolder().scaffold(request)


def test_a_scaffolded_recipe_is_one_and_every_line_of_it_is_explained(projects: dict[str, Path]) -> None:
    defs = projects["first_caches"]
    (defs / "my-teacher").mkdir()
    scaffolded(defs / "my-teacher")
    recipe = load_recipe("my_teacher", folder_of(defs))
    assert (recipe.teacher.model, recipe.caches) == ("meta-llama/Llama-3.1-8B-Instruct", ("topk_cache",))
    lines = (defs / "my-teacher" / "defs.yaml").read_text().splitlines()
    assert sum(line.lstrip().startswith("#") for line in lines) > 20


def test_what_is_commented_out_in_a_scaffolded_recipe_is_right(projects: dict[str, Path]) -> None:
    defs = projects["first_caches"]
    (defs / "whole").mkdir()
    scaffolded(defs / "whole")
    path = defs / "whole" / "defs.yaml"
    commented = (
        "# hidden_states:",
        "# embeddings:",
        "# student:",
        "# jobs:",
        "#   teacher:",
        "#     n_tasks:",
        "#     slurm:",
    )
    path.write_text(
        "\n".join(
            line.replace("# ", "", 1) if line.lstrip().startswith(commented) else line
            for line in path.read_text().splitlines()
        )
    )
    recipe = load_recipe("whole", folder_of(defs))
    assert recipe.caches == ("topk_cache", "hidden_state_cache", "embedding_cache")
    assert recipe.student is not None
    assert recipe.tasks_of("teacher").resources.slurm_partition == "gpu"


def test_scaffolding_takes_words_that_yaml_would_read_otherwise(projects: dict[str, Path]) -> None:
    defs = projects["first_caches"]
    (defs / "odd").mkdir()
    scaffolded(defs / "odd", model_id="a: b # c", source='/data/"quoted"/é/*.jsonl', licence="yes")
    recipe = load_recipe("odd", folder_of(defs))
    assert recipe.teacher.model == "a: b # c"
    assert (recipe.sources[0].spec.path, recipe.sources[0].spec.licence) == ('/data/"quoted"/é/*.jsonl', "yes")


def test_a_recipe_can_be_scaffolded_into_a_file_that_is_there(projects: dict[str, Path]) -> None:
    defs = projects["first_caches"]
    existing = add_recipe(defs, "mine", folder="several")
    scaffolded(defs / "several", append_to=existing)
    assert sorted(load_recipes(folder_of(defs))) == ["mine", "several"]


def test_a_folder_whose_name_no_recipe_can_have_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"a recipe cannot be called '70b': begin with a letter"):
        recipe_name(Path("defs/70b"))


# ------------------------------------------------------------------------------------------------ side by side


def test_two_projects_in_one_deployment_have_no_name_in_common(projects: dict[str, Path]) -> None:
    named = []
    for defs, recipe in zip(projects.values(), ("llama", "qwen"), strict=True):
        add_recipe(defs, recipe)
        add_recipe(defs, f"{recipe}_small")  # two in one project share their resource and executor
        repository = definitions_of(defs).get_repository_def()
        jobs = {job.name for job in repository.get_all_jobs() if not job.name.startswith("__")}
        sensors = {sensor.name for sensor in repository.sensor_defs}
        schedules = {schedule.name for schedule in repository.schedule_defs}
        assets = {key.to_user_string() for key in repository.asset_graph.get_all_asset_keys()}
        names = jobs | sensors | schedules | assets
        assert all(name.startswith(recipe) for name in names)
        named.append(names)
    assert named[0].isdisjoint(named[1])


def test_a_recipe_of_another_project_with_the_same_name_is_refused_when_it_runs(projects: dict[str, Path]) -> None:
    for defs in projects.values():
        add_recipe(defs, "mine")
    with dg.instance_for_test() as instance:
        results = [
            definitions_of(defs)
            .resolve_job_def("mine_plan")
            .execute_in_process(instance=instance, raise_on_error=False)
            for defs in projects.values()
        ]
    assert [result.success for result in results] == [True, False]
    (failed,) = [event for event in results[1].all_events if event.is_step_failure]
    said = str(failed.step_failure_data.user_failure_data)
    assert "the recipe mine of project second_caches has the name of one of project 'first_caches'" in said
    assert "recipes/mine.json" in said


def test_nothing_of_another_projects_recipe_is_worked_on(
    projects: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for defs in projects.values():
        path = add_recipe(defs, "mine")
        path.write_text(path.read_text() + "  student: {steps: 1}\n")
    first, second = projects.values()
    require_one_project(load_recipe("mine", folder_of(first)), Platform.from_environment())
    refusal = "the recipe mine of project second_caches has the name of one of project 'first_caches'"
    found = definitions_of(second)
    resources = found.resources or {}
    with dg.instance_for_test() as instance:
        for asset in ("student_smoke", "cache_card"):
            result = found.resolve_implicit_global_asset_job_def().execute_in_process(
                instance=instance, asset_selection=[dg.AssetKey(["mine", asset])], raise_on_error=False
            )
            (failed,) = [event for event in result.all_events if event.is_step_failure]
            assert refusal in str(failed.step_failure_data.user_failure_data), asset
        repository = found.get_repository_def()
        for sensor in repository.sensor_defs:
            tick = dg.build_sensor_context(instance, repository_def=repository, resources=resources)
            assert refusal in str(sensor.evaluate_tick(tick).skip_message), sensor.name
        schedule = repository.get_schedule_def("mine_nightly_caches")
        of_schedule = dg.build_schedule_context(instance, resources=resources)
        assert refusal in str(schedule.evaluate_tick(of_schedule).skip_message)
    monkeypatch.chdir(folder_of(second))
    assert cli.main(["recode", "mine", "--dry-run"]) != 0
    assert refusal in capsys.readouterr().err


def test_a_recipe_that_moved_to_another_project_is_taken_over_by_hand(projects: dict[str, Path]) -> None:
    platform = Platform.from_environment()
    for defs in projects.values():
        add_recipe(defs, "mine")
    first, second = (load_recipe("mine", folder_of(defs)) for defs in projects.values())
    require_one_project(first, platform)
    require_one_project(first, platform)
    with pytest.raises(RecipeError, match=r"where it has moved from 'first_caches', remove .*mine.json"):
        require_one_project(second, platform)
    note = platform.home_folder / "recipes" / "mine.json"
    note.unlink()
    require_one_project(second, platform)
    note.write_text("[]")
    with pytest.raises(RecipeError, match=r"mine.json does not say which project"):
        require_one_project(second, platform)


def test_two_recipes_of_one_name_in_one_project_are_refused_by_name(projects: dict[str, Path]) -> None:
    add_recipe(projects["first_caches"], "mine")
    add_recipe(projects["first_caches"], "mine", folder="copy")
    with pytest.raises(RecipeError, match=r"two recipes of .*first_caches are called 'mine'"):
        load_recipes(folder_of(projects["first_caches"]))


def test_the_component_type_is_that_of_the_package() -> None:
    assert kd_assets.TeacherCaches is TeacherCaches
