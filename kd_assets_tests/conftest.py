"""For all tests. Imports no dagster: the compute plane's tests run where it is not installed."""

from __future__ import annotations

import importlib.util
import os
import signal

import pytest

# No test calls home, whatever instance it makes.
os.environ["DAGSTER_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell that runs the tests in the background has them ignore SIGINT, and so everything they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Several tests may share two cores; see slurm/task.sbatch. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What needs the control plane is left out where it is not installed, so that `pytest kd_assets_tests -m gpu` is one
# command on a node.
collect_ignore = (
    []
    if importlib.util.find_spec("dagster") is not None
    else [
        "benchmarks/test_scheduler.py",
        "diagnose",
        "golden/test_golden_deployment.py",
        "orchestration",
        "recipes",
        "scheduler/local/test_local.py",
        "slurm",
        "test_dagster_internals.py",
        "ui",
    ]
)

# So is what needs a web server.
if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn", "prometheus_client", "requests")):
    collect_ignore += ["replay", "benchmarks/test_replay.py", "consumers/test_replay.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, but for those by which Dagster marks what we use of it as beta or superseded each time it
    is called (its version is pinned). Not in pyproject.toml, which must do where dagster is not installed."""
    if importlib.util.find_spec("dagster_shared") is not None:
        for name in ("BetaWarning", "PreviewWarning", "SupersessionWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::dagster_shared.utils.warnings.{name}")
        config.addinivalue_line(
            "filterwarnings", "ignore:.parse_obj_as. is deprecated:pydantic.warnings.PydanticDeprecatedSince20"
        )


def pytest_itemcollected(item: pytest.Item) -> None:
    """A GPU machine has other versions than those pinned: what they warn of (TF32, their own packages) is no error."""
    if item.get_closest_marker("gpu") is not None:
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def cuda_for_gpu_tests(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
