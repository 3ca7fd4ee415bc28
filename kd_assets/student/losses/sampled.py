"""Losses on random draws from the teacher's distribution: random-sampling KD.

The source of both is Anshumann et al. 2025 (Sparse Logit Sampling, section 4; arXiv 2503.16870): ids are drawn from a
proposal q, and each drawn id's target is its share of the draws times p / q, made to sum to 1. On average over draws
the gradient is then that of the full KL, with nothing cut off.

Legend: as of the folder.
"""

from __future__ import annotations

from torch import Tensor

from kd_assets.student.losses.logprobs import Places, chosen_logprobs, selected_places


def sampled_response_loss(
    logits_BTV: Tensor, sampled_ids_BTs: Tensor, sampled_counts_BTs: Tensor, mask_BT: Tensor
) -> Tensor:
    """KL(teacher's draws ‖ student), in nats, for draws from the teacher's distribution itself, at temperature 1.

    The targets are how often each id was drawn over all draws of its position; a count of 0 is padding. On average over
    draws its gradient is that of the full KL, as every id is drawn as often as the teacher says. Raises ValueError for
    a selected position without draws.
    """
    places = selected_places(mask_BT, logits_BTV, sampled_ids_BTs, sampled_counts_BTs)
    student_Ms = chosen_logprobs(logits_BTV, places, sampled_ids_BTs[places])
    return _mean_kl_of_weights(_counts(sampled_counts_BTs, places).to(student_Ms.dtype), student_Ms)


def importance_sampled_response_loss(
    logits_BTV: Tensor,
    sampled_ids_BTs: Tensor,
    sampled_counts_BTs: Tensor,
    sampled_logprobs_BTs: Tensor,
    mask_BT: Tensor,
    *,
    exponent: float,
) -> Tensor:
    """KL(teacher's reweighted draws ‖ student), in nats, for ids drawn from q ∝ p^exponent.

    `exponent` is the proposal's inverse temperature: below 1 it draws more of the tail. `sampled_logprobs_BTs` are the
    teacher's true log p of the drawn ids, at temperature 1, any number where the count is 0. An id's weight is
    count · p / q ∝ count · p^(1 - exponent); weights are made to sum to 1 for each position, so the proposal's own
    normaliser is not needed. That makes the gradient's expectation the full KL's up to a part that falls as one over
    the number of draws, and exactly for exponent = 1, where this is `sampled_response_loss`. Raises ValueError for a
    selected position without draws.
    """
    places = selected_places(mask_BT, logits_BTV, sampled_ids_BTs, sampled_counts_BTs, sampled_logprobs_BTs)
    student_Ms = chosen_logprobs(logits_BTV, places, sampled_ids_BTs[places])
    counts_Ms = _counts(sampled_counts_BTs, places)
    powers_Ms = (1.0 - exponent) * sampled_logprobs_BTs[places].to(student_Ms.dtype)
    # Over the largest of its row, as a softmax: only ratios count, and 1e-30 to some power is not to underflow.
    powers_Ms = powers_Ms.masked_fill(counts_Ms == 0, float("-inf"))
    return _mean_kl_of_weights(counts_Ms.to(student_Ms.dtype) * powers_Ms.softmax(-1), student_Ms)


def _counts(sampled_counts_BTs: Tensor, places: Places) -> Tensor:
    counts_Ms = sampled_counts_BTs[places]
    if without := int((counts_Ms.sum(-1) <= 0).sum()):
        raise ValueError(
            f"{without} of {len(counts_Ms)} selected positions have no draws: take the mask that came with them"
        )
    return counts_Ms


def _mean_kl_of_weights(weights_Ms: Tensor, student_Ms: Tensor) -> Tensor:
    """KL(weights over their sum ‖ student), mean over M; 0 without rows. A weight of 0 counts nothing."""
    targets_Ms = weights_Ms / weights_Ms.sum(-1, keepdim=True)
    # What is padding has a target of 0, whose product with -inf would be NaN.
    student_Ms = student_Ms.masked_fill(weights_Ms == 0, 0.0)
    return (targets_Ms.xlogy(targets_Ms) - targets_Ms * student_Ms).sum() / max(len(weights_Ms), 1)
