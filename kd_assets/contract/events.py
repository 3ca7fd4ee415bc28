"""Events: how a task tells the control plane what it does, one JSON line each, to its event file and to stdout.

Standard library only. Written here (`Reporter`) and read here (`read_events`). Every line is one `write` to a file
opened for appending, so two attempts of a task that overlap cannot tear each other's lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from kd_assets.contract.decode import decode, parse_json
from kd_assets.contract.job_file import CONTRACT_VERSION
from kd_assets.errors import ContractError

EventType = Literal[
    "task_started", "teacher_loaded", "progress", "committed", "partition_failed", "warning", "task_finished"
]
"""What an event's `data` holds. A reader must do without any of it, and without knowing more.

task_started      kind, n_partitions (of this process), n_parts_on_disk (files of its results that a kill does not
                  undo), host, pid, process_index, n_processes, slurm_job_id, slurm_array_job_id, slurm_array_task_id,
                  slurm_restart_count, slurm_nodelist, slurm_partition, slurm_cluster (None where SLURM says nothing)
teacher_loaded    load_s, device, gpu, n_parameters, head, attention, placement, n_devices, compiled, warm_up_s,
                  token_budget, quantization
progress          partition_key, n_documents, done_documents, n_tokens, done_tokens, tokens_per_s; of exports asset and
                  done_bytes besides
committed         partition_key, asset, path, fingerprint, data_version, reused, usage
partition_failed  partition_key, assets, error (the class: of `kd_assets.errors` where we foresaw it), message,
                  during ("load" where the teacher or tokenizer could not be loaded, else "run")
warning           message; partition_key where it is about one; token_budget where that was made smaller
task_finished     status ("done", "failed", "resumable", "duplicate"), signal, n_committed, n_reused, n_failed, n_loads,
                  wall_s, usage, process_index, slurm_job_id; of a duplicate also holder, as that task_started has it

`usage` is what this attempt has used so far: wall_s, cpu_s, n_cpus, cpu_efficiency, max_rss_gib; of jobs that run a
model also cpu_utilisation_percent and host_memory_gib (of the process and its children); where NVML is there also
n_gpus, joules, gpu_utilisation_percent, gpu_memory_gib, gpu_power_watts, gpu_temperature_celsius, gpu_sm_clock_mhz,
gpu_memory_clock_mhz, gpu_throttle_reasons (see `kd_assets.worker.telemetry.sums.Usage`). What one partition used stands
in its manifest's facts, as a series over time in `telemetry`.

A file holds the events of all attempts in the order of their starts; a duplicate, which leaves the task to another
process, writes a warning and a task_finished in between, which do not end the other's attempt.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One line of a task's event file."""

    type: EventType
    time: float
    """Seconds since the epoch."""
    task: int
    attempt: int
    """SLURM_RESTART_COUNT: 0 for the first start of the task."""
    data: dict[str, Any]

    def to_line(self) -> str:
        """One line of JSON with its newline; NaN and infinity become null, since JSON has neither."""
        record = {"v": CONTRACT_VERSION} | dataclasses.asdict(self)
        try:
            return json.dumps(record, allow_nan=False, default=str) + "\n"
        except ValueError:
            return json.dumps(_without_non_finite(record), allow_nan=False, default=str) + "\n"


def parse_event(line: str) -> Event:
    """The event on one complete line. Raises ContractError for anything else, another version included."""
    try:
        raw = parse_json(line)
    except ValueError as e:
        raise ContractError(f"not an event line ({e}): {line[:200]!r}") from e
    if not isinstance(raw, dict) or raw.pop("v", None) != CONTRACT_VERSION:
        raise ContractError(f"not an event of contract version {CONTRACT_VERSION}: {line[:200]!r}")
    return decode(Event, raw, where="event")


def event_file(events_folder: Path, task_index: int, process_index: int = 0) -> Path:
    """Of one process of a task: where several share it (KD_N_PROCESSES), each writes its own."""
    return events_folder / f"{task_name(task_index, process_index)}.jsonl"


def lease_file(events_folder: Path, task_index: int, process_index: int = 0) -> Path:
    """Locked as long as a process is at this task: see `kd_assets.worker.attempt`."""
    return events_folder.parent / "leases" / f"{task_name(task_index, process_index)}.lease"


def task_name(task_index: int, process_index: int = 0) -> str:
    return f"task-{task_index:05d}" + (f".process-{process_index}" if process_index else "")


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[int, Event | str]]:
    """Events of complete lines from byte `offset` on, each with the offset to go on from.

    A last line without its newline is left for the next call: its writer is still at it, or was killed and its next
    attempt begins a new line (see `Reporter`). A complete line that is no event comes back as its text, so that the
    caller can say so and go on.
    """
    try:
        with path.open("rb") as f:
            f.seek(offset)
            for line in f:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                text = line.decode("utf-8", "replace").strip()
                if not text:
                    continue
                try:
                    yield offset, parse_event(text)
                except ContractError:
                    yield offset, text
    except FileNotFoundError:
        return


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _without_non_finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(v) for v in value]
    return value


class Reporter:
    """Appends events of one attempt of one task. Safe to call from several threads."""

    def __init__(
        self,
        path: Path | None,
        *,
        task: int = 0,
        attempt: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._task, self._attempt, self._clock = task, attempt, clock
        self._stream = sys.stdout if stream is None else stream
        self.report_fatal: Callable[[Exception], None] = lambda e: None
        """Set by the task: reports that all it has not finished failed with this error, and that it is over. For a
        thread that has to end the process because the main thread is stuck."""
        self._lock = threading.Lock()
        self._fd: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            self._end_half_written_line()

    def _end_half_written_line(self) -> None:
        """An attempt killed inside a write leaves half a line; ours must not be glued to it."""
        assert self._fd is not None
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")

    def emit(self, event_type: EventType, **data: Any) -> None:
        """Append one event. Times are seconds since the epoch; `data` must be JSON."""
        line = Event(type=event_type, time=self._clock(), task=self._task, attempt=self._attempt, data=data).to_line()
        with self._lock:
            try:
                if self._fd is not None:
                    os.write(self._fd, line.encode())
                self._stream.write(line)
                self._stream.flush()
            except OSError as e:  # events inform: a full disk must not stop the work they tell of
                self._complain(e)

    def _complain(self, e: OSError) -> None:
        with contextlib.suppress(OSError):
            print(f"an event could not be written: {e}", file=sys.stderr, flush=True)

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
