"""Top-k log-probabilities against the plain definition, ties included."""

from __future__ import annotations

import pytest
import torch

from kd_assets.teacher.topk import largest, topk_logprobs


@pytest.mark.parametrize("vocabulary", [7, 130, 3000, 4103])
@pytest.mark.parametrize("k", [1, 5, 7])
@pytest.mark.parametrize("steps", [None, 8, 1])
def test_largest_equals_a_stable_sort_of_the_whole_row(vocabulary: int, k: int, steps: int | None) -> None:
    """With `steps` numbers are rounded so that many are equal, as 16-bit logits are."""
    x_NV = torch.randn(60, vocabulary, generator=torch.Generator().manual_seed(k))
    if steps is not None:
        x_NV = (x_NV * steps).round() / steps
    values_NV, ids_NV = x_NV.sort(dim=1, descending=True, stable=True)
    values_Nk, ids_Nk = largest(x_NV, k)
    assert torch.equal(values_Nk, values_NV[:, :k])
    assert torch.equal(ids_Nk, ids_NV[:, :k])


def test_of_equal_logits_the_lowest_token_ids_are_kept_in_order() -> None:
    logits_NV = torch.tensor([[0.0, 1.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    found = topk_logprobs(logits_NV, torch.tensor([0, 0]), k=3)
    assert found.ids_Nk.tolist() == [[3, 1, 2], [0, 1, 2]]


def test_ties_are_settled_across_a_large_vocabulary() -> None:
    logits_NV = torch.zeros(1, 5000)
    logits_NV[0, [4999, 700, 33]] = 1.0
    assert topk_logprobs(logits_NV, torch.tensor([0]), k=2).ids_Nk.tolist() == [[33, 700]]
    assert topk_logprobs(logits_NV, torch.tensor([0]), k=5).ids_Nk.tolist() == [[33, 700, 4999, 0, 1]]


def test_logprobs_are_those_of_the_full_vocabulary() -> None:
    logits_NV = torch.randn(40, 2500, generator=torch.Generator().manual_seed(0)) * 5
    targets_N = torch.arange(40) * 3
    plain_NV = torch.log_softmax(logits_NV.double(), dim=1)
    found = topk_logprobs(logits_NV, targets_N, k=6, scratch_NV=torch.empty_like(logits_NV))
    torch.testing.assert_close(found.logprobs_Nk.double(), plain_NV.topk(6).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logsumexp_N.double(), logits_NV.double().logsumexp(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found.target_logprob_N.double(), plain_NV.gather(1, targets_N[:, None])[:, 0], rtol=0, atol=1e-5
    )


def test_huge_logits_do_not_overflow() -> None:
    found = topk_logprobs(torch.tensor([[3.0e38, 0.0, -3.0e38]]), torch.tensor([1]), k=2)
    assert found.logprobs_Nk[0, 0] == 0.0
    assert found.logsumexp_N[0] == torch.tensor(3.0e38)


def test_k_above_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 4, the vocabulary has 3 ids"):
        topk_logprobs(torch.zeros(1, 3), torch.tensor([0]), k=4)
