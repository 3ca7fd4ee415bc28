"""The token budget: the arithmetic as tables, the measuring with real steps of a tiny teacher.

A CPU has no meter, so what steps take is made up here (`Device`); the real meter is tested where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from kd_assets.contract import EmbeddingParams, HiddenStateParams, TeacherParams, TopkParams
from kd_assets.errors import OutOfDeviceMemoryError
from kd_assets.teacher.batch.engine import Engine
from kd_assets.teacher.devices.measured_budget import (
    CPU_BUDGET_TOKENS,
    LARGEST_BUDGET_TOKENS,
    RESULTS_WAITING,
    SAFE_SHARE,
    CudaMemoryMeter,
    Measurement,
    budget_from,
    full_step,
    grid,
    measured_budget,
    n_bytes,
)
from kd_assets.teacher.model.load import Teacher, as_teacher
from kd_assets_tests.teacher.tiny import HIDDEN_SIZE, tiny_model

MIB = 2**20


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return as_teacher(tiny_model(), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def params() -> TeacherParams:
    return TeacherParams(
        model="tiny",
        weights_fingerprint="0" * 64,
        tokenizer_fingerprint="0" * 64,
        dtype="float32",
        topk=TopkParams(k=4, max_length=64, draws=3),
        hidden_states=HiddenStateParams(blocks=(0, 2), max_length=16),
        embeddings=EmbeddingParams(max_length=40),
    )


def measured(*points: tuple[int, float], room: float) -> list[Measurement]:
    """Tokens and MiB of each step."""
    return [Measurement(n_tokens=n, needed_bytes=round(need * MIB), room_bytes=round(room * MIB)) for n, need in points]


@pytest.mark.parametrize(
    ("points", "room", "budget"),
    [
        # 100 MiB + 100 MiB for each 1,024 tokens; nine tenths of the room may be taken
        ([(2048, 300), (4096, 500)], 1000, 8192),  # 900 MiB
        ([(2048, 300), (4096, 500)], 999, 6144),  # one byte less: 700 MiB of 899
        ([(2048, 300), (4096, 500)], 1500, 12288),  # 1,300 MiB
        ([(2048, 300), (4096, 500)], 10**6, 32768),  # no more is of use
        ([(2048, 300), (4096, 500)], 560, 4096),
        # the largest step took more than is safe: the line backwards
        ([(2048, 300), (4096, 500)], 400, 2048),
        ([(2048, 300), (4096, 500)], 300, 1536),
        # nothing is safe: one document fits, it was seen to
        ([(2048, 300), (4096, 500)], 100, 1000),
        # one step alone: as if everything grew with the batch
        ([(8192, 800)], 1900, 16384),
        ([(8192, 800)], 1500, 12288),
        # the steepest line counts: a chunk of logits hides what the small steps took
        ([(1024, 600), (2048, 600), (4096, 800)], 1000, 4096),
        ([(1024, 600), (2048, 600)], 1000, 32768),
    ],
)
def test_budget_is_the_largest_of_the_grid_on_the_line_through_the_last_two(
    points: list[tuple[int, int]], room: int, budget: int
) -> None:
    assert budget_from(measured(*points, room=room), longest=1000, largest=32768) == budget


def test_the_room_that_counts_is_the_last_seen() -> None:
    """Libraries take memory of their own in the first steps."""
    first, second = measured((2048, 300), room=10_000), measured((4096, 500), room=1000)
    assert budget_from([*first, *second], longest=1000, largest=32768) == 8192


def test_budget_is_not_below_the_longest_document_and_never_above_the_largest() -> None:
    points = measured((5000, 500), (10_000, 900), room=1000)
    assert budget_from(points, longest=5000, largest=32768) == 8192
    assert budget_from(points, longest=9000, largest=32768) == 9000
    assert budget_from(points, longest=9000, largest=1024) == 1024


def test_the_grid_is_coarse() -> None:
    assert grid(5000) == [256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert grid(32768)[-3:] == [16384, 24576, 32768]


@dataclass
class Device:
    """A made-up device, in MiB: what steps take of it is a line, and what it has not got it runs out of."""

    base: float
    per_token: float
    room: float
    seems: float | None = None
    """What there seems to be; None: as much as there is."""
    steps: list[int] = field(default_factory=list)

    def __call__(self, work: Callable[[], object], n_tokens: int) -> list[Measurement]:
        self.steps.append(n_tokens)
        needed = self.base + self.per_token * n_tokens
        if needed > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")
        work()
        return measured((n_tokens, needed), room=self.room if self.seems is None else self.seems)


def budget_of(
    teacher: Teacher,
    params: TeacherParams,
    meter: Device,
    *,
    longest: int = 64,
    largest: int = 4096,
    can_retry: bool = True,
) -> int:
    run_step = Engine(teacher).run
    return measured_budget(
        run_step, teacher, params, longest=longest, largest=largest, meter=meter, can_retry=can_retry
    )


def test_steps_double_until_more_is_of_no_use(teacher: Teacher, params: TeacherParams) -> None:
    device = Device(base=1000, per_token=10, room=10**9)
    assert budget_of(teacher, params, device) == 4096
    assert device.steps == [2048, 4096]


def test_steps_double_until_the_next_would_not_fit(teacher: Teacher, params: TeacherParams) -> None:
    device = Device(base=0, per_token=10, room=30_000)
    assert budget_of(teacher, params, device) == 2048
    assert device.steps == [2048]


def test_running_out_of_memory_while_measuring_means_smaller(teacher: Teacher, params: TeacherParams) -> None:
    device = Device(base=1000, per_token=10, room=7000)
    assert budget_of(teacher, params, device) == 512
    assert device.steps == [2048, 1024, 512]


@pytest.mark.parametrize(("room", "steps"), [(20000, [2048]), (30000, [2048, 4096])])
def test_processes_that_end_with_an_error_are_not_measured_any_further(
    teacher: Teacher, params: TeacherParams, room: int, steps: list[int]
) -> None:
    """Ranks of a tensor-parallel teacher are no longer in step after an error: a budget would be of no use to them."""
    device = Device(base=0, per_token=10, room=room, seems=10**9)
    with pytest.raises(OutOfDeviceMemoryError, match=f"set teacher.token_budget below {steps[-1]}"):
        budget_of(teacher, params, device, can_retry=False)
    assert device.steps == steps


def test_what_ran_out_of_memory_while_measuring_is_above_the_budget_whatever_the_line_says(
    teacher: Teacher, params: TeacherParams
) -> None:
    class Cliff(Device):
        def __call__(self, work: Callable[[], object], n_tokens: int) -> list[Measurement]:
            if n_tokens > 1024:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().__call__(work, n_tokens)

    device = Cliff(base=0, per_token=1, room=10**9)
    assert budget_of(teacher, params, device, longest=700, largest=32768) == 1024
    assert device.steps == [700]  # 1,400 before and after it
    device = Cliff(base=0, per_token=1, room=10**9)
    assert budget_of(teacher, params, device, longest=600, largest=32768) == 1024
    assert device.steps == [600]  # 1,800 before it, 1,200 after it


def test_not_even_one_document_is_an_error_that_says_what_helps(teacher: Teacher, params: TeacherParams) -> None:
    with pytest.raises(OutOfDeviceMemoryError, match="one document of 64 tokens") as raised:
        budget_of(teacher, params, Device(base=1000, per_token=10, room=1500))
    for remedy in ("max_length", "teacher.n_devices", "teacher.quantization"):
        assert remedy in str(raised.value)
    assert raised.value.__cause__ is None


def test_the_fullest_of_several_devices_decides(teacher: Teacher, params: TeacherParams) -> None:
    class Pair(Device):
        def __call__(self, work: Callable[[], object], n_tokens: int) -> list[Measurement]:
            (first,) = super().__call__(work, n_tokens)
            return [first, *measured((n_tokens, 10 * n_tokens), room=17_100)]

    assert budget_of(teacher, params, Pair(base=0, per_token=10, room=10**9)) == 1536


def test_on_a_cpu_the_budget_is_a_constant(teacher: Teacher, params: TeacherParams) -> None:
    run_step = Engine(teacher).run
    assert measured_budget(run_step, teacher, params, longest=64) == CPU_BUDGET_TOKENS
    assert measured_budget(run_step, teacher, params, longest=64, largest=1024) == 1024


def test_a_full_step_asks_for_all_that_the_recipe_keeps(teacher: Teacher, params: TeacherParams) -> None:
    result = Engine(teacher).run(full_step(teacher, params, n_documents=3, width=50))
    assert {n: tuple(b.bits_NH.shape) for n, b in result.blocks.items()} == dict.fromkeys((0, 2), (3 * 16, HIDDEN_SIZE))
    assert result.pooled is not None
    assert result.pooled.mean_BH.shape == (3, HIDDEN_SIZE)
    assert result.topk is not None
    assert result.topk.ids_Mk.shape == (3 * 49, 4)
    assert result.topk.sampled_ids_Md is not None
    assert result.topk.sampled_ids_Md.shape == (3 * 49, 3)
    assert bool(result.topk.finite_M.all())


def test_a_full_step_of_one_cache_asks_for_nothing_else(teacher: Teacher, params: TeacherParams) -> None:
    only_hidden = TeacherParams(
        model="tiny", weights_fingerprint="", tokenizer_fingerprint="", hidden_states=params.hidden_states
    )
    step = full_step(teacher, only_hidden, n_documents=2, width=20)
    assert step.topk is None
    assert step.pooled_lengths_B is None
    assert not step.needs_final
    assert step.rows_N.tolist() == [*range(16), *range(20, 36)]


def test_results_that_wait_to_be_copied_count(teacher: Teacher, params: TeacherParams) -> None:
    of_hidden = TeacherParams(
        model="tiny", weights_fingerprint="", tokenizer_fingerprint="", hidden_states=params.hidden_states
    )
    bytes_a_document = 2 * 16 * (2 * HIDDEN_SIZE + 1)  # of two blocks 16 tokens each: states, and whether finite
    assert n_bytes(Engine(teacher).run(full_step(teacher, of_hidden, n_documents=3, width=64))) == 3 * bytes_a_document
    room = 32 * RESULTS_WAITING * bytes_a_document / SAFE_SHARE / MIB
    assert budget_of(teacher, of_hidden, Device(base=0, per_token=0, room=room * 1.001)) == 2048
    assert budget_of(teacher, of_hidden, Device(base=0, per_token=0, room=room * 0.999)) == 1536


@pytest.mark.gpu
def test_on_a_gpu_a_batch_of_the_measured_budget_fits_and_is_what_was_measured(params: TeacherParams) -> None:
    device = torch.device("cuda")
    teacher = as_teacher(tiny_model(dtype=torch.bfloat16).to(device), device=device)
    engine = Engine(teacher)
    budget = measured_budget(engine.run, teacher, params, longest=64)
    assert budget in grid(LARGEST_BUDGET_TOKENS)
    meter = CudaMemoryMeter(teacher)
    steps = [full_step(teacher, params, n_documents=n, width=64) for n in (32, 64)]
    (small,), (large,) = (meter(lambda s=step: engine.run(s), step.ids_BT.size) for step in steps)  # type: ignore[misc]
    assert 0 < small.needed_bytes < large.needed_bytes < large.room_bytes
    assert large.room_bytes <= torch.cuda.get_device_properties(0).total_memory


@pytest.mark.gpu
def test_on_a_gpu_with_little_memory_the_budget_is_small_and_nothing_fails(params: TeacherParams) -> None:
    device = torch.device("cuda")
    teacher = as_teacher(tiny_model(dtype=torch.bfloat16).to(device), device=device)
    engine = Engine(teacher)
    total = torch.cuda.mem_get_info()[1]
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * MIB) / total)
        budget = measured_budget(engine.run, teacher, params, longest=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 64 <= budget < LARGEST_BUDGET_TOKENS
