"""The device that a process computes on, in words for manifests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_assets.worker.usage import max_rss_gib

if TYPE_CHECKING:
    import torch


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
