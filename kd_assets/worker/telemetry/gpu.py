"""The GPUs of this task, as NVML tells of them.

Used by `sampler`. The invariant: nothing here raises. A machine without an NVIDIA driver, a container without its
library, or a GPU that lacks a counter gives None, which manifests keep as "not known".
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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


class GpuReader:
    """Reads the GPUs that CUDA shows this process. Without NVML there are none.

    `nvml` is the module `pynvml`, or what stands for it in a test. May wait as long as the driver does.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, *, nvml: Any = None) -> None:
        self._nvml = nvml if nvml is not None else _import_nvml()
        self._handles = self._open(environment.get("CUDA_VISIBLE_DEVICES"))

    @property
    def n_gpus(self) -> int:
        return len(self._handles)

    def read(self) -> list[GpuReading]:
        """Of each GPU, always in the same order."""
        return [self._reading(handle) for handle in self._handles]

    def close(self) -> None:
        if self._handles:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

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


def _import_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml
