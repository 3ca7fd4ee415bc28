"""Top-k log-probabilities of next tokens from logits of any float dtype: exact, in float32, with ties settled.

Used by `kd_assets.teacher` only; pure functions. Names: N = rows (positions), V = vocabulary, k as in top-k,
G = groups of `GROUP` neighbouring ids, g = numbers in a group, C = candidates.

No float32 copy of all logits is ever made: the k largest are found among the numbers as they are, and the normaliser is
a sum over runs of rows that fit a cache (or, on CUDA, one compiled reduction). Nothing here waits for the device.

How ties are settled: a number and its column become one int64 key, in whose order larger numbers come first, and of
equal ones the lower column. Selection is in two steps, so that 1/32 of the numbers are looked at closely: the k groups
whose maxima come first in that order, then inside them. That is exact. A number outside of the chosen groups has k
groups before its own; each of these holds a number that is larger, or equal and of a lower column, so k numbers come
before it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_assets.library_internals import any_number_of_rows

GROUP = 32

SCRATCH_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}
"""Temporary memory of one run of rows. Measured on 2 cores, 1,024 rows of 32,768 float32: the normaliser takes 10.3 ms
in runs of 8 or 16 MiB, 11.8 in runs of 2, 12.0 into one piece of memory as large as the logits (and 35 to 48 with
`sub`, `exp_` and `sum` over slices of columns or rows, which read memory three times)."""

PROOF_ATOL = 2.0**-16
"""Largest difference of a compiled normaliser (the logarithm of a sum of up to 2^18 numbers, at most 12.5) from the
eager one: 16 units in the last place of that."""

LogSums = Callable[[Tensor, Tensor, Tensor], Tensor]
"""logits [N, V], ids of their largest int64 [N, 1], these in float32 [N, 1] → float32 [N, 1]: log of sum of exp(x - m),
the sum over all ids in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TopK:
    """What the response-based cache keeps of each position (natural log, temperature 1, over all columns)."""

    ids_Nk: Tensor
    """int64, most probable first; ties: lowest token id first."""
    logprobs_Nk: Tensor
    """float32."""
    logsumexp_N: Tensor
    """float32: of the logits, over the full vocabulary."""
    target_logprob_N: Tensor
    """float32: of the token that really came next."""
    largest_N: Tensor
    """float32: the largest logit."""


def topk_logprobs(logits_NV: Tensor, targets_N: Tensor, k: int, log_sums: LogSums | None = None) -> TopK:
    """Top-k log-probabilities against the full vocabulary, in float32. Ties: lowest token id first.

    `logits_NV` of any float dtype, `targets_N` int64; a logit of -inf is that of an id which is not there. A row with
    NaN or with an infinity on top gets a logsumexp that is not finite. Raises ValueError if k > V.
    """
    if k > logits_NV.shape[1]:
        raise ValueError(f"k is {k}, the vocabulary has {logits_NV.shape[1]} ids")
    values_Nk, ids_Nk = largest(logits_NV, k)
    m_N1 = values_Nk[:, :1].contiguous()
    log_s_N1 = (log_sums or eager_log_sums)(logits_NV, ids_Nk[:, :1], m_N1)
    target_N1 = logits_NV.gather(1, targets_N.unsqueeze(1)).float()
    return TopK(
        ids_Nk=ids_Nk,
        logprobs_Nk=(values_Nk - m_N1) - log_s_N1,
        logsumexp_N=(m_N1 + log_s_N1).squeeze(1),
        target_logprob_N=((target_N1 - m_N1) - log_s_N1).squeeze(1),
        largest_N=m_N1.squeeze(1),
    )


