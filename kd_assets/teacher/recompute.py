"""The plain way to compute the caches, and the check of what was stored against it.

Used by `kd_assets.teacher` and by tests. One document at a time, no batch, no padding, no chunks: the model's own
forward with its own head, `log_softmax` + `topk`. It shares with the pass the loaded model, with the parts that were
found in it (see `anatomy`), and nothing else; and it is compared with what is read back from the written parts: the
cache is checked, not the pass.

Its memory is bounded: the states of the wanted blocks and of the decoder's end, and the logits of a sample of positions
(all float32 logits of 8,192 tokens and a vocabulary of 128,256 would take 4.2 GB).

Names: L = tokens of a document, P = positions whose logits are taken, H = hidden size, V = vocabulary, k as in top-k.

Tolerances have two terms. Storing rounds: float16 log-probabilities by 2^-11 of their size, bfloat16 states by 2^-8,
and codecs more.
Computing in another batch shape rounds differently, by a multiple of the precision of the teacher: relative to the
largest logit for log-probabilities, to a state's norm for states. A larger difference is recorded as `passed: false`
and the result is committed nevertheless: the check in the control plane then fails in everyone's sight with its
numbers, while the data stays there to be looked at; a task that refused to commit would only be started again, with
the same outcome.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd_assets.contract import Asset, FinalState, TokenIds
from kd_assets.store.arrays import flat
from kd_assets.store.codecs.codec import PLAIN
from kd_assets.store.codecs.state_codec import largest_error
from kd_assets.store.codecs.topk_compact import logprob_tolerance
from kd_assets.store.partfile import PartFile
from kd_assets.store.ragged_topk import with_rows_of_k
from kd_assets.store.reading.columns import column_of
from kd_assets.store.schema import HiddenState, hidden_field, is_ragged, k_of
from kd_assets.teacher.batch.outside import masked
from kd_assets.teacher.batch.sampling import cdf_distance, uniforms
from kd_assets.teacher.model.anatomy import tapped
from kd_assets.teacher.model.final_norm import watched
from kd_assets.teacher.model.load import Teacher
from kd_assets.teacher.model.quantised import Quantisation, tolerance

FLOAT16_RTOL = 2.0**-11
FLOAT16_ATOL = 2.0**-25
"""Half the smallest float16: a log-probability of a near-certain token is that close to 0."""
BFLOAT16_RTOL = 2.0**-8

LOGIT_RTOL = {torch.float32: 2.0**-15, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
"""What another batch shape may change in a logit, relative to the row's largest: eight roundings of the teacher's
precision in 16 bits (2^-8, 2^-11), and 512 in float32, where thousands of terms are summed in another order."""
STATE_RTOL = {torch.float32: 2.0**-12, torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
"""The same for a hidden state, as the norm of the difference over the norm: noise that grows with every block."""

LOG_ATOL = 2.0**-18
"""What the order of summation may change in the float32 logarithm of a sum, however small the logits are: those of a
document that begins with a token whose embedding is 0 (as that of padding is) are all 0."""

DRAW_ATOL = 2.0**-20
"""What float32 weights and their sums may change in a cumulative probability."""

MASS_ATOL = 2.0**-126
"""The smallest float32 that keeps its precision: a probability below may be stored as 0."""

REROUTED_SHARE = 0.1
"""Where two experts are tied within the rounding of their scores, another batch shape takes the other one, and that
token becomes another, which no bound on rounding covers. So of a teacher with experts, in 16 bits, this share of the
positions may be beyond tolerance; how many are is recorded. In float32 such ties do not occur."""

MOST_POSITIONS = 256
"""Positions of a document whose logits are compared: 131 MB in float32 with a vocabulary of 128,256."""

_TOPK_LISTS = ("topk_ids", "topk_logprobs")

NOT_KEPT = -60.0
"""The logarithm of what no token's probability adds to a sum, in the place of those that a position does not keep."""

Row = dict[str, npt.NDArray[Any]]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A document as the plain path gives it; float32."""

    positions_P: Int64Array
    """Ascending: where in the document `logits_PV` are."""
    logits_PV: Tensor
    block_LH: dict[HiddenState, Tensor]
    """Also of the states at the decoder's end that were asked for."""
    final_LH: Tensor


