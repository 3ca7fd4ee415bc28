"""Telemetry: figures where there is something to read, None where there is not, and never an error."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd_assets.store import read_manifest
from kd_assets.teacher.devices.device import device_name, peak_memory_gib
from kd_assets.worker.main import main
from kd_assets.worker.telemetry import gpu, series
from kd_assets.worker.telemetry import sampler as telemetry
from kd_assets.worker.telemetry.gpu import visible_gpus
from kd_assets.worker.telemetry.host import HostReader, HostReading
from kd_assets.worker.telemetry.sampler import Sampler, UsageSpan
from kd_assets.worker.telemetry.sums import Usage
from kd_assets_tests.patience import PATIENCE_S
from kd_assets_tests.teacher.tiny import Desk, save_teacher, tiny_documents, tiny_params

CPU = torch.device("cpu")


class FakeNvmlError(Exception):
    """What the fake NVML raises in place of pynvml.NVMLError."""


class FakeNvml:
    """A fake pynvml module, with GPUs that are dictionaries: no driver and no GPU is behind it."""

    NVMLError = FakeNvmlError
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2

    def __init__(self, n_gpus: int = 1, *, lacks: tuple[str, ...] = ()) -> None:
        self.gpus: list[dict[str, Any]] = [
            {
                "uuid": f"GPU-{i:04d}-beef",
                "energy_mj": 5_000_000.0,
                "power_mw": 300_000.0,
                "utilisation": 50.0,
                "used_bytes": 10 * 2**30,
                "celsius": 60.0,
                "mhz": 1500.0,
                "memory_mhz": 2600.0,
                "throttle": 0x01,
            }
            for i in range(n_gpus)
        ]
        self.lacks, self.forbidden, self.hangs = lacks, set[int](), threading.Event()
        self.hangs.set()  # cleared: every reading waits
        self.n_init = 0

    def _read(self, gpu: dict[str, float], name: str) -> float:
        assert self.hangs.wait(PATIENCE_S)
        if name in self.lacks:
            raise FakeNvmlError("Not Supported")
        return gpu[name]

    def nvmlInit(self) -> None:
        if "driver" in self.lacks:
            raise FakeNvmlError("NVML Shared Library Not Found")
        self.n_init += 1

    def nvmlShutdown(self) -> None:
        self.n_init -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:
        if index in self.forbidden:
            raise FakeNvmlError("Insufficient Permissions")
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:
        return {"uuid": uuid}

    def nvmlDeviceGetUUID(self, gpu: dict[str, str]) -> str:
        return gpu["uuid"]

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: dict[str, float]) -> float:
        return self._read(gpu, "energy_mj")

    def nvmlDeviceGetPowerUsage(self, gpu: dict[str, float]) -> float:
        return self._read(gpu, "power_mw")

    def nvmlDeviceGetUtilizationRates(self, gpu: dict[str, float]) -> object:
        return SimpleNamespace(gpu=self._read(gpu, "utilisation"))

    def nvmlDeviceGetMemoryInfo(self, gpu: dict[str, float]) -> object:
        return SimpleNamespace(used=self._read(gpu, "used_bytes"))

    def nvmlDeviceGetTemperature(self, gpu: dict[str, float], sensor: int) -> float:
        return self._read(gpu, "celsius")

    def nvmlDeviceGetClockInfo(self, gpu: dict[str, float], clock: int) -> float:
        return self._read(gpu, "mhz" if clock == self.NVML_CLOCK_SM else "memory_mhz")

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: dict[str, float]) -> float:
        return self._read(gpu, "throttle")


class OldFakeNvml(FakeNvml):
    """A fake of a library or driver that knows clock event reasons by their old name only."""

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: dict[str, float]) -> float:
        raise FakeNvmlError("Function Not Found")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: dict[str, float]) -> float:
        return self._read(gpu, "throttle")


class FakeHost(HostReader):
    """A fake process: it uses what a test says."""

    def __init__(self) -> None:
        self.reading = HostReading(cpu_s=0.0)

    def read(self) -> HostReading:
        return self.reading


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


Open = Callable[..., Sampler]


@pytest.fixture
def open_sampler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Samplers that read only when they are asked, so that a test knows every reading."""
    monkeypatch.setattr(telemetry, "READ_TIMEOUT_S", PATIENCE_S)
    made: list[Sampler] = []

    def start(nvml: FakeNvml, environment: dict[str, str] | None = None, **options: object) -> Sampler:
        defaults: dict[str, object] = {"sample_s": 3600.0, "host": FakeHost()}
        sampler = Sampler(environment or {}, nvml=nvml, **(defaults | options))  # type: ignore[arg-type]
        made.append(sampler)
        return sampler

    yield start
    for sampler in made:
        sampler.close()


