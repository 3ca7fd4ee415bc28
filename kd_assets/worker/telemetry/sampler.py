"""What the GPUs and the processors of this task did, sampled once a second: sums over a span of time, and a series.

A task has one sampler, of which it takes spans: one for all of the task, one for each partition. The invariant:
telemetry never fails a pass and never holds one up. Only the sampler's own thread talks to NVML (`gpu`) and to the
system (`host`), and whoever asks waits a few seconds at most.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from kd_assets.worker.attempt import Attempt
from kd_assets.worker.telemetry.gpu import GpuReader, GpuReading
from kd_assets.worker.telemetry.host import HostReader, HostReading
from kd_assets.worker.telemetry.series import Series
from kd_assets.worker.telemetry.sums import GpuSums, HostSums, Usage, all_or_none, mean, usage_of
from kd_assets.worker.usage import n_cpus

SAMPLE_S = 1.0
"""NVML's own utilisation is a mean over the last 1/6 to 1 s, by product."""

READ_TIMEOUT_S = 5.0
"""A driver in trouble can keep a reading for ever; the pass goes on without it."""


class UsageSpan:
    """What one sampler reads from its start on. Made by `Sampler.span`."""

    def __init__(self, sampler: Sampler, *, n_gpus: int, n_cpus: int, clock: Callable[[], float]) -> None:
        self._sampler, self._clock = sampler, clock
        self._gpus, self._host = [GpuSums() for _ in range(n_gpus)], HostSums(n_cpus)
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
            "total_gpu_power_watts": all_or_none([gpu.power_watts for gpu in gpus]),
            "gpu_utilisation_percent": mean([gpu.utilisation_percent for gpu in gpus]),
            "cpu_utilisation_percent": cpu_percent,
            "host_memory_gib": host.memory_gib,
        }
        for name, value in figures.items():
            self._series.add(name, before_s, now_s, value)

    def sum(self) -> Usage:
        return usage_of(self._gpus, self._host)

    def close(self) -> None:
        self._sampler.drop(self)


class Sampler:
    """Reads this task's GPUs and this process once a second until it is closed.

    `nvml` (see `GpuReader`) and `host` are what stands for the machine in a test.
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
        self._gpus = GpuReader(environment, nvml=nvml)
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
        span = UsageSpan(self, n_gpus=self._gpus.n_gpus, n_cpus=self._n_cpus, clock=self._clock)
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
            if not self._thread.is_alive():
                self._gpus.close()

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
        finally:  # no one may wait for a thread that an error ended
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
        gpus, host = self._gpus.read(), self._host.read()
        now_s = self._clock()
        with self._changed:
            self._n_finished = self._n_started
            for span in self._spans:
                span.add(now_s, gpus, host)
            self._changed.notify_all()
        return True