@torch.inference_mode()
def reference(
    teacher: Teacher,
    input_ids_L: npt.NDArray[np.uint32],
    blocks: Sequence[int],
    positions_P: Int64Array | None = None,
    final: Sequence[FinalState] = (),
) -> Reference:
    """Run one document through the whole model: the outputs of `blocks`, the final states, and the logits at these
    positions (None: at all). Without any position the head does not run. `final`: see `Reference.block_LH`."""
    positions_P = np.arange(len(input_ids_L)) if positions_P is None else positions_P
    ids_1L = torch.from_numpy(input_ids_L.astype(np.int64)).unsqueeze(0).to(teacher.device)
    wanted = {n: teacher.blocks[n] for n in blocks}
    norm = teacher.end.norm if "before_norm" in final else None
    with (
        tapped((teacher.decoder, *wanted.values())) as outputs,
        watched(() if norm is None else (norm,)) as runs,
    ):
        if len(positions_P):
            logits_PV = own_logits(teacher.model, ids_1L, torch.from_numpy(positions_P))
        else:
            teacher.decoder(input_ids=ids_1L, use_cache=False)
            logits_PV = torch.empty(0, teacher.vocabulary_size)
    final_LH = outputs[teacher.decoder][0][0].float()
    states: dict[HiddenState, Tensor] = {n: outputs[block][0][0].float() for n, block in wanted.items()}
    for name in final:
        if name == "after_norm":
            states[name] = final_LH
        elif norm is not None:
            states[name] = runs[norm][0].input[0].float()
    return Reference(positions_P=positions_P, logits_PV=logits_PV.float(), block_LH=states, final_LH=final_LH)


def own_logits(model: Any, ids_1L: Tensor, positions_P: Tensor) -> Tensor:
    """[P, V]: the model's own at these positions of one document; the others are not computed where it can leave them
    out (some models keep all, and some only a number of last ones)."""
    keep = inspect.signature(model.forward).parameters.get("logits_to_keep")
    if keep is not None and "Tensor" in str(keep.annotation):
        logits_PV: Tensor = model(input_ids=ids_1L, use_cache=False, logits_to_keep=positions_P).logits[0]
        if len(logits_PV) == len(positions_P):
            return logits_PV
    logits_LV: Tensor = model(input_ids=ids_1L, use_cache=False).logits[0]
    return logits_LV[positions_P]


def sampled_positions(n_positions: int, *, seed: int, document_id: str, most: int = MOST_POSITIONS) -> Int64Array:
    """At most `most` of a document's positions, the first and the last among them: the same for every attempt."""
    if n_positions <= most:
        return np.arange(n_positions)
    choice = random.Random(f"{seed}:{document_id}")  # noqa: S311 - a sample, no secret
    return np.array([0, *sorted(choice.sample(range(1, n_positions - 1), most - 2)), n_positions - 1])


def sampled_documents(n_documents: int, n_sampled: int, *, seed: int, partition_key: str) -> list[int]:
    """Indexes of the documents to recompute: the same for every attempt, others for every partition."""
    choice = random.Random(f"{seed}:{partition_key}")  # noqa: S311 - a sample, no secret
    return sorted(choice.sample(range(n_documents), min(n_sampled, n_documents)))


def stored_row(path: Path, row: int) -> Row:
    """Row `row` of a part file as arrays: what a reader of the cache would get. Top-k lists of different lengths are
    filled up to k, as `ragged_topk.with_rows_of_k` says."""
    with PartFile(path) as part:
        group = part.group_of(row)
        columns = [name for name in part.schema.names if name != "n_tokens"]
        table = part.read_group(group, columns).slice(row - int(part.first_rows[group]), 1)
        found = {name: flat(table[name]) for name in columns}
        if is_ragged(table.schema):
            lists: dict[str, Any] = {name: column_of(table[name]).values for name in columns if name in _TOPK_LISTS}
            found |= {name: of.reshape(-1) for name, of in with_rows_of_k(lists, k_of(table.schema)).items()}
        return found


def positions_of(row: Row, n_positions: int) -> Int64Array:
    """int64 [M], ascending: the positions that a stored document's rows are of; `n_positions`: of a cache that keeps
    all."""
    kept = row.get("positions")
    return np.arange(n_positions) if kept is None else kept.astype(np.int64)


