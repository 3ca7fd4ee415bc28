"""The recipes as shipped: they load anywhere, say what is wrong with a YAML, and need no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from kd_assets.components import TeacherCaches
from kd_assets.contract import EmbeddingParams, HiddenStateParams, TopkParams
from kd_assets.definitions import defs
from kd_assets.errors import RecipeError
from kd_assets.orchestration.platform import PROJECT_FOLDER, Platform
from kd_assets.orchestration.recipe import Recipe, Source, Teacher
from kd_assets.sources.plan import SourceSpec


@pytest.fixture(scope="module")
def recipes() -> dict[str, Recipe]:
    found = dg.ComponentTree.for_project(PROJECT_FOLDER).get_all_components(of_type=TeacherCaches)
    return {c.recipe: c.to_recipe() for c in found}


def test_definitions_load_without_files_weights_or_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from kd_assets.definitions import defs; d = defs(); d.resolve_all_job_defs(); "
        "print(sorted({'torch', 'transformers', 'tokenizers', 'accelerate'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "KD_HOME": str(tmp_path / "nothing here")},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
    assert not (tmp_path / "nothing here").exists(), "loading writes nothing"


def test_every_asset_key_starts_with_its_recipe() -> None:
    keys = {k.to_user_string() for k in defs().resolve_asset_graph().get_all_asset_keys()}
    expected = {"shard_plan", "shards_manifest", "topk_cache", "hidden_state_cache", "embedding_cache", "student_smoke"}
    assert {k.removeprefix("llama31_70b/") for k in keys if k.startswith("llama31_70b/")} == expected
    assert {k.removeprefix("demo/") for k in keys if k.startswith("demo/")} == expected | {"corpus", "teacher"}
    assert all(k.startswith(("demo/", "llama31_70b/")) for k in keys)


def test_llama31_70b_has_the_parameters_of_the_scripts_it_replaces(recipes: dict[str, Recipe]) -> None:
    recipe = recipes["llama31_70b"]
    assert recipe.teacher.model == "meta-llama/Llama-3.1-70B-Instruct"
    assert recipe.teacher.dtype == "bfloat16"
    assert recipe.topk == TopkParams(k=16, max_length=8192)
    assert recipe.hidden_states == HiddenStateParams(blocks=(22,), max_length=2048)
    assert recipe.embeddings == EmbeddingParams(max_length=8192)
    assert recipe.max_length == 8192
    assert recipe.sources[0].spec.path == "$KD_LLAMA31_70B_SHARDS"


DG = str(Path(sys.executable).parent / "dg")
RECIPE_FOLDERS = sorted(p.parent.name for p in (PROJECT_FOLDER / "kd_assets" / "defs").glob("*/defs.yaml"))


@pytest.mark.parametrize("recipe_name", RECIPE_FOLDERS)
def test_a_wrong_field_of_a_recipe_is_named_with_file_and_line(tmp_path: Path, recipe_name: str) -> None:
    """With the recipe's folder as argument: without one, dg 1.13.27 checks a single file of each component type."""
    project = tmp_path / "a project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(PROJECT_FOLDER / name, project)
    shutil.copytree(PROJECT_FOLDER / "kd_assets", project / "kd_assets", ignore=shutil.ignore_patterns("__pycache__"))
    recipe = project / "kd_assets" / "defs" / recipe_name / "defs.yaml"
    lines = recipe.read_text().splitlines()
    wrong = next(i for i, line in enumerate(lines) if "documents_per_shard" in line)
    lines[wrong] = lines[wrong].replace("documents_per_shard", "documents_per_shrd")
    recipe.write_text("\n".join(lines) + "\n")
    run = subprocess.run(
        [DG, "check", "yaml", f"kd_assets/defs/{recipe_name}"],
        capture_output=True,
        text=True,
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},  # this copy, and not the one that is installed
        check=False,
    )
    assert run.returncode == 1
    assert f"{recipe_name}/defs.yaml:{wrong + 1}" in run.stdout + run.stderr
    assert "documents_per_shrd" in run.stdout + run.stderr


@pytest.mark.parametrize("recipe_name", RECIPE_FOLDERS)
def test_the_shipped_recipes_pass_the_check(recipe_name: str) -> None:
    command = [DG, "check", "yaml", f"kd_assets/defs/{recipe_name}"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_FOLDER, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def a_recipe(**changes: object) -> Recipe:
    fields: dict[str, object] = {
        "name": "r",
        "sources": (Source(spec=SourceSpec(name="s", path="/s", file_format="jsonl", licence="CC0-1.0")),),
        "teacher": Teacher(model="m"),
        "documents_per_shard": 10,
        "topk": TopkParams(k=4, max_length=100),
        "embeddings": EmbeddingParams(max_length=300),
    }
    return Recipe(**{**fields, **changes})  # type: ignore[arg-type]


def test_documents_are_cut_at_the_most_that_any_cache_keeps() -> None:
    assert a_recipe().max_length == 300
    assert a_recipe(embeddings=None).max_length == 100


def test_a_recipe_without_any_cache_is_refused() -> None:
    with pytest.raises(RecipeError, match="r caches nothing: name at least one of"):
        a_recipe(topk=None, embeddings=None)


def test_a_code_version_changes_with_what_decides_the_content_and_with_nothing_else() -> None:
    before, after = a_recipe(), a_recipe(topk=TopkParams(k=5, max_length=100))
    assert before.code_version("topk_cache") != after.code_version("topk_cache")
    for asset in ("shard_plan", "shards_manifest", "embedding_cache"):
        assert before.code_version(asset) == after.code_version(asset)
    slower = a_recipe(teacher=Teacher(model="m", token_budget=1))
    assert slower.code_version("topk_cache") == before.code_version("topk_cache")


def test_a_scheduler_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="KD_SCHEDULER=slurmm"):
        Platform(home=str(tmp_path), scheduler="slurmm").make_scheduler()
