"""A plugin of pytest for `chosen_tests`: notes every test as it begins and ends, and puts those of most worth first.

Where a test leaves the device in a state in which nothing works any more, and after the time that it is told, no other
test begins.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from kd_assets_tests.benchmarks.first_minutes.chosen_tests import (
    DEADLINE_OPTION,
    MOST_MESSAGE,
    NOTES_OPTION,
    note,
    read_notes,
)

MATRIX = "test_pass_on_the_gpu_equals_its_plain_path"
WIDELY_USED = (
    "qwen3",
    "mistral",
    "mixtral",
    "qwen3_moe",
    "gemma3",
    "gpt_oss",
    "deepseek_v3",
    "phi3",
    "olmo2",
    "gemma2",
)
FIRST = (
    "test_a_teacher_lies_on_the_gpu",
    f"{MATRIX}[bfloat16-llama]",
    f"{MATRIX}[float32-llama]",
    "test_float32_on_the_device",
    "test_bfloat16_caches",
    "test_results_that_the_collector",
    "test_usr1",
    "test_kill_9",
    "memory",
    "budget",
)
"""Parts of the names of tests, the most worth first: right numbers, then stopping and resuming, then memory."""
COMPILED = "compiled"


def rank_of(test: str) -> int:
    """The place of a test among all: 0 comes first. One architecture says most of what the next fifty would say again,
    and compiling takes long."""
    for rank, part in enumerate(FIRST):
        if part in test.rpartition("::")[2] and not (COMPILED in test and MATRIX not in test):
            return rank
    rank = len(FIRST)
    if MATRIX not in test:
        return rank + 1 if COMPILED in test else rank
    dtype, _, architecture = test.partition("[")[2].rstrip("]").partition("-")
    return rank + 2 + 2 * (architecture not in WIDELY_USED) + (dtype != "bfloat16")


class Noting:
    def __init__(self, path: Path, no_test_after: float) -> None:
        self._path, self._no_test_after = path, no_test_after
        self._reports: list[pytest.TestReport] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: rank_of(item.nodeid))
        done = read_notes(self._path).outcomes
        note(self._path, collected=[item.nodeid for item in items])
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports.clear()
        note(self._path, test=nodeid, begun_at=time.time())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        failed = [report for report in self._reports if report.failed]
        skipped = [report for report in self._reports if report.skipped]
        outcome = "failed" if failed else "skipped" if skipped else "passed"
        message = "\n".join(report.longreprtext for report in failed or skipped)
        seconds = round(sum(report.duration for report in self._reports), 2)
        note(self._path, test=nodeid, outcome=outcome, seconds=seconds, message=message[-MOST_MESSAGE:])

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.time() > self._no_test_after:
            item.session.shouldstop = "no time is left"
        elif not device_works():
            item.session.shouldstop = "the device no longer works in this process"


def device_works() -> bool:
    """After an illegal access every call of CUDA in this process fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(NOTES_OPTION, type=Path)
    parser.addoption(DEADLINE_OPTION, type=float)


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption(NOTES_OPTION)
    config.pluginmanager.register(Noting(path, config.getoption(DEADLINE_OPTION)))
