"""What each task of a job asks for, with the number of its processes: it follows from how the teacher lies on GPUs.

Both a run and `kd-assets preview` ask here, so that what is shown is what is submitted. The node has the last word on
the placement, with the GPUs that it sees; here it is what the recipe and the cluster's profile say of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kd_assets.contract import JobKind
from kd_assets.errors import InputError, RecipeError
from kd_assets.model_files.placement import Placement, place
from kd_assets.model_files.size import teacher_size
from kd_assets.orchestration.planning.planner import Planner
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.recipe import Recipe
from kd_assets.scheduler import Profile, Resources


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResources:
    """Resources whose `processes_per_task` is settled as far as it can be here."""

    resources: Resources
    placement: Placement | None = None
    """Of a teacher; None where only the node can tell."""
    words: str | None = None
    """One line for people; None for kinds without a teacher."""


def task_resources(
    recipe: Recipe, platform: Platform, planner: Planner, kind: JobKind, *, profile: Profile | None = None
) -> TaskResources:
    """What each task of a recipe's jobs of a kind asks for. `profile`: what `platform.profile()` gave, where that was
    asked already.

    Raises RecipeError for a placement that cannot be on what the job asks for.
    """
    profile = profile or platform.profile()
    resources = platform.resources(recipe, kind, profile=profile)
    if kind != "teacher":
        return TaskResources(resources=resources)
    if profile is None:  # the local scheduler gives what there is
        return _by_the_node(resources, "the local scheduler gives it the GPUs that there are")
    if not resources.gpus_per_node:
        says_none = resources.gpus_per_node == 0
        return _by_the_node(resources, f"the job {'asks for no GPU' if says_none else 'does not say gpus_per_node'}")
    wanted = recipe.teacher
    try:
        size = teacher_size(planner.teacher_folder, dtype=wanted.dtype, quantization=wanted.quantization)
    except RecipeError:
        raise
    except InputError as e:  # without weights nothing is submitted either; a preview goes on without them
        return _by_the_node(resources, str(e))
    placement = place(
        size,
        n_gpus=resources.gpus_per_node,
        gpu_memory_gib=resources.gpu_memory_gib,
        wanted=wanted.placement,
        n_devices=wanted.n_devices,
        n_processes=resources.processes_per_task,
    )
    if placement is None:
        return _by_the_node(resources, f"{size.in_words}, and the cluster's profile does not say gpu_memory_gib")
    words = f"teacher: {placement.in_words}"
    if placement.kind == "tensor_parallel":
        words += f" (layer by layer if transformers has no plan for {size.model_type})"
    resources = dataclasses.replace(resources, processes_per_task=placement.n_processes)
    return TaskResources(resources=resources, placement=placement, words=words)


def _by_the_node(resources: Resources, why: str) -> TaskResources:
    return TaskResources(resources=resources, words=f"teacher: the node decides how it lies on its GPUs ({why})")
