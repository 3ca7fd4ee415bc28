"""How many tokens a batch may have: found by measuring, on the devices that the teacher lies on.

Used by `kd_assets.teacher` only. Real steps of growing size run, all of the recipe's caches wanted and every document
as long as the recipe allows, and what they took at most is read off the allocator; the budget is the largest of a
coarse grid that fits with a margin, by the line through the last two. The arithmetic (`budget_from`) is pure.

The invariant: the budget is a property of teacher, recipe and hardware. The grid is coarse, so that the next attempt,
on another node of the same kind, finds the same one; where it does not, what is on disk says which one a part had.

With tensor parallelism every rank runs the same steps, and rank 0's memory stands for all: weights and activations are
cut into equal pieces, and the margin is for the rest. Documents of the longest length need the most: what grows with
the square of it (a mask, attention without a fused kernel) grows only by their number then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kd_assets.contract import TeacherParams
from kd_assets.errors import OutOfDeviceMemoryError
from kd_assets.teacher.batch.engine import RunStep, Step, StepResult, TopkStep
from kd_assets.teacher.batch.transfer import QUEUED_RESULTS
from kd_assets.teacher.devices.memory import within_memory
from kd_assets.teacher.devices.teacher_on_devices import TeacherOnDevices
from kd_assets.teacher.model.load import Teacher
from kd_assets.teacher.partition.batching import concatenated_ranges, longest

LARGEST_BUDGET_TOKENS = 32768
"""More tokens in a batch gain nothing (arithmetic, not measured: a matrix product fills a GPU with some 2,000 rows, and
of a mixture of experts each gets a sixteenth of them or so, 8 of 128; hence this number and not 4,096). Larger batches
only hold more memory, and a request to stop waits for the batch in hand."""
FALLBACK_BUDGET_TOKENS = 1024
"""Most tokens of a batch of a teacher whose head is not proven: its own forward makes all their logits at once."""
SMALLEST_BUDGET_TOKENS = 256
CPU_BUDGET_TOKENS = 4096
"""On a CPU, whose memory is not measured: others use it, too. Larger batches are no faster (measured on 2 cores, a
model of 16 blocks of 512: within 10 % from 512 to 16,384)."""
FIRST_TOKENS = 2048
"""Of the first step measured, where documents are shorter: in a smaller one the memory that every step takes hides
what grows with it."""
SAFE_SHARE = 0.9
"""Of the memory that is free: the rest is for pieces too small to be used, and for other shapes' other kernels."""
RESULTS_WAITING = QUEUED_RESULTS + 1
"""Results that may lie on the device beside a step and its own: one being copied, and those waiting for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What one step took of one device."""

    n_tokens: int
    """Padding included."""
    needed_bytes: int
    """At most at any time, beyond what was held before the first step."""
    room_bytes: int
    """What there was for it: free on the device, or held by the allocator and not in use."""


class MemoryMeter(Protocol):
    """Runs something and says what it took of each device; the only real one is `CudaMemoryMeter`."""

    def __call__(self, work: Callable[[], object], n_tokens: int) -> list[Measurement]: ...


class CudaMemoryMeter:
    """By torch's allocator, on every device that holds a part of the teacher."""

    def __init__(self, teacher: Teacher) -> None:
        devices = {p.device.index for p in teacher.model.parameters() if p.device.type == "cuda"}
        # Before the first step: what that one takes and keeps (a chunk of logits, say) belongs to every step's need.
        self._held = {device: torch.cuda.memory_allocated(device) for device in sorted(devices)}

    def __call__(self, work: Callable[[], object], n_tokens: int) -> list[Measurement]:
        for device in self._held:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        work()
        for device in self._held:
            torch.cuda.synchronize(device)
        # After the work: libraries take memory of their own when they are first used.
        return [
            Measurement(
                n_tokens=n_tokens,
                needed_bytes=torch.cuda.max_memory_allocated(device) - held,
                room_bytes=torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held,
            )
            for device, held in self._held.items()
        ]


def longest_possible(params: TeacherParams, teacher: Teacher) -> int:
    """Tokens of the longest document that may be tried: beyond its context a teacher may have no positions, and what it
    cannot repeat must not run before a document that it can."""
    return min(n for n in (longest(params), teacher.context_tokens, teacher.repeatable_tokens) if n is not None)


def first_budget(params: TeacherParams, devices: TeacherOnDevices) -> int:
    """Most tokens of a batch that every partition begins with: what the recipe says, or what fits."""
    teacher = devices.teacher
    largest = LARGEST_BUDGET_TOKENS if teacher.head is not None else FALLBACK_BUDGET_TOKENS
    if params.token_budget is not None:
        return params.token_budget if teacher.head is not None else min(params.token_budget, largest)
    return measured_budget(
        devices.run_step,
        teacher,
        params,
        longest=longest_possible(params, teacher),
        largest=largest,
        can_retry=not devices.is_shared,
    )


