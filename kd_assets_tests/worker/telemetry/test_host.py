"""What a process and its children use: by the real psutil and getrusage."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from kd_assets.worker.telemetry import host
from kd_assets.worker.telemetry.host import HostReader

BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ntime.sleep(60)"


def test_time_of_children_counts_while_they_run_and_after() -> None:
    psutil = pytest.importorskip("psutil")
    reader = HostReader()
    before = reader.read()
    child = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    reader._look_again_s = 0.0
    during = reader.read()
    assert during.cpu_s - before.cpu_s > 0.25
    assert before.memory_gib is not None
    assert during.memory_gib is not None
    assert during.memory_gib > psutil.Process().memory_info().rss / 2**30
    child.kill()
    child.communicate()
    after = reader.read()
    assert after.cpu_s >= during.cpu_s - 0.02, "in clock ticks while it ran, exact after"
    assert after.cpu_s - before.cpu_s < 10


def test_looking_for_children_takes_one_hundredth_of_a_processor_at_most() -> None:
    reader = HostReader()
    started = time.monotonic()
    reader.read()
    took_s = time.monotonic() - started
    assert started < reader._look_again_s <= started + 100 * took_s + 0.01


def test_without_psutil_the_time_is_known_and_the_memory_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert host._import_psutil() is None
    reading = HostReader().read()
    assert reading.cpu_s > 0
    assert reading.memory_gib is None
