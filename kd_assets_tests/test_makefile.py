"""`make` in folders with odd names: nothing in a name is ever run. No test here installs anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
SHOW = '#!/bin/sh\nprintf "%s\\n" "$KD_HOME" "$DAGSTER_HOME" "$*"\n'
ODD = ["x$(touch y)", "it's", 'say "hello"', "a `touch y` b", "$HOME $$ $(shell touch y)", "back\\slash and space"]


@pytest.fixture
def checkout(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with this Makefile and, in the place of an environment, a Python that shows what it is given."""
    folder = tmp_path / str(request.param)
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(MAKEFILE, folder / "Makefile")
    shutil.copy(MAKEFILE.parent / "dagster.yaml", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    (folder / ".venv" / "bin" / "python").write_text(SHOW)
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    (folder / ".venv" / ".ready").touch()
    return folder


def without_ours() -> dict[str, str]:
    """The environment without what `make test` puts into it."""
    return {name: value for name, value in os.environ.items() if name not in ("KD_HOME", "MAKEFLAGS", "MAKELEVEL")}


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env={**without_ours(), **environment},
        text=True,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.parametrize("checkout", ODD, indirect=True)
@pytest.mark.parametrize("target", ["demo", "ui"])
def test_a_checkout_may_have_any_name_and_none_of_it_is_run(checkout: Path, target: str) -> None:
    done = make(checkout, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert [str(checkout / "var"), str(checkout / "var" / "dagster")] == done.stdout.splitlines()[-3:-1]
    assert not list(checkout.rglob("y"))


@pytest.mark.parametrize("checkout", ["plain"], indirect=True)
def test_dagsters_folder_is_private_whatever_the_umask(checkout: Path) -> None:
    (checkout / ".venv" / "bin" / "python").write_text('#!/bin/sh\n>"$DAGSTER_HOME/database"\n')
    environment = without_ours()
    done = subprocess.run(
        ["sh", "-c", "umask 000; exec make ui"], cwd=checkout, env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0
    modes = [path.stat().st_mode & 0o777 for path in (checkout / "var/dagster", checkout / "var/dagster/database")]
    assert modes == [0o750, 0o640]


@pytest.mark.parametrize("checkout", ["plain"], indirect=True)
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("way", ["environment", "argument"])
def test_kd_home_may_have_any_name_and_is_made_absolute(checkout: Path, name: str, way: str) -> None:
    done = make(checkout, "demo", KD_HOME=name) if way == "environment" else make(checkout, "demo", f"KD_HOME={name}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-3] == str(checkout / name)
    assert not list(checkout.rglob("y"))


@pytest.mark.parametrize("checkout", ["x $(touch y)", 'a "quoted" folder', "a `touch y` b"], indirect=True)
def test_a_name_that_pip_would_run_is_refused_before_anything_is_installed(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    done = make(checkout, "setup")
    assert done.returncode == 2
    assert "move the checkout" in done.stderr
    assert not (checkout / ".venv").exists()
    assert not list(checkout.rglob("y"))
