"""What the GPUs and the processors of this task did, sampled once a second: sums over a span of time, and a series.

Used by runners that run a model and, for what a whole task used, by the worker. The invariant: telemetry never fails a
pass and never holds one up. Only the sampler's own thread talks to NVML, whoever asks waits a few seconds at most; a
machine without an NVIDIA driver, a container without its library, or a GPU that lacks a counter gives None, which
manifests keep as "not known". What is read of the processors stands in `host`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kd_assets.worker.attempt import Attempt
from kd_assets.worker.telemetry.host import HostReader, HostReading
from kd_assets.worker.telemetry.series import Series
from kd_assets.worker.usage import n_cpus

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
"""Bits of `nvmlClocksEventReasons` (NVML API reference), once named throttle reasons, that mean slower than wished.
Left out: idle (0x01), and clocks that somebody set (0x02, 0x100)."""


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
    memory_clock_mhz: float | None = None
    throttle_bits: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a task's GPUs and processors did in a span of time; None is not known. Names and units as in manifests."""

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
    gpu_memory_clock_mhz: float | None = None
    """Mean of one GPU."""
    gpu_throttle_reasons: tuple[str, ...] | None = None
    """Every reason that was seen on any of them."""
    cpu_utilisation_percent: float | None = None
    """Mean of this process, its children included, over the processors that it was given."""
    host_memory_gib: float | None = None
    """Most resident memory of this process and its children that was seen."""
    cpu_joules: float | None = None
    """Of all processors of the whole node, by RAPL: on a shared node that is not this task's alone."""

    def facts(self) -> dict[str, Any]:
        return asdict(self)


class UsageSpan:
    """What one sampler reads from its start on. Made by `Sampler.span`."""

    def __init__(self, sampler: Sampler, *, n_gpus: int, n_cpus: int, clock: Callable[[], float]) -> None:
        self._sampler, self._clock = sampler, clock
        self._gpus, self._host = [_GpuSums() for _ in range(n_gpus)], _HostSums(n_cpus)
        started_s = clock()
        self._series = Series(started_s)
        self._read_s: float | None = None
        self._tokens_s, self._done_tokens = started_s, 0
        """When the last batch was done, and how many tokens were by then."""

    def usage(self) -> Usage:
        """From the start until now; takes a reading of its own, so that short spans have two."""
        return self._sampler.usage_of(self)

    def series(self) -> dict[str, Any] | None:
        """The figures over time since the start (see `Series.facts`); None for a span of less than three seconds.

        `total_gpu_power_watts` is that of all GPUs together, `gpu_utilisation_percent` and `cpu_utilisation_percent`
        are means over GPUs and over processors, `host_memory_gib` is that of the process and its children.
        """
        if self._done_tokens:
            self.tokens_done(self._done_tokens)  # none since the last batch
        return self._series.facts()

    def tokens_done(self, done_tokens: int) -> None:
        """Say after a batch how many tokens are done by now: they were worked on since the batch before. Of one thread
        only."""
        now_s, before_s, before = self._clock(), self._tokens_s, self._done_tokens
        self._tokens_s, self._done_tokens = now_s, done_tokens
        if now_s > before_s:
            tokens_per_s = max(0, done_tokens - before) / (now_s - before_s)
            self._series.add("tokens_per_s", before_s, now_s, tokens_per_s)

    def add(self, now_s: float, gpus: list[GpuReading], host: HostReading) -> None:
        for sums, reading in zip(self._gpus, gpus, strict=True):
            sums.add(now_s, reading)
        cpu_percent = self._host.add(now_s, host)
        before_s, self._read_s = self._read_s, now_s
        if before_s is None:
            return
        figures = {
            "total_gpu_power_watts": _all_or_none([gpu.power_watts for gpu in gpus]),
            "gpu_utilisation_percent": _mean([gpu.utilisation_percent for gpu in gpus]),
            "cpu_utilisation_percent": cpu_percent,
            "host_memory_gib": host.memory_gib,
        }
        for name, value in figures.items():
            self._series.add(name, before_s, now_s, value)

    def sum(self) -> Usage:
        gpus, host = self._gpus, self._host.sum()
        if not gpus or not all(gpu.n for gpu in gpus):
            return Usage(**host)
        joules = [gpu.joules for gpu in gpus]
        reasons = [gpu.throttle_bits for gpu in gpus if gpu.throttle_bits is not None]
        bits = 0
        for more in reasons:
            bits |= more
        return Usage(
            n_gpus=len(gpus),
            joules=_all_or_none(joules),
            gpu_utilisation_percent=_mean([gpu.utilisation.mean for gpu in gpus]),
            gpu_memory_gib=_largest([gpu.memory.largest for gpu in gpus]),
            gpu_power_watts=_mean([gpu.power.mean for gpu in gpus]),
            gpu_temperature_celsius=_largest([gpu.temperature.largest for gpu in gpus]),
            gpu_sm_clock_mhz=_mean([gpu.sm_clock.mean for gpu in gpus]),
            gpu_memory_clock_mhz=_mean([gpu.memory_clock.mean for gpu in gpus]),
            gpu_throttle_reasons=tuple(n for bit, n in THROTTLE_REASONS.items() if bits & bit) if reasons else None,
            **host,
        )

    def close(self) -> None:
        self._sampler.drop(self)


