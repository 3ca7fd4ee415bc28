"""What is true of the losses on logits by their definitions, and what they refuse."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kd_assets.student.losses import (
    Tail,
    cross_entropy_loss,
    importance_sampled_response_loss,
    jensen_shannon_loss,
    renormalised_response_loss,
    response_loss,
    rest_to_target_loss,
    reverse_response_loss,
    sampled_response_loss,
)
from kd_assets_tests.student.dense import VOCABULARY, Case, value_and_gradient

TAILS: tuple[Tail, ...] = ("bucket", "left_out")


def test_a_mask_of_numbers_and_an_id_without_a_logit_are_refused() -> None:
    case = Case.random(4)
    with pytest.raises(ValueError, match=r"int64.*bool"):
        response_loss(case.student, *case.top, case.mask.long())
    for tail in TAILS:
        with pytest.raises(ValueError, match=r"token id 10 has no logit among the student's 10"):
            response_loss(case.student[..., :-1], case.top[0].clamp(min=10), case.top[1], case.mask | True, tail=tail)


def test_bad_parameters_are_refused() -> None:
    case = Case.random(4)
    for temperature in (0.0, -1.0, math.nan):
        for loss in (response_loss, reverse_response_loss, jensen_shannon_loss, renormalised_response_loss):
            with pytest.raises(ValueError, match="temperature must be positive"):
                loss(case.student, *case.top, case.mask, temperature=temperature)
    for beta in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="beta must be between 0 and 1"):
            jensen_shannon_loss(case.student, *case.top, case.mask, beta=beta)
    with pytest.raises(ValueError, match="tail must be bucket or left_out"):
        response_loss(case.student, *case.top, case.mask, tail="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="selected positions have no draws"):
        sampled_response_loss(case.student, case.sampled_ids, case.sampled_counts * 0, case.mask)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
def test_losses_of_shared_outcomes_are_zero_for_the_teacher_itself_and_the_others_say_what_they_are(
    k: int, temperature: float
) -> None:
    case = Case.random(k)
    for loss in (response_loss, reverse_response_loss, jensen_shannon_loss):
        for tail in TAILS:
            assert loss(case.teacher, *case.top, case.mask, temperature=temperature, tail=tail).abs() < 1e-12
    found = renormalised_response_loss(case.teacher, *case.top, case.mask, temperature=temperature)
    on_kept = (case.teacher / temperature).softmax(-1).gather(-1, case.top[0]).sum(-1)
    torch.testing.assert_close(found, -on_kept.log()[case.mask].mean() * temperature**2)


def test_jensen_shannon_is_symmetric_at_one_half_and_tends_to_both_divergences() -> None:
    case = Case.random(VOCABULARY)
    swapped = Case(**{**case.__dict__, "student": case.teacher, "teacher": case.student})
    args, other = (case.student, *case.top, case.mask), (swapped.student, *swapped.top, swapped.mask)
    torch.testing.assert_close(jensen_shannon_loss(*args), jensen_shannon_loss(*other))
    small = 1e-7
    torch.testing.assert_close(
        jensen_shannon_loss(*args, beta=small) / small, response_loss(*args), rtol=1e-4, atol=0.0
    )
    torch.testing.assert_close(
        jensen_shannon_loss(*args, beta=1 - small) / small, reverse_response_loss(*args), rtol=1e-4, atol=0.0
    )


def test_a_student_and_a_teacher_that_rule_ids_out_teach_without_nan() -> None:
    # Padded heads: both give -inf to the last two ids, of which the cache names one.
    case = Case.random(VOCABULARY - 1, dtype=torch.float32)
    case.student[..., -2:] = -math.inf
    case.teacher[..., -2:] = -math.inf
    ids, logprobs_ = case.top
    assert logprobs_[..., -1].isneginf().all()
    for loss in (response_loss, reverse_response_loss, jensen_shannon_loss):
        of_logits = partial(loss, topk_ids_BTk=ids, topk_logprobs_BTk=logprobs_, mask_BT=case.mask, tail="left_out")
        value, gradient = value_and_gradient(of_logits, case.student)
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert not gradient[..., -2:].any()
    value, gradient = value_and_gradient(
        lambda s: renormalised_response_loss(s, ids, logprobs_, case.mask), case.student
    )
    assert value.isfinite()
    assert gradient.isfinite().all()


def gradient_of_draws(draws: int, *, proposal: float, exponent: float) -> tuple[Tensor, Tensor]:
    """Gradients for 4,000 positions with one teacher, which drew from q ∝ p^proposal: of draws, and of the full KL."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64) * 1.5
    student = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    n = 4000
    q = (teacher * proposal).softmax(-1)
    ids = q.expand(n, -1).multinomial(draws, replacement=True, generator=generator)
    counts = torch.zeros(n, VOCABULARY, dtype=torch.int64).scatter_add(1, ids, torch.ones_like(ids))
    every_id = torch.arange(VOCABULARY).expand_as(counts)
    logprobs_nV = teacher.log_softmax(-1).expand(n, -1)
    mask = torch.ones(n, dtype=torch.bool)
    _, found = value_and_gradient(
        lambda s: importance_sampled_response_loss(
            s.expand(n, -1), every_id, counts, logprobs_nV, mask, exponent=exponent
        ),
        student,
    )
    return found, student.softmax(-1) - teacher.softmax(-1)


def test_draws_of_a_proposal_have_the_gradient_of_the_full_kl_on_average() -> None:
    few, full = gradient_of_draws(50, proposal=0.7, exponent=0.7)
    torch.testing.assert_close(few, full, atol=6e-3, rtol=0.0)
    # What is left is the bias of weights made to sum to 1, which falls as one over the number of draws.
    many, _ = gradient_of_draws(1000, proposal=0.7, exponent=0.7)
    torch.testing.assert_close(many, full, atol=6e-4, rtol=0.0)
    unweighted, _ = gradient_of_draws(1000, proposal=0.7, exponent=1.0)
    assert (unweighted - full).abs().max() > 2e-2, "without weights the gradient is that of the proposal"


def test_losses_on_the_true_token_agree_with_each_other_and_with_transformers_about_the_shift() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    input_ids = torch.randint(0, VOCABULARY, (3, 7))
    loss_mask = torch.rand(3, 7) < 0.5
    labels = input_ids.masked_fill(~loss_mask, -100)
    output = model(input_ids=input_ids, labels=labels)
    rows, targets, mask = output.logits[:, :-1], input_ids[:, 1:], loss_mask[:, 1:]
    ours = cross_entropy_loss(rows, targets, mask)
    torch.testing.assert_close(ours, output.loss)
    # A teacher that is sure of the true token.
    sure = torch.zeros(3, 6, 1)
    torch.testing.assert_close(renormalised_response_loss(rows, targets[..., None], sure, mask), ours)
    torch.testing.assert_close(sampled_response_loss(rows, targets[..., None], sure.long() + 3, mask), ours)
    # One that is sure of nothing: the whole rest is the target's.
    unsure = torch.full((3, 6, 1), -100.0)
    torch.testing.assert_close(
        rest_to_target_loss(rows, (targets[..., None] + 1) % VOCABULARY, unsure, targets, mask), ours
    )
