"""What the pass cost: joules, memory and load of the GPU it ran on, by NVML; None where there is no NVML.

Used by `kd_assets.teacher` only. The invariant: telemetry never fails a pass. A machine without an NVIDIA driver, a
container without its library, or a GPU that lacks a counter gives None, which manifests keep as "not known".
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

MILLIJOULES_PER_JOULE = 1000.0
"""`nvmlDeviceGetTotalEnergyConsumption` counts millijoules since the driver was loaded (NVML API reference)."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """The counters of one GPU at one moment."""

    energy_joules: float | None
    """Since the driver was loaded: only differences mean anything."""
    utilisation_percent: int | None
    """Share of the last sample period (up to a second) in which a kernel ran."""


class Gpu:
    """One GPU as NVML sees it; every reading is None where NVML, or a counter, is absent."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        if device.type == "cuda":
            self._open(device)

    def _open(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError:
            return
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            # By UUID: NVML numbers all GPUs of the node, torch only those in CUDA_VISIBLE_DEVICES.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml = pynvml

    def read(self) -> GpuReading:
        millijoules = self._ask(lambda nvml: int(nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)))
        utilisation = self._ask(lambda nvml: int(nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu))
        return GpuReading(
            energy_joules=None if millijoules is None else millijoules / MILLIJOULES_PER_JOULE,
            utilisation_percent=utilisation,
        )

    def _ask(self, question: Callable[[Any], T]) -> T | None:
        if self._nvml is None:
            return None
        try:
            return question(self._nvml)
        except self._nvml.NVMLError:  # not supported on this GPU, or not permitted (MIG slices)
            return None

    def close(self) -> None:
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
            self._nvml = None


def joules_between(before: GpuReading, after: GpuReading) -> float | None:
    """Energy used between two readings of one GPU; None when either is not known."""
    if before.energy_joules is None or after.energy_joules is None:
        return None
    return after.energy_joules - before.energy_joules


def device_name(device: torch.device) -> str | None:
    """The GPU's product name; None on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use so far: torch's allocations on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
