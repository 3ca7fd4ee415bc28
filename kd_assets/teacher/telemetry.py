"""What the GPUs of this task did: energy, load, memory, heat and throttling, sampled by NVML once a second.

Used by `kd_assets.teacher` and, for what a whole task used, by `kd_assets.worker`; so it imports torch only where it
asks torch. The invariant: telemetry never fails a pass and never holds one up. Only the sampler's own thread talks to
NVML, whoever asks waits a few seconds at most; a machine without an NVIDIA driver, a container without its library, or
a GPU that lacks a counter gives None, which manifests keep as "not known".
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kd_assets.usage import max_rss_gib

if TYPE_CHECKING:
    import torch

SAMPLE_S = 1.0
"""NVML's own utilisation is a mean over the last 1/6 to 1 s, by product."""
READ_TIMEOUT_S = 5.0
"""A driver in trouble can keep a reading for ever; the pass goes on without it."""

MILLIJOULES_PER_JOULE = 1000.0
"""`nvmlDeviceGetTotalEnergyConsumption` counts millijoules since the driver was loaded (NVML API reference)."""
MILLIWATTS_PER_WATT = 1000.0

THROTTLE_REASONS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
"""Bits of `nvmlClocksThrottleReasons` (NVML API reference) that mean slower than wished. Left out: idle (0x01), and
clocks that somebody set (0x02, 0x100)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """One GPU at one moment; None is what this GPU does not tell."""

    energy_joules: float | None = None
    """Since the driver was loaded: only differences mean anything."""
    power_watts: float | None = None
    utilisation_percent: float | None = None
    """Share of the last sample period in which a kernel ran."""
    memory_gib: float | None = None
    """In use by all processes."""
    temperature_celsius: float | None = None
    sm_clock_mhz: float | None = None
    throttle_bits: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuUsage:
    """What all GPUs of the task did in a span of time; None is not known. Names and units as in manifests."""

    n_gpus: int | None = None
    joules: float | None = None
    """Of all GPUs: by their energy counters, else power integrated over time."""
    gpu_utilisation_percent: float | None = None
    """Mean over time and GPUs."""
    gpu_memory_gib: float | None = None
    """Most in use on the fullest GPU."""
    gpu_power_watts: float | None = None
    """Mean of one GPU."""
    gpu_temperature_celsius: float | None = None
    """Of the hottest."""
    gpu_sm_clock_mhz: float | None = None
    """Mean of one GPU."""
    gpu_throttle_reasons: tuple[str, ...] | None = None
    """Every reason that was seen on any of them."""

    def facts(self) -> dict[str, Any]:
        return asdict(self)


class GpuSpan:
    """What one sampler reads from its start on. Made by `GpuSampler.span`."""

    def __init__(self, sampler: GpuSampler, n_gpus: int) -> None:
        self._sampler = sampler
        self._gpus = [_GpuSums() for _ in range(n_gpus)]

    def usage(self) -> GpuUsage:
        """From the start until now; takes a reading of its own, so that short spans have two."""
        return self._sampler.usage_of(self)

    def add(self, now_s: float, readings: list[GpuReading]) -> None:
        for gpu, reading in zip(self._gpus, readings, strict=True):
            gpu.add(now_s, reading)

    def sum(self) -> GpuUsage:
        gpus = self._gpus
        if not gpus or not all(gpu.n for gpu in gpus):
            return GpuUsage()
        joules = [gpu.joules for gpu in gpus]
        reasons = [gpu.throttle_bits for gpu in gpus if gpu.throttle_bits is not None]
        bits = 0
        for more in reasons:
            bits |= more
        return GpuUsage(
            n_gpus=len(gpus),
            joules=None if None in joules else round(sum(j for j in joules if j is not None), 3),
            gpu_utilisation_percent=_mean([gpu.utilisation.mean for gpu in gpus]),
            gpu_memory_gib=_largest([gpu.memory.largest for gpu in gpus]),
            gpu_power_watts=_mean([gpu.power.mean for gpu in gpus]),
            gpu_temperature_celsius=_largest([gpu.temperature.largest for gpu in gpus]),
            gpu_sm_clock_mhz=_mean([gpu.sm_clock.mean for gpu in gpus]),
            gpu_throttle_reasons=tuple(n for bit, n in THROTTLE_REASONS.items() if bits & bit) if reasons else None,
        )

    def close(self) -> None:
        self._sampler.drop(self)


class GpuSampler:
    """Reads all GPUs of this task once a second until it is closed. Without NVML or a GPU it does nothing.

    `nvml` is the module `pynvml`, or what stands for it in a test.
    """

    def __init__(
        self,
        environment: Mapping[str, str] = os.environ,
        *,
        nvml: Any = None,
        sample_s: float = SAMPLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sample_s, self._clock = sample_s, clock
        self._nvml = nvml if nvml is not None else _import_nvml()
        self._handles = self._open(environment.get("CUDA_VISIBLE_DEVICES"))
        self._spans: list[GpuSpan] = []
        self._changed = threading.Condition()
        self._n_started = self._n_finished = self._n_wanted = 0
        """Rounds of readings: begun, ended, and asked for."""
        self._closed = not self._handles
        self._thread = threading.Thread(target=self._sample, name="gpu-sampler", daemon=True)
        if self._handles:
            self._thread.start()

    def span(self) -> GpuSpan:
        """Begin to add up; begins with a reading."""
        span = GpuSpan(self, len(self._handles))
        with self._changed:
            self._spans.append(span)
            self._read_now()
        return span

    def usage_of(self, span: GpuSpan) -> GpuUsage:
        with self._changed:
            if span in self._spans:
                self._read_now()
            return span.sum()

    def drop(self, span: GpuSpan) -> None:
        with self._changed, contextlib.suppress(ValueError):
            self._spans.remove(span)

    def close(self) -> None:
        """End the thread; what spans have added up stays."""
        with self._changed:
            was_open, self._closed = not self._closed, True
            self._changed.notify_all()
        if was_open:
            self._thread.join(READ_TIMEOUT_S)
            if not self._thread.is_alive():
                with contextlib.suppress(self._nvml.NVMLError):
                    self._nvml.nvmlShutdown()

    def _read_now(self) -> None:
        """Wait, a few seconds at most, for a round of readings that begins after this call. Holds the condition."""
        wanted = self._n_started + 1
        self._n_wanted = max(self._n_wanted, wanted)
        self._changed.notify_all()
        self._changed.wait_for(lambda: self._closed or self._n_finished >= wanted, READ_TIMEOUT_S)

    def _sample(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._n_wanted > self._n_started, self._sample_s)
                if self._closed:
                    return
                self._n_started += 1
            readings = [self._reading(handle) for handle in self._handles]
            now_s = self._clock()
            with self._changed:
                self._n_finished = self._n_started
                for span in self._spans:
                    span.add(now_s, readings)
                self._changed.notify_all()

    def _open(self, visible: str | None) -> list[Any]:
        if self._nvml is None:
            return []
        try:
            self._nvml.nvmlInit()
            return visible_gpus(self._nvml, visible)
        except self._nvml.NVMLError:  # no driver, or none for this user
            return []

    def _reading(self, gpu: Any) -> GpuReading:
        nvml, ask = self._nvml, self._ask
        millijoules = ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu))
        milliwatts = ask(lambda: nvml.nvmlDeviceGetPowerUsage(gpu))
        used_bytes = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used)
        bits = ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))
        return GpuReading(
            energy_joules=None if millijoules is None else millijoules / MILLIJOULES_PER_JOULE,
            power_watts=None if milliwatts is None else milliwatts / MILLIWATTS_PER_WATT,
            utilisation_percent=ask(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
            memory_gib=None if used_bytes is None else used_bytes / 2**30,
            temperature_celsius=ask(lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
            sm_clock_mhz=ask(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            throttle_bits=None if bits is None else int(bits),
        )

    def _ask(self, question: Callable[[], Any]) -> float | None:
        try:
            return float(question())
        except (self._nvml.NVMLError, AttributeError):  # not on this GPU, not permitted (MIG), another pynvml
            return None


def visible_gpus(nvml: Any, visible: str | None) -> list[Any]:
    """NVML's handles of the GPUs that CUDA shows for this CUDA_VISIBLE_DEVICES (None: all), in no particular order.

    Entries are numbers in the driver's order (`slurm/task.sbatch` sets CUDA_DEVICE_ORDER=PCI_BUS_ID) or the beginning
    of a UUID; the first one that names no GPU ends the list (CUDA C++ Programming Guide, "Environment Variables").
    """
    gpus = []
    for index in range(nvml.nvmlDeviceGetCount()):
        with contextlib.suppress(nvml.NVMLError):  # not permitted: SLURM gave it to somebody else
            gpus.append(nvml.nvmlDeviceGetHandleByIndex(index))
    if visible is None:
        return gpus
    found = []
    for entry in (e.strip() for e in visible.split(",")):
        if entry.isdecimal() and int(entry) < len(gpus):
            found.append(gpus[int(entry)])
        elif entry.startswith("MIG-"):
            found.append(nvml.nvmlDeviceGetHandleByUUID(entry))
        elif entry.startswith("GPU-") and (
            named := [gpu for gpu in gpus if nvml.nvmlDeviceGetUUID(gpu).startswith(entry)]
        ):
            found.append(named[0])
        else:
            break
    return found


def device_name(device: torch.device) -> str | None:
    """The GPU's product name; None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.get_device_name(device)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use so far: torch's allocations on a GPU, the process's resident set on a CPU."""
    if device.type != "cuda":
        return max_rss_gib()
    import torch

    return torch.cuda.max_memory_allocated(device) / 2**30


