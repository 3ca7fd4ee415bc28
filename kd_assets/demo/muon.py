"""Muon, an optimizer for weight matrices: momentum whose singular values are all brought to about one.

Keller Jordan's algorithm (2024, kellerjordan.github.io/posts/muon), with the update scaled as Liu et al. 2025 ("Muon is
scalable for LLM training", section 2.2) so that it takes AdamW's learning rates. Numerically `torch.optim.Muon` with
`adjust_lr_fn="match_rms_adamw"`, except that the precision of its matrix products can be chosen: torch's are always
bfloat16, which a CPU without instructions for it multiplies thirty times slower than float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: steepest at zero, at the price of singular values between 0.7 and 1.2 (Jordan 2024)."""
_ITERATIONS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Optimizes matrices (two dimensions each) in float32; their updates are computed in `dtype`."""

    def __init__(self, matrices: Iterable[Tensor], *, lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: gradients are there already
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
                update = orthogonalised(matrix.grad.lerp(momentum, _MOMENTUM), dtype=self._dtype)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonalised(matrix: Tensor, *, dtype: torch.dtype) -> Tensor:
    """About U Vᵀ of the matrix's singular value decomposition U S Vᵀ, by Newton-Schulz iteration in `dtype`."""
    a, b, c = _COEFFICIENTS
    # The products are smallest with the shorter side first.
    x = matrix.to(dtype) if matrix.shape[0] <= matrix.shape[1] else matrix.to(dtype).T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).to(matrix.dtype)
