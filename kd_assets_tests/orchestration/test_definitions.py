"""The recipes as shipped: they load anywhere, say what is wrong with a YAML, and need no torch."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pydantic import ValidationError

from kd_assets.components import TeacherCaches, load_recipe
from kd_assets.contract import EmbeddingParams, HiddenStateParams, TopkParams
from kd_assets.definitions import defs
from kd_assets.errors import MissingInputError, RecipeError, SchedulerError
from kd_assets.orchestration.platform import PROJECT_FOLDER, Platform
from kd_assets.recipes.recipe import Recipe, Source, Tasks, TeacherSettings
from kd_assets.scheduler import LocalScheduler, Resources, SlurmScheduler
from kd_assets.sources.spec import Sharding, SourceSpec
from kd_assets_tests.library.environments import NO_TELEMETRY


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
    caches = {"shards_manifest", "topk_cache", "hidden_state_cache", "embedding_cache"}
    expected = {"shard_plan", *caches, "student_smoke", "cache_card"}
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


@pytest.fixture
def quiet_dg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dg` calls home, unless the dagster.yaml of DAGSTER_HOME says no."""
    instance = tmp_path / "dagster"
    instance.mkdir()
    (instance / "dagster.yaml").write_text(NO_TELEMETRY)
    monkeypatch.setenv("DAGSTER_HOME", str(instance))


RECIPE_FOLDERS = sorted(p.parent.name for p in (PROJECT_FOLDER / "kd_assets" / "defs").glob("*/defs.yaml"))


@pytest.mark.usefixtures("quiet_dg")
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


