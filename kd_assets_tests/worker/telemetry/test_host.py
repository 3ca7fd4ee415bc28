"""What a process and its node use: the real psutil and getrusage, and made-up energy counters."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_assets.worker.telemetry import host
from kd_assets.worker.telemetry.host import HostReader, PackageEnergy

BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ntime.sleep(60)"


class FakePowercap:
    """A fake of /sys/class/powercap: plain files, and no processor behind them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "fake-powercap"
        self.folder.mkdir()

    def domain(self, entry: str, name: str, microjoules: int, *, counts_to: int | None = 262_143_328_850) -> None:
        domain = self.folder / entry
        domain.mkdir()
        (domain / "name").write_text(f"{name}\n")
        if counts_to is not None:
            (domain / "max_energy_range_uj").write_text(f"{counts_to}\n")
        self.set(entry, microjoules)

    def set(self, entry: str, microjoules: int) -> None:
        (self.folder / entry / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def powercap(tmp_path: Path) -> FakePowercap:
    return FakePowercap(tmp_path)


# ---------------------------------------------------------------------- time and memory


def test_time_of_children_counts_while_they_run_and_after(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    reader = HostReader(powercap=tmp_path)
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


def test_looking_for_children_takes_one_hundredth_of_a_processor_at_most(tmp_path: Path) -> None:
    reader = HostReader(powercap=tmp_path)
    started = time.monotonic()
    reader.read()
    took_s = time.monotonic() - started
    assert started < reader._look_again_s <= started + 100 * took_s + 0.01


def test_without_psutil_the_time_is_known_and_the_memory_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert host._import_psutil() is None
    reading = HostReader(powercap=tmp_path).read()
    assert reading.cpu_s > 0
    assert reading.memory_gib is None


# ---------------------------------------------------------------------- energy


def test_packages_are_added_up_and_what_they_include_is_not(powercap: FakePowercap) -> None:
    powercap.domain("intel-rapl:0", "package-0", 1_000_000)
    powercap.domain("intel-rapl:1", "package-1", 5_000_000)
    powercap.domain("intel-rapl:0:0", "core", 700_000)
    powercap.domain("intel-rapl:0:1", "dram", 200_000)
    powercap.domain("intel-rapl:2", "psys", 9_000_000)
    powercap.domain("intel-rapl-mmio:0", "package-0", 1_000_000)
    packages = PackageEnergy(powercap.folder)
    assert packages.joules() == 0.0
    for entry in ("intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:2", "intel-rapl-mmio:0"):
        powercap.set(entry, 50_000_000)
    powercap.set("intel-rapl:0", 3_500_000)
    powercap.set("intel-rapl:1", 6_000_000)
    assert packages.joules() == 3.5
    powercap.set("intel-rapl:1", 6_250_000)
    assert packages.joules() == 3.75, "since the start"


def test_a_counter_that_went_round_goes_on(powercap: FakePowercap) -> None:
    powercap.domain("intel-rapl:0", "package-0", 99_000_000, counts_to=100_000_000)
    packages = PackageEnergy(powercap.folder)
    powercap.set("intel-rapl:0", 2_000_000)
    assert packages.joules() == 3.0
    powercap.set("intel-rapl:0", 4_000_000)
    assert packages.joules() == 5.0


def test_a_counter_that_went_round_at_an_unknown_number_is_not_known(powercap: FakePowercap) -> None:
    powercap.domain("intel-rapl:0", "package-0", 99_000_000, counts_to=None)
    packages = PackageEnergy(powercap.folder)
    powercap.set("intel-rapl:0", 2_000_000)
    assert packages.joules() is None
    powercap.set("intel-rapl:0", 4_000_000)
    assert packages.joules() is None


def test_one_package_that_cannot_be_read_makes_the_sum_unknown(powercap: FakePowercap) -> None:
    """As where only root may read them; a test may be root, so the file is missing."""
    powercap.domain("intel-rapl:0", "package-0", 1_000_000)
    powercap.domain("intel-rapl:1", "package-1", 1_000_000)
    (powercap.folder / "intel-rapl:1" / "energy_uj").unlink()
    assert PackageEnergy(powercap.folder).joules() is None


def test_a_node_without_counters_tells_no_energy(tmp_path: Path) -> None:
    assert PackageEnergy(tmp_path).joules() is None
    assert PackageEnergy(tmp_path / "nowhere").joules() is None


def test_the_counters_of_this_machine_never_run_backwards() -> None:
    packages = PackageEnergy()
    first = packages.joules()
    second = packages.joules()
    if first is None or second is None:
        pytest.skip("this machine tells no energy of its processors")
    assert 0 <= first <= second
