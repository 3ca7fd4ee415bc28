"""The check `rebuilt`: from the final states as they are on disk, the distributions as they are on disk.

Used by `kd_assets.teacher` and by tests. A state that is off by a row, lacks its norm or is scaled by 2 % keeps most of
its top-1 tokens, and anyone who trains a draft head on it learns something wrong: so the states are sent through the
teacher's own norm (those from before it) and head, and the log-probabilities that come out are compared with those that
the top-k cache holds. A scale of states from before the norm is the one thing that no logits can show.

Names: P = positions that are compared, H = hidden size, V = vocabulary, k as in top-k, R = perturbations.

What may differ has three terms. The top-k cache rounds to float16 (2^-11 of a log-probability). The teacher rounds each
logit to its own precision: up to one unit in the last place, where another number of rows is summed in another order;
and where both caches are not of one pass, the states themselves may be another batch shape's (`recompute.LOGIT_RTOL`).
And the states are rounded to bfloat16, which is nothing for a teacher in bfloat16, and by codecs that round: of each
number an error that is spread evenly over one unit in the last place, so that what it makes of a logit has a standard
deviation, which is measured: `N_PERTURBATIONS` times such errors are added to the states once more. The sum of evenly
spread errors is within `DEVIATIONS` of its standard deviations but for one in 10^8 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_assets.contract import FinalState, TokenIds
from kd_assets.errors import TeacherError
from kd_assets.store.codecs.codec import PLAIN
from kd_assets.store.codecs.state_codec import largest_error
from kd_assets.store.codecs.states import rounding_steps
from kd_assets.store.schema import FINAL_CONVENTIONS, hidden_field
from kd_assets.teacher.batch.outside import masked
from kd_assets.teacher.model.head import ChunkBuffers, is_plain
from kd_assets.teacher.model.load import Teacher
from kd_assets.teacher.model.quantised import tolerance
from kd_assets.teacher.recompute import (
    FLOAT16_ATOL,
    FLOAT16_RTOL,
    LOG_ATOL,
    LOGIT_RTOL,
    NOT_KEPT,
    REROUTED_SHARE,
    Int64Array,
    Row,
    sampled_positions,
    storing_tolerance,
)

MOST_POSITIONS = 64
"""Positions of a document that are compared, each through the head 1 + `N_PERTURBATIONS` times."""

N_PERTURBATIONS = 8
DEVIATIONS = 8.0
"""Six would do for a standard deviation that is known; one that is measured on a few numbers may be a quarter short."""

ROUNDED_RTOL = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Of a logit itself: a unit in its last place in 16 bits."""
SUMMED_RTOL = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Of the row's largest logit: what another order of summation costs, where partial sums may be in 16 bits, too."""


def why_not(teacher: Teacher, *, is_shared: bool = False) -> str | None:
    """Why logits cannot be rebuilt from final states; None: they can."""
    if teacher.head is None:
        return "the teacher's logits are not what its head makes of its final states (it is run as a whole instead)"
    if is_shared:
        return "the teacher's head lies in pieces on several processes (tensor parallelism)"
    return None


def not_made(why: str) -> dict[str, Any]:
    """The record of a check that was not made: neither passed nor failed."""
    return {"passed": None, "not_made": why}


@torch.inference_mode()
def rebuilt_logits(teacher: Teacher, states_PH: Tensor, state: FinalState) -> Iterator[Tensor]:
    """Chunks of rows, float32 [.., V] on the head's device: the teacher's logits by its final states.

    `states_PH` in any floating dtype. Raises TeacherError where they cannot be had (see `why_not`).
    """
    if (why := why_not(teacher)) is not None:
        raise TeacherError(f"log-probabilities cannot be rebuilt from final states: {why}")
    assert teacher.head is not None
    weight = getattr(teacher.head.linear, "weight", None)
    device = weight.device if isinstance(weight, Tensor) and weight.device.type != "meta" else teacher.device
    dtype = teacher.end.dtypes.get(state, teacher.dtype)
    buffers = ChunkBuffers(
        vocabulary_size=teacher.vocabulary_size, dtype=teacher.dtype, device=device, most_rows=MOST_POSITIONS
    )
    for chunk_PH in torch.split(states_PH, buffers.rows):
        final_PH = chunk_PH.to(device=device, dtype=dtype)
        if state == "before_norm":
            if teacher.end.norm is None:
                raise TeacherError("log-probabilities cannot be rebuilt from states before the norm: none was found")
            final_PH = teacher.end.norm(final_PH.unsqueeze(0)).squeeze(0)
        yield teacher.head.logits(final_PH, buffers).float()


