"""Environments as users have them: the wheel of this checkout, and beside it what an extra asks for and no more.

Packages are those of the environment that runs the tests, by links, so that nothing large is downloaded; a package that
an extra forgot is not there, and the editable installation of this checkout is not either.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[2]
HERE = Path(sysconfig.get_path("purelib"))

NO_TELEMETRY = "telemetry: {enabled: false}\n"
"""Of a dagster.yaml: of `dg` no variable of the environment does it."""

LAUNCHERS = {
    "dagster": ("dagster._cli", "main"),
    "dg": ("dagster_dg_cli.cli", "main"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(
        self, *words: str | Path, cwd: Path, env: dict[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment (`dg`, `kd-assets`, `python`) as a shell of its user would."""
        command = [str(self.folder / "bin" / words[0]), *map(str, words[1:])]
        done = subprocess.run(command, cwd=cwd, env=self.env | (env or {}), capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done

    @property
    def env(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
        return kept | {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "VIRTUAL_ENV": str(self.folder),
            "DAGSTER_HOME": str(self.folder / "dagster"),
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout. Its build backend comes from the package index."""
    words = ("wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--wheel-dir", str(folder), str(CHECKOUT))
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path, *, extra: str) -> Environment:
    """`pip install kd-assets[extra]` from a wheel."""
    venv.create(folder, symlinks=True)
    (folder / "dagster").mkdir()
    (folder / "dagster" / "dagster.yaml").write_text(NO_TELEMETRY)
    environment = Environment(folder=folder)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    words = ("install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-compile", str(wheel))
    command = [sys.executable, "-m", "pip", "--python", str(environment.python), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (metadata,) = importlib.metadata.distributions(name="kd-assets", path=[str(packages)])
    for name in asked_for(metadata.requires or (), extra):
        link(importlib.metadata.distribution(name), packages)
    for name, (module, function) in LAUNCHERS.items():
        if (packages / module.partition(".")[0]).exists():
            launcher = folder / "bin" / name
            launcher.write_text(f"#!{environment.python}\nfrom {module} import {function}\n{function}()\n")
            launcher.chmod(0o755)
    return environment


def asked_for(requirements: Iterable[str], extra: str) -> set[str]:
    """Names of the distributions that an extra brings, and what they bring in turn."""
    found: set[tuple[str, str]] = set()
    waiting = list(_held(requirements, extra))
    while waiting:
        name, of_extra = waiting.pop()
        if (name, of_extra) in found:
            continue
        found.add((name, of_extra))
        try:
            waiting += _held(importlib.metadata.distribution(name).requires or (), of_extra)
        except importlib.metadata.PackageNotFoundError:  # of an extra that the tests' environment has not
            found.discard((name, of_extra))
    return {name for name, _ in found}


def _held(requirements: Iterable[str], extra: str) -> Iterator[tuple[str, str]]:
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for of_extra in ("", *requirement.extras):
                yield canonicalize_name(requirement.name), of_extra


def link(distribution: importlib.metadata.Distribution, packages: Path) -> None:
    """Have what a distribution installed at the top of site-packages here in `packages`, too."""
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if (HERE / top).exists() and not (packages / top).exists():
            (packages / top).symlink_to(HERE / top)
