"""Top-k log-probabilities of next tokens from logits: exact, in float32, with ties settled.

Used by `kd_assets.teacher` only; pure functions. Names: N = rows (positions), V = vocabulary, k as in top-k,
G = groups of `GROUP` neighbouring ids.

Why not `topk(log_softmax(x))`: on a CPU that is a tenth of the whole pass. Here the normaliser comes from one fused
`log_softmax` into memory that is there already, and the top k from a two-step selection: an id among the k largest
lies in one of the k groups with the largest maxima, so 1/32 of the numbers have to be sorted, not all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class TopK:
    """What the response-based cache keeps of each position (natural log, temperature 1, full vocabulary)."""

    ids_Nk: Tensor
    """int64, most probable first; ties: lowest token id first."""
    logprobs_Nk: Tensor
    """float32."""
    logsumexp_N: Tensor
    """float32: of the logits, over the full vocabulary."""
    target_logprob_N: Tensor
    """float32: of the token that really came next."""


def topk_logprobs(logits_NV: Tensor, targets_N: Tensor, k: int, scratch_NV: Tensor | None = None) -> TopK:
    """Top-k log-probabilities against the full vocabulary, in float32. Ties: lowest token id first.

    `logits_NV` float32; `targets_N` int64; `scratch_NV` float32 memory to overwrite. Raises ValueError if k > V.
    """
    if k > logits_NV.shape[1]:
        raise ValueError(f"k is {k}, the vocabulary has {logits_NV.shape[1]} ids")
    values_Nk, ids_Nk = largest(logits_NV, k)
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1, out=scratch_NV)
    # x - log_softmax(x) is the logsumexp; taken at the largest logit, where neither number is far from 0.
    logsumexp_N = values_Nk[:, 0] - logprobs_NV.gather(1, ids_Nk[:, :1]).squeeze(1)
    return TopK(
        ids_Nk=ids_Nk,
        logprobs_Nk=logprobs_NV.gather(1, ids_Nk),
        logsumexp_N=logsumexp_N,
        target_logprob_N=logprobs_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1),
    )


def largest(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and column indices of the k largest numbers of each row, sorted; ties: lowest index first.

    `torch.topk` leaves open which of equal numbers it takes, and in 16-bit logits many are equal.
    """
    n_columns = x_NV.shape[1]
    values_Nj, ids_Nj = _largest_unordered(x_NV, min(k + 1, n_columns))
    values_Nk, ids_Nk = values_Nj[:, :k], ids_Nj[:, :k]
    if n_columns > k:
        cut_through_a_tie_N = values_Nj[:, k] == values_Nj[:, k - 1]
        rows = cut_through_a_tie_N.nonzero().squeeze(1)
        if len(rows):
            ids_Nk = ids_Nk.index_copy(0, rows, _lowest_ids_of_tie(x_NV[rows], values_Nk[rows], ids_Nk[rows]))
    return _sorted(x_NV, ids_Nk)


def _largest_unordered(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` in two steps where that pays: the groups with the largest maxima first, then inside them."""
    n_rows, n_columns = x_NV.shape
    n_groups, rest = divmod(n_columns, GROUP)
    if n_groups < 4 * k:
        values_Nk, ids_Nk = x_NV.topk(k, dim=1)
        return values_Nk, ids_Nk
    grouped_NGg = x_NV[:, : n_groups * GROUP].view(n_rows, n_groups, GROUP)
    groups_Nk = grouped_NGg.amax(dim=2).topk(k, dim=1, sorted=False).indices
    candidates = grouped_NGg.gather(1, groups_Nk.unsqueeze(2).expand(-1, -1, GROUP)).flatten(1)
    candidate_ids = (groups_Nk.unsqueeze(2) * GROUP + torch.arange(GROUP, device=x_NV.device)).flatten(1)
    if rest:
        tail_ids = torch.arange(n_groups * GROUP, n_columns, device=x_NV.device).expand(n_rows, -1)
        candidates = torch.cat([candidates, x_NV[:, n_groups * GROUP :]], dim=1)
        candidate_ids = torch.cat([candidate_ids, tail_ids], dim=1)
    values_Nk, positions_Nk = candidates.topk(k, dim=1)
    return values_Nk, candidate_ids.gather(1, positions_Nk)


def _lowest_ids_of_tie(x_NV: Tensor, values_Nk: Tensor, ids_Nk: Tensor) -> Tensor:
    """The k largest of rows where the k-th number occurs more often than there is room: its lowest ids win."""
    k, n_columns = values_Nk.shape[1], x_NV.shape[1]
    threshold_N1 = values_Nk[:, -1:]
    n_above_N1 = (values_Nk > threshold_N1).sum(dim=1, keepdim=True)
    descending_V = torch.arange(n_columns, 0, -1, device=x_NV.device, dtype=torch.int32)
    tied_Nk = torch.where(x_NV == threshold_N1, descending_V, 0).topk(k, dim=1).values
    lowest_ids_Nk = n_columns - tied_Nk.long()
    rank_k = torch.arange(k, device=x_NV.device)
    from_tie_Nk = lowest_ids_Nk.gather(1, (rank_k - n_above_N1).clamp_min(0))
    return torch.where(rank_k < n_above_N1, ids_Nk, from_tie_Nk)


def _sorted(x_NV: Tensor, ids_Nk: Tensor) -> tuple[Tensor, Tensor]:
    """Sort ids by value, largest first, equal values by id: a sort by id, then a stable one by value."""
    ascending_Nk = ids_Nk.sort(dim=1).values
    values_Nk, order_Nk = x_NV.gather(1, ascending_Nk).sort(dim=1, descending=True, stable=True)
    return values_Nk, ascending_Nk.gather(1, order_Nk)