def known(usage: Usage) -> dict[str, Any]:
    """What is known of the GPUs."""
    return {
        name: value
        for name, value in usage.facts().items()
        if value is not None and not name.startswith(("cpu_", "host_"))
    }


# ---------------------------------------------------------------------- without


def test_without_nvml_nothing_is_known_of_gpus_and_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_import_nvml", lambda: None)
    sampler = Sampler()
    span = sampler.span()
    assert known(span.usage()) == {}
    span.close()
    span.close()
    sampler.close()
    sampler.close()
    assert device_name(CPU) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_pynvml_without_a_driver_gives_nothing() -> None:
    sampler = Sampler()
    assert known(sampler.span().usage()) == {}
    sampler.close()


def test_a_library_without_a_driver_and_a_node_without_gpus_give_nothing(open_sampler: Open) -> None:
    assert known(open_sampler(FakeNvml(lacks=("driver",))).span().usage()) == {}
    assert known(open_sampler(FakeNvml(0)).span().usage()) == {}
    assert known(open_sampler(FakeNvml(2), {"CUDA_VISIBLE_DEVICES": ""}).span().usage()) == {}


def test_every_counter_may_be_missing(open_sampler: Open) -> None:
    nvml = FakeNvml(
        lacks=("energy_mj", "power_mw", "utilisation", "used_bytes", "celsius", "mhz", "memory_mhz", "throttle")
    )
    assert known(open_sampler(nvml).span().usage()) == {"n_gpus": 1}


def test_a_driver_that_does_not_answer_holds_nothing_up(open_sampler: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "READ_TIMEOUT_S", 0.1)
    nvml = FakeNvml()
    nvml.hangs.clear()
    sampler = open_sampler(nvml)
    assert sampler.span().usage() == Usage()
    sampler.close()
    nvml.hangs.set()  # nobody has waited so long: it would have failed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_an_unforeseen_error_ended(
    open_sampler: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "READ_TIMEOUT_S", 10 * PATIENCE_S)
    nvml = FakeNvml()
    span = open_sampler(nvml).span()
    nvml.gpus.clear()
    nvml._read = lambda gpu, name: 1 / 0  # type: ignore[method-assign]
    started = time.monotonic()
    assert known(span.usage())["n_gpus"] == 1
    assert time.monotonic() - started < PATIENCE_S, "not until a reading is given up"
    for thread in threading.enumerate():
        if thread.name == "telemetry":
            thread.join(PATIENCE_S)


# ---------------------------------------------------------------------- figures


def test_joules_are_what_the_energy_counters_of_all_gpus_went_up_by(open_sampler: Open) -> None:
    nvml = FakeNvml(2)
    span = open_sampler(nvml).span()
    nvml.gpus[0]["energy_mj"] += 1500
    nvml.gpus[1]["energy_mj"] += 500
    assert span.usage().joules == 2.0
    nvml.gpus[1]["energy_mj"] += 1000
    assert span.usage().joules == 3.0, "so far, from the start"


def test_without_an_energy_counter_power_is_integrated_over_time(open_sampler: Open) -> None:
    nvml, clock = FakeNvml(lacks=("energy_mj",)), Clock()
    span = open_sampler(nvml, clock=clock).span()
    clock.now_s, nvml.gpus[0]["power_mw"] = 10.0, 500_000.0
    assert span.usage().joules == 4000.0, "10 s at 300 W rising to 500 W"
    clock.now_s = 12.0
    assert span.usage().joules == 5000.0


