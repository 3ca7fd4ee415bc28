"""Top-k log-probabilities against the plain definition: `log_softmax` and a stable sort of the whole row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd_assets.teacher.batch import topk
from kd_assets.teacher.batch.topk import CompiledLogSums, eager_log_sums, largest, proven_log_sums, topk_logprobs

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INFINITY, NAN = math.inf, math.nan


def logits(n_rows: int, vocabulary: int, *, dtype: torch.dtype = torch.float32, steps: int | None = None) -> Tensor:
    """Random ones. With `steps` they are rounded so that many are equal, and that zeros have both signs."""
    x_NV = torch.randn(n_rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 3
    return (x_NV if steps is None else (x_NV * steps).round() / steps).to(dtype)


def plain(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the k largest, equal numbers by id."""
    values_NV, ids_NV = (x_NV.double() + 0.0).sort(dim=1, descending=True, stable=True)
    return values_NV[:, :k], ids_NV[:, :k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [7, 130, 3000, 4103])
@pytest.mark.parametrize("k", [1, 5, 7])
@pytest.mark.parametrize("steps", [None, 8, 1])
def test_largest_equals_a_stable_sort_of_the_whole_row(
    dtype: torch.dtype, vocabulary: int, k: int, steps: int | None
) -> None:
    x_NV = logits(60, vocabulary, dtype=dtype, steps=steps)
    values_Nk, ids_Nk = largest(x_NV, k)
    plain_values_Nk, plain_ids_Nk = plain(x_NV, k)
    assert values_Nk.dtype == torch.float32
    assert torch.equal(values_Nk.double(), plain_values_Nk)
    assert torch.equal(ids_Nk, plain_ids_Nk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [5, 64, 1000])
def test_k_may_be_the_whole_vocabulary(dtype: torch.dtype, vocabulary: int) -> None:
    x_NV = logits(9, vocabulary, dtype=dtype, steps=4)
    assert torch.equal(largest(x_NV, vocabulary)[1], plain(x_NV, vocabulary)[1])


def test_rows_are_looked_at_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x_NV = logits(50, 3000, steps=2)
    whole = topk_logprobs(x_NV, torch.arange(50), k=6)
    monkeypatch.setitem(topk.SCRATCH_BYTES, "cpu", 100_000)
    in_runs = topk_logprobs(x_NV, torch.arange(50), k=6)
    assert torch.equal(in_runs.ids_Nk, whole.ids_Nk)
    assert torch.equal(in_runs.logsumexp_N, whole.logsumexp_N)


