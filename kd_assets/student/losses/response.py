"""Losses on the teacher's top-k: what to do with the mass outside of it, and which divergence.

What stands in a cache is log p of k ids at temperature 1; of the tail only the mass, 1 - Σp, is known. So there are
four ways to compare, and a temperature means something else in each:

| function | outcomes compared | temperature |
|---|---|---|
| `response_loss` and its like, `tail="bucket"` | the k ids and all others as one | softens these masses of both |
| the same, `tail="left_out"` | the k ids, given that it is one of them | the true one: ratios need no tail |
| `renormalised_response_loss` | all V ids, the teacher having nothing outside its k | of student and k ids |
| `rest_to_target_loss` | all V ids, the teacher's rest being on the true token | of student and these masses |

Only the first two are zero when the student is the teacher: the other two ask for more than the teacher says of the ids
that are named, by 1 / Σp or on the target (Anshumann et al. 2025, arXiv 2503.16870, who show what this bias costs, and
compare with a bucket, their "ghost token"). A tail bucket and k of at most ten is also how Dasgupta et al. 2026 (arXiv
2602.20816) begin. Every loss is times T², which keeps gradients at one size (Hinton et al. 2015, section 2).

Legend: as of the folder; K outcomes: k, or k + 1.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kd_assets.student.losses.logprobs import chosen_logits, chosen_logprobs, positive, selected_places

Tail = Literal["bucket", "left_out"]
"""What the ids outside of the top-k are to a divergence: one outcome, or not there, on both sides."""

_SMALLEST_TAIL = 1e-6
"""Least probability given to all tokens outside the top-k: float16 rounding can leave less than nothing."""


def response_loss(
    logits_BTV: Tensor,
    topk_ids_BTk: Tensor,
    topk_logprobs_BTk: Tensor,
    mask_BT: Tensor,
    *,
    temperature: float = 1.0,
    tail: Tail = "bucket",
) -> Tensor:
    """KL(teacher ‖ student) over the teacher's top-k tokens and one bucket for all others, in nats times temperature².

    `logits_BTV` are the student's at the positions of the top-k rows; `topk_logprobs_BTk` are true log-probabilities
    at temperature 1, so the bucket's mass 1 - Σp is known exactly. Student and teacher are brought to the same k + 1
    outcomes at temperature 1 and then softened alike, p^(1/T) / Σ p^(1/T): the softened mass of the single tokens in
    the tail would need logits that no top-k cache holds. With k = V there is no tail, and this is Hinton et al.'s loss
    (2015, section 2). At temperature 1 it is a lower bound of the full KL (log-sum inequality).

    `tail="left_out"` renormalises both over the k ids: then the student is told nothing of how much they are together.
    Raises ValueError for a temperature that is not positive, and positions or ids that do not fit.
    """
    student, teacher = _outcomes(
        logits_BTV, topk_ids_BTk, topk_logprobs_BTk, mask_BT, temperature=temperature, tail=tail
    )
    return _mean_kl(teacher, student) * temperature**2


def reverse_response_loss(
    logits_BTV: Tensor,
    topk_ids_BTk: Tensor,
    topk_logprobs_BTk: Tensor,
    mask_BT: Tensor,
    *,
    temperature: float = 1.0,
    tail: Tail = "bucket",
) -> Tensor:
    """KL(student ‖ teacher) over the outcomes of `response_loss`, in nats times temperature²: it seeks modes.

    Gu et al. 2024 (MiniLLM, section 2) minimise it over the student's own samples; here it is exact, token by token,
    over the outcomes of the cached positions. A teacher's mass outside of the top-k counts as 1e-6 at least.
    """
    student, teacher = _outcomes(
        logits_BTV, topk_ids_BTk, topk_logprobs_BTk, mask_BT, temperature=temperature, tail=tail
    )
    return _mean_kl(student, teacher) * temperature**2


def jensen_shannon_loss(
    logits_BTV: Tensor,
    topk_ids_BTk: Tensor,
    topk_logprobs_BTk: Tensor,
    mask_BT: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    tail: Tail = "bucket",
) -> Tensor:
    """β KL(teacher ‖ m) + (1 - β) KL(student ‖ m), m = β teacher + (1 - β) student, in nats times temperature².

    The generalised Jensen-Shannon divergence of Agarwal et al. 2024 (GKD, section 2), over the outcomes of
    `response_loss`; symmetric at β = 1/2. Over β it tends to KL(teacher ‖ student) as β falls to 0, and over 1 - β to
    KL(student ‖ teacher) as β rises to 1. Raises ValueError for a β outside of (0, 1), which would be zero everywhere.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must be between 0 and 1, found {beta}: for these ends take the two KL losses")
    student, teacher = _outcomes(
        logits_BTV, topk_ids_BTk, topk_logprobs_BTk, mask_BT, temperature=temperature, tail=tail
    )
    # Of an outcome that both rule out, the logarithm of the mixture has no derivative.
    smallest = torch.finfo(student.dtype).min / 4
    student, teacher = student.clamp(min=smallest), teacher.clamp(min=smallest)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    divergence = beta * _mean_kl(teacher, mixture) + (1.0 - beta) * _mean_kl(student, mixture)
    return divergence * temperature**2