@pytest.mark.usefixtures("quiet_dg")
@pytest.mark.parametrize("recipe_name", RECIPE_FOLDERS)
def test_the_shipped_recipes_pass_the_check(recipe_name: str) -> None:
    command = [DG, "check", "yaml", f"kd_assets/defs/{recipe_name}"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_FOLDER, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


WRONG_JOBS = """
  jobs:
    shards:
      n_tasks: 0
      concurrency: many
    teachers: {}
    teacher:
      n_tsks: 4
      slurm:
        partition: -h100
        account: ""
        qos: "a\\nb"
        gpus_per_node: -1
        cpus: 1.5
        memory_gib: -1
        time: 48:00:00
        exclusive: maybe
        sbatch_options:
          - --array=3
          - --reservation
          - --contiguous
    student:
      slurm:
        time: 2 days
"""
WRONG_LINES = {
    3: "n_tasks 0 is less than or equal to the minimum of 0",
    4: "'many' is not of type 'integer'",
    5: "'teachers' was unexpected",
    7: "'n_tsks' was unexpected",
    9: "it may not begin with -",
    10: "'' does not match",
    11: "one line, without control characters",
    12: "-1 is less than the minimum of 0",
    13: "1.5 is not of type 'integer'",
    14: "-1 is less than or equal to the minimum of 0",
    15: '172800 is not one of [\'in quotes: "HH:MM:SS"',
    16: "'maybe' is not of type 'boolean'",
    18: "'--array=3' is not one of ['an option that kd_assets does not set itself",
    19: "'--reservation' is not one of ['--name=value",
    23: "'2 days' is not one of",
}


@pytest.mark.usefixtures("quiet_dg")
def test_every_wrong_field_of_the_jobs_is_named_with_its_own_line(tmp_path: Path) -> None:
    project = tmp_path / "a project"
    project.mkdir()
    shutil.copy(PROJECT_FOLDER / "pyproject.toml", project)
    shutil.copytree(PROJECT_FOLDER / "kd_assets", project / "kd_assets", ignore=shutil.ignore_patterns("__pycache__"))
    recipe = project / "kd_assets" / "defs" / "llama31_70b" / "defs.yaml"
    before = recipe.read_text().partition("  # How the work is split")[0].rstrip("\n")
    recipe.write_text(before + WRONG_JOBS)
    run = subprocess.run(
        [DG, "check", "yaml", "kd_assets/defs/llama31_70b"],
        capture_output=True,
        text=True,
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        check=False,
    )
    assert run.returncode == 1
    first = before.count("\n") + 1
    reports = [line for line in (run.stdout + run.stderr).splitlines() if "defs.yaml:" in line]
    for line, said in WRONG_LINES.items():
        assert any(f"defs.yaml:{first + line} " in r and said in r for r in reports), (line, said, reports)
    assert len(reports) == len(WRONG_LINES), "and nothing else is wrong"


def test_a_wrong_string_is_no_template() -> None:
    schema = TeacherCaches.get_model_cls().model_json_schema()
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    attributes = {"recipe": "r", "sources": [{"name": "s", "path": "/s"}], "teacher": {"model_id": "m"}}
    good = attributes | {"caches": {"topk": {"k": 4, "max_length": 8}}, "documents_per_shard": "{{ env.N }}"}
    assert list(validator.iter_errors(good)) == []
    (error,) = validator.iter_errors(good | {"documents_per_shard": "ten"})
    assert error.message == "'ten' is not of type 'integer'"
    (error,) = validator.iter_errors(good | {"caches": {}})
    assert list(error.absolute_path) == ["caches"]


WRONG_TEACHERS = [
    ({"placement": "one_device", "n_devices": 2}, ["n_devices"], "1, or left out, beside placement one_device"),
    ({"placement": "tensor_parallel", "n_devices": 1}, ["n_devices"], "2 or more, or left out"),
    ({"placement": "device_map", "n_devices": 1}, ["n_devices"], "2 or more, or left out"),
    ({"quantization": {"bits": 4}}, ["quantization"], "quant_method"),
    ({"quantization": {}}, ["quantization"], "quant_method"),
]


@pytest.mark.parametrize(("settings", "where", "said"), WRONG_TEACHERS)
def test_a_teacher_that_no_machine_can_load_is_refused_with_the_recipe(
    settings: dict[str, object], where: list[str], said: str
) -> None:
    """By the schema, which names the line, and by whatever else loads the recipe."""
    schema = TeacherCaches.get_model_cls().model_json_schema()
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    attributes: dict[str, Any] = {
        "recipe": "r",
        "sources": [{"name": "s", "path": "/s"}],
        "teacher": {"model_id": "m"} | settings,
        "caches": {"topk": {"k": 4, "max_length": 8}},
    }
    (error,) = validator.iter_errors(attributes)
    assert list(error.absolute_path) == ["teacher", *where]
    assert said in error.message
    with pytest.raises(ValidationError, match=said):
        TeacherCaches(**attributes)


@pytest.mark.parametrize(
    "settings",
    [
        {"placement": "one_device", "n_devices": 1},
        {"placement": "tensor_parallel", "n_devices": 2},
        {"placement": "device_map"},
        {"n_devices": 1},
        {"placement": "tensor_parallel", "n_devices": "{{ env.N }}"},
        {"quantization": None},
        {"quantization": {"quant_method": "fp8", "anything": 1}},
    ],
)
def test_a_teacher_that_some_machine_can_load_passes_the_check(settings: dict[str, object]) -> None:
    schema = TeacherCaches.get_model_cls().model_json_schema()
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    attributes = {"recipe": "r", "sources": [{"name": "s", "path": "/s"}], "teacher": {"model_id": "m"} | settings}
    assert list(validator.iter_errors(attributes | {"caches": {"topk": {"k": 4, "max_length": 8}}})) == []


def a_recipe(**changes: object) -> Recipe:
    fields: dict[str, object] = {
        "name": "r",
        "sources": (Source(spec=SourceSpec(name="s", path="/s", file_format="jsonl", licence="CC0-1.0")),),
        "teacher": TeacherSettings(model="m"),
        "sharding": Sharding(documents_per_shard=10),
        "topk": TopkParams(k=4, max_length=100),
        "embeddings": EmbeddingParams(max_length=300),
    }
    return Recipe(**{**fields, **changes})  # type: ignore[arg-type]


def test_llama31_70b_asks_for_the_nodes_of_the_scripts_it_replaces(recipes: dict[str, Recipe]) -> None:
    teacher = recipes["llama31_70b"].tasks_of("teacher")
    assert (teacher.n_tasks, teacher.concurrency) == (4, 4)
    assert teacher.resources == Resources(slurm_partition="h100", gpus_per_node=4, time_minutes=48 * 60, exclusive=True)
    shards = recipes["llama31_70b"].tasks_of("shards").resources
    assert (shards.gpus_per_node, shards.slurm_partition) == (None, None), "CPUs, where the profile says"


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
    slower = a_recipe(teacher=TeacherSettings(model="m", token_budget=1))
    assert slower.code_version("topk_cache") == before.code_version("topk_cache")


def test_resources_change_no_code_version() -> None:
    tasks = Tasks(n_tasks=3, concurrency=2, resources=Resources(slurm_partition="h100", gpus_per_node=4))
    other = a_recipe(tasks={"shards": tasks, "teacher": tasks, "student": tasks})
    for asset in ("shard_plan", "shards_manifest", "topk_cache", "embedding_cache", "student_smoke"):
        assert other.code_version(asset) == a_recipe().code_version(asset)


# ------------------------------------------------------------------------------------------------ the platform


def test_a_scheduler_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="KD_SCHEDULER=slurmm"):
        Platform(home=str(tmp_path), scheduler="slurmm").make_scheduler()


