"""Random draws from the teacher's distributions: what random-sampling KD learns from instead of the top k.

Used by `kd_assets.teacher` only; pure functions. Names: N = rows (positions), P = positions to check, V = vocabulary,
d = draws of a position, G = groups of `GROUP` neighbouring ids, R and K = rows and columns of any table of weights.

The invariant: a position's uniform numbers depend on the seed, its document's id and its place in the document, on
nothing else: not on batches, on other documents, on other caches or on `max_length`. What is drawn with them follows
from the logits alone, so only a draw within rounding of a boundary between two ids may fall on the other side
elsewhere.

Why draws: a student that learns from the k most likely ids alone learns a distribution that is cut off, while counts
of random draws are right on average (Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation
in LLMs"; with draws from the distribution itself, their importance weights are the counts over the draws).
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GROUP = 32
"""Neighbouring ids whose weights are summed first: only the sums, and the groups that are hit, are looked at again."""

SCRATCH_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
"""Memory for one run of rows: what fills a GPU, and does not go far beyond a CPU's caches."""

_SHARES = 2.0**46
"""What a table row's weights are made whole numbers of. Sums of whole numbers do not depend on their order, which
`torch.cumsum` of floats on CUDA leaves open; up to 2^53 a float64 holds them exactly."""

_BYTES_A_WEIGHT = 28
"""Of a weight that is turned into shares: itself, in float64, its share, and the sum up to it."""

_CHECKED_ROWS = 32


def uniforms(seed: int, document_id: str, n_positions: int, draws: int) -> npt.NDArray[np.float32]:
    """float32 [n_positions, draws] in [0, 1), multiples of 2^-24; row i belongs to position i of the document.

    The generator is Philox 4x64 with 10 rounds (Salmon et al. 2011) as `numpy.random.Philox` gives its raw words, its
    key the first 16 bytes, little-endian, of the SHA-256 of "<seed>:<document id>" in UTF-8. Each 64-bit word makes two
    numbers, its lower 32 bits first: the upper 24 bits of a half, over 2^24. Numbers fill rows one after the other, so
    more positions leave the earlier ones as they are.
    """
    digest = hashlib.sha256(f"{seed}:{document_id}".encode()).digest()
    philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    n_numbers = n_positions * draws
    words = np.asarray(philox.random_raw((n_numbers + 1) // 2), dtype="<u8")
    halves = words.view("<u4")[:n_numbers]
    numbers: npt.NDArray[np.float32] = (halves >> 8).astype(np.float32) * np.float32(2.0**-24)
    return numbers.reshape(n_positions, draws)


def drawn_ids(logits_NV: Tensor, largest_N: Tensor, uniforms_Nd: Tensor) -> Tensor:
    """int64 [N, d]: for each uniform number u the lowest id whose cumulative probability is above u.

    That is a draw, with replacement, from the whole softmax at temperature 1. `logits_NV` of any float dtype,
    `largest_N` float32 [N] or [N, 1]: the largest of each row, `uniforms_Nd` float32 in [0, 1). Weights are float32;
    an id whose probability is 0 (or below 2^-46) is never drawn. Rows that hold NaN give some id. Runs of rows at a
    time, in `SCRATCH_BYTES`; never waits for the device.
    """
    (n_rows, n_columns), draws, device = logits_NV.shape, uniforms_Nd.shape[1], logits_NV.device
    n_groups = -(-n_columns // GROUP)
    row_bytes = 4 * n_groups * GROUP + _BYTES_A_WEIGHT * (n_groups + draws * GROUP)
    rows = max(1, min(n_rows, SCRATCH_BYTES[device.type] // row_bytes))
    # zeros, for the columns that fill up the last group
    weights_RV = torch.zeros((rows, n_groups * GROUP), dtype=torch.float32, device=device)
    drawn_Nd = torch.empty((n_rows, draws), dtype=torch.int64, device=device)
    for start in range(0, n_rows, rows):
        run = slice(start, min(start + rows, n_rows))
        run_RV = weights_RV[: run.stop - start]
        torch.sub(logits_NV[run], largest_N[run].reshape(-1, 1), out=run_RV[:, :n_columns]).exp_()
        drawn_Nd[run] = _drawn(run_RV.view(len(run_RV), n_groups, GROUP), uniforms_Nd[run])
    return drawn_Nd.clamp_(max=n_columns - 1)


def _drawn(weights_NGg: Tensor, uniforms_Nd: Tensor) -> Tensor:
    """In two steps: which group, and with what is left of the uniform number which id of the group."""
    n_rows, _, size = weights_NGg.shape
    groups_Nd, rest_Nd = _inverse_cdf(weights_NGg.sum(dim=2), uniforms_Nd)
    hit_Ndg = weights_NGg.gather(1, groups_Nd.unsqueeze(2).expand(-1, -1, size))
    places, _ = _inverse_cdf(hit_Ndg.flatten(0, 1), rest_Nd.reshape(-1, 1))
    return groups_Nd * size + places.view(n_rows, -1)


def _inverse_cdf(weights_RK: Tensor, uniforms_Rd: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [R, d]: the first column with more than u of its row's weight up to it; and float64 [R, d] in [0, 1]: how
    far u is through that column's weight."""
    unit_R1 = _SHARES / weights_RK.sum(dim=1, keepdim=True, dtype=torch.float64)
    shares_RK = (weights_RK * unit_R1).round_().long()
    ends_RK = shares_RK.cumsum(dim=1)
    all_R1 = ends_RK[:, -1:].contiguous()
    points_Rd = uniforms_Rd * all_R1.double()
    # Below the end even where a product is rounded up to it; a share of 0 ends where the one before it does.
    columns_Rd = torch.searchsorted(ends_RK, points_Rd.long().minimum(all_R1 - 1), right=True)
    columns_Rd = columns_Rd.clamp_(max=weights_RK.shape[1] - 1)  # rows of NaN
    share_Rd = shares_RK.gather(1, columns_Rd)
    return columns_Rd, (points_Rd - (ends_RK.gather(1, columns_Rd) - share_Rd)) / share_Rd


def cdf_distance(logits_PV: Tensor, ids_Pd: Tensor, uniforms_Pd: Tensor) -> Tensor:
    """float64 [P], on the CPU: how far each row's worst draw lies outside of what these logits give its id of [0, 1).

    It is 0 where u is between the cumulative probabilities before and after its id. The plain way, for a check: whole
    float64 distributions, of a few rows at a time. `ids_Pd` int64 and `uniforms_Pd`, on the CPU, in any order: the
    inverse of a cumulative distribution is monotone, so the i-th smallest id belongs to the i-th smallest number.
    """
    distances = [torch.zeros(0, dtype=torch.float64)]
    for i in range(0, len(logits_PV), _CHECKED_ROWS):
        rows = slice(i, i + _CHECKED_ROWS)
        probabilities_PV = logits_PV[rows].double().softmax(dim=1).cpu()
        ids_d, u_d = ids_Pd[rows].sort(dim=1).values, uniforms_Pd[rows].double().sort(dim=1).values
        after_d = probabilities_PV.cumsum(dim=1).gather(1, ids_d)
        before_d = after_d - probabilities_PV.gather(1, ids_d)
        distances.append(torch.maximum(before_d - u_d, u_d - after_d).clamp_min(0.0).amax(dim=1))
    return torch.cat(distances)