def measured_budget(
    run_step: RunStep,
    teacher: Teacher,
    params: TeacherParams,
    *,
    longest: int,
    largest: int = LARGEST_BUDGET_TOKENS,
    meter: MemoryMeter | None = None,
    can_retry: bool = True,
) -> int:
    """Tokens of a batch that fit into the memory that is free now; at most `largest`.

    `longest`: tokens of the longest document of any cache. Raises OutOfDeviceMemoryError where not even one such
    document fits. `meter`: how memory is measured; None: as the teacher's device has it, which on a CPU is not at all.
    `can_retry`: whether a step may follow one that ran out of memory: not where other processes take part in it.
    """
    if meter is None:
        if teacher.device.type != "cuda":
            return min(CPU_BUDGET_TOKENS, largest)
        meter = CudaMemoryMeter(teacher)
    found: list[list[Measurement]] = []  # of each device
    n_documents = max(1, min(FIRST_TOKENS, largest) // longest)
    while not found or is_worth_measuring(n_documents * longest, found, largest=largest):
        step = full_step(teacher, params, n_documents=n_documents, width=longest)
        try:
            of_devices = _measured(meter, run_step, step)
        except OutOfDeviceMemoryError as e:
            if not can_retry and (found or n_documents > 1):
                raise OutOfDeviceMemoryError(
                    f"{e}; and its processes can run nothing after that: set teacher.token_budget below "
                    f"{step.ids_BT.size}, so that none has to be measured"
                ) from None
            if found:
                largest = step.ids_BT.size - 1
                break
            if n_documents == 1:
                raise OutOfDeviceMemoryError(
                    f"not even one document of {longest} tokens fits beside the teacher ({e}): lower the caches' "
                    "max_length, or give the teacher more memory (more GPUs by teacher.n_devices, larger ones, or a "
                    "teacher.quantization)"
                ) from None
            largest = step.ids_BT.size - 1
            n_documents //= 2
            continue
        found = found or [[] for _ in of_devices]
        for of_device, measurement in zip(found, of_devices, strict=True):
            of_device.append(measurement)
        n_documents *= 2
    return min(budget_from(of_device, longest=longest, largest=largest) for of_device in found)


def is_worth_measuring(n_tokens: int, found: Sequence[Sequence[Measurement]], *, largest: int) -> bool:
    """Not what is of no use, nor what would not fit on some device."""
    return n_tokens <= largest and all(need_of(n_tokens, of_device) <= safe_room(of_device) for of_device in found)


def _measured(meter: MemoryMeter, run_step: RunStep, step: Step) -> list[Measurement]:
    """What the step takes of each device, in the pass: earlier results wait there to be copied while it runs."""
    results: list[StepResult] = []

    def work(step: Step) -> list[Measurement]:
        return meter(lambda: results.append(run_step(step)), step.ids_BT.size)

    of_devices = within_memory(
        work,
        step,
        doing=f"measuring a batch of {step.ids_BT.size} tokens",
        device_remedy="smaller batches may fit",
    )
    waiting_bytes = RESULTS_WAITING * n_bytes(results.pop())
    return [dataclasses.replace(m, needed_bytes=m.needed_bytes + waiting_bytes) for m in of_devices]


def n_bytes(result: StepResult) -> int:
    sizes: list[int] = []

    def noted(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    result.moved(noted)
    return sum(sizes)


def budget_from(measurements: Sequence[Measurement], *, longest: int, largest: int) -> int:
    """The largest budget of the grid that one device has room for, by what steps of growing size took of it.

    Not below the longest document, which was seen to fit, nor above `largest`.
    """
    room = safe_room(measurements)
    fitting = [n for n in grid(largest) if need_of(n, measurements) <= room]
    return min(max([longest, *fitting]), largest)


def grid(largest: int) -> list[int]:
    """Powers of two and the middles between them, from `SMALLEST_BUDGET_TOKENS` to `largest`, ascending."""
    powers = [SMALLEST_BUDGET_TOKENS << i for i in range(largest.bit_length())]
    return [n for power in powers for n in (power, power + power // 2) if n <= largest]


def safe_room(measurements: Sequence[Measurement]) -> float:
    """Bytes of a device that batches may take: of what was there last, when all libraries were loaded."""
    return SAFE_SHARE * measurements[-1].room_bytes


def need_of(n_tokens: int, measurements: Sequence[Measurement]) -> float:
    """Bytes that a batch of `n_tokens` takes, extrapolated on the line through the two largest measurements (with one
    alone: through zero). Peak memory is a maximum of linear functions, so this line is never too flat."""
    last = measurements[-1]
    before = measurements[-2] if len(measurements) > 1 else Measurement(n_tokens=0, needed_bytes=0, room_bytes=0)
    slope = max(0.0, (last.needed_bytes - before.needed_bytes) / (last.n_tokens - before.n_tokens))
    return last.needed_bytes + slope * (n_tokens - last.n_tokens)


def full_step(teacher: Teacher, params: TeacherParams, *, n_documents: int, width: int) -> Step:
    """A step of `n_documents` documents of `width` tokens, with everything that the recipe ever keeps of one."""
    ids_BT = (np.arange(n_documents * width, dtype=np.int64) * 7919 % teacher.n_token_ids).reshape(n_documents, width)
    starts_B = np.arange(n_documents, dtype=np.int64) * width

    def first_rows(n_tokens: int) -> np.ndarray:
        return concatenated_ranges(starts_B, np.full(n_documents, max(0, n_tokens), dtype=np.int64))

    hidden, embeddings, topk = params.hidden_states, params.embeddings, params.topk
    topk_step = None
    if topk is not None:
        rows_M = first_rows(min(width, topk.max_length) - 1)
        uniforms_Md = np.random.default_rng(0).random((len(rows_M), topk.draws), dtype=np.float32)
        topk_step = TopkStep(
            k=topk.k,
            rows_M=rows_M,
            targets_M=ids_BT.reshape(-1)[rows_M + 1],
            uniforms_Md=uniforms_Md if topk.draws else None,
            token_ids=topk.token_ids,
        )
    return Step(
        ids_BT=ids_BT,
        blocks=() if hidden is None else hidden.blocks,
        final=() if hidden is None else hidden.final,
        rows_N=first_rows(0 if hidden is None else min(width, hidden.max_length)),
        pooled_lengths_B=None
        if embeddings is None
        else np.full(n_documents, min(width, embeddings.max_length), dtype=np.int64),
        topk=topk_step,
    )