def test_a_counter_that_began_anew_is_not_believed(open_sampler: Open) -> None:
    nvml, clock = FakeNvml(), Clock()
    span = open_sampler(nvml, clock=clock).span()
    clock.now_s, nvml.gpus[0]["energy_mj"] = 2.0, 10.0
    assert span.usage().joules == 600.0, "2 s at 300 W"


def test_one_gpu_that_tells_nothing_makes_the_sum_unknown(open_sampler: Open) -> None:
    nvml = FakeNvml(2)
    span = open_sampler(nvml).span()
    del nvml.gpus[1]["energy_mj"], nvml.gpus[1]["power_mw"]
    nvml.lacks = ()

    def read(gpu: dict[str, float], name: str) -> float:
        if name not in gpu:
            raise FakeNvmlError("GPU is lost")
        return gpu[name]

    nvml._read = read  # type: ignore[method-assign]
    assert span.usage().joules is None


def test_load_is_a_mean_memory_and_heat_are_the_largest(open_sampler: Open) -> None:
    nvml = FakeNvml(2)
    span = open_sampler(nvml).span()
    for utilisation, gib, celsius, mhz in ((80.0, 40, 70.0, 1000.0), (100.0, 20, 65.0, 2000.0)):
        nvml.gpus[0] |= {"utilisation": utilisation, "used_bytes": gib * 2**30, "celsius": celsius, "mhz": mhz}
        nvml.gpus[1]["memory_mhz"] = 2 * mhz
        usage = span.usage()
    assert usage.n_gpus == 2
    assert usage.gpu_utilisation_percent == 70.0, "90 of one and 50 of the other; what was before does not count"
    assert usage.gpu_memory_gib == 40.0
    assert usage.gpu_temperature_celsius == 70.0
    assert usage.gpu_sm_clock_mhz == 1500.0
    assert usage.gpu_memory_clock_mhz == 2800.0, "2,600 of one and 3,000 of the other"
    assert usage.gpu_power_watts == 300.0


@pytest.mark.parametrize("make_nvml", [FakeNvml, OldFakeNvml])
def test_every_reason_to_run_slower_is_named_and_idling_is_none(
    open_sampler: Open, make_nvml: Callable[[int], FakeNvml]
) -> None:
    nvml = make_nvml(2)
    span = open_sampler(nvml).span()
    assert span.usage().gpu_throttle_reasons == ()
    nvml.gpus[0]["throttle"] = 0x04
    span.usage()
    nvml.gpus[0]["throttle"] = 0x01
    nvml.gpus[1]["throttle"] = 0x40 | 0x02
    assert span.usage().gpu_throttle_reasons == ("software power cap", "hardware thermal slowdown")


def test_spans_count_only_their_own_time(open_sampler: Open) -> None:
    nvml = FakeNvml()
    sampler = open_sampler(nvml)
    whole, first = sampler.span(), sampler.span()
    nvml.gpus[0] |= {"energy_mj": 5_001_000.0, "used_bytes": 70 * 2**30}
    assert first.usage().joules == 1.0
    first.close()
    nvml.gpus[0] |= {"energy_mj": 5_003_000.0, "used_bytes": 20 * 2**30}
    second = sampler.span()
    nvml.gpus[0]["energy_mj"] = 5_004_000.0
    assert (first.usage().joules, second.usage().joules, whole.usage().joules) == (1.0, 1.0, 4.0)
    assert (second.usage().gpu_memory_gib, whole.usage().gpu_memory_gib) == (20.0, 70.0)


def test_readings_go_on_between_questions(open_sampler: Open) -> None:
    """A peak that nobody asked about is seen by the thread."""
    nvml = FakeNvml()
    span = open_sampler(nvml, sample_s=0.01).span()
    nvml.gpus[0]["used_bytes"] = 77 * 2**30
    deadline = time.monotonic() + PATIENCE_S
    while span.sum().gpu_memory_gib != 77.0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    nvml.gpus[0]["used_bytes"] = 1
    assert span.usage().gpu_memory_gib == 77.0


def test_closing_ends_the_thread_and_gives_nvml_back(open_sampler: Open) -> None:
    nvml = FakeNvml()
    sampler = open_sampler(nvml)
    span: UsageSpan = sampler.span()
    assert nvml.n_init == 1
    sampler.close()
    assert nvml.n_init == 0
    assert not any(thread.name == "telemetry" for thread in threading.enumerate())
    assert span.usage().n_gpus == 1, "what was added up stays"