@dataclass(kw_only=True, slots=True)
class Comparison:
    """The largest differences found in one cache, and how close the worst came to its tolerance."""

    asset: Asset
    dtype: torch.dtype
    seed: int
    """Of the sample and of the draws."""
    quantisation: Quantisation | None = None
    """The teacher's; rounded activations widen the tolerances."""
    token_ids: TokenIds | None = None
    """The ids that a top-k cache is cut to; None: all."""
    routed: bool = False
    """Whether the teacher routes tokens to experts: in 16 bits `REROUTED_SHARE` of them may be beyond tolerance."""
    top_p: float | None = None
    """Of a top-k cache whose positions keep as many tokens as have this mass."""
    codec: str = PLAIN
    """Of the cache: what its coding may change widens the tolerances."""
    largest: dict[str, float] = field(default_factory=dict)
    """Name of a difference → its largest value."""
    ratios: dict[str, list[Tensor]] = field(default_factory=dict)
    """Name of a difference → each position's over its tolerance, document by document. NaN counts as infinite."""
    n_positions: int = 0
    """Positions of documents that were compared."""

    @property
    def forgiven_share(self) -> float:
        """Of the positions."""
        return REROUTED_SHARE if self.routed and self.dtype != torch.float32 else 0.0

    @property
    def worst(self) -> float:
        """Largest difference over its tolerance, leaving out the forgiven share: above 1 the check has failed."""
        found = (torch.cat(ratios).sort(descending=True).values for ratios in self.ratios.values())
        return max((float(ratio_N[int(self.forgiven_share * len(ratio_N))]) for ratio_N in found), default=0.0)

    @property
    def share_beyond(self) -> float:
        """The largest part of the positions with a difference beyond its tolerance."""
        return max((float((torch.cat(r) > 1).double().mean()) for r in self.ratios.values()), default=0.0)

    def add(self, row: Row, expected: Reference) -> None:
        """Compare one stored document with its reference (of at least as many tokens)."""
        match self.asset:
            case "topk_cache":
                self._add_topk(row, expected)
            case "hidden_state_cache":
                self._add_hidden_states(row, expected)
            case "embedding_cache":
                self._add_embeddings(row, expected)

    def result(self, document_ids: Iterable[str]) -> dict[str, Any]:
        """What the manifest keeps as `checks["recomputed"]`."""
        documents = list(document_ids)
        return {
            "passed": self.worst <= 1.0,
            "n_documents": len(documents),
            "n_positions": self.n_positions,
            "document_ids": documents,
            "seed": self.seed,
            "worst_over_tolerance": self.worst,
            **({"share_beyond_tolerance": self.share_beyond} if self.forgiven_share else {}),
            **self.largest,
        }

    def _add_topk(self, row: Row, expected: Reference) -> None:
        """Values at the stored ids, and the k largest values whatever their ids: equal ones may swap places."""
        # A row a token that has a next one, of those positions that are kept.
        kept_M = positions_of(row, len(row["input_ids"]) - 1)
        n_stored = len(kept_M)
        is_kept_P = np.isin(expected.positions_P, kept_M)
        at_P = np.searchsorted(kept_M, expected.positions_P[is_kept_P])
        if not len(at_P):
            return
        self.n_positions += len(at_P)
        logits_PV = expected.logits_PV[torch.from_numpy(is_kept_P).to(expected.logits_PV.device)]
        computing_P1 = self._tolerance(LOGIT_RTOL) * logits_PV.abs().amax(dim=1, keepdim=True) + LOG_ATOL
        if self.token_ids is not None:
            self._add_outside_mass(row["outside_mass"][at_P], logits_PV, computing_P1.squeeze(1), self.token_ids)
        logits_PV = masked(logits_PV, self.token_ids)
        logprobs_PV = torch.log_softmax(logits_PV, dim=-1)
        device = logits_PV.device
        ids_Pk = torch.from_numpy(row["topk_ids"].reshape(n_stored, -1)[at_P].astype(np.int64)).to(device)
        stored_Pk = _on(row["topk_logprobs"].reshape(n_stored, -1)[at_P], device)
        targets_P = torch.from_numpy(row["input_ids"][kept_M[at_P] + 1].astype(np.int64)).to(device)

        is_kept_Pk = ~stored_Pk.isneginf() if self.top_p is not None else torch.ones_like(ids_Pk, dtype=torch.bool)
        at_ids_Pk = logprobs_PV.gather(1, ids_Pk).masked_fill(~is_kept_Pk, NOT_KEPT)
        ordered_Pk = logprobs_PV.topk(ids_Pk.shape[1], dim=1).values
        largest_Pk = ordered_Pk.masked_fill(~is_kept_Pk, NOT_KEPT)
        for plain_Pk in (at_ids_Pk, largest_Pk):
            tolerance_Pk = computing_P1 + storing_tolerance(plain_Pk, self.codec)
            difference_Pk = (stored_Pk - plain_Pk).abs().masked_fill(~is_kept_Pk, 0.0)
            self._note("max_abs_logprob_difference", difference_Pk, tolerance_Pk)
        if self.top_p is not None:
            self._add_kept_mass(ordered_Pk, is_kept_Pk, computing_P1.squeeze(1), self.top_p)
        target_P1 = logprobs_PV.gather(1, targets_P.unsqueeze(1))
        sum_P, computing_P = logits_PV.logsumexp(dim=1), computing_P1.squeeze(1)
        of_target_P, of_sum_P = 2 * computing_P, computing_P
        if self.codec != PLAIN:  # rounded to float16; of a target among the k it is the log-probability of its slot
            coded_P = storing_tolerance(largest_Pk, self.codec, at=target_P1).squeeze(1)
            in_slot_P = (ids_Pk == targets_P.unsqueeze(1)).any(dim=1)
            of_target_P = of_target_P + torch.where(in_slot_P, coded_P, FLOAT16_RTOL * target_P1.squeeze(1).abs())
            of_sum_P = of_sum_P + FLOAT16_RTOL * sum_P.abs() + FLOAT16_ATOL
        if "logsumexp" in row:
            self._note("max_abs_logsumexp_difference", (_on(row["logsumexp"][at_P], device) - sum_P).abs(), of_sum_P)
        self._note(
            "max_abs_target_logprob_difference",
            (_on(row["target_logprob"][at_P], device) - target_P1.squeeze(1)).abs(),
            of_target_P,
        )
        different_Pk = torch.where(is_kept_Pk, ids_Pk, -1 - torch.arange(ids_Pk.shape[1], device=device))
        n_repeated = int((different_Pk.sort(dim=1).values.diff(dim=1) == 0).sum())
        self._note("n_repeated_topk_ids", torch.tensor([float(n_repeated)]), torch.tensor([0.5]))
        if "sampled_ids" in row:
            self._add_draws(row, at_P, logits_PV, computing_P1.squeeze(1))

    def _add_kept_mass(self, ordered_Pk: Tensor, is_kept_Pk: Tensor, computing_P: Tensor, top_p: float) -> None:
        """How far the mass of the tokens that are kept is below `top_p`, where there could be more, and that of all but
        the last above it. Logits that each move by d at most move a mass by tanh(d / 2) at most, and storing rounds
        log-probabilities."""
        p_Pk = ordered_Pk.double().exp() * is_kept_Pk
        mass_P, n_P = p_Pk.sum(dim=1), is_kept_Pk.sum(dim=1)
        of_last_P = p_Pk.gather(1, (n_P - 1).unsqueeze(1)).squeeze(1)
        below_P = torch.where(n_P < is_kept_Pk.shape[1], top_p - mass_P, 0.0)
        above_P = torch.where(n_P > 1, mass_P - of_last_P - top_p, 0.0)
        storing_P = (p_Pk * (FLOAT16_RTOL * ordered_Pk.double().abs())).sum(dim=1)
        tolerance_P = (computing_P.double() / 2).tanh() + storing_P + FLOAT16_ATOL
        self._note("max_kept_mass_difference", torch.maximum(below_P, above_P).clamp(min=0.0), tolerance_P)

    def _add_outside_mass(
        self, stored_P: npt.NDArray[np.float32], logits_PV: Tensor, computing_P: Tensor, token_ids: TokenIds
    ) -> None:
        """Of the whole distributions. Logits that each move by d at most move a probability by tanh(d / 2) at most, and
        by a factor of e^(2 d) at most: the first tells large masses apart, the second small ones."""
        is_out_V = masked(torch.zeros_like(logits_PV[:1]), token_ids)[0].isinf()
        log_mass_P = logits_PV[:, is_out_V].logsumexp(dim=1) - logits_PV.logsumexp(dim=1)
        plain_P, d_P = log_mass_P.double().exp().cpu(), computing_P.double().cpu()
        tolerance_P = torch.minimum((d_P / 2).tanh(), plain_P * (2 * d_P).expm1()) + LOG_ATOL * plain_P + MASS_ATOL
        difference_P = (torch.from_numpy(stored_P).double() - plain_P).abs()
        self._note("max_abs_outside_mass_difference", difference_P, tolerance_P)

    def _add_draws(self, row: Row, at_P: Int64Array, logits_PV: Tensor, computing_P: Tensor) -> None:
        """Each stored draw against the number that it was drawn with, which can be had again."""
        n_positions = len(row["input_ids"]) - 1
        kept_M = positions_of(row, n_positions)
        drawn_Ld = np.repeat(row["sampled_ids"], row["sampled_counts"]).reshape(len(kept_M), -1).astype(np.int64)
        u_Ld = uniforms(self.seed, str(row["document_id"][0]), n_positions, drawn_Ld.shape[1])[kept_M]
        distance_P = cdf_distance(logits_PV, torch.from_numpy(drawn_Ld[at_P]), torch.from_numpy(u_Ld[at_P]))
        # Logits that each move by d at most move a cumulative probability by tanh(d / 2) at most.
        self._note("max_draw_cdf_distance", distance_P, (computing_P / 2).tanh().cpu() + DRAW_ATOL)

    def _add_hidden_states(self, row: Row, expected: Reference) -> None:
        kept_N = positions_of(row, len(row["input_ids"]))
        if not len(kept_N):
            return
        self.n_positions += len(kept_N)
        tolerance = BFLOAT16_RTOL + self._tolerance(STATE_RTOL) + largest_error(self.codec)
        for block, plain_LH in expected.block_LH.items():
            bits = torch.from_numpy(row[hidden_field(block)].view(np.int16).copy())
            stored_NH = bits.view(torch.bfloat16).view(len(kept_N), -1).to(plain_LH.device).float()
            plain_NH = plain_LH[torch.from_numpy(kept_N).to(plain_LH.device)]
            self._add_states("hidden", stored_NH, plain_NH, torch.full((len(kept_N),), tolerance))

    def _add_embeddings(self, row: Row, expected: Reference) -> None:
        final_LH = expected.final_LH[: len(row["input_ids"])]
        self.n_positions += len(final_LH)
        plain = torch.stack([final_LH.double().mean(dim=0).float(), final_LH[-1]])
        stored = np.stack([row["mean_embedding"], row["last_token_embedding"]])
        tolerance = torch.full((2,), self._tolerance(STATE_RTOL), device=plain.device)
        if self.forgiven_share:  # tokens that took another way are in the mean, and the last may be one of them
            tolerance += torch.tensor([self.forgiven_share, 1.0], device=plain.device)
        self._add_states("embedding", _on(stored, plain.device), plain, tolerance)

    def _tolerance(self, rtol: Mapping[torch.dtype, float]) -> float:
        return tolerance(rtol[self.dtype], self.quantisation)

    def _add_states(self, name: str, stored_LH: Tensor, plain_LH: Tensor, tolerance_L: Tensor) -> None:
        delta_LH = stored_LH - plain_LH
        self._keep(f"max_abs_{name}_difference", delta_LH.abs().max())
        relative_L = delta_LH.norm(dim=1) / plain_LH.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        self._note(f"max_relative_{name}_difference", relative_L, tolerance_L.to(relative_L.device))

    def _note(self, name: str, delta: Tensor, tolerance: Tensor) -> None:
        """Differences [N] or [N, k] of N positions, and what each may be."""
        self._keep(name, delta.max())
        ratio_N = (delta / tolerance).nan_to_num(nan=float("inf")).flatten(1 if delta.ndim > 1 else 0)
        self.ratios.setdefault(name, []).append((ratio_N.amax(dim=1) if delta.ndim > 1 else ratio_N).double().cpu())

    def _keep(self, name: str, value: Tensor) -> None:
        self.largest[name] = max(self.largest.get(name, 0.0), float(value.nan_to_num(nan=float("inf"))))


def storing_tolerance(logprobs_Pk: Tensor, codec: str, *, at: Tensor | None = None) -> Tensor:
    """How far a stored log-probability may be from the number that was stored: [P, k], or at others of the same rows.

    `logprobs_Pk` float32: those that the rows keep.
    """
    wanted = logprobs_Pk if at is None else at
    rounding = FLOAT16_RTOL * wanted.abs() + FLOAT16_ATOL
    if codec == PLAIN:
        return rounding
    kept_Pk, numbers = (x.double().cpu().numpy() for x in (logprobs_Pk, wanted))
    coding = logprob_tolerance(kept_Pk, at=numbers)
    return rounding + torch.from_numpy(coding).to(device=wanted.device, dtype=wanted.dtype)


def _on(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(device)