def test_of_equal_logits_the_lowest_token_ids_are_kept_in_order() -> None:
    logits_NV = torch.tensor([[0.0, 1.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    found = topk_logprobs(logits_NV, torch.tensor([0, 0]), k=3)
    assert found.ids_Nk.tolist() == [[3, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_are_settled_across_a_large_vocabulary(dtype: torch.dtype) -> None:
    logits_NV = torch.zeros(1, 5000, dtype=dtype)
    logits_NV[0, [4999, 700, 33]] = 1.0
    assert topk_logprobs(logits_NV, torch.tensor([0]), k=2).ids_Nk.tolist() == [[33, 700]]
    assert topk_logprobs(logits_NV, torch.tensor([0]), k=5).ids_Nk.tolist() == [[33, 700, 4999, 0, 1]]


@pytest.mark.parametrize("vocabulary", [40, 4000])
def test_minus_zero_is_zero(vocabulary: int) -> None:
    logits_NV = torch.full((1, vocabulary), -1.0)
    logits_NV[0, [3, 20]] = 0.0
    logits_NV[0, [2, 30]] = -0.0
    assert topk_logprobs(logits_NV, torch.tensor([0]), k=4).ids_Nk.tolist() == [[2, 3, 20, 30]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [41, 2500])
def test_logprobs_are_those_of_the_full_vocabulary(dtype: torch.dtype, vocabulary: int) -> None:
    logits_NV = logits(40, vocabulary, dtype=dtype)
    targets_N = torch.arange(40)
    plain_NV = torch.log_softmax(logits_NV.double(), dim=1)
    found = topk_logprobs(logits_NV, targets_N, k=6)
    torch.testing.assert_close(found.logprobs_Nk.double(), plain_NV.topk(6).values, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.logsumexp_N.double(), logits_NV.double().logsumexp(1), rtol=0, atol=2e-6)
    torch.testing.assert_close(
        found.target_logprob_N.double(), plain_NV.gather(1, targets_N[:, None])[:, 0], rtol=0, atol=2e-6
    )
    assert torch.equal(found.largest_N, logits_NV.float().amax(dim=1))


def test_huge_logits_do_not_overflow() -> None:
    found = topk_logprobs(torch.tensor([[3.0e38, 0.0, -3.0e38]]), torch.tensor([1]), k=2)
    assert found.logprobs_Nk[0, 0] == 0.0
    assert found.logsumexp_N[0] == torch.tensor(3.0e38)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [41, 2500])
@pytest.mark.parametrize("broken", [NAN, -NAN, INFINITY])
def test_a_row_with_nan_or_infinity_has_no_finite_logsumexp(dtype: torch.dtype, vocabulary: int, broken: float) -> None:
    """Wherever in the row it is, and whatever its sign bit; other rows keep theirs."""
    for column in (0, 17, vocabulary - 1):
        logits_NV = logits(3, vocabulary, dtype=dtype)
        logits_NV[1, column] = broken
        found = topk_logprobs(logits_NV, torch.zeros(3, dtype=torch.int64), k=4)
        assert found.logsumexp_N.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("vocabulary", [41, 2500])
def test_ids_that_a_model_rules_out_by_minus_infinity_are_no_error(vocabulary: int) -> None:
    logits_NV = logits(2, vocabulary)
    logits_NV[:, 10:] = -INFINITY
    found = topk_logprobs(logits_NV, torch.tensor([3, 20]), k=4)
    torch.testing.assert_close(found.logsumexp_N, logits_NV[:, :10].logsumexp(1))
    assert found.logprobs_Nk.isfinite().all()
    assert found.target_logprob_N.isfinite().tolist() == [True, False]
    assert torch.equal(found.ids_Nk, plain(logits_NV, 4)[1])


def test_k_above_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 4, the vocabulary has 3 ids"):
        topk_logprobs(torch.zeros(1, 3), torch.tensor([0]), k=4)


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_normaliser_is_the_eager_one_and_takes_any_number_of_rows(dtype: torch.dtype) -> None:
    """By the compiler of the CPU; on a GPU the same code is compiled by another."""
    compiled = CompiledLogSums()
    proven = proven_log_sums(compiled, rows=24, vocabulary_size=3000, dtype=dtype, device=CPU)
    assert proven is compiled
    with torch.inference_mode():
        for n in (24, 7, 2, 1):
            logits_NV = logits(n, 3000, dtype=dtype)
            targets_N = torch.zeros(n, dtype=torch.int64)
            ours, eager = (topk_logprobs(logits_NV, targets_N, 5, sums) for sums in (compiled, eager_log_sums))
            torch.testing.assert_close(ours.logsumexp_N, eager.logsumexp_N, rtol=0, atol=topk.PROOF_ATOL)


def test_a_normaliser_that_is_wrong_or_does_not_run_gives_way_to_the_eager_one() -> None:
    def wrong(logits_NV: Tensor, ids_N1: Tensor, largest_N1: Tensor) -> Tensor:
        return eager_log_sums(logits_NV, ids_N1, largest_N1) * 1.001

    def without_compiler(logits_NV: Tensor, ids_N1: Tensor, largest_N1: Tensor) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    for candidate in (wrong, without_compiler):
        proven = proven_log_sums(candidate, rows=4, vocabulary_size=100, dtype=torch.float32, device=CPU)
        assert proven is eager_log_sums


def test_a_torch_without_a_deterministic_compiler_takes_the_eager_normaliser(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("Unexpected optimization option deterministic")

    monkeypatch.setattr(torch, "compile", refuse)
    proven = proven_log_sums(CompiledLogSums(), rows=4, vocabulary_size=100, dtype=torch.float32, device=CPU)
    assert proven is eager_log_sums


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_on_the_gpu_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    compiled = CompiledLogSums()
    cuda = torch.device("cuda")
    assert proven_log_sums(compiled, rows=100, vocabulary_size=128_256, dtype=dtype, device=cuda) is compiled
    logits_NV = logits(100, 128_256, dtype=dtype, steps=16)
    targets_N = torch.arange(100)
    on_cpu = topk_logprobs(logits_NV, targets_N, 16)
    for sums in (compiled, eager_log_sums):
        with torch.inference_mode():
            on_gpu = topk_logprobs(logits_NV.cuda(), targets_N.cuda(), 16, sums)
        assert torch.equal(on_gpu.ids_Nk.cpu(), on_cpu.ids_Nk)
        torch.testing.assert_close(on_gpu.logsumexp_N.cpu(), on_cpu.logsumexp_N, rtol=0, atol=topk.PROOF_ATOL)
        torch.testing.assert_close(on_gpu.logprobs_Nk.cpu(), on_cpu.logprobs_Nk, rtol=0, atol=2 * topk.PROOF_ATOL)


@pytest.mark.gpu
def test_top_k_of_16_bit_logits_takes_less_memory_than_a_float32_copy_of_them() -> None:
    rows, vocabulary = 2093, 128_256
    logits_NV = torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16)
    targets_N = torch.zeros(rows, dtype=torch.int64, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    topk_logprobs(logits_NV, targets_N, 16)
    assert torch.cuda.max_memory_allocated() - before < rows * vocabulary * 4 / 2
