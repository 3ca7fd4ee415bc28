"""Losses on the relations between documents, from their pooled embeddings (relational knowledge distillation).

Legend: as of the folder; S hidden size of the student.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kd_assets.student.losses.logprobs import precise

_EPSILON = 1e-8


def relation_distance_loss(student_MS: Tensor, teacher_MH: Tensor) -> Tensor:
    """Huber loss between the pairwise distances of both embeddings, each divided by its batch's mean distance.

    Park et al. 2019 (Relational Knowledge Distillation, section 3.2.1), distance-wise loss. The sizes of the
    embeddings may differ. Needs two documents; with fewer there is no pair and the loss is zero.
    """
    if len(teacher_MH) < 2:
        return precise(student_MS[:0]).sum()
    student_MS = precise(student_MS)
    return functional.huber_loss(_relative_distances(student_MS), _relative_distances(teacher_MH.to(student_MS.dtype)))


def relation_angle_loss(student_MS: Tensor, teacher_MH: Tensor) -> Tensor:
    """Huber loss between the cosines of the angles that all triples of documents form, in both embeddings.

    Park et al. 2019 (section 3.2.2), angle-wise loss. Needs three documents; with fewer the loss is zero.
    """
    if len(teacher_MH) < 3:
        return precise(student_MS[:0]).sum()
    student_MS = precise(student_MS)
    return functional.huber_loss(_angle_cosines(student_MS), _angle_cosines(teacher_MH.to(student_MS.dtype)))


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
