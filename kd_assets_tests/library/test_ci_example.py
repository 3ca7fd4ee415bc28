"""The script and the workflow that CI of a project takes from `examples/ci`. Our own CI runs the script as it stands in
docs/operations.md; here it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from kd_assets_tests.library.environments import CHECKOUT
from kd_assets_tests.library.projects import add_recipe, make_project

EXAMPLES = CHECKOUT / "examples" / "ci"
SCRIPT = EXAMPLES / "check-recipe"
STEPS = [
    "kd-assets check",
    "dg check defs",
    "kd-assets doctor good",
    'dg launch --assets +key:"good/shard_plan"',
    'dg launch --assets key:"good/shards_manifest"+ --partition good-00000',
    "kd-assets verify HOME/store/good",
]
STAND_IN = """#!/bin/sh
words="$(basename "$0") $*"
echo "$words" >>"$SAID"
case "$words" in "$FAILS"*) exit 3;; esac
"""


def check_recipe(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    commands = environment.pop("COMMANDS", str(Path(sys.executable).parent))
    env = {**os.environ, "PATH": f"{commands}:/usr/bin:/bin", "PYTHONPATH": f"{cwd / 'src'}:{CHECKOUT}", **environment}
    return subprocess.run([SCRIPT, *words], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("n", range(len(STEPS) + 1))
def test_the_script_ends_with_the_first_step_that_fails(tmp_path: Path, n: int) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("kd-assets", "dg"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    steps = [step.replace("HOME", str(tmp_path)) for step in STEPS]
    fails = steps[n] if n < len(steps) else "nothing"
    homes = {"KD_HOME": str(tmp_path), "DAGSTER_HOME": str(tmp_path / "dagster")}
    said = tmp_path / "said"
    done = check_recipe("good", cwd=tmp_path, COMMANDS=str(tmp_path / "bin"), SAID=str(said), FAILS=fails, **homes)
    assert done.returncode == (3 if n < len(steps) else 0)
    assert said.read_text().splitlines() == steps[: n + 1]


def test_a_broken_recipe_fails_the_script_with_its_file_and_line(tmp_path: Path) -> None:
    path = add_recipe(make_project(tmp_path, "of_ci"), "good")
    path.write_text(path.read_text().replace("licence:", "license:"))
    homes = {"KD_HOME": str(tmp_path / "home"), "DAGSTER_HOME": str(tmp_path / "dagster")}
    done = check_recipe("good", cwd=tmp_path, **homes)
    assert done.returncode == 1, done.stderr
    assert f"{path}:5: there is no field license: is it licence?" in done.stdout
    assert "== kd-assets check" in done.stdout
    assert "dg launch" not in done.stdout


def test_the_script_says_what_it_lacks(tmp_path: Path) -> None:
    assert "which recipe?" in check_recipe(cwd=tmp_path).stderr
    said = check_recipe("good", cwd=tmp_path, KD_HOME=str(tmp_path), DAGSTER_HOME="").stderr
    assert "DAGSTER_HOME: where Dagster keeps its records" in said


def test_the_workflow_calls_the_script_with_all_that_it_needs() -> None:
    workflow = yaml.safe_load((EXAMPLES / "recipes.yml").read_text())
    (job,) = workflow["jobs"].values()
    (call,) = [step["run"] for step in job["steps"] if SCRIPT.name in step.get("run", "")]
    assert call == 'bash ci/check-recipe "$RECIPE"'
    needed = re.findall(r"\$\{([A-Z_]+):\?", SCRIPT.read_text())
    assert {"RECIPE", *needed} <= set(job["env"])
    assert needed == ["KD_HOME", "DAGSTER_HOME"]