def test_the_environment_chooses_scheduler_and_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KD_SCHEDULER", "KD_SLURM_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KD_HOME", str(tmp_path))
    assert isinstance(Platform.from_environment().make_scheduler(), LocalScheduler)
    monkeypatch.setenv("KD_SCHEDULER", "slurm")
    assert isinstance(Platform.from_environment().make_scheduler(), SlurmScheduler)
    monkeypatch.setenv("KD_SLURM_PROFILE", "h100")
    profile = Platform.from_environment().profile()
    assert profile is not None
    assert profile.name == "h100"
    monkeypatch.setenv("KD_SLURM_PROFILE", "no such site")
    with pytest.raises(MissingInputError, match="no cluster profile 'no such site'"):
        Platform.from_environment().make_scheduler()


def test_a_job_asks_for_what_the_recipe_says_and_else_the_profile(tmp_path: Path) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text("account: us\nkinds: {teacher: {partition: gpu, gpus_per_node: 1}, shards: {partition: cpu}}\n")
    recipe = a_recipe(tasks={"teacher": Tasks(resources=Resources(slurm_partition="h100"))})
    platform = Platform(home=str(tmp_path), scheduler="slurm", slurm_profile=str(profile))
    assert platform.resources(recipe, "teacher") == Resources(slurm_partition="h100", account="us", gpus_per_node=1)
    assert platform.resources(recipe, "shards") == Resources(slurm_partition="cpu", account="us")
    assert Platform(home=str(tmp_path)).resources(recipe, "teacher") == Resources(slurm_partition="h100")


SECRET = "hf_'quoted\\ $(touch pwned) `x` \n second line"


@pytest.fixture
def with_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    (tmp_path / "site.yaml").write_text("secrets: [HF_TOKEN, NOT_SET]\n")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.delenv("NOT_SET", raising=False)
    return Platform(home=str(tmp_path / "home"), scheduler="slurm", slurm_profile=str(tmp_path / "site.yaml"))


def test_secrets_reach_a_task_through_one_private_file(with_secrets: Platform) -> None:
    path = with_secrets.secrets_file()
    assert path is not None
    assert path.parent == with_secrets.home_folder / "secrets"
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    seen = subprocess.run(
        ["bash", "-c", 'set -a; source "$1"; env -0', "bash", str(path)],
        capture_output=True,
        env={},
        cwd=path.parent,
        check=True,
    )
    variables = dict(word.split(b"=", 1) for word in seen.stdout.split(b"\0") if word)
    assert variables[b"HF_TOKEN"].decode() == SECRET
    assert b"NOT_SET" not in variables
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name], "nothing ran, nothing is left over"


def test_the_secrets_file_is_replaced_as_a_whole_and_stays_private(with_secrets: Platform) -> None:
    path = with_secrets.secrets_file()
    assert path is not None
    path.chmod(0o644)
    path.parent.chmod(0o755)
    before = path.stat().st_ino
    assert with_secrets.secrets_file() == path
    assert path.stat().st_ino != before
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)


def test_without_secrets_there_is_no_file(with_secrets: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    assert with_secrets.secrets_file() is None
    assert not (with_secrets.home_folder / "secrets").exists()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert Platform(home=with_secrets.home).secrets_file() is None, "local tasks inherit the environment"


def test_who_only_asks_a_scheduler_writes_no_secrets(with_secrets: Platform) -> None:
    with_secrets.make_scheduler(submits=False)
    assert not with_secrets.secrets_path().exists()
    with_secrets.make_scheduler()
    assert with_secrets.secrets_path().exists()


def test_a_secret_is_in_no_repr_and_no_error(with_secrets: Platform) -> None:
    assert SECRET not in repr(with_secrets) + repr(with_secrets.profile()) + repr(vars(with_secrets.make_scheduler()))
    folder = with_secrets.home_folder / "secrets"
    shutil.rmtree(folder)
    folder.write_text("in the way")
    with pytest.raises(SchedulerError, match="cannot be written") as raised:
        with_secrets.secrets_file()
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None
    assert SECRET not in str(raised.value)


# ------------------------------------------------------------------------------------------------ recipes by name


def test_a_recipe_is_loaded_by_its_name() -> None:
    assert load_recipe("llama31_70b").teacher.model == "meta-llama/Llama-3.1-70B-Instruct"
    with pytest.raises(RecipeError, match="there is no recipe 'llama'; there are demo, llama31_70b"):
        load_recipe("llama")
