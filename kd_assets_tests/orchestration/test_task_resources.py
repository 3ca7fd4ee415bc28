"""How many processes a task has follows from the teacher's size and the cluster's GPUs, and is shown before it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_assets.diagnose.preview import preview, text_lines
from kd_assets.errors import RecipeError
from kd_assets.model_files.size import teacher_size
from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.planning.task_resources import TaskResources, task_resources
from kd_assets.orchestration.platform import Platform
from kd_assets_tests.orchestration.deployment import Deployment

Deploy = Callable[..., Deployment]


def on_cluster(
    deploy: Deploy, profile: dict[str, Any], *, jobs: dict[str, Any] | None = None, **teacher: Any
) -> TaskResources:
    """What a teacher's task asks for on a cluster with this profile."""
    deployment = deploy(jobs={"teacher": jobs or {}})
    attributes = deployment.attributes["teacher"] | teacher
    path = deployment.home / "site.yaml"
    path.write_text(json.dumps(profile))  # JSON is YAML
    platform = Platform(home=str(deployment.home), scheduler="slurm", slurm_profile=str(path))
    changed = deploy(jobs={"teacher": jobs or {}}, teacher=attributes)
    return task_resources(changed.recipe, platform, planner_of(changed.recipe, platform), "teacher")


def test_a_teacher_that_fits_one_gpu_has_a_process_for_each(deploy: Deploy) -> None:
    found = on_cluster(deploy, {"gpus_per_node": 4, "gpu_memory_gib": 80})
    assert found.resources.processes_per_task == 4
    assert found.words is not None
    assert found.words.endswith("fit one GPU of 80 GiB with room for a batch: on one device, 4 processes a task")


def test_a_teacher_that_takes_two_gpus_has_a_process_for_each_pair(deploy: Deploy, tiny_teacher: Path) -> None:
    size = teacher_size(tiny_teacher, dtype="float32")
    found = on_cluster(deploy, {"gpus_per_node": 4, "gpu_memory_gib": size.weights_gib})
    assert found.placement is not None
    assert (found.placement.kind, found.placement.n_devices) == ("tensor_parallel", 2)
    assert found.resources.processes_per_task == 2
    assert found.words is not None
    assert found.words.endswith("2 processes a task (layer by layer if transformers has no plan for llama)")


def test_the_recipes_number_of_processes_stands(deploy: Deploy) -> None:
    found = on_cluster(deploy, {"gpus_per_node": 4, "gpu_memory_gib": 80}, jobs={"processes_per_task": 1})
    assert found.resources.processes_per_task == 1


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        ({}, "the job does not say gpus_per_node"),
        ({"gpus_per_node": 0, "gpu_memory_gib": 80}, "the job asks for no GPU"),
        ({"gpus_per_node": 4}, "the cluster's profile does not say gpu_memory_gib"),
    ],
)
def test_the_node_decides_where_its_gpus_are_not_known(deploy: Deploy, profile: dict[str, Any], reason: str) -> None:
    found = on_cluster(deploy, profile)
    assert (found.resources.n_processes, found.placement) == (1, None)
    assert found.words is not None
    assert reason in found.words


def test_a_placement_that_cannot_be_is_refused_before_anything_is_submitted(deploy: Deploy) -> None:
    with pytest.raises(RecipeError, match="n_devices is 8, and a process has 4 GPUs"):
        on_cluster(deploy, {"gpus_per_node": 4, "gpu_memory_gib": 80}, n_devices=8)


def test_only_a_teacher_is_placed(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy()
    found = task_resources(
        deployment.recipe, deployment.platform, planner_of(deployment.recipe, deployment.platform), "shards"
    )
    assert (found.resources.n_processes, found.words) == (1, None)


def test_a_preview_shows_where_the_teacher_goes(deploy: Deploy) -> None:
    deployment = deploy()
    deployment.plan()
    shown = preview(deployment.recipe, deployment.platform, partitions=None, assets=None)
    (line,) = [line for line in text_lines(shown) if line.startswith("  teacher: ")]
    assert line.endswith(
        "the node decides how it lies on its GPUs (the local scheduler gives it the GPUs that there are)"
    )
    raw = {job["kind"]: job for job in shown.to_json()["jobs"]}
    assert raw["teacher"]["placement"] is None
    assert raw["teacher"]["placement_words"] == line.strip()
    assert raw["shards"]["placement_words"] is None
