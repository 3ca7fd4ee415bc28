"""Random draws: whose numbers they are, that they follow the distribution, and what odd rows do."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from kd_assets.teacher.batch import sampling
from kd_assets.teacher.batch.sampling import cdf_distance, drawn_ids, uniforms

BELOW_ONE = 1.0 - 2.0**-24
"""The largest number that `uniforms` can give."""


def random_logits(n: int, vocabulary: int, *, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits_NV: Tensor, u_Nd: Tensor) -> Tensor:
    return drawn_ids(logits_NV, logits_NV.float().amax(dim=1), u_Nd)


def numbers(n: int, draws: int, document_id: str = "document") -> Tensor:
    return torch.from_numpy(uniforms(0, document_id, n, draws))


def test_numbers_of_a_position_do_not_depend_on_how_long_the_document_is() -> None:
    whole = uniforms(3, "document", 100, 7)
    for n in (0, 1, 2, 99):
        assert np.array_equal(uniforms(3, "document", n, 7), whole[:n])


def test_every_document_and_seed_has_numbers_of_its_own() -> None:
    documents = [uniforms(seed, name, 20, 50) for seed in (0, 1) for name in ("a", "b", "1:a", "Straße 7")]
    for i, one in enumerate(documents):
        for other in documents[:i]:
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.15


def test_numbers_are_spread_evenly_from_0_to_below_1() -> None:
    u = uniforms(0, "document", 2000, 50)
    assert u.dtype == np.float32
    assert (u.min() >= 0, u.max() <= BELOW_ONE) == (True, True)
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    assert chi_square(counts, np.full(100, u.size / 100)) < most_chi_square(99)
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.08
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.08


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [5, 32, 70, 4103])
def test_draws_follow_the_whole_distribution(dtype: torch.dtype, vocabulary: int) -> None:
    logits_V = random_logits(1, vocabulary, scale=2.0).to(dtype)
    drawn = draw(logits_V.expand(2000, -1), numbers(2000, 50))
    expected = logits_V[0].double().softmax(0).numpy() * drawn.numel()
    counts = np.bincount(drawn.numpy().ravel(), minlength=vocabulary)
    often = expected >= 5  # chi-square's rule of thumb; the rare ones together are one more kind
    counts = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum() + 1e-9)
    assert chi_square(counts, expected) < most_chi_square(len(counts) - 1)


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 1000, 50_000])
def test_draws_are_the_inverse_of_the_cumulative_distribution(vocabulary: int) -> None:
    """In float64 here; a difference only where u is within float32 rounding of the boundary between two ids."""
    logits_NV, u_Nd = random_logits(64, vocabulary), numbers(64, 50)
    cumulative_NV = logits_NV.double().softmax(dim=1).cumsum(dim=1)
    plain_Nd = torch.searchsorted(cumulative_NV, u_Nd.double(), right=True).clamp_max(vocabulary - 1)
    drawn_Nd = draw(logits_NV, u_Nd)
    assert (drawn_Nd != plain_Nd).float().mean() < 0.002
    boundary_Nd = cumulative_NV.gather(1, torch.minimum(drawn_Nd, plain_Nd))
    assert (boundary_Nd - u_Nd).abs().where(drawn_Nd != plain_Nd, 0.0).max() < 1e-6
    assert (drawn_Nd - plain_Nd).abs().max() <= 1
    assert cdf_distance(logits_NV, drawn_Nd, u_Nd).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_draws_from_16_bit_logits_are_those_of_the_same_numbers_in_float32(dtype: torch.dtype) -> None:
    logits_NV, u_Nd = random_logits(50, 3000).to(dtype), numbers(50, 20)
    assert torch.equal(draw(logits_NV, u_Nd), draw(logits_NV.float(), u_Nd))


def test_rows_are_drawn_alike_however_many_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_NV, u_Nd = random_logits(37, 1000), numbers(37, 20)
    together = draw(logits_NV, u_Nd)
    in_fives = [draw(logits_NV[i : i + 5], u_Nd[i : i + 5]) for i in range(0, 37, 5)]
    assert torch.equal(torch.cat(in_fives), together)
    for n_bytes in (1, 100_000):
        monkeypatch.setattr(sampling, "SCRATCH_BYTES", {"cpu": n_bytes})
        assert torch.equal(draw(logits_NV, u_Nd), together)


@pytest.mark.parametrize("u", [0.0, 2.0**-24, 0.5, BELOW_ONE, 1.0])
@pytest.mark.parametrize("vocabulary", [5, 32, 100])
def test_id_without_probability_is_never_drawn(u: float, vocabulary: int) -> None:
    """Wherever the one possible id is, at the ends and beside others that are masked out."""
    for possible in (0, 1, vocabulary // 2, vocabulary - 1):
        logits_1V = torch.full((1, vocabulary), -torch.inf)
        logits_1V[0, possible] = -7.0
        assert draw(logits_1V, torch.tensor([[u]])).item() == possible


def test_of_equal_logits_every_id_gets_its_share() -> None:
    u_1d = torch.arange(0, 100).float().view(1, -1) / 100 + 0.005
    assert draw(torch.full((1, 100), 1e4), u_1d).tolist() == [list(range(100))]


def test_rows_that_are_not_finite_give_some_id_and_leave_others_alone() -> None:
    logits_NV, u_Nd = random_logits(6, 70), numbers(6, 30)
    expected_Nd = draw(logits_NV, u_Nd)
    logits_NV[1, 3], logits_NV[2, 69], logits_NV[3] = torch.nan, torch.inf, -torch.inf
    logits_NV[4] = torch.nan
    drawn_Nd = draw(logits_NV, u_Nd)
    assert ((drawn_Nd >= 0) & (drawn_Nd < 70)).all()
    assert torch.equal(drawn_Nd[[0, 5]], expected_Nd[[0, 5]])


def test_no_rows_give_no_draws() -> None:
    assert draw(torch.zeros(0, 7), torch.zeros(0, 3)).shape == (0, 3)


def test_distance_of_a_draw_is_how_far_its_number_is_from_its_share() -> None:
    logits_LV = torch.tensor([[0.25, 0.5, 0.25]]).log().expand(3, -1)
    u_Ld = torch.tensor([[0.3, 0.1], [0.3, 0.1], [0.3, 0.1]])
    ids_Ld = torch.tensor([[0, 1], [1, 1], [0, 2]])  # the first row as drawn, in another order
    assert cdf_distance(logits_LV, ids_Ld, u_Ld).tolist() == pytest.approx([0.0, 0.15, 0.45], abs=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_on_the_gpu_are_those_of_the_cpu_and_deterministic(dtype: torch.dtype) -> None:
    """Deterministic mode refuses operations that are not; and nothing may wait for the device."""
    logits_NV, u_Nd = random_logits(3000, 50_000).to(dtype), numbers(3000, 50)
    on_gpu = logits_NV.cuda(), logits_NV.float().amax(dim=1).cuda(), u_Nd.cuda()
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first_Nd, second_Nd = drawn_ids(*on_gpu), drawn_ids(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first_Nd, second_Nd)
    assert (first_Nd.cpu() != draw(logits_NV, u_Nd)).float().mean() < 0.002
    assert cdf_distance(logits_NV[:100], first_Nd[:100].cpu(), u_Nd[:100]).max() < 1e-6


def chi_square(counts: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> float:
    return float(np.sum((counts - expected) ** 2 / expected))


def most_chi_square(degrees: int) -> float:
    """What fewer than one in 10,000 true samples exceed (by the normal approximation, and a margin for few degrees)."""
    return degrees + 4 * math.sqrt(2 * degrees) + 8
