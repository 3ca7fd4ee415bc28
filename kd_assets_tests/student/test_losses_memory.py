"""The losses on logits make no tensor as large as the logits but their gradient, in the logits' own dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kd_assets.student.losses import (
    cross_entropy_loss,
    importance_sampled_response_loss,
    jensen_shannon_loss,
    logprobs,
    renormalised_response_loss,
    response_loss,
    rest_to_target_loss,
    reverse_response_loss,
    sampled_response_loss,
)

VOCABULARY, POSITIONS, K = 4096, 16, 4
MASK = torch.ones(1, POSITIONS, dtype=torch.bool)
IDS = torch.arange(K).expand(1, POSITIONS, K)
COUNTS = torch.ones(1, POSITIONS, K, dtype=torch.int64)
LOGPROBS = torch.tensor([0.4, 0.3, 0.1, 0.1]).log().expand(1, POSITIONS, K)
TARGETS = torch.full((1, POSITIONS), 7)


class LargeResults(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which memory of at least so many bytes operations wrote their results to."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._n_bytes = n_bytes
        self.storages: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() >= self._n_bytes:
            self.storages.setdefault(result.untyped_storage().data_ptr(), str(func))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x: response_loss(x, IDS, LOGPROBS, MASK),
        lambda x: response_loss(x, IDS, LOGPROBS, MASK, temperature=2.0, tail="left_out"),
        lambda x: reverse_response_loss(x, IDS, LOGPROBS, MASK),
        lambda x: jensen_shannon_loss(x, IDS, LOGPROBS, MASK, temperature=2.0),
        lambda x: renormalised_response_loss(x, IDS, LOGPROBS, MASK, temperature=2.0),
        lambda x: rest_to_target_loss(x, IDS, LOGPROBS, TARGETS, MASK),
        lambda x: cross_entropy_loss(x, TARGETS, MASK),
        lambda x: sampled_response_loss(x, IDS, COUNTS, MASK),
        lambda x: importance_sampled_response_loss(x, IDS, COUNTS, LOGPROBS, MASK, exponent=0.5),
    ],
    ids=["bucket", "left out", "reverse", "JS", "renormalised", "rest", "cross-entropy", "draws", "weighted draws"],
)
def test_besides_the_logits_only_their_gradient_is_as_large_as_they_are(
    loss: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs.RUN_ELEMENTS, "cpu", 2 * VOCABULARY)
    logits = torch.randn(1, POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits.requires_grad_()
    with LargeResults(logits.untyped_storage().nbytes()) as large:
        value = loss(logits)
    assert set(large.storages) <= {logits.untyped_storage().data_ptr()}
    with LargeResults(logits.untyped_storage().nbytes()) as large:
        (gradient,) = torch.autograd.grad(value, logits)
    new = {place: name for place, name in large.storages.items() if place != logits.untyped_storage().data_ptr()}
    assert list(new) == [gradient.untyped_storage().data_ptr()], new
    assert gradient.dtype == dtype