def renormalised_response_loss(
    logits_BTV: Tensor,
    topk_ids_BTk: Tensor,
    topk_logprobs_BTk: Tensor,
    mask_BT: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher's top-k made to sum to 1 ‖ student), the student over its whole vocabulary, in nats times T².

    The teacher's side is p^(1/T) / Σ p^(1/T) over the k ids, which is its true distribution at T given that it is one
    of them; the student's is softmax(logits / T). The loss of trainers that take what is missing for zero. It is
    lowest for a student with nothing outside the k ids; for the teacher itself it is T² times -log of its
    mass on them at T.
    """
    places = selected_places(mask_BT, logits_BTV, topk_ids_BTk, topk_logprobs_BTk)
    student_Mk = chosen_logprobs(logits_BTV, places, topk_ids_BTk[places], temperature=temperature)
    teacher_Mk = _softened(topk_logprobs_BTk[places].to(student_Mk.dtype), temperature)
    return _mean_kl(teacher_Mk, student_Mk) * temperature**2


def rest_to_target_loss(
    logits_BTV: Tensor,
    topk_ids_BTk: Tensor,
    topk_logprobs_BTk: Tensor,
    target_ids_BT: Tensor,
    mask_BT: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher with its rest on the true token ‖ student), the student over its whole vocabulary, in nats times T².

    `target_ids_BT` are the true next tokens, `input_ids[:, 1:]`. The mass 1 - Σp is added to that token, be it among
    the k or not, at temperature 1; these k + 1 masses are then softened, p^(1/T) / Σ p^(1/T), and the student is
    softmax(logits / T). A mixture of distillation and cross-entropy: the more the top-k leave out, the more the
    document decides (Anshumann et al. 2025, arXiv 2503.16870, among the naive repairs of top-k).
    """
    places = selected_places(mask_BT, logits_BTV, topk_ids_BTk, topk_logprobs_BTk, target_ids_BT)
    ids_Mk, target_M1 = topk_ids_BTk[places], target_ids_BT[places][:, None]
    is_kept_Mk = ~topk_logprobs_BTk[places].isneginf()
    student_MK = chosen_logprobs(logits_BTV, places, torch.cat([ids_Mk, target_M1], -1), temperature=temperature)
    kept_Mk = topk_logprobs_BTk[places].to(student_MK.dtype).exp()
    rest_M1 = (1.0 - kept_Mk.sum(-1, keepdim=True)).clamp(min=0.0)
    is_target_Mk = (ids_Mk == target_M1) & is_kept_Mk
    alone_M1 = rest_M1 * ~is_target_Mk.any(-1, keepdim=True)
    teacher_MK = torch.cat([kept_Mk + rest_M1 * is_target_Mk, alone_M1], -1).log()
    return _mean_kl(_softened(teacher_MK, temperature), student_MK) * temperature**2


def _outcomes(
    logits_BTV: Tensor,
    topk_ids_BTk: Tensor,
    topk_logprobs_BTk: Tensor,
    mask_BT: Tensor,
    *,
    temperature: float,
    tail: Tail,
) -> tuple[Tensor, Tensor]:
    """[M, K] twice: log-probabilities of the student and the teacher over the same outcomes, at `temperature`."""
    if tail not in ("bucket", "left_out"):
        raise ValueError(f"tail must be bucket or left_out, found {tail!r}")
    positive(temperature)
    places = selected_places(mask_BT, logits_BTV, topk_ids_BTk, topk_logprobs_BTk)
    ids_Mk, logprobs_Mk = topk_ids_BTk[places], topk_logprobs_BTk[places]
    # Where a position keeps fewer than k, what stands behind is no outcome, and neither has a probability for it.
    absent_Mk = logprobs_Mk.isneginf()
    if tail == "left_out":
        student_MK = chosen_logits(logits_BTV, places, ids_Mk).masked_fill(absent_Mk, -torch.inf)
        teacher_MK = logprobs_Mk.to(student_MK.dtype)
    else:
        has_rest = ids_Mk.shape[-1] < logits_BTV.shape[-1] or bool(absent_Mk.any())
        student_MK = chosen_logprobs(logits_BTV, places, ids_Mk, with_rest=has_rest)
        teacher_MK = logprobs_Mk.to(student_MK.dtype)
        if has_rest:
            rest_M1 = 1.0 - teacher_MK.exp().sum(-1, keepdim=True)
            has_none_M1 = (~absent_Mk).sum(-1, keepdim=True) >= logits_BTV.shape[-1]
            of_rest_M1 = rest_M1.clamp(min=_SMALLEST_TAIL).log().masked_fill(has_none_M1, -torch.inf)
            teacher_MK = torch.cat([teacher_MK, of_rest_M1], dim=-1)
            absent_Mk = torch.cat([absent_Mk, torch.zeros_like(absent_Mk[:, :1])], -1)
        student_MK = student_MK.masked_fill(absent_Mk, -torch.inf)
    return _softened(student_MK, temperature), _softened(teacher_MK, temperature)


def _softened(logprobs_MK: Tensor, temperature: float) -> Tensor:
    return (logprobs_MK / temperature).log_softmax(-1)


def _mean_kl(of_MK: Tensor, to_MK: Tensor) -> Tensor:
    """KL(of ‖ to) of rows of log-probabilities, mean over M; 0 without rows. What `of` rules out counts nothing."""
    ruled_out = of_MK.isneginf()
    of_MK, to_MK = of_MK.masked_fill(ruled_out, 0.0), to_MK.masked_fill(ruled_out, 0.0)
    return (of_MK.exp() * (of_MK - to_MK)).sum() / max(len(of_MK), 1)
