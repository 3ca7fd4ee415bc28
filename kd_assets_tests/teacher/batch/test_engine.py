"""A step: all there is to say of a batch, sent anywhere, computed in one place."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from kd_assets.teacher.batch.engine import Engine, Step, StepResult, TopkStep
from kd_assets.teacher.batch.forward import States, run_forward
from kd_assets.teacher.batch.sampling import uniforms
from kd_assets.teacher.model import head as head_module
from kd_assets.teacher.model.load import Teacher, as_teacher
from kd_assets_tests.teacher.tiny import HIDDEN_SIZE, VOCABULARY, tiny_model

CPU = torch.device("cpu")
IDS_BT = np.arange(2 * 12, dtype=np.int64).reshape(2, 12) * 7 % VOCABULARY
"""Two documents of 12 and 9 tokens."""
ROWS_M = np.array([*range(11), *range(12, 20)], dtype=np.int64)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return as_teacher(tiny_model("llama"), device=CPU)


def step(*, ids_BT: np.ndarray = IDS_BT, draws: int = 3, rows_M: np.ndarray = ROWS_M) -> Step:
    """Everything there is."""
    return Step(
        ids_BT=ids_BT,
        blocks=(0, 2),
        rows_N=np.array([*range(12), *range(12, 21)], dtype=np.int64),
        pooled_lengths_B=np.array([12, 9], dtype=np.int64),
        topk=TopkStep(
            k=4,
            rows_M=rows_M,
            targets_M=ids_BT.reshape(-1)[rows_M + 1],
            uniforms_Md=uniforms(0, "a", len(rows_M), draws) if draws else None,
        ),
    )


def tensors(result: StepResult) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    result.moved(note)
    return found


def assert_equal(one: StepResult, other: StepResult) -> None:
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(a, b)


def test_result_has_the_form_that_goes_to_disk(teacher: Teacher) -> None:
    result = Engine(teacher).run(step())
    assert result.topk is not None
    assert result.topk.sampled_ids_Md is not None
    assert result.pooled is not None
    for block in result.blocks.values():
        assert (block.bits_NH.dtype, tuple(block.bits_NH.shape)) == (torch.int16, (21, HIDDEN_SIZE))
        assert block.finite_N.all()
    assert (result.pooled.mean_BH.dtype, tuple(result.pooled.mean_BH.shape)) == (torch.float32, (2, HIDDEN_SIZE))
    assert (result.topk.ids_Mk.dtype, tuple(result.topk.ids_Mk.shape)) == (torch.int32, (19, 4))
    assert result.topk.logprobs_Mk.dtype == torch.float16
    assert result.topk.logsumexp_M.dtype == result.topk.target_logprob_M.dtype == torch.float32
    assert (result.topk.sampled_ids_Md.dtype, tuple(result.topk.sampled_ids_Md.shape)) == (torch.int32, (19, 3))


def test_step_may_be_sent_to_another_process(teacher: Teacher) -> None:
    engine = Engine(teacher)
    assert_equal(engine.run(pickle.loads(pickle.dumps(step()))), engine.run(step()))


def test_next_step_leaves_earlier_results_as_they_are(teacher: Teacher) -> None:
    """They may still be on their way to host memory."""
    engine = Engine(teacher)
    first = engine.run(step())
    before = first.moved(torch.clone)
    engine.run(step(ids_BT=(IDS_BT + 13) % VOCABULARY))
    assert_equal(first, before)


def test_what_is_kept_does_not_depend_on_what_else_is(teacher: Teacher) -> None:
    engine = Engine(teacher)
    everything = engine.run(step())
    only_blocks = engine.run(Step(ids_BT=IDS_BT, blocks=(0,), rows_N=step().rows_N))
    assert torch.equal(only_blocks.blocks[0].bits_NH, everything.blocks[0].bits_NH)
    assert only_blocks.topk is None
    assert only_blocks.pooled is None
    without_draws = engine.run(step(draws=0))
    assert without_draws.topk is not None
    assert everything.topk is not None
    assert torch.equal(without_draws.topk.ids_Mk, everything.topk.ids_Mk)
    assert torch.equal(without_draws.topk.logsumexp_M, everything.topk.logsumexp_M)


def test_no_position_to_predict_is_no_error(teacher: Teacher) -> None:
    result = Engine(teacher).run(step(rows_M=np.zeros(0, np.int64)))
    assert result.topk is not None
    assert result.topk.sampled_ids_Md is not None
    assert tuple(result.topk.ids_Mk.shape) == (0, 4)
    assert tuple(result.topk.sampled_ids_Md.shape) == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_the_head_are_put_together_in_order(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = as_teacher(tiny_model("llama", dtype=dtype), device=CPU)
    whole = Engine(teacher).run(step()).topk
    monkeypatch.setattr(head_module, "CPU_CHUNK_BYTES", 1)  # 16 rows, so two chunks of 10 and 9
    chunked = Engine(teacher).run(step()).topk
    assert whole is not None
    assert chunked is not None
    assert whole.sampled_ids_Md is not None
    assert chunked.sampled_ids_Md is not None
    assert torch.equal(chunked.ids_Mk, whole.ids_Mk)
    assert torch.equal(chunked.sampled_ids_Md, whole.sampled_ids_Md)
    torch.testing.assert_close(chunked.logsumexp_M, whole.logsumexp_M, rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_nothing_but_the_models_own_forward_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own watch over operations that do."""
    cuda = torch.device("cuda")
    engine = Engine(as_teacher(tiny_model("llama", dtype=torch.bfloat16).to(cuda), device=cuda))
    engine.run(step())

    def unwatched(*arguments: Any, **options: Any) -> States:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return run_forward(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("error")
            torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call]

    monkeypatch.setattr("kd_assets.teacher.batch.engine.run_forward", unwatched)
    try:
        engine.run(step())
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_step_on_the_gpu_uses_the_compiled_normaliser() -> None:
    cuda = torch.device("cuda")
    engine = Engine(as_teacher(tiny_model("llama", dtype=torch.bfloat16).to(cuda), device=cuda))
    assert engine.normaliser == "compiled"
