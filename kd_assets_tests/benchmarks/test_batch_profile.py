"""What is read off a profile: from a trace that is written out here, and from a real one of a tiny decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

from kd_assets_tests.benchmarks.batch_profile import idle_share, profile_facts, profiled_forwards, trace_facts


def event(category: str, name: str, start: float, duration: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread}


TRACE = [
    {"ph": "M", "name": "process_name", "pid": 1},
    event("cpu_op", "aten::_scaled_dot_product_flash_attention", 90, 5),
    event("cuda_runtime", "cudaLaunchKernel", 95, 2),
    event("kernel", "flash_fwd_kernel", 100, 30, thread=7),
    event("cuda_runtime", "cudaStreamSynchronize", 110, 4),
    event("cuda_runtime", "cudaEventSynchronize", 110, 50, thread=2),
    event("gpu_memcpy", "Memcpy DtoH", 140, 10, thread=8),
    event("cuda_driver", "cuLaunchKernelEx", 150, 2),
    event("kernel", "gemm", 160, 40, thread=7),
    event("kernel", "gemm", 180, 20, thread=9),
    event("cuda_runtime", "cudaDeviceSynchronize", 170, 40),
]
"""Microseconds 100 to 200: a gap of 30 between two kernels, of which a copy fills 10; the profiler waits at the end."""


def test_idle_time_waits_attention_and_kernels_are_read_off_a_trace() -> None:
    assert trace_facts(TRACE) == {
        "gpu_idle_share": 0.3,
        "gpu_idle_share_copies_counted": 0.2,
        "host_waits": [
            "another thread: 1 x cudaEventSynchronize, 0.1 ms",
            "the launching thread: 1 x cudaStreamSynchronize, 0.0 ms",
        ],
        "attention": {"_scaled_dot_product_flash_attention": 1},
        "top": [
            " 66.7%       0.06 ms      2 x gemm",
            " 33.3%       0.03 ms      1 x flash_fwd_kernel",
        ],
    }


def test_without_a_gpu_its_figures_are_not_known() -> None:
    facts = trace_facts([event("cpu_op", "aten::mm", 0, 10)])
    assert (facts["gpu_idle_share"], facts["host_waits"], facts["top"]) == (None, [], [])


@pytest.mark.parametrize(
    ("spans", "share"),
    [([(0, 10)], 0.0), ([(0, 4), (2, 6), (3, 5)], 0.4), ([(8, 12), (-5, 1)], 0.7), ([], 1.0)],
)
def test_overlapping_spans_count_once_and_only_within_the_window(
    spans: list[tuple[float, float]], share: float
) -> None:
    assert idle_share(spans, (0, 10)) == share


class Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def run_profiled(n_forwards: int, *, n: int) -> profile:
    decoder = Decoder()
    with profiled_forwards(decoder, n=n) as found:
        for _ in range(n_forwards):
            decoder(torch.ones(2, 8))
    return found


def test_of_five_forwards_the_first_and_the_last_are_not_in_the_profile(tmp_path: Path) -> None:
    (line,) = [line for line in profile_facts(run_profiled(5, n=3), tmp_path)["top"] if line.endswith("aten::mm")]
    assert " 3 x " in line
    assert "aten::mm" in (tmp_path / "table.txt").read_text()
    assert (tmp_path / "trace.json.gz").stat().st_size > 0


def test_too_few_forwards_are_refused() -> None:
    with pytest.raises(ValueError, match="3 forwards of 4 cannot be profiled"):
        run_profiled(4, n=3)
