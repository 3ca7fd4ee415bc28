"""Installed from a wheel, in a project of one's own: what the page of that name says, command by command.

The service node has what `kd-assets[control]` brings (no torch), the cluster node what `kd-assets[compute]` brings (no
dagster), and neither sees this checkout.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

import kd_assets
from kd_assets_tests.library.environments import CHECKOUT, NO_TELEMETRY, Environment
from kd_assets_tests.library.projects import TEACHER, TEXTS, make_project

pytestmark = pytest.mark.slow

(SECTION,) = re.findall(
    r"^(# In your own project\n.*)", (CHECKOUT / "docs" / "own-project.md").read_text(), re.MULTILINE | re.DOTALL
)
(COMMANDS,) = re.findall(r"^```console\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
(DAGSTER_YAML,) = re.findall(r"^```yaml\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
INSTALLING, USING = COMMANDS.split("\n\n")
"""What the fixtures do in their own way, and what is run as it stands."""

LOOK = """
import json, sys
from dagster.components.core.load_defs import PLUGIN_COMPONENT_TYPES_JSON_METADATA_KEY
from my_project.definitions import defs
from kd_assets.orchestration.platform import BATCH_SCRIPT, code_commit
import kd_assets
repository = defs().get_repository_def()
print(json.dumps({
    "component types": json.dumps(repository.metadata[PLUGIN_COMPONENT_TYPES_JSON_METADATA_KEY].value),
    "assets": sorted(key.to_user_string() for key in repository.asset_graph.get_all_asset_keys()),
    "package": kd_assets.__file__,
    "code": code_commit(),
    "script": str(BATCH_SCRIPT),
    "torch": "torch" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, service_node: Environment) -> Path:
    """The project of the page with its recipe, installed (editable) on the service node."""
    folder = tmp_path_factory.mktemp("projects") / "my-project"
    make_project(folder, "my_project")
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    (packages,) = service_node.folder.glob("lib/*/site-packages")
    (packages / "my_project.pth").write_text(f"{folder / 'src'}\n")
    return folder


@pytest.fixture(scope="module")
def materialized(project: Path, service_node: Environment, cluster_node: Environment) -> str:
    """The page's commands one after the other; returns what they printed."""
    instance = project / "var" / "dagster"
    instance.mkdir(parents=True)
    (instance / "dagster.yaml").write_text(NO_TELEMETRY + DAGSTER_YAML)
    env = {
        "KD_COMPUTE_PYTHON": str(cluster_node.python),
        "DAGSTER_HOME": str(instance),
        "MODEL": str(TEACHER),
        "TEXTS": str(TEXTS),
    }
    said = []
    for command in USING.splitlines():
        if command.startswith("dg dev"):
            continue
        words = [
            word.replace("$MODEL", env["MODEL"]).replace("$TEXTS", env["TEXTS"])
            for word in shlex.split(command, comments=True)
        ]
        said.append(service_node.run(*words, cwd=project, env=env).stdout)
    return "".join(said)


def test_the_wheel_has_the_batch_script_and_the_profiles_as_the_repository_has(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for file in (CHECKOUT / "slurm").rglob("*.*"):
            assert archive.read(f"kd_assets/slurm/{file.relative_to(CHECKOUT / 'slurm')}") == file.read_bytes()
    assert {"kd_assets/py.typed", "kd_assets/__init__.pyi"} <= names
    assert not any(name.startswith("kd_assets_tests") for name in names)
    assert wheel.name.startswith(f"kd_assets-{kd_assets.__version__}-")


def test_the_readmes_commands_make_and_verify_a_shard(materialized: str, project: Path) -> None:
    assert "All component YAML validated successfully." in materialized
    assert "The caches fit." in materialized
    assert re.search(r"var/store/my_teacher: 2 results, .*: all hashes and counts are right", materialized)
    recipe = yaml.safe_load((project / "src" / "my_project" / "defs" / "my_teacher" / "defs.yaml").read_text())
    assert recipe["attributes"]["recipe"] == "my_teacher"


@pytest.mark.usefixtures("materialized")
def test_the_component_is_shown_and_comes_from_the_wheel(project: Path, service_node: Environment) -> None:
    seen = json.loads(service_node.run("python", "-W", "ignore", "-c", LOOK, cwd=project).stdout)
    assert "kd_assets.TeacherCaches" in seen["component types"], "what the Components tab shows"
    assets = ("cache_card", "shard_plan", "shards_manifest", "topk_cache")
    assert seen["assets"] == [f"my_teacher/{asset}" for asset in assets]
    assert seen["package"].startswith(str(service_node.folder))
    assert seen["script"].startswith(str(service_node.folder))
    assert seen["code"] == f"kd-assets {kd_assets.__version__}", "and not the commit of the project around it"
    assert not seen["torch"]


@pytest.mark.usefixtures("materialized")
def test_a_node_without_dagster_runs_a_job_file_and_reads_what_it_made(
    project: Path, cluster_node: Environment
) -> None:
    refused = cluster_node.run("python", "-c", "import dagster", cwd=project, check=False)
    assert "No module named 'dagster'" in refused.stderr
    (result,) = (project / "var" / "store" / "my_teacher" / "topk_cache").glob("*/*/*/manifest.json")
    manifest = json.loads(result.read_text())
    assert manifest["provenance"]["kd_assets"] == kd_assets.__version__
    (job_file,) = project.glob("var/jobs/my_teacher/teacher-*/*/job.json")
    for file in result.parent.iterdir():  # so that there is something to do
        file.unlink()
    environment = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "1", "SLURM_JOB_ID": "1"}
    cluster_node.run("python", "-m", "kd_assets.worker", job_file, cwd=project, env=environment)
    again = json.loads(result.read_text())
    assert again["data_version"] == manifest["data_version"]
    program = (
        "from pathlib import Path; from kd_assets import CacheReader, TeacherCacheDataset; "
        "recipe = Path('var/store/my_teacher'); print(len(CacheReader(recipe, 'topk_cache')), "
        "sorted(TeacherCacheDataset.from_recipe(recipe, assets=['topk_cache'])[0]))"
    )
    said = cluster_node.run("python", "-c", program, cwd=project).stdout
    assert said.startswith("4 [")
    assert "topk_logprobs" in said


def test_what_a_project_needs_in_its_dagster_yaml_is_what_the_checkouts_has() -> None:
    asked, ours = yaml.safe_load(DAGSTER_YAML), yaml.safe_load((CHECKOUT / "dagster.yaml").read_text())
    assert asked["concurrency"]["pools"] == ours["concurrency"]["pools"]
    for name in ("run_monitoring", "run_retries", "storage"):
        assert asked[name] == ours[name]
