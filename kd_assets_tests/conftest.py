"""For all tests. Imports no dagster: the compute plane's tests run where it is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator

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
        "benchmarks/test_orchestration.py",
        "benchmarks/test_scheduler.py",
        "benchmarks/test_worth.py",
        "demo/test_inputs.py",
        "demo/test_run.py",
        "diagnose",
        "golden/test_golden_deployment.py",
        "library",
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-of-each", action="store_true", help="of each parametrized test its first case alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --one-of-each what is missing in an environment is found in each place, and nothing is computed twice."""
    if not config.getoption("--one-of-each"):
        return
    of_each: dict[str, pytest.Item] = {}
    for item in items:
        of_each.setdefault(item.nodeid.partition("[")[0], item)
    config.hook.pytest_deselected(items=[item for item in items if item not in of_each.values()])
    items[:] = of_each.values()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How a test failed that is run once more (`.ci/run`): a fault of the test, or one that is there now and then."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"failed, and was run again: {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)


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


@pytest.fixture(autouse=True)
def no_definitions_state_of_an_instance_that_is_gone() -> Iterator[None]:
    """Dagster keeps the storage of the instance that was entered last for all that is loaded after; one of a fixture of
    a whole module may be the one that is left, when its folder is gone."""
    if "dagster" not in sys.modules:
        yield
        return
    base = importlib.import_module("dagster._core.storage.defs_state.base")
    with base.set_defs_state_storage(None):
        yield