class _Sum:
    """Mean and maximum of what was read."""

    def __init__(self) -> None:
        self._n, self._total = 0, 0.0
        self.largest: float | None = None

    def add(self, value: float | None) -> None:
        if value is not None:
            self._n, self._total = self._n + 1, self._total + value
            self.largest = value if self.largest is None else max(self.largest, value)

    @property
    def mean(self) -> float | None:
        return self._total / self._n if self._n else None


class _GpuSums:
    """One GPU over a span."""

    def __init__(self) -> None:
        self.n = 0
        self.utilisation, self.memory, self.power, self.temperature, self.sm_clock = (_Sum() for _ in range(5))
        self.throttle_bits: int | None = None
        self._first: GpuReading | None = None
        self._last: tuple[float, GpuReading] | None = None
        self._integral_joules: float | None = 0.0

    def add(self, now_s: float, reading: GpuReading) -> None:
        self.n += 1
        self.memory.add(reading.memory_gib)
        if self._last is None:
            self._first = reading
        else:  # what the first reading tells of load is from before the span
            self.utilisation.add(reading.utilisation_percent)
            self.power.add(reading.power_watts)
            self.temperature.add(reading.temperature_celsius)
            self.sm_clock.add(reading.sm_clock_mhz)
            if reading.throttle_bits is not None:
                self.throttle_bits = (self.throttle_bits or 0) | reading.throttle_bits
            before_s, before = self._last
            if self._integral_joules is None or reading.power_watts is None or before.power_watts is None:
                self._integral_joules = None
            else:
                self._integral_joules += (before.power_watts + reading.power_watts) / 2 * (now_s - before_s)
        self._last = now_s, reading

    @property
    def joules(self) -> float | None:
        if self._first is None or self._last is None or self.n < 2:
            return None
        first, last = self._first.energy_joules, self._last[1].energy_joules
        if first is not None and last is not None and last >= first:  # less: the driver was loaded again
            return last - first
        return self._integral_joules


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 1) if known else None


def _largest(values: list[float | None]) -> float | None:
    return max((round(value, 3) for value in values if value is not None), default=None)


def _import_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml
