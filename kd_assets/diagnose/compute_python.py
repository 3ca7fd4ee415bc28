"""What the doctor finds of the compute environment's Python, here or in what a node said of it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import kd_assets
from kd_assets.diagnose.finding import Finding, fail, ok, warn
from kd_assets.diagnose.node_probe import PYTHON_PROGRAM
from kd_assets.orchestration.platform import Platform

IMPORT_TIMEOUT_S = 300.0


# ---------------------------------------------------------------------------------------------- the compute environment


def check_local_python(platform: Platform) -> Iterator[Finding]:
    python = platform.compute_python
    try:
        run = subprocess.run(
            [python, "-c", PYTHON_PROGRAM], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        yield fail("compute python", f"{python} does not run ({e})", "set KD_COMPUTE_PYTHON")
        return
    yield from python_findings("compute python", python, run.stdout if run.returncode == 0 else run.stderr)
    gpus = python_facts(run.stdout).get("gpus", [])
    if gpus:
        yield ok("GPU", ", ".join(gpus))
    elif run.returncode == 0:
        yield warn("GPU", "none is visible here", "the teacher runs on the CPU: enough for the demo")


def python_findings(what: str, python: str, output: str) -> Iterator[Finding]:
    facts = python_facts(output)
    if not facts:
        said = output.strip().rpartition("\n")[2] or "it said nothing"
        yield fail(what, f"{python}: {said}", "install kd-assets[compute] there, or set KD_COMPUTE_PYTHON")
    elif facts["kd_assets"] != kd_assets.__version__:
        yield fail(
            what,
            f"{python} has kd_assets {facts['kd_assets']}, this is {kd_assets.__version__}",
            "install the same version in both environments",
        )
    else:
        versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers", "kd_assets"))
        yield ok(what, f"{python} has {versions}")


def python_facts(output: str) -> Mapping[str, Any]:
    """What `PYTHON_PROGRAM` printed; empty when it did not come so far."""
    try:
        facts = json.loads(output.strip().rpartition("\n")[2])
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) and "torch" in facts else {}
