"""Our Muon against torch's, and against the decomposition it approximates."""

from __future__ import annotations

import pytest
import torch

from kd_assets.demo.muon import Muon, orthogonalised


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (8, 3)])
def test_it_steps_as_torchs_muon_does(shape: tuple[int, int]) -> None:
    ours, theirs = (random_matrix(*shape).requires_grad_() for _ in range(2))
    optimizers = (
        Muon([ours], lr=0.01, weight_decay=0.1, dtype=torch.bfloat16),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for seed in range(1, 6):
        for matrix, optimizer in zip((ours, theirs), optimizers, strict=True):
            matrix.grad = random_matrix(*shape, seed=seed)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = random_matrix(*shape) * 100
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalised(matrix, dtype=dtype) @ vh.T
    assert inner.diagonal().min() > 0.3
    assert inner.diagonal().max() < 1.4
    assert (inner - inner.diagonal().diag()).abs().max() < 0.1


def test_a_zero_gradient_moves_nothing_but_the_weight_decay() -> None:
    matrix = torch.ones(2, 3, requires_grad=True)
    matrix.grad = torch.zeros(2, 3)
    Muon([matrix], lr=0.1, weight_decay=0.5, dtype=torch.float32).step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 3), 0.95))
