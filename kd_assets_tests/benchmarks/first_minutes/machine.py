"""What machine this is, as a program that imports torch and nothing else that is heavy."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from kd_assets_tests.benchmarks.figures import Figures

GIB = 2**30
PACKAGES = ("torch", "transformers", "accelerate", "pyarrow", "nvidia-ml-py", "triton", "numpy", "pytest")


def host_facts() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        **{name: installed_version(name) for name in PACKAGES},
        "c_compiler": shutil.which("gcc") or shutil.which("cc"),
        "cpp_compiler": shutil.which("g++"),
        "n_cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1),
        "free_disk_gib": round(shutil.disk_usage(tempfile.gettempdir()).free / GIB, 1),
    }


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_facts() -> dict[str, Any]:
    """Of the first GPU that torch sees; `gpu` is None where it sees none."""
    import torch

    facts: dict[str, Any] = {"torch_build": torch.__version__, "cuda": torch.version.cuda, "driver": driver_version()}
    if not torch.cuda.is_available():
        return facts | {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return facts | {
        "gpu": properties.name,
        "n_gpus": torch.cuda.device_count(),
        "gpu_memory_gib": round(total / GIB, 1),
        "gpu_free_memory_gib": round(free / GIB, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "n_multiprocessors": properties.multi_processor_count,
    }


def driver_version() -> str | None:
    """NVML's word; None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, help="not needed: it takes as long as importing torch")
    figures = Figures(parser.parse_args().figures)
    figures.add(**host_facts())
    figures.add(**gpu_facts())
    if figures.known["driver"] is not None and figures.known["gpu"] is None:
        sys.exit(
            f"there is an NVIDIA driver ({figures.known['driver']}), and torch {figures.known['torch_build']} sees no "
            "CUDA device: look at CUDA_VISIBLE_DEVICES, and whether the driver is new enough for this torch's CUDA"
        )


if __name__ == "__main__":
    main()
