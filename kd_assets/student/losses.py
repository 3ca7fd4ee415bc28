"""The three distillation losses, as pure functions of a student's outputs and a teacher's caches.

Needs torch only. Every loss is a scalar in float32, zero when the student matches the teacher (or the draws that stand
for it), a mean over what its mask selects, and zero (with zero gradient) where the mask selects nothing; what the mask
leaves out has no influence.

Legend: B documents, T positions, V vocabulary, k of top-k, s ids among the random draws of a position, H hidden size,
M selected positions or documents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST_TAIL = 1e-6
"""Least probability given to all tokens outside the top-k: float16 rounding can leave less than nothing."""
_EPSILON = 1e-8


def response_loss(
    logits_BTV: Tensor,
    topk_ids_BTk: Tensor,
    topk_logprobs_BTk: Tensor,
    mask_BT: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher ‖ student) over the teacher's top-k tokens and one bucket for all others, in nats times temperature².

    `logits_BTV` are the student's at the positions of the top-k rows; `topk_logprobs_BTk` are true log-probabilities
    at temperature 1, so the bucket's mass 1 - Σp is known exactly. Student and teacher are brought to the same k + 1
    outcomes at temperature 1 and then softened alike, p^(1/T) / Σ p^(1/T): the softened mass of the single tokens in
    the tail would need logits that no top-k cache holds. With k = V there is no tail, and this is Hinton et al.'s loss
    (2015, section 2; the factor T² keeps gradients at one size). At temperature 1 it is a lower bound of the full KL
    (log-sum inequality). Raises ValueError for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    logits_MV = logits_BTV[mask_BT].float()
    ids_Mk, teacher_Mk = topk_ids_BTk[mask_BT], topk_logprobs_BTk[mask_BT].float()
    if not len(ids_Mk):
        return logits_BTV.float().sum() * 0.0
    logsumexp_M1 = logits_MV.logsumexp(-1, keepdim=True)
    student_Mk = logits_MV.gather(-1, ids_Mk) - logsumexp_M1
    if ids_Mk.shape[-1] < logits_MV.shape[-1]:
        # The tail by itself rather than 1 - Σp: exact where the top-k hold nearly everything, and so is its gradient.
        tail_M1 = logits_MV.scatter(-1, ids_Mk, -torch.inf).logsumexp(-1, keepdim=True) - logsumexp_M1
        student_Mk = torch.cat([student_Mk, tail_M1], dim=-1)
        mass_M1 = 1.0 - teacher_Mk.exp().sum(-1, keepdim=True)
        teacher_Mk = torch.cat([teacher_Mk, mass_M1.clamp(min=_SMALLEST_TAIL).log()], dim=-1)
    student_Mk = (student_Mk / temperature).log_softmax(-1)
    teacher_Mk = (teacher_Mk / temperature).log_softmax(-1)
    return functional.kl_div(student_Mk, teacher_Mk, reduction="batchmean", log_target=True) * temperature**2


def sampled_response_loss(
    logits_BTV: Tensor, sampled_ids_BTs: Tensor, sampled_counts_BTs: Tensor, mask_BT: Tensor
) -> Tensor:
    """KL(teacher's draws ‖ student), in nats: the response loss of random-sampling KD, at temperature 1.

    The targets are how often each id was drawn over all draws of its position; a count of 0 is padding. On average over
    draws its gradient is that of the full KL, with nothing cut off, as every id is drawn as often as the teacher says
    (Anshumann et al. 2025, section 4: draws from the distribution itself have these importance weights).
    """
    logits_MV, counts_Ms = logits_BTV[mask_BT].float(), sampled_counts_BTs[mask_BT].float()
    if not len(counts_Ms):
        return logits_BTV.float().sum() * 0.0
    student_Ms = logits_MV.gather(-1, sampled_ids_BTs[mask_BT]) - logits_MV.logsumexp(-1, keepdim=True)
    targets_Ms = counts_Ms / counts_Ms.sum(-1, keepdim=True)
    # What is padding has a target of 0, whose product with -inf would be NaN.
    return functional.kl_div(student_Ms.masked_fill(counts_Ms == 0, 0.0), targets_Ms, reduction="batchmean")


def feature_mse_loss(projected_BTH: Tensor, hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean squared difference of the student's projected hidden states and the teacher's, over selected tokens.

    `projected_BTH` went through the student's regressor, which is trained with it (FitNets, Romero et al. 2015,
    equation 3, with the mean over elements).
    """
    projected_MH, hidden_MH = projected_BTH[mask_BT].float(), hidden_BTH[mask_BT].float()
    if not len(hidden_MH):
        return projected_BTH.float().sum() * 0.0
    return functional.mse_loss(projected_MH, hidden_MH)


def feature_cosine_loss(projected_BTH: Tensor, hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """1 - cosine of the student's projected hidden states and the teacher's, mean over selected tokens.

    Free of the scale of hidden states, which grows from block to block (the form of DistilBERT's L_cos, Sanh et al.
    2019, section 3).
    """
    projected_MH, hidden_MH = projected_BTH[mask_BT].float(), hidden_BTH[mask_BT].float()
    if not len(hidden_MH):
        return projected_BTH.float().sum() * 0.0
    return (1.0 - functional.cosine_similarity(projected_MH, hidden_MH, dim=-1)).mean()


def relation_distance_loss(student_MS: Tensor, teacher_MH: Tensor) -> Tensor:
    """Huber loss between the pairwise distances of both embeddings, each divided by its batch's mean distance.

    Park et al. 2019 (Relational Knowledge Distillation), distance-wise loss. The sizes of the embeddings may differ.
    Needs two documents; with fewer there is no pair and the loss is zero.
    """
    if len(teacher_MH) < 2:
        return student_MS.float().sum() * 0.0
    return functional.huber_loss(_relative_distances(student_MS.float()), _relative_distances(teacher_MH.float()))


def relation_angle_loss(student_MS: Tensor, teacher_MH: Tensor) -> Tensor:
    """Huber loss between the cosines of the angles that all triples of documents form, in both embeddings.

    Park et al. 2019, angle-wise loss. Needs three documents; with fewer the loss is zero.
    """
    if len(teacher_MH) < 3:
        return student_MS.float().sum() * 0.0
    return functional.huber_loss(_angle_cosines(student_MS.float()), _angle_cosines(teacher_MH.float()))


def mean_pooled(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """float32 [B, H]: the mean of the hidden states of the selected tokens, as the embedding cache pools them."""
    weights_BT1 = mask_BT[..., None].float()
    return (hidden_BTH.float() * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1.0)


def _relative_distances(points_MH: Tensor) -> Tensor:
    """[M (M-1) / 2]: the distance of every pair over the mean distance."""
    distances = functional.pdist(points_MH)
    return distances / distances.mean().clamp(min=_EPSILON)


def _angle_cosines(points_MH: Tensor) -> Tensor:
    """[M (M-1) (M-2)]: the cosine of the angle at document j between i and k, for all triples of different ones."""
    # directions[j, i] points from j to i.
    directions_MMH = functional.normalize(points_MH[None, :, :] - points_MH[:, None, :], dim=-1, eps=_EPSILON)
    cosines_MMM = directions_MMH @ directions_MMH.transpose(1, 2)
    same_MM = torch.eye(len(points_MH), dtype=torch.bool, device=points_MH.device)
    repeated_MMM = same_MM[:, :, None] | same_MM[:, None, :] | same_MM[None, :, :]
    return cosines_MMM[~repeated_MMM]