class Sampler:
    """Reads this task's GPUs and this process once a second until it is closed. Without NVML there are no GPUs.

    `nvml` is the module `pynvml`, or what stands for it in a test, as `host` may stand for the reader of the node.
    """

    def __init__(
        self,
        environment: Mapping[str, str] = os.environ,
        *,
        nvml: Any = None,
        host: HostReader | None = None,
        sample_s: float = SAMPLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sample_s, self._clock = sample_s, clock
        self._nvml = nvml if nvml is not None else _import_nvml()
        self._handles = self._open(environment.get("CUDA_VISIBLE_DEVICES"))
        self._host = host if host is not None else HostReader()
        self._n_cpus = n_cpus(environment, n_processes=Attempt.of(environment).n_processes)
        self._spans: list[UsageSpan] = []
        self._changed = threading.Condition()
        self._n_started = self._n_finished = self._n_wanted = 0
        """Rounds of readings: begun, ended, and asked for."""
        self._closed = False
        self._thread = threading.Thread(target=self._sample, name="telemetry", daemon=True)
        self._thread.start()

    def span(self) -> UsageSpan:
        """Begin to add up; begins with a reading."""
        span = UsageSpan(self, n_gpus=len(self._handles), n_cpus=self._n_cpus, clock=self._clock)
        with self._changed:
            self._spans.append(span)
            self._read_now()
        return span

    def usage_of(self, span: UsageSpan) -> Usage:
        with self._changed:
            if span in self._spans:
                self._read_now()
            return span.sum()

    def drop(self, span: UsageSpan) -> None:
        with self._changed, contextlib.suppress(ValueError):
            self._spans.remove(span)

    def close(self) -> None:
        """End the thread; what spans have added up stays."""
        with self._changed:
            was_open, self._closed = not self._closed, True
            self._changed.notify_all()
        if was_open:
            self._thread.join(READ_TIMEOUT_S)
            if self._handles and not self._thread.is_alive():
                with contextlib.suppress(self._nvml.NVMLError):
                    self._nvml.nvmlShutdown()

    def _read_now(self) -> None:
        """Wait, a few seconds at most, for a round of readings that begins after this call. Holds the condition."""
        wanted = self._n_started + 1
        self._n_wanted = max(self._n_wanted, wanted)
        self._changed.notify_all()
        self._changed.wait_for(lambda: self._closed or self._n_finished >= wanted, READ_TIMEOUT_S)

    def _sample(self) -> None:
        try:
            while self._sampled():
                pass
        finally:  # nobody is to wait for a thread that an error ended
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _sampled(self) -> bool:
        """Wait until it is time for a round of readings, and make it; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._n_wanted > self._n_started, self._sample_s)
            if self._closed:
                return False
            self._n_started += 1
        gpus, host = [self._reading(handle) for handle in self._handles], self._host.read()
        now_s = self._clock()
        with self._changed:
            self._n_finished = self._n_started
            for span in self._spans:
                span.add(now_s, gpus, host)
            self._changed.notify_all()
        return True

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
        bits = ask(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))
        if bits is None:  # the name before driver 535; goes with CUDA 14
            bits = ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))
        return GpuReading(
            energy_joules=None if millijoules is None else millijoules / MILLIJOULES_PER_JOULE,
            power_watts=None if milliwatts is None else milliwatts / MILLIWATTS_PER_WATT,
            utilisation_percent=ask(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
            memory_gib=None if used_bytes is None else used_bytes / 2**30,
            temperature_celsius=ask(lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
            sm_clock_mhz=ask(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            memory_clock_mhz=ask(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
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
        self.utilisation, self.memory, self.power, self.temperature = (_Sum() for _ in range(4))
        self.sm_clock, self.memory_clock = _Sum(), _Sum()
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
            self.memory_clock.add(reading.memory_clock_mhz)
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


class _HostSums:
    """This process and its node over a span."""

    def __init__(self, n_cpus: int) -> None:
        self._n_cpus = n_cpus
        self._memory = _Sum()
        self._first: tuple[float, HostReading] | None = None
        self._last: tuple[float, HostReading] | None = None

    def add(self, now_s: float, reading: HostReading) -> float | None:
        """Returns the CPU utilisation in percent since the reading before; None where there was none."""
        before, self._last = self._last, (now_s, reading)
        self._first = self._first or self._last
        self._memory.add(reading.memory_gib)
        return None if before is None else self._percent(before, self._last)

    def sum(self) -> dict[str, Any]:
        first, last = self._first, self._last
        if first is None or last is None or first is last:
            return {}
        joules_before, joules = first[1].package_joules, last[1].package_joules
        return {
            "cpu_utilisation_percent": _mean([self._percent(first, last)]),
            "host_memory_gib": _largest([self._memory.largest]),
            "cpu_joules": None if joules_before is None or joules is None else round(joules - joules_before, 3),
        }

    def _percent(self, before: tuple[float, HostReading], after: tuple[float, HostReading]) -> float | None:
        """Never negative: the time of a child that ended may be lost where another process waited for it."""
        elapsed_s, used_s = after[0] - before[0], after[1].cpu_s - before[1].cpu_s
        return 100 * max(0.0, used_s) / (elapsed_s * self._n_cpus) if elapsed_s > 0 else None


def _all_or_none(values: list[float | None]) -> float | None:
    """The sum, unless one is not known."""
    known = [value for value in values if value is not None]
    return round(sum(known), 3) if values and len(known) == len(values) else None


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
