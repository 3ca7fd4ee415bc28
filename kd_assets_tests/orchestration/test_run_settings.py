"""What one may set for a run: checked before anything is submitted, and in the identity of nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from kd_assets.errors import InputError
from kd_assets.orchestration.platform import Platform
from kd_assets.orchestration.run_settings import CachesSettings, JobSettings, settle
from kd_assets.recipes.recipe import STUDENT_SMOKE, Recipe
from kd_assets.scheduler import Profile
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment, failure_text


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe")
    with dg.DagsterInstance.ephemeral() as instance:
        return Deployment(folder, folder / "no teacher", instance, exports=["hf"]).recipe


@pytest.fixture
def cluster(tmp_path: Path) -> Platform:
    """A deployment on a SLURM cluster with three profiles, one of another cluster."""
    (tmp_path / "site.yaml").write_text("partition: batch\nsignal_s: 300\n")
    (tmp_path / "night.yaml").write_text("partition: night\n")
    (tmp_path / "elsewhere.yaml").write_text("clusters: other\n")
    return Platform(home=str(tmp_path), scheduler="slurm", slurm_profile=str(tmp_path / "site.yaml"))


def partitions(profile: Profile) -> list[str]:
    return ["batch", "h100", "night"]


def settled(settings: JobSettings, recipe: Recipe, platform: Platform, *selected: Any) -> tuple[Recipe, Platform]:
    found = settle(settings, recipe, platform, selected or CACHES, slurm_partitions=partitions)
    return found.recipe, found.platform


def test_without_settings_a_run_has_the_recipe_and_the_deployment_as_they_are(
    recipe: Recipe, cluster: Platform
) -> None:
    assert settled(CachesSettings(), recipe, cluster) == (recipe, cluster)


def test_settings_are_of_the_job_that_asks_the_teacher(recipe: Recipe, cluster: Platform) -> None:
    settings = CachesSettings(tasks=3, time="02:00:00", slurm_partition="h100", token_budget=512, profile="night")
    changed, platform = settled(settings, recipe, cluster, "shards_manifest", *CACHES)
    tasks = changed.tasks_of("teacher")
    assert (tasks.n_tasks, tasks.resources.time_minutes, tasks.resources.slurm_partition) == (3, 120, "h100")
    assert changed.teacher.token_budget == 512
    assert changed.tasks_of("shards") == recipe.tasks_of("shards")
    profile = platform.profile()
    assert profile is not None
    assert profile.name == "night"


def test_of_a_run_without_a_cache_they_are_of_every_job(recipe: Recipe, cluster: Platform) -> None:
    changed, _ = settled(CachesSettings(tasks=7), recipe, cluster, "shards_manifest", "export_hf")
    assert [changed.tasks_of(kind).n_tasks for kind in ("shards", "export", "teacher")] == [7, 7, 1]
    student, _ = settled(JobSettings(time="00:30:00"), recipe, cluster, STUDENT_SMOKE)
    assert student.tasks_of("student").resources.time_minutes == 30


def test_nothing_that_is_set_for_a_run_is_in_the_identity_of_a_result(recipe: Recipe, cluster: Platform) -> None:
    settings = CachesSettings(recompute="all", tasks=3, time="02:00:00", slurm_partition="h100", token_budget=512)
    changed, _ = settled(settings, recipe, cluster)
    for asset in ("shard_plan", *recipe.partitioned, STUDENT_SMOKE):
        assert changed.code_version(asset) == recipe.code_version(asset)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": 0}, ["tasks: found 0", "a number from 1 to 100,000"]),
        ({"token_budget": 8}, ["token_budget: found 8", "256 or more"]),
        ({"time": "3 hours"}, ["time: found '3 hours'", '"HH:MM:SS"']),
        ({"time": "0"}, ["time: found '0'", '"HH:MM:SS"']),
        ({"time": "30"}, ["time: found '30', allowed is", '"HH:MM:SS" or "D-HH:MM:SS"']),
        ({"time": "90"}, ["time: found '90', allowed is", '"HH:MM:SS" or "D-HH:MM:SS"']),
        ({"time": "00:00:00"}, ["time: found '00:00:00', allowed is a time above 0"]),
        ({"time": "00:05:00"}, ["time: found '00:05:00'", "no time to work", "7 minutes or more"]),
        ({"slurm_partition": "gpus"}, ["slurm_partition: found 'gpus'", "one of batch, h100, night"]),
        ({"profile": "nowhere"}, ["profile: found 'nowhere'", "default", "night", "site"]),
        ({"profile": "/tmp/mine.yaml"}, ["profile: found '/tmp/mine.yaml'", "one of"]),
        ({"profile": "elsewhere"}, ["profile: found 'elsewhere'", "the same cluster"]),
    ],
)
def test_what_is_wrong_names_the_field_what_was_found_and_what_is_allowed(
    recipe: Recipe, cluster: Platform, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError) as raised:
        settled(CachesSettings(**settings), recipe, cluster)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_all_that_is_wrong_is_named_at_once(recipe: Recipe, cluster: Platform) -> None:
    with pytest.raises(InputError, match=r"time: found .*; tasks: found .*; token_budget: found"):
        settled(CachesSettings(tasks=0, time="soon", token_budget=1), recipe, cluster)


def test_a_token_budget_is_refused_where_no_teacher_is_asked(recipe: Recipe, cluster: Platform) -> None:
    with pytest.raises(InputError, match="no cache is selected"):
        settled(CachesSettings(token_budget=512), recipe, cluster, "shards_manifest")


@pytest.mark.parametrize("setting", [{"time": "02:00:00"}, {"slurm_partition": "h100"}, {"profile": "default"}])
def test_what_is_slurms_is_refused_where_jobs_run_without_it(
    recipe: Recipe, tmp_path: Path, setting: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=f"{next(iter(setting))}: found .*KD_SCHEDULER=local"):
        settled(CachesSettings(**setting), recipe, Platform(home=str(tmp_path)))


def test_a_cluster_that_does_not_answer_leaves_the_word_to_sbatch(recipe: Recipe, cluster: Platform) -> None:
    settings = CachesSettings(slurm_partition="gpus")
    found = settle(settings, recipe, cluster, recipe.caches, slurm_partitions=lambda profile: [])
    assert found.recipe.tasks_of("teacher").resources.slurm_partition == "gpus"


def test_the_launchpad_has_what_is_of_a_run_and_nothing_of_the_deployment(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy()
    job = deployment.definitions.resolve_job_def("tiny_caches")
    fields = {f.name for f in dataclasses.fields(deployment.platform)}
    assert {"home", "compute_python", "scheduler"} <= fields
    for name in fields:
        with pytest.raises(dg.DagsterInvalidConfigError, match="platform"):
            dg.validate_run_config(job, {"resources": {"kd_assets_platform": {"config": {name: "x"}}}})

    def config(**settings: object) -> dict[str, object]:
        return {"ops": {"tiny__teacher_caches": {"config": settings}}}

    assert dg.validate_run_config(job, config(recompute="wrong", tasks=2, token_budget=512))
    with pytest.raises(dg.DagsterInvalidConfigError, match="recompute"):
        dg.validate_run_config(job, config(recompute="sometimes"))
    with pytest.raises(dg.DagsterInvalidConfigError, match="home"):
        dg.validate_run_config(job, config(home="/elsewhere"))
    shown = dg.validate_run_config(job)["ops"]["tiny__teacher_caches"]["config"]
    assert set(shown) == {"recompute", "token_budget", "tasks", "time", "slurm_partition", "profile"}


def test_a_wrong_setting_fails_the_run_before_anything_is_submitted(deployment: Deployment) -> None:
    result = deployment.run("shards_manifest", partition=SHARDS[0], settings={"tasks": 0})
    assert not result.success
    assert "tasks: found 0, allowed is a number from 1 to 100,000" in failure_text(result)
    assert "nothing was submitted" in failure_text(result)
    assert not list((deployment.home / "jobs").glob("tiny/*"))