def largest(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest numbers of each row in float32 and their columns in int64, sorted; ties: lowest column first.

    -0.0 equals 0.0; NaN comes before or after all numbers. (`torch.topk` leaves open which of equal numbers it takes,
    and in 16-bit logits many are equal.)
    """
    n_columns = x_NV.shape[1]
    # of a candidate: itself, in float32, as int32 (twice), its key (twice) and its column
    row_bytes = 40 * (n_columns // GROUP + k * GROUP if _in_groups(n_columns, k) else n_columns)
    rows = max(1, SCRATCH_BYTES[x_NV.device.type] // row_bytes)
    ids_Nk = torch.cat([_largest_columns(run_NV, k) for run_NV in torch.split(x_NV, rows)])
    return x_NV.gather(1, ids_Nk).float(), ids_Nk


def _in_groups(n_columns: int, k: int) -> bool:
    """Whether the first step leaves out enough groups to pay."""
    return n_columns // GROUP >= 4 * k


def _largest_columns(x_NV: Tensor, k: int) -> Tensor:
    """int64 [N, k], in order."""
    n_columns = x_NV.shape[1]
    columns_V = torch.arange(n_columns, device=x_NV.device)
    if not _in_groups(n_columns, k):
        return _columns_of(_keys(x_NV, columns_V).topk(k, dim=1).values)
    n_groups = n_columns // GROUP
    grouped_NGg = x_NV[:, : n_groups * GROUP].view(len(x_NV), n_groups, GROUP)
    group_keys_NG = _keys(grouped_NGg.amax(dim=2), columns_V[:n_groups])
    groups_Nk = _columns_of(group_keys_NG.topk(k, dim=1, sorted=False).values)
    numbers_NC = grouped_NGg.gather(1, groups_Nk.unsqueeze(2).expand(-1, -1, GROUP)).flatten(1)
    columns_NC = (groups_Nk.unsqueeze(2) * GROUP + columns_V[:GROUP]).flatten(1)
    keys_NC = _keys(numbers_NC, columns_NC)
    if n_columns % GROUP:  # the last ids, which fill no group
        tail = slice(n_groups * GROUP, None)
        keys_NC = torch.cat([keys_NC, _keys(x_NV[:, tail], columns_V[tail])], dim=1)
    return _columns_of(keys_NC.topk(k, dim=1).values)


def _keys(x_NC: Tensor, columns_C: Tensor) -> Tensor:
    """int64 [N, C]: in descending order of the keys numbers descend, and columns ascend among equal numbers.

    The upper 32 bits are those of the float32 with the magnitude of negative ones inverted, which makes the order of
    integers that of numbers; the lower 32 bits count columns backwards.
    """
    bits_NC = (x_NC.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    ordered_NC = bits_NC ^ ((bits_NC >> 31) & 0x7FFFFFFF)
    return (ordered_NC.long() << 32) | (0xFFFFFFFF - columns_C)


def _columns_of(keys_NC: Tensor) -> Tensor:
    return 0xFFFFFFFF - (keys_NC & 0xFFFFFFFF)


def eager_log_sums(logits_NV: Tensor, top_ids_N1: Tensor, largest_N1: Tensor) -> Tensor:
    """`LogSums` by `log_softmax`, whose one kernel does it all: at the largest logit it is 0 - log of the sum."""
    n_rows, n_columns = logits_NV.shape
    rows = max(1, SCRATCH_BYTES[logits_NV.device.type] // (4 * n_columns))
    scratch_NV = torch.empty((min(rows, n_rows), n_columns), dtype=torch.float32, device=logits_NV.device)
    log_s_N1 = torch.empty((n_rows, 1), dtype=torch.float32, device=logits_NV.device)
    for start in range(0, n_rows, rows):
        run = slice(start, min(start + rows, n_rows))
        logprobs_NV = scratch_NV[: run.stop - start]
        torch.log_softmax(logits_NV[run], dim=1, dtype=torch.float32, out=logprobs_NV)
        torch.neg(logprobs_NV.gather(1, top_ids_N1[run]), out=log_s_N1[run])
    return log_s_N1


def _fused(logits_NV: Tensor, largest_N1: Tensor) -> Tensor:
    return (logits_NV.float() - largest_N1).exp().sum(dim=1, keepdim=True).log()


class CompiledLogSums:
    """`LogSums` as one kernel that reads the logits once. Rows may differ in number, nothing else may."""

    @functools.cached_property
    def _compiled(self) -> Callable[[Tensor, Tensor], Tensor]:
        # Deterministic: no kernel is chosen by a stopwatch, so every attempt adds up in the same order. Made when first
        # used, in the proof: a torch that does not know this option says so here.
        return torch.compile(_fused, fullgraph=True, options={"deterministic": True})

    def __call__(self, logits_NV: Tensor, top_ids_N1: Tensor, largest_N1: Tensor) -> Tensor:
        if len(logits_NV) < 2:  # the compiler would make a kernel of its own for one row
            return eager_log_sums(logits_NV, top_ids_N1, largest_N1)
        any_number_of_rows(logits_NV)
        any_number_of_rows(largest_N1)
        log_s_N1: Tensor = self._compiled(logits_NV, largest_N1)
        return log_s_N1


@torch.inference_mode()
def proven_log_sums(
    candidate: LogSums, *, rows: int, vocabulary_size: int, dtype: torch.dtype, device: torch.device
) -> LogSums:
    """`candidate` if it works here and gives what the eager one does, else that: it is only slower."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler about its own code
            difference = max(
                _difference(candidate, torch.empty((rows, vocabulary_size), dtype=dtype, device=device)[:n])
                for n in (rows, max(2, rows // 2))
            )
    except Exception:  # noqa: BLE001 - no compiler, no kernel, no memory: whatever it is, there is another way
        return eager_log_sums
    return candidate if difference <= PROOF_ATOL else eager_log_sums


def _difference(candidate: LogSums, memory_NV: Tensor) -> float:
    """Of a candidate from the eager one on random logits; infinite where a number is NaN."""
    logits_NV = memory_NV.normal_(std=4.0, generator=torch.Generator(memory_NV.device).manual_seed(0))
    values_N1, ids_N1 = largest(logits_NV, 1)
    difference_N1 = candidate(logits_NV, ids_N1, values_N1) - eager_log_sums(logits_NV, ids_N1, values_N1)
    return float(difference_N1.abs().max().nan_to_num(nan=float("inf")))
