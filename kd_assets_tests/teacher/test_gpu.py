"""What only a CUDA device can show: 16-bit kernels against float32 references, memory that runs out, signals in the
middle of a kernel, kill -9, compiled blocks, copies through pinned memory.

Every test here is written for the device that there is, and runs on a CPU as well where there is no GPU, so that it is
known to be right when the first GPU comes along:

    python3 -m pytest kd_assets_tests -m gpu
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_assets.contract import HiddenStateParams, TeacherParams, TopkParams, WorkUnit
from kd_assets.errors import InterruptedTaskError
from kd_assets.store import read_manifest
from kd_assets.store.schema import hidden_field
from kd_assets.teacher.batch.engine import Engine, StepResult
from kd_assets.teacher.batch.transfer import Collector, copier
from kd_assets.teacher.model.anatomy import probe_ids
from kd_assets.teacher.model.load import Teacher, as_teacher, load_teacher
from kd_assets.teacher.partition.batching import plan_batches
from kd_assets.teacher.partition.window import CacheRequest, Capture, Window
from kd_assets.teacher.recompute import LOGIT_RTOL, Reference, reference, stored_row
from kd_assets.worker.stop_flag import StopFlag
from kd_assets_tests.teacher.test_runner import StopAfter
from kd_assets_tests.teacher.tiny import (
    ARCHITECTURES,
    N_BLOCKS,
    Desk,
    part_bytes,
    save_teacher,
    tiny_documents,
    tiny_model,
    tiny_params,
)

CPU = torch.device("cpu")
K = 4
"""Of the top-k that `tiny_params` keeps."""
LENGTHS = (3, 1, 20, 64, 37, 5, 9, 30, 12, 2, 40)
MANY_LENGTHS = (64, 30, 7, 50, 21, 1, 33, 64, 2, 18) * 6


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that a teacher is loaded to here."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("a teacher is loaded to the GPU where there is one")
    return torch.device(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "teacher")


def two_desks(tmp_path: Path, params: TeacherParams, lengths: tuple[int, ...]) -> list[tuple[Desk, WorkUnit]]:
    """The same work twice, in two stores."""
    desks = [Desk(tmp_path / name) for name in ("one", "other")]
    return [(desk, desk.unit(desk.commit_shard(tiny_documents(lengths)), params)) for desk in desks]


# -------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pass_on_the_gpu_equals_its_plain_path(architecture: str, dtype: str, tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    params = tiny_params(
        save_teacher(tmp_path / "teacher", architecture),
        dtype=dtype,
        recompute_documents=len(LENGTHS),
        hidden_states=HiddenStateParams(blocks=tuple(range(N_BLOCKS)), max_length=64),
    )
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params)
    desk.run(params, unit)
    (loaded,) = desk.events("teacher_loaded")
    assert loaded["device"].startswith("cuda")
    assert loaded["head"] == "proven"
    for output in unit.outputs:
        record = read_manifest(Path(output.path)).checks["recomputed"]
        assert record["passed"], (output.asset, record)


def test_bfloat16_caches_are_as_close_to_float32_as_a_plain_bfloat16_forward(
    device: torch.device, folder: Path, tmp_path: Path
) -> None:
    """Of the same weights, in float32 on the CPU: other kernels than the pass and its recomputation share."""
    params = tiny_params(folder, dtype="bfloat16", hidden_states=HiddenStateParams(blocks=(1,), max_length=64))
    desk, documents = Desk(tmp_path), tiny_documents(MANY_LENGTHS)
    unit = desk.unit(desk.commit_shard(documents), params)
    desk.run(params, unit)
    exact = as_teacher(tiny_model().bfloat16().float(), device=CPU)
    plain = as_teacher(tiny_model().bfloat16(), device=CPU)
    errors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for output in unit.outputs:
        for index, document in enumerate(stored_documents(Path(output.path))):
            ids_L = documents.slice(index, 1).input_ids
            wanted, likely = (kept_of(document, reference(teacher, ids_L, (1,))) for teacher in (exact, plain))
            for name, stored in kept_of(document, None).items():
                pair = (stored - wanted[name]).flatten(), (likely[name] - wanted[name]).flatten()
                errors.setdefault(name, []).append(pair)
    assert len(errors) == 5
    for name, pairs in errors.items():
        ours, theirs = (torch.cat(side).square().mean().sqrt().item() for side in zip(*pairs, strict=True))
        assert 0 < ours < 1.5 * theirs, name


def stored_documents(folder: Path) -> Iterator[dict[str, Any]]:
    for record in read_manifest(folder).parts:
        for row in range(record.n_documents):
            yield stored_row(folder / record.name, row)


def kept_of(document: dict[str, Any], plain: Reference | None) -> dict[str, Tensor]:
    """What a stored document keeps, name by name; with `plain`, what that would have kept in its place."""
    n_tokens = len(document["input_ids"])
    if "topk_ids" in document:
        ids_Lk = torch.from_numpy(document["topk_ids"].astype(np.int64)).view(n_tokens - 1, K)
        if plain is None:
            logprobs_Lk = torch.from_numpy(document["topk_logprobs"].astype(np.float32)).view_as(ids_Lk)
            return {"logprobs": logprobs_Lk, "logsumexp": torch.from_numpy(document["logsumexp"].copy())}
        logits_LV = plain.logits_PV[: n_tokens - 1]
        return {"logprobs": logits_LV.log_softmax(1).gather(1, ids_Lk), "logsumexp": logits_LV.logsumexp(1)}
    if "mean_embedding" in document:
        if plain is None:
            return {
                name: torch.from_numpy(document[name].copy()) for name in ("mean_embedding", "last_token_embedding")
            }
        return {"mean_embedding": plain.final_LH.mean(0), "last_token_embedding": plain.final_LH[-1]}
    if plain is None:
        bits = torch.from_numpy(document[hidden_field(1)].view(np.int16).copy())
        return {"hidden": bits.view(torch.bfloat16).float().view(n_tokens, -1)}
    return {"hidden": plain.block_LH[1]}


def test_float32_on_the_device_equals_float32_on_the_cpu(device: torch.device, folder: Path) -> None:
    loaded = load_teacher(tiny_params(folder), digests=None, warn=print)
    assert loaded.device.type == device.type
    on_cpu = as_teacher(tiny_model(), device=CPU)
    ids_L = tiny_documents([64]).input_ids
    ours_LV = reference(loaded, ids_L, ()).logits_PV.cpu().numpy()
    cpu_LV = reference(on_cpu, ids_L, ()).logits_PV.numpy()
    np.testing.assert_allclose(ours_LV, cpu_LV, rtol=0, atol=LOGIT_RTOL[torch.float32] * np.abs(cpu_LV).max())


def test_results_that_the_collector_brings_are_those_that_lie_on_the_device(
    device: torch.device, folder: Path, tmp_path: Path
) -> None:
    """Copied by a stream of their own while the next step runs, several times over the same pinned memory."""
    teacher = load_teacher(tiny_params(folder), digests=None, warn=print)
    engine = Engine(teacher)
    captures = [capture_of(teacher, tmp_path / str(seed), seed) for seed in range(12)]
    arrived: list[StepResult] = []
    expected: list[StepResult] = []
    with Collector(copier(device)) as collector:
        for capture in captures:
            result = engine.run(capture.step())
            expected.append(result.moved(torch.clone))
            collector.submit(result, arrived.append)
            del result
    assert len(arrived) == len(captures)
    for ours, theirs in zip(arrived, expected, strict=True):
        for here, there in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert here.device == CPU
            assert here.is_pinned() == (device.type == "cuda")
            assert torch.equal(here, there.cpu())


def capture_of(teacher: Teacher, folder: Path, seed: int) -> Capture:
    params = tiny_params(folder.parent / "teacher")
    shard = Desk(folder).read_shard(tiny_documents([64, 50, 33], seed=seed))
    wanted = CacheRequest.of(params, {"topk_cache", "hidden_state_cache", "embedding_cache"})
    window = Window.of(shard, 0, 3, max_length=64, wanted=wanted, hidden_size=teacher.hidden_size)
    (batch,) = plan_batches(window.documents.n_tokens_D, token_budget=1024)
    return Capture(window=window, batch=batch, partition_key="p", seed=0)


def tensors_of(result: StepResult) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    result.moved(keep)
    return found


# --------------------------------------------------------------------------------------------------------- memory

WIDE = 4096
"""Intermediate size of a teacher whose batches need memory: 48 KiB a token in float32."""


@contextlib.contextmanager
def little_memory(
    device: torch.device, n_bytes: int, *, as_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Only `n_bytes` of the device are free. On a CPU, where that cannot be, batches of more than `as_tokens` fail with
    the error that torch raises."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        filler = torch.empty(torch.cuda.mem_get_info()[0] - n_bytes, dtype=torch.uint8, device=device)
        try:
            yield
        finally:
            del filler
            torch.cuda.empty_cache()
        return
    run = Engine.run

    def limited(self: Engine, step: Any) -> StepResult:
        if step.ids_BT.size > as_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", limited)
        yield


def wide_params(tmp_path: Path, *, token_budget: int | None) -> TeacherParams:
    """One window, however many documents."""
    return tiny_params(
        save_teacher(tmp_path / "teacher", intermediate_size=WIDE),
        token_budget=token_budget,
        part_documents=1024,
        part_tokens=10**6,
    )


def test_a_batch_that_does_not_fit_halves_the_budget_and_the_pass_goes_on(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real memory that runs out on a GPU: 32,768 tokens need 1.5 GiB at least, and there is 1."""
    n_documents = 512 if device.type == "cuda" else 8
    budget = 64 * n_documents
    params = wide_params(tmp_path, token_budget=budget)
    (short, unit), (plenty, other_unit) = two_desks(tmp_path, params, (64,) * n_documents)
    if device.type == "cuda":  # kernels are loaded when they are first used, and take memory of their own
        warm = Desk(tmp_path / "warm")
        warm.run(params, warm.unit(warm.commit_shard(tiny_documents([64] * n_documents)), params))
    with little_memory(device, 2**30, as_tokens=budget // 4, monkeypatch=monkeypatch):
        facts = short.run(params, unit)
    assert facts["n_budget_halvings"] >= 1
    assert facts["token_budget"] == budget >> facts["n_budget_halvings"]
    warnings = short.events("warning")
    assert [w["token_budget"] for w in warnings][-1] == facts["token_budget"]
    assert "memory did not suffice" in warnings[0]["message"]
    smaller = dataclasses.replace(params, token_budget=facts["token_budget"])
    plenty.run(smaller, other_unit)
    assert_same_arrays(unit, other_unit)


def test_the_measured_budget_is_one_that_fits(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_documents = 512 if device.type == "cuda" else 8
    params = wide_params(tmp_path, token_budget=None)
    desk = Desk(tmp_path)
    unit = desk.unit(desk.commit_shard(tiny_documents([64] * n_documents)), params)
    with little_memory(device, 3 * 2**29, as_tokens=2**20, monkeypatch=monkeypatch):
        facts = desk.run(params, unit)
    assert facts["n_budget_halvings"] == 0
    assert facts["token_budget"] >= 256
    if device.type == "cuda":
        assert facts["token_budget"] < 32_768, "it was not measured: so many tokens do not fit"


def assert_same_arrays(unit: WorkUnit, other: WorkUnit) -> None:
    """Part by part, whatever the statistics beside them say."""
    ours, theirs = part_bytes(unit), part_bytes(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


# ------------------------------------------------------------------------------------------------- stop and resume


class SignalAfter(StopFlag):
    """Sends this process a real signal at the n-th look, while the batch before it is still at work on a GPU."""

    def __init__(self, n_looks: int, number: signal.Signals) -> None:
        super().__init__()
        self._looks_left, self._number = n_looks, number

    def __bool__(self) -> bool:
        self._looks_left -= 1
        if self._looks_left == 0:
            os.kill(os.getpid(), self._number)
        return super().__bool__()


@contextlib.contextmanager
def handlers_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_usr1_during_a_batch_ends_after_it_and_a_restart_gives_the_same_bytes(
    device: torch.device, dtype: str, folder: Path, tmp_path: Path
) -> None:
    params = tiny_params(folder, dtype=dtype)
    (whole, unit), (stopped, other_unit) = two_desks(tmp_path, params, MANY_LENGTHS)
    whole.run(params, unit)
    with handlers_put_back(), pytest.raises(InterruptedTaskError, match="stopped by SIGUSR1"):
        stopped.run(params, other_unit, SignalAfter(9, signal.SIGUSR1).listen())
    n_parts = {len(list(Path(o.path).glob("part-*"))) for o in other_unit.outputs}
    assert all(0 < n < len(MANY_LENGTHS) // params.part_documents for n in n_parts)
    stopped.run(params, other_unit)
    assert part_bytes(unit) == part_bytes(other_unit)


def run_until_killed(desk_folder: Path, params: TeacherParams, unit: WorkUnit, n_looks: int) -> None:
    """A task in a process of its own, killed in the middle of a window."""
    torch.set_num_threads(1)
    Desk(desk_folder).run(params, unit, SignalAfter(n_looks, signal.SIGKILL))


def test_kill_9_in_the_middle_and_a_restart_give_the_same_bytes(
    device: torch.device, folder: Path, tmp_path: Path
) -> None:
    params = tiny_params(folder, dtype="bfloat16", topk=TopkParams(k=4, max_length=64, draws=8))
    (whole, unit), (killed, other_unit) = two_desks(tmp_path, params, MANY_LENGTHS)
    whole.run(params, unit)
    process = multiprocessing.get_context("spawn").Process(
        target=run_until_killed, args=(killed.folder, params, other_unit, 12)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not any((Path(o.path) / "manifest.json").exists() for o in other_unit.outputs)
    killed.run(params, other_unit)
    assert part_bytes(unit) == part_bytes(other_unit)


# -------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_blocks_on_the_gpu_are_used_pass_their_check_and_resume_to_the_same_bytes(
    dtype: str, folder: Path, tmp_path: Path
) -> None:
    params = tiny_params(folder, dtype=dtype, compile="always")
    (whole, unit), (stopped, other_unit) = two_desks(tmp_path, params, MANY_LENGTHS)
    whole.run(params, unit)
    (loaded,) = whole.events("teacher_loaded")
    assert loaded["compiled"] == "blocks"
    assert loaded["warm_up_s"] > 0
    for output in unit.outputs:
        record = read_manifest(Path(output.path)).checks["recomputed"]
        assert record["passed"], (output.asset, record)
    with pytest.raises(InterruptedTaskError):
        stopped.run(params, other_unit, StopAfter(5))
    stopped.run(params, other_unit)
    assert part_bytes(unit) == part_bytes(other_unit)


@pytest.mark.gpu
def test_a_teacher_lies_on_the_gpu_and_nowhere_else(folder: Path) -> None:
    teacher = load_teacher(tiny_params(folder, dtype="bfloat16"), digests=None, warn=print)
    assert {p.device.type for p in teacher.model.parameters()} == {"cuda"}
    with torch.inference_mode():
        logits = teacher.model(probe_ids(teacher.n_token_ids).to(teacher.device)).logits
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())