def rebuilt_logprobs(teacher: Teacher, bits_PH: np.ndarray[Any, Any], state: FinalState) -> Tensor:
    """float32 [P, V]: natural logarithms at temperature 1, by final states as a cache holds them (uint16 [P, H], the
    bits of bfloat16). Raises TeacherError where they cannot be had (see `why_not`)."""
    chunks = [logits_PV.log_softmax(dim=1) for logits_PV in rebuilt_logits(teacher, states_of(bits_PH), state)]
    return torch.cat(chunks) if chunks else torch.empty(0, teacher.vocabulary_size)


def states_of(bits_PH: np.ndarray[Any, Any]) -> Tensor:
    """bfloat16, by their bits in uint16."""
    return torch.from_numpy(bits_PH.view(np.int16).copy()).view(torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What is compared of a distribution; float32."""

    logits_Pk: Tensor
    """At the ids of the top-k cache."""
    logsumexp_P: Tensor

    @property
    def logprobs_Pk(self) -> Tensor:
        return self.logits_Pk - self.logsumexp_P.unsqueeze(1)


@dataclass(kw_only=True, slots=True)
class RebuiltComparison:
    """The largest differences between what is rebuilt and what the top-k cache holds."""

    teacher: Teacher
    seed: int
    token_ids: TokenIds | None = None
    """The ids that the top-k cache is cut to; None: all."""
    same_pass: bool = True
    """Whether both caches were made of the same forward passes."""
    codec: str = PLAIN
    """Of the top-k cache."""
    states_codec: str = PLAIN
    """Of the hidden-state cache."""
    largest: dict[str, float] = field(default_factory=dict)
    ratios: list[Tensor] = field(default_factory=list)
    """Of each position, the largest difference over its tolerance."""
    divergences: list[Tensor] = field(default_factory=list)
    """Of each position, KL from the stored to the rebuilt distribution, over the kept ids and the rest as one."""
    document_ids: list[str] = field(default_factory=list)
    states: list[FinalState] = field(default_factory=list)

    @property
    def n_positions(self) -> int:
        return sum(map(len, self.ratios))

    @property
    def worst(self) -> float:
        """Above 1 the check has failed."""
        if not self.ratios:
            return 0.0
        forgiven = not self.same_pass and self.teacher.routed and self.teacher.dtype != torch.float32
        ratio_N = torch.cat(self.ratios).sort(descending=True).values
        return float(ratio_N[int((REROUTED_SHARE if forgiven else 0.0) * len(ratio_N))])

    def add(self, topk: Row, hidden: Row) -> None:
        """Compare one document: its rows as they were read back from both caches."""
        document_id = str(topk["document_id"][0])
        n_stored = len(topk["logsumexp" if "logsumexp" in topk else "target_logprob"])
        self.document_ids.append(document_id)
        rows_topk = topk.get("positions", np.arange(n_stored)).astype(np.int64)
        n_tokens = len(hidden["input_ids"])
        rows_hidden = hidden.get("positions", np.arange(n_tokens)).astype(np.int64)
        both, in_topk, in_hidden = np.intersect1d(rows_topk, rows_hidden, assume_unique=True, return_indices=True)
        if not len(both):
            return
        chosen = sampled_positions(len(both), seed=self.seed, document_id=document_id, most=MOST_POSITIONS)
        for name in FINAL_CONVENTIONS:
            if hidden_field(name) in hidden:
                if name not in self.states:
                    self.states.append(name)
                bits_PH = hidden[hidden_field(name)].reshape(len(rows_hidden), -1)[in_hidden[chosen]]
                self._add_positions(topk, in_topk[chosen], states_of(bits_PH), name)

    def result(self) -> dict[str, Any]:
        """What the manifest keeps as `checks["rebuilt"]`."""
        if not self.n_positions:
            return not_made("no position of the sampled documents is in both caches")
        worst = self.worst
        return {
            "passed": worst <= 1.0,
            "n_documents": len(self.document_ids),
            "n_positions": self.n_positions,
            "document_ids": self.document_ids,
            "seed": self.seed,
            "states": list(self.states),
            "same_pass": self.same_pass,
            "worst_over_tolerance": worst,
            "mean_kl": float(torch.cat(self.divergences).mean()),
            **self.largest,
        }

    def _add_positions(self, topk: Row, at_P: Int64Array, states_PH: Tensor, state: FinalState) -> None:
        n_stored = len(topk["logsumexp" if "logsumexp" in topk else "target_logprob"])
        ids_Pk = torch.from_numpy(topk["topk_ids"].reshape(n_stored, -1)[at_P].astype(np.int64))
        stored_Pk = torch.from_numpy(topk["topk_logprobs"].reshape(n_stored, -1)[at_P].astype(np.float32))
        is_kept_Pk = ~stored_Pk.isneginf()  # behind what a position keeps its first id stands again
        found, size_P = self._rebuilt(states_PH, state, ids_Pk)
        rebuilt_Pk = found.logprobs_Pk.masked_fill(~is_kept_Pk, NOT_KEPT)
        deviation_Pk, deviation_P = self._deviations(states_PH, state, ids_Pk, found)
        computing_Pk, computing_P = self._computing(found.logits_Pk, size_P)
        probability_Pk = rebuilt_Pk.exp()
        # A logsumexp moves by the average of what its logits do: of those that are not kept, by as much as the largest.
        rest_P = (1 - probability_Pk.sum(dim=1)).clamp(min=0.0)
        summed_P = (probability_Pk * computing_Pk).sum(dim=1) + rest_P * computing_P
        rounding_Pk = storing_tolerance(rebuilt_Pk, self.codec)
        logprob_Pk = (stored_Pk - rebuilt_Pk).abs().masked_fill(~is_kept_Pk, 0.0)
        together_Pk = deviation_Pk + deviation_P.unsqueeze(1)
        ratio_Pk = logprob_Pk / (
            computing_Pk + summed_P.unsqueeze(1) + rounding_Pk + DEVIATIONS * together_Pk + LOG_ATOL
        )
        ratio_P = ratio_Pk.nan_to_num(nan=math.inf).amax(dim=1)
        if "logsumexp" in topk:
            logsumexp_P = torch.from_numpy(topk["logsumexp"][at_P].astype(np.float32))
            logit_Pk = (stored_Pk + logsumexp_P.unsqueeze(1) - found.logits_Pk).abs()
            logit_Pk = logit_Pk.masked_fill(~is_kept_Pk, 0.0)
            of_sum_P = torch.zeros_like(logsumexp_P)
            if self.codec != PLAIN:
                of_sum_P = FLOAT16_RTOL * logsumexp_P.abs() + FLOAT16_ATOL
            # the stored logsumexp is that of the stored logits, which is not rounded in between
            of_logit_Pk = computing_Pk + rounding_Pk + of_sum_P.unsqueeze(1) + DEVIATIONS * deviation_Pk + LOG_ATOL
            sum_P = (logsumexp_P - found.logsumexp_P).abs()
            ratio_P = torch.stack(
                [
                    ratio_P,
                    (logit_Pk / of_logit_Pk).nan_to_num(nan=math.inf).amax(dim=1),
                    (sum_P / (summed_P + of_sum_P + DEVIATIONS * deviation_P + LOG_ATOL)).nan_to_num(nan=math.inf),
                ]
            ).amax(dim=0)
            self._keep("max_abs_logsumexp_difference", sum_P)
        self.ratios.append(ratio_P.double())
        self.divergences.append(divergence(stored_Pk.masked_fill(~is_kept_Pk, NOT_KEPT), rebuilt_Pk))
        self._keep("max_abs_logprob_difference", logprob_Pk)

    def _rebuilt(self, states_PH: Tensor, state: FinalState, ids_Pk: Tensor) -> tuple[Kept, Tensor]:
        """What is kept of the rebuilt distributions, and the largest logit of each in size [P]; on the host."""
        logits, sums, sizes, first = [], [], [], 0
        for logits_NV in rebuilt_logits(self.teacher, states_PH, state):
            ids_Nk = ids_Pk[first : first + len(logits_NV)].to(logits_NV.device)
            first += len(logits_NV)
            sizes.append(logits_NV.abs().amax(dim=1).cpu())
            logits.append(logits_NV.gather(1, ids_Nk).cpu())
            sums.append(masked(logits_NV, self.token_ids).logsumexp(dim=1).cpu())
        return Kept(logits_Pk=torch.cat(logits), logsumexp_P=torch.cat(sums)), torch.cat(sizes)

    def _computing(self, logits_Pk: Tensor, size_P: Tensor) -> tuple[Tensor, Tensor]:
        """[P, k] and [P]: how far two ways of computing a kept logit, and the largest one, may lie apart."""
        teacher = self.teacher
        assert teacher.head is not None
        whole = SUMMED_RTOL[teacher.dtype] if self.same_pass else LOGIT_RTOL[teacher.dtype]
        if not self.same_pass or not is_plain(teacher.head.linear):
            whole = tolerance(whole, teacher.quantisation)
        rounded = ROUNDED_RTOL[teacher.dtype]
        steps = 1 + sum(x is not None for x in (teacher.head.divisor, teacher.head.multiplier, teacher.head.softcap))
        # what a scale or a cap makes of a logit is rounded, too
        return rounded * steps * logits_Pk.abs() + whole * size_P.unsqueeze(1), (rounded * steps + whole) * size_P

    def _deviations(self, states_PH: Tensor, state: FinalState, ids_Pk: Tensor, found: Kept) -> tuple[Tensor, Tensor]:
        """Standard deviations [P, k] of the kept logits and [P] of the logsumexp, by the rounding of the states."""
        rounds = largest_error(self.states_codec) > 0
        if self.teacher.end.dtypes.get(state) == torch.bfloat16 and not rounds:
            return torch.zeros_like(found.logits_Pk), torch.zeros_like(found.logsumexp_P)
        generator = torch.Generator().manual_seed(self.seed)
        wide_PH = states_PH.float()
        _, exponent_PH = torch.frexp(
            wide_PH
        )  # x = m · 2^e with m from 1/2 to 1: of bfloat16's 8 bits the last is 2^(e-8)
        ulp_PH = torch.ldexp(torch.ones_like(wide_PH), exponent_PH - 8)
        if rounds:
            bits_PH = states_PH.view(torch.int16).numpy().view(np.uint16)
            ulp_PH += torch.from_numpy(rounding_steps(bits_PH, self.states_codec))
        squares_Pk, squares_P = torch.zeros_like(found.logits_Pk), torch.zeros_like(found.logsumexp_P)
        for _ in range(N_PERTURBATIONS):
            error_PH = (torch.rand(wide_PH.shape, generator=generator) - 0.5) * ulp_PH
            moved, _ = self._rebuilt(wide_PH + error_PH, state, ids_Pk)
            squares_Pk += (moved.logits_Pk - found.logits_Pk).square()
            squares_P += (moved.logsumexp_P - found.logsumexp_P).square()
        each_Pk = (squares_Pk / N_PERTURBATIONS).sqrt()
        pooled_P1 = (squares_Pk / N_PERTURBATIONS).mean(dim=1, keepdim=True).sqrt()
        return torch.maximum(each_Pk, pooled_P1), (squares_P / N_PERTURBATIONS).sqrt()

    def _keep(self, name: str, differences: Tensor) -> None:
        value = float(differences.nan_to_num(nan=math.inf).max())
        self.largest[name] = max(self.largest.get(name, 0.0), value)


def divergence(stored_Pk: Tensor, rebuilt_Pk: Tensor) -> Tensor:
    """float64 [P]: KL of the kept ids and of all others as one, at least 0."""
    p_Pk, q_Pk = stored_Pk.double().exp(), rebuilt_Pk.double().exp()
    p_rest, q_rest = ((1 - x_Pk.sum(dim=1)).clamp(min=1e-12) for x_Pk in (p_Pk, q_Pk))
    of_kept_P = (p_Pk * (stored_Pk.double() - rebuilt_Pk.double())).sum(dim=1)
    return (of_kept_P + p_rest * (p_rest / q_rest).log()).clamp(min=0.0)