def test_what_the_process_used_stands_beside(open_sampler: Open) -> None:
    host, clock = FakeHost(), Clock()
    span = open_sampler(FakeNvml(0), {"SLURM_CPUS_ON_NODE": "1"}, host=host, clock=clock).span()
    clock.now_s, host.reading = 4.0, HostReading(cpu_s=1.0, memory_gib=3.0)
    span.usage()
    clock.now_s, host.reading = 10.0, HostReading(cpu_s=8.0, memory_gib=2.0)
    usage = span.usage()
    assert usage.cpu_utilisation_percent == 80.0, "8 s of 10 s of one processor"
    assert usage.host_memory_gib == 3.0


# ---------------------------------------------------------------------- over time


def test_power_load_and_speed_over_time(open_sampler: Open) -> None:
    nvml, host, clock = FakeNvml(2), FakeHost(), Clock()
    span = open_sampler(nvml, {"SLURM_CPUS_ON_NODE": "1"}, host=host, clock=clock).span()
    for second, watts in enumerate((200, 400, 600), start=1):
        clock.now_s = second
        nvml.gpus[0] |= {"power_mw": watts * 1000.0, "utilisation": 100.0}
        host.reading = HostReading(cpu_s=second / 4, memory_gib=float(second))
        span.usage()
        if second == 2:
            span.tokens_done(1000)
    assert span.series() == {
        "interval_s": 1.0,
        "total_gpu_power_watts": [500, 700, 900],
        "gpu_utilisation_percent": [75, 75, 75],
        "cpu_utilisation_percent": [25, 25, 25],
        "host_memory_gib": [1, 2, 3],
        "tokens_per_s": [500, 500, 0],
    }


def test_where_one_gpu_tells_no_power_that_of_all_is_not_known(open_sampler: Open) -> None:
    nvml, clock = FakeNvml(2, lacks=("power_mw", "utilisation")), Clock()
    span = open_sampler(nvml, clock=clock).span()
    clock.now_s = 5.0
    span.usage()
    assert span.series() == {"interval_s": 1.0, "cpu_utilisation_percent": [0, 0, 0, 0, 0]}


def test_tokens_that_are_done_again_after_a_failed_batch_do_not_count_backwards(open_sampler: Open) -> None:
    clock = Clock()
    span = open_sampler(FakeNvml(0), clock=clock).span()
    for now_s, done_tokens in ((1.0, 100), (2.0, 60), (3.0, 90)):
        clock.now_s = now_s
        span.tokens_done(done_tokens)
    over_time = span.series()
    assert over_time is not None
    assert over_time["tokens_per_s"] == [100, 0, 30]


def test_a_short_span_has_no_series(open_sampler: Open) -> None:
    clock = Clock()
    span = open_sampler(FakeNvml(1), clock=clock).span()
    clock.now_s = 2.0
    span.usage()
    span.tokens_done(5)
    assert span.series() is None


def test_a_second_of_this_machine_is_sampled_whatever_it_has() -> None:
    """The real psutil, the real clock."""
    sampler = Sampler(sample_s=0.1)
    span, until = sampler.span(), time.monotonic() + 3.1
    while time.monotonic() < until:
        sum(range(10_000))
        span.tokens_done(1)
    usage, over_time = span.usage(), span.series()
    sampler.close()
    assert usage.cpu_utilisation_percent is not None
    assert 1 < usage.cpu_utilisation_percent < 200
    assert usage.host_memory_gib is not None
    assert 0.01 < usage.host_memory_gib < 1000
    assert over_time is not None
    assert {"cpu_utilisation_percent", "host_memory_gib", "tokens_per_s"} <= over_time.keys()
    (n_seconds,) = {len(values) for values in over_time.values() if isinstance(values, list)}
    assert 3 <= n_seconds < 60


