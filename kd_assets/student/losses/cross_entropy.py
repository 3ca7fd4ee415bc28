"""Plain cross-entropy with the true next token, on the same rows as the distillation losses.

Legend: as of the folder.
"""

from __future__ import annotations

from torch import Tensor

from kd_assets.student.losses.logprobs import chosen_logprobs, selected_places


def cross_entropy_loss(logits_BTV: Tensor, target_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """-log of the student's probability of the true next token, mean over selected rows, in nats.

    For a batch: `logits[:, :-1]`, `input_ids[:, 1:]` and `topk_mask`, or without a top-k cache
    `(attention_mask & loss_mask)[:, 1:]`. Raises ValueError for positions or ids that do not fit.
    """
    places = selected_places(mask_BT, logits_BTV, target_ids_BT)
    logprobs_M1 = chosen_logprobs(logits_BTV, places, target_ids_BT[places][:, None])
    return -logprobs_M1.sum() / max(len(logprobs_M1), 1)
