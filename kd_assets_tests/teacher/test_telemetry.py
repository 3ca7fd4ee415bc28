"""Telemetry: figures where there is a GPU, None where there is none, and never an error."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd_assets.teacher import telemetry
from kd_assets.teacher.telemetry import GpuSampler, GpuSpan, GpuUsage, device_name, peak_memory_gib, visible_gpus

CPU = torch.device("cpu")
UNKNOWN = GpuUsage()


class FakeNvmlError(Exception):
    """What the fake NVML raises in place of pynvml.NVMLError."""


class FakeNvml:
    """A fake pynvml module, with GPUs that are dictionaries: no driver and no GPU is behind it."""

    NVMLError = FakeNvmlError
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1

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
                "throttle": 0x01,
            }
            for i in range(n_gpus)
        ]
        self.lacks, self.forbidden, self.hangs = lacks, set[int](), threading.Event()
        self.hangs.set()  # cleared: every reading waits
        self.n_init = 0

    def _read(self, gpu: dict[str, float], name: str) -> float:
        self.hangs.wait(30)
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
        return self._read(gpu, "mhz")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: dict[str, float]) -> float:
        return self._read(gpu, "throttle")


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


Open = Callable[..., GpuSampler]


@pytest.fixture
def open_sampler() -> Iterator[Open]:
    """Samplers that read only when they are asked, so that a test knows every reading."""
    made: list[GpuSampler] = []

    def start(nvml: FakeNvml, environment: dict[str, str] | None = None, **options: object) -> GpuSampler:
        defaults: dict[str, object] = {"sample_s": 3600.0}
        sampler = GpuSampler(environment or {}, nvml=nvml, **(defaults | options))  # type: ignore[arg-type]
        made.append(sampler)
        return sampler

    yield start
    for sampler in made:
        sampler.close()


# ---------------------------------------------------------------------- without


def test_without_nvml_nothing_is_known_and_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_import_nvml", lambda: None)
    sampler = GpuSampler()
    span = sampler.span()
    assert span.usage() == UNKNOWN
    span.close()
    span.close()
    sampler.close()
    sampler.close()
    assert device_name(CPU) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_pynvml_without_a_driver_gives_nothing() -> None:
    sampler = GpuSampler()
    assert sampler.span().usage() == UNKNOWN
    sampler.close()


def test_a_library_without_a_driver_and_a_node_without_gpus_give_nothing(open_sampler: Open) -> None:
    assert open_sampler(FakeNvml(lacks=("driver",))).span().usage() == UNKNOWN
    assert open_sampler(FakeNvml(0)).span().usage() == UNKNOWN
    assert open_sampler(FakeNvml(2), {"CUDA_VISIBLE_DEVICES": ""}).span().usage() == UNKNOWN


def test_every_counter_may_be_missing(open_sampler: Open) -> None:
    nvml = FakeNvml(lacks=("energy_mj", "power_mw", "utilisation", "used_bytes", "celsius", "mhz", "throttle"))
    assert open_sampler(nvml).span().usage() == GpuUsage(n_gpus=1)


def test_a_driver_that_does_not_answer_holds_nothing_up(open_sampler: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "READ_TIMEOUT_S", 0.1)
    nvml = FakeNvml()
    nvml.hangs.clear()
    sampler = open_sampler(nvml)
    started = time.monotonic()
    assert sampler.span().usage() == UNKNOWN
    sampler.close()
    assert time.monotonic() - started < 2
    nvml.hangs.set()


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
        usage = span.usage()
    assert usage.n_gpus == 2
    assert usage.gpu_utilisation_percent == 70.0, "90 of one and 50 of the other; what was before does not count"
    assert usage.gpu_memory_gib == 40.0
    assert usage.gpu_temperature_celsius == 70.0
    assert usage.gpu_sm_clock_mhz == 1500.0
    assert usage.gpu_power_watts == 300.0


def test_every_reason_to_run_slower_is_named_and_idling_is_none(open_sampler: Open) -> None:
    nvml = FakeNvml(2)
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
    deadline = time.monotonic() + 10
    while span.sum().gpu_memory_gib != 77.0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    nvml.gpus[0]["used_bytes"] = 1
    assert span.usage().gpu_memory_gib == 77.0


def test_closing_ends_the_thread_and_gives_nvml_back(open_sampler: Open) -> None:
    nvml = FakeNvml()
    sampler = open_sampler(nvml)
    span: GpuSpan = sampler.span()
    assert nvml.n_init == 1
    sampler.close()
    assert nvml.n_init == 0
    assert not any(thread.name == "gpu-sampler" for thread in threading.enumerate())
    assert span.usage().n_gpus == 1, "what was added up stays"


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
    sampler = GpuSampler({"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]})
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