def test_every_cache_of_a_partition_has_its_series_and_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "INTERVAL_S", 0.01)  # the partition takes a few tenths of a second
    params = tiny_params(save_teacher(tmp_path / "teacher"))
    desk = Desk(tmp_path)
    unit = desk.unit(desk.commit_shard(tiny_documents((20, 30, 64) * 20)), params)
    desk.run(params, unit)
    found = [read_manifest(Path(output.path)).facts for output in unit.outputs]
    assert found[0]["telemetry"] == found[1]["telemetry"] == found[2]["telemetry"]
    facts = found[0]
    assert {"cpu_utilisation_percent", "host_memory_gib"} <= {name for name in facts if facts[name] is not None}
    over_time = facts["telemetry"]
    tokens = sum(v * over_time["interval_s"] for v in over_time["tokens_per_s"] if v is not None)
    assert tokens == pytest.approx(facts["computed_tokens"], rel=0.05)


@pytest.fixture
def handlers() -> Iterator[None]:
    """The worker's program sets signal handlers, and leaves them so."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_task_has_one_sampler_for_itself_and_all_its_partitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Sampler] = []

    class NotedSampler(Sampler):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    for module in ("kd_assets.worker.telemetry.sampler", "kd_assets.teacher.runner"):
        monkeypatch.setattr(f"{module}.Sampler", NotedSampler)
    params = tiny_params(save_teacher(tmp_path / "teacher"))
    desk = Desk(tmp_path)
    units = [desk.unit(desk.commit_shard(tiny_documents((20, 30)), key), params, key=key) for key in ("a", "b")]
    (tmp_path / "job.json").write_text(desk.job(params, units).to_json())
    (tmp_path / "events").mkdir()
    assert main(["worker", str(tmp_path / "job.json")], {}) == 0
    assert len(made) == 1
    assert not made[0]._thread.is_alive()
    facts = read_manifest(Path(units[1].outputs[0].path)).facts
    assert facts["cpu_utilisation_percent"] is not None


# ---------------------------------------------------------------------- which GPUs


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("2", [2]),
        ("3,1", [3, 1]),
        ("GPU-0002", [2]),
        ("1,-1,2", [1]),
        ("9", []),
        ("", []),
    ],
)
def test_the_gpus_of_the_task_are_those_that_cuda_shows(visible: str | None, expected: list[int]) -> None:
    nvml = FakeNvml(4)
    assert visible_gpus(nvml, visible) == [nvml.gpus[i] for i in expected]


def test_a_slice_of_a_gpu_is_found_by_its_uuid() -> None:
    assert visible_gpus(FakeNvml(1), "MIG-1234") == [{"uuid": "MIG-1234"}]


def test_gpus_of_other_tasks_are_passed_over() -> None:
    nvml = FakeNvml(4)
    nvml.forbidden = {0, 1}
    assert visible_gpus(nvml, "0,1") == [nvml.gpus[2], nvml.gpus[3]], "SLURM counts those that it gave"


def test_peak_memory_of_a_cpu_is_that_of_the_process() -> None:
    assert 0.01 < peak_memory_gib(CPU) < 1000


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_energy_of_a_gpu_is_in_joules_and_grows() -> None:
    """A GPU at work takes between 20 and 2,000 watts: a counter in millijoules would be a thousand times off."""
    device = torch.device("cuda")
    a_NN = torch.randn(8192, 8192, device=device)
    sampler = Sampler({"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]})
    span, started = sampler.span(), time.perf_counter()
    for _ in range(100):
        a_NN @ a_NN
    torch.cuda.synchronize()
    usage, seconds = span.usage(), time.perf_counter() - started
    sampler.close()
    if usage.joules is None:
        pytest.skip("this GPU tells no energy")
    assert 20 < usage.joules / seconds < 2000
    assert usage.gpu_memory_gib is None or usage.gpu_memory_gib > 0.25
    assert usage.gpu_throttle_reasons is not None, "by the new name of the question or by the old one"
    assert device_name(device)


@pytest.mark.gpu
def test_nvml_and_torch_mean_the_same_gpus() -> None:
    pynvml = pytest.importorskip("pynvml")
    pynvml.nvmlInit()
    try:
        ours = {pynvml.nvmlDeviceGetUUID(g) for g in visible_gpus(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))}
    finally:
        pynvml.nvmlShutdown()
    n_gpus = torch.cuda.device_count()
    assert ours == {f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(n_gpus)}
