"""The ids that a student does not have: their probability, and logits without them.

Used by `kd_assets.teacher` only. Names: N = rows (positions), V = vocabulary, O = ids (columns) that are left out.

The left-out columns are made -inf where the logits are: no second tensor of their size, no other shape for the kernels
that follow, and each of these gives such an id the probability 0. Only the left-out columns are looked at, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_assets.contract import TokenIds
from kd_assets.teacher.batch.topk import SCRATCH_BYTES

_BYTES_A_LOGIT = 12
"""Of a left-out one: gathered as it is, in float32, and its exponential."""

_MOST_RUNS = 16
"""Of left-out columns that are taken as slices, 13 times faster on a CPU than one by one; a vocabulary with more holes
has its columns gathered."""


class Outside:
    """The columns of a teacher's logits that a vocabulary leaves out, on the device of the logits."""

    def __init__(self, token_ids: TokenIds, *, vocabulary_size: int, device: torch.device) -> None:
        ends = [0, *(end for _, end in token_ids.runs)]
        firsts = [*(first for first, _ in token_ids.runs), vocabulary_size]
        runs = [(end, min(first, vocabulary_size)) for end, first in zip(ends, firsts, strict=True)]
        runs = [(end, first) for end, first in runs if end < first]
        self._columns: list[slice | Tensor] = [slice(*run) for run in runs]
        self._most = max((first - end for end, first in runs), default=0)
        if len(runs) > _MOST_RUNS:
            ids_O = torch.cat([torch.arange(*run) for run in runs])
            self._columns, self._most = [ids_O.to(device)], len(ids_O)

    def cut(self, logits_NV: Tensor) -> Tensor:
        """float32 [N]: the logsumexp of the left-out logits, which are -inf on return; -inf where none are left out.

        `logits_NV` of any float dtype; runs of rows at a time, in `SCRATCH_BYTES`.
        """
        log_outside_N = torch.full((len(logits_NV),), -torch.inf, dtype=torch.float32, device=logits_NV.device)
        rows = max(1, SCRATCH_BYTES[logits_NV.device.type] // (_BYTES_A_LOGIT * max(1, self._most)))
        for columns in self._columns:
            for start in range(0, len(logits_NV), rows):
                run = slice(start, start + rows)
                log_of_columns = _taken(logits_NV[run], columns).float().logsumexp(dim=1)
                log_outside_N[run] = torch.logaddexp(log_outside_N[run], log_of_columns)
            if isinstance(columns, slice):
                logits_NV[:, columns] = -torch.inf
            else:
                logits_NV.index_fill_(1, columns, -torch.inf)
        return log_outside_N


def _taken(logits_NV: Tensor, columns: slice | Tensor) -> Tensor:
    return logits_NV[:, columns] if isinstance(columns, slice) else logits_NV.index_select(1, columns)


def outside_mass(log_outside_N: Tensor, log_kept_N: Tensor) -> Tensor:
    """float32 [N]: the probability of what is left out, by the logsumexp of its logits and of the kept ones.

    Right to a few units in its last places however small it is; 0 where nothing is left out; NaN where either is NaN or
    infinite.
    """
    return (log_outside_N - torch.logaddexp(log_outside_N, log_kept_N)).exp()


def masked(logits_PV: Tensor, token_ids: TokenIds | None) -> Tensor:
    """The plain way, for checks: a copy of the logits with -inf at every id that is left out."""
    if token_ids is None:
        return logits_PV
    is_kept_V = torch.zeros(logits_PV.shape[1], dtype=torch.bool)
    for first, end in token_ids.runs:
        is_kept_V[first:end] = True
    return logits_PV.masked_fill(~is_kept_V.to(logits_PV.device), -torch.inf)
