"""Telemetry: figures where there is a GPU, None where there is none, and never an error."""

from __future__ import annotations

import time

import pytest
import torch

from kd_assets.teacher.telemetry import Gpu, GpuReading, device_name, joules_between, peak_memory_gib

CPU = torch.device("cpu")


def reading(joules: float | None) -> GpuReading:
    return GpuReading(energy_joules=joules, utilisation_percent=None)


def test_without_nvml_nothing_is_known_and_nothing_breaks() -> None:
    gpu = Gpu(CPU)
    assert gpu.read() == reading(None)
    gpu.close()
    gpu.close()
    assert device_name(CPU) is None


def test_joules_are_the_difference_of_two_readings() -> None:
    assert joules_between(reading(10.0), reading(12.5)) == 2.5
    assert joules_between(reading(None), reading(12.5)) is None
    assert joules_between(reading(10.0), reading(None)) is None


def test_peak_memory_of_a_cpu_is_that_of_the_process() -> None:
    assert 0.01 < peak_memory_gib(CPU) < 1000


@pytest.mark.gpu
def test_energy_of_a_gpu_is_in_joules_and_grows() -> None:
    """A GPU at work takes between 20 and 2,000 watts: a counter in millijoules would be a thousand times off."""
    device = torch.device("cuda")
    gpu = Gpu(device)
    a_NN = torch.randn(8192, 8192, device=device)
    before, started = gpu.read(), time.perf_counter()
    for _ in range(100):
        a_NN @ a_NN
    torch.cuda.synchronize()
    joules, seconds = joules_between(before, gpu.read()), time.perf_counter() - started
    if joules is None:
        pytest.skip("this GPU has no energy counter")
    assert 20 < joules / seconds < 2000
    assert device_name(device)
