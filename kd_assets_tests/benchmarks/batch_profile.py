"""What the time of a few batches goes to: kernels, gaps between them, waits of the host, the kind of attention.

`profiled_forwards` runs torch's profiler over the middle of a partition; `trace_facts` is pure: it reads the events of
a Chrome trace ("Trace Event Format"), as `profile.export_chrome_trace` writes them. Times in a trace are microseconds.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

N_TOP = 20
LARGEST_TRACE_BYTES = 16 * 2**20
"""A larger trace is not kept: its facts are, and it is for people, who look at small ones."""
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
FROM_HOST = ("cuda_runtime", "cuda_driver")
WAITS = {
    *(f"cuda{what}" for what in ("DeviceSynchronize", "StreamSynchronize", "EventSynchronize", "Memcpy")),
    *(f"cu{what}" for what in ("CtxSynchronize", "StreamSynchronize", "EventSynchronize")),
}
"""Calls that return when the device has got somewhere."""
ATTENTION_OPERATOR = "aten::_scaled_dot_product_"
"""Begins the name of each backend of `torch.nn.functional.scaled_dot_product_attention`."""

Event = Mapping[str, Any]


@contextmanager
def profiled_forwards(decoder: torch.nn.Module, *, n: int) -> Iterator[profile]:
    """Profile `n` forwards of `decoder` among those that the body makes: from the start of the second to that of the
    one that comes after. Raises ValueError where the body makes too few."""
    on_gpu = next(decoder.parameters()).device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    n_begun = 0

    def begin(module: torch.nn.Module, arguments: Any) -> None:
        nonlocal n_begun
        n_begun += 1
        if n_begun == 2:
            if on_gpu:
                torch.cuda.synchronize()  # nothing of the first is in the picture
            profiler.start()
        elif n_begun == n + 2:
            profiler.stop()

    handle = decoder.register_forward_pre_hook(begin)
    try:
        yield profiler
    finally:
        handle.remove()
        if 2 <= n_begun < n + 2:
            profiler.stop()
    if n_begun < n + 2:
        raise ValueError(f"{n} forwards of {n_begun} cannot be profiled: their first and last are left out")


def profile_facts(profiler: profile, folder: Path) -> dict[str, Any]:
    """What a finished profile shows; writes `table.txt` and, unless it is large, `trace.json.gz` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / "trace.json.gz"
    profiler.export_chrome_trace(str(trace))
    with gzip.open(trace) as file:
        facts = trace_facts(json.load(file)["traceEvents"])
    if trace.stat().st_size > LARGEST_TRACE_BYTES:
        trace.unlink()
    averages = profiler.key_averages()
    by = "self_cpu_time_total" if facts["gpu_idle_share"] is None else "self_device_time_total"
    (folder / "table.txt").write_text(averages.table(sort_by=by, row_limit=60, max_name_column_width=100))
    if facts["gpu_idle_share"] is None:
        rows = [(average.key, average.count, average.self_cpu_time_total) for average in averages]
        facts["top"] = top_lines(rows)
    return facts


def trace_facts(events: Iterable[Event]) -> dict[str, Any]:
    """gpu_idle_share       of the time from the first kernel's start to the last one's end, that without any kernel;
                            None where no kernel ran, as all figures of a GPU
    gpu_idle_share_copies_counted   the same without any kernel, copy or memset
    host_waits              calls by which the thread that launches kernels waited for the device, and by which others
                            did, with their number and milliseconds; up to the last launch
    attention               backends of SDPA by name, with the number of their calls
    top                     a line for each of the kernels that took longest
    """
    timed = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in timed if event.get("cat") == "kernel"]
    attention = Counter(e["name"].removeprefix("aten::") for e in timed if e["name"].startswith(ATTENTION_OPERATOR))
    spans = [_span(event) for event in kernels]
    window = (min(s for s, _ in spans), max(e for _, e in spans)) if spans else None
    return {
        "gpu_idle_share": None if window is None else idle_share(spans, window),
        "gpu_idle_share_copies_counted": None
        if window is None
        else idle_share([_span(event) for event in timed if event.get("cat") in ON_GPU], window),
        "host_waits": _host_waits(timed),
        "attention": dict(attention),
        "top": top_lines([(event["name"], 1, float(event["dur"])) for event in kernels]),
    }


def idle_share(spans: Sequence[tuple[float, float]], window: tuple[float, float]) -> float:
    """The share of `window` that no span covers; spans may overlap, as those of several streams do."""
    begin, end = window
    covered, reached = 0.0, begin
    for start, stop in sorted(spans):
        new = min(stop, end) - max(start, reached)
        covered += max(0.0, new)
        reached = max(reached, stop)
    return round(1 - covered / (end - begin), 4)


def top_lines(rows: Iterable[tuple[str, int, float]]) -> list[str]:
    """The largest of (name, calls, microseconds), equal names added up: share of all, milliseconds, calls, name."""
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for name, n_calls, microseconds in rows:
        calls[name] += n_calls
        times[name] += microseconds
    total = sum(times.values())
    longest = sorted((name for name in times if times[name] > 0), key=lambda name: -times[name])[:N_TOP]
    return [
        f"{times[name] / total:6.1%} {times[name] / 1e3:10.2f} ms {calls[name]:6} x {name[:120]}" for name in longest
    ]


def _host_waits(timed: Sequence[Event]) -> list[str]:
    launches = [event for event in timed if event.get("cat") in FROM_HOST and "LaunchKernel" in event["name"]]
    if not launches:
        return []
    launching_thread = Counter(event["tid"] for event in launches).most_common(1)[0][0]
    last_launch = max(event["ts"] for event in launches)  # after it the profiler itself waits
    found: dict[tuple[str, str], list[float]] = {}
    for event in timed:
        if event.get("cat") in FROM_HOST and event["name"] in WAITS and event["ts"] < last_launch:
            by = "the launching thread" if event["tid"] == launching_thread else "another thread"
            found.setdefault((by, event["name"]), []).append(float(event["dur"]) / 1e3)
    return [f"{by}: {len(times_ms)} x {name}, {sum(times_ms):.1f} ms" for (by, name), times_ms in sorted(found.items())]


def _span(event: Event) -> tuple[float, float]:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])
