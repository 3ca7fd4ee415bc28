"""The losses against small examples computed by hand, and against torch's own KL where they must agree."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kd_assets.student.losses import (
    feature_cosine_loss,
    feature_mse_loss,
    mean_pooled,
    relation_angle_loss,
    relation_distance_loss,
    response_loss,
    sampled_response_loss,
)

EVERYWHERE = torch.ones(1, 1, dtype=torch.bool)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = logits.log_softmax(-1).topk(k)
    return ids, values


def test_response_loss_by_hand_has_the_tail_as_one_bucket() -> None:
    # The teacher gives (1/2, 1/4, 1/8, 1/8) and keeps the best two; the student is uniform over four tokens.
    logits = torch.zeros(1, 1, 4)
    loss = response_loss(logits, torch.tensor([[[0, 1]]]), torch.tensor([[[0.5, 0.25]]]).log(), EVERYWHERE)
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)


def test_response_loss_by_hand_softens_both_sides_alike() -> None:
    # Buckets (1/2, 1/2) of the teacher stay so at any temperature; the student's (0.8, 0.2) become (2/3, 1/3) at 2.
    logits = torch.tensor([[[0.8, 0.1, 0.1]]]).log()
    loss = response_loss(logits, torch.tensor([[[0]]]), torch.tensor([[[0.5]]]).log(), EVERYWHERE, temperature=2.0)
    by_hand = 4 * (0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3)))
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_response_loss_with_the_whole_vocabulary_is_the_full_kl(temperature: float) -> None:
    teacher, student = random_logits(2, 5, 7), random_logits(2, 5, 7, seed=1)
    ids, logprobs = top(teacher, 7)
    mask = torch.ones(2, 5, dtype=torch.bool)
    full = functional.kl_div(
        (student / temperature).log_softmax(-1).flatten(0, 1),
        (teacher / temperature).log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
    loss = response_loss(student, ids, logprobs, mask, temperature=temperature)
    assert loss.item() == pytest.approx(full.item() * temperature**2, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_response_loss_is_zero_when_the_student_equals_the_teacher(k: int, temperature: float) -> None:
    logits = random_logits(2, 5, 7)
    ids, logprobs = top(logits, k)
    mask = torch.ones(2, 5, dtype=torch.bool)
    # An offset of all logits changes no distribution.
    loss = response_loss(logits + 3.0, ids, logprobs, mask, temperature=temperature)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)


def test_response_loss_at_temperature_one_never_exceeds_the_full_kl() -> None:
    teacher, student = random_logits(1, 20, 50), random_logits(1, 20, 50, seed=1)
    mask = torch.ones(1, 20, dtype=torch.bool)
    losses = [response_loss(student, *top(teacher, k), mask).item() for k in (1, 4, 16, 50)]
    assert losses == sorted(losses)


def test_response_loss_ignores_what_the_mask_leaves_out() -> None:
    logits = random_logits(2, 5, 7).requires_grad_()
    ids, logprobs = top(random_logits(2, 5, 7, seed=1), 3)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, :2] = True
    loss = response_loss(logits, ids, logprobs, mask)
    alone = response_loss(logits[:1, :2], ids[:1, :2], logprobs[:1, :2], torch.ones(1, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[mask].abs().sum() > 0
    assert gradient[~mask].abs().sum() == 0


@pytest.mark.parametrize("k", [2, 5])
def test_response_loss_has_finite_gradients_where_the_top_k_hold_all_the_mass(k: int) -> None:
    logits = torch.tensor([[[60.0, 50.0, 0.0, -10.0, -20.0]]], requires_grad=True)
    logprobs = torch.tensor([[[0.0, -12.0, -20.0, -30.0, -40.0]]]).half().float()[..., :k]
    loss = response_loss(logits, torch.arange(k)[None, None], logprobs, EVERYWHERE, temperature=2.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_response_loss_brings_a_student_to_the_teacher() -> None:
    teacher = random_logits(1, 4, 6)
    ids, logprobs = top(teacher, 5)
    mask = torch.ones(1, 4, dtype=torch.bool)
    student = torch.zeros(1, 4, 6, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(300):
        loss = response_loss(student, ids, logprobs, mask, temperature=2.0)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(student.softmax(-1), teacher.softmax(-1), atol=2e-3, rtol=0)


def test_response_loss_refuses_a_temperature_of_zero() -> None:
    with pytest.raises(ValueError, match="temperature"):
        response_loss(torch.zeros(1, 1, 2), torch.tensor([[[0]]]), torch.zeros(1, 1, 1), EVERYWHERE, temperature=0.0)


def drawn(logits: Tensor, draws: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and counts of random draws from the teacher; every id of the vocabulary has a place, some a count of 0."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = logits.shape[-1]
    ids = logits.softmax(-1).flatten(0, 1).multinomial(draws, replacement=True, generator=generator)
    counts = functional.one_hot(ids, vocabulary).sum(1).reshape(logits.shape)
    return torch.arange(vocabulary).expand_as(counts), counts


def test_sampled_response_loss_by_hand() -> None:
    # Id 2 was drawn three times and id 0 once, the rest is padding; the student is uniform over four tokens.
    loss = sampled_response_loss(
        torch.zeros(1, 1, 4), torch.tensor([[[0, 2, 0]]]), torch.tensor([[[1, 3, 0]]]), EVERYWHERE
    )
    by_hand = 0.25 * math.log(0.25 / 0.25) + 0.75 * math.log(0.75 / 0.25)
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)


def test_sampled_response_loss_is_zero_for_a_student_that_says_what_was_drawn() -> None:
    logits = torch.tensor([[[0.2, 0.0, 0.8, 0.0]]]).log()  # padding points to an id that the student rules out
    loss = sampled_response_loss(logits, torch.tensor([[[0, 2, 1]]]), torch.tensor([[[2, 8, 0]]]), EVERYWHERE)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_gradient_of_the_sampled_response_loss_is_that_of_the_full_kl_on_average() -> None:
    teacher, student = random_logits(1, 3, 8), random_logits(1, 3, 8, seed=1).requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    full = response_loss(student, *top(teacher, 8), mask)
    sampled = sampled_response_loss(student, *drawn(teacher, 200_000), mask)
    (expected,), (found,) = torch.autograd.grad(full, student), torch.autograd.grad(sampled, student)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert sampled.item() == pytest.approx(full.item(), abs=2e-2)


def test_sampled_response_loss_ignores_what_the_mask_leaves_out() -> None:
    logits = random_logits(2, 5, 7).requires_grad_()
    ids, counts = drawn(random_logits(2, 5, 7, seed=1), 10)
    counts[1] = 0  # padding of a shorter document
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, :2] = True
    loss = sampled_response_loss(logits, ids, counts, mask)
    alone = sampled_response_loss(logits[:1, :2], ids[:1, :2], counts[:1, :2], torch.ones(1, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[~mask].any()
    nothing = sampled_response_loss(logits, ids, counts, torch.zeros(2, 5, dtype=torch.bool))
    assert nothing.item() == 0.0
    assert not torch.autograd.grad(nothing, logits)[0].any()


def test_feature_losses_by_hand() -> None:
    projected, hidden = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]]), torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, False]])
    assert feature_mse_loss(projected, hidden, mask).item() == pytest.approx(0.5)
    assert feature_cosine_loss(projected, hidden, mask).item() == pytest.approx(1 - 1 / math.sqrt(2))


def test_feature_losses_are_zero_for_equal_states_also_in_bfloat16() -> None:
    hidden = random_logits(2, 3, 8).bfloat16()
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert feature_mse_loss(hidden.float(), hidden, mask).item() == 0.0
    assert feature_cosine_loss(hidden.float() * 7, hidden, mask).item() == pytest.approx(0.0, abs=1e-6)


def test_feature_losses_train_the_projector() -> None:
    projector = torch.nn.Linear(4, 8, bias=False)
    student, hidden = random_logits(2, 3, 4), random_logits(2, 3, 8, seed=1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for loss in (feature_mse_loss, feature_cosine_loss):
        (gradient,) = torch.autograd.grad(loss(projector(student), hidden, mask), projector.weight)
        assert gradient.abs().sum() > 0


def test_relation_distance_loss_by_hand() -> None:
    # Distances 3, 5, 4 over their mean 4, against three equal ones: differences -1/4, 1/4, 0.
    teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
    by_hand = (0.5 * 0.25**2 + 0.5 * 0.25**2 + 0.0) / 3
    assert relation_distance_loss(student, teacher).item() == pytest.approx(by_hand, abs=1e-6)


def test_relation_angle_loss_by_hand() -> None:
    # Cosines of a 3-4-5 triangle (0.6, 0, 0.8) against those of an equilateral one (0.5 three times).
    teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
    by_hand = (0.5 * 0.1**2 + 0.5 * 0.5**2 + 0.5 * 0.3**2) / 3
    assert relation_angle_loss(student, teacher).item() == pytest.approx(by_hand, abs=1e-6)


def test_relation_losses_do_not_see_scale_rotation_or_place() -> None:
    teacher = random_logits(6, 2)
    quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    student = 5.0 * teacher @ quarter_turn + torch.tensor([2.0, -1.0])
    assert relation_distance_loss(student, teacher).item() == pytest.approx(0.0, abs=1e-6)
    assert relation_angle_loss(student, teacher).item() == pytest.approx(0.0, abs=1e-6)


def test_relation_losses_have_gradients_of_other_sizes_and_finite_ones_for_equal_documents() -> None:
    student = random_logits(4, 3).requires_grad_()
    same = torch.zeros(4, 3, requires_grad=True)
    for loss in (relation_distance_loss, relation_angle_loss):
        (gradient,) = torch.autograd.grad(loss(student, random_logits(4, 9, seed=1)), student)
        assert gradient.abs().sum() > 0
        (gradient,) = torch.autograd.grad(loss(same, random_logits(4, 9, seed=1)), same)
        assert gradient.isfinite().all()


def test_losses_over_nothing_are_zero_and_backpropagate() -> None:
    x = random_logits(2, 3, 4).requires_grad_()
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    ids, logprobs = top(random_logits(2, 3, 4, seed=1), 2)
    one = random_logits(1, 4).requires_grad_()
    for loss, leaf in (
        (response_loss(x, ids, logprobs, nothing), x),
        (feature_mse_loss(x, x.detach(), nothing), x),
        (feature_cosine_loss(x, x.detach(), nothing), x),
        (relation_distance_loss(one, one.detach()), one),
        (relation_angle_loss(one, one.detach()), one),
    ):
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.item() == 0.0
        assert gradient.abs().sum() == 0.0


def test_mean_pooling_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [100.0]], [[5.0], [7.0], [9.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert mean_pooled(hidden, mask).tolist() == [[2.0], [7.0]]
