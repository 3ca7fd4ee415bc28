"""One step: what one batch asks of the devices, what it gives back, and the one place where it is computed.

Used by `kd_assets.teacher` only. Names: B, T = documents and padded tokens of the batch, F = B x T, N = its rows that
are kept of blocks, M = its rows that predict a next token, H = hidden size, V = vocabulary, k as in top-k, d = draws.

The invariants: a `Step` is numpy and numbers only, so it can be sent to other processes, and all that decides a result
is in it; `Engine.run` is the same sequence of operations for equal steps, so every process of a tensor-parallel teacher
runs the same steps. It waits for nothing that the device does (transformers does once, at the start of a forward, to
look at the position ids), so results are on their way while the next batch is launched. A `StepResult` has the form
that goes to disk, and shares no memory with what the next step uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd_assets.contract import FinalState, TokenIds
from kd_assets.store.schema import HiddenState
from kd_assets.teacher.batch.forward import States, run_forward
from kd_assets.teacher.batch.outside import Outside, outside_mass
from kd_assets.teacher.batch.sampling import drawn_ids
from kd_assets.teacher.batch.topk import CompiledLogSums, LogSums, eager_log_sums, proven_log_sums, topk_logprobs
from kd_assets.teacher.model.head import ChunkBuffers
from kd_assets.teacher.model.load import Teacher

Int64Array = npt.NDArray[np.int64]
Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TopkStep:
    """Which positions predict a token, and what is kept of their distributions."""

    k: int
    rows_M: Int64Array
    """Rows of the flattened batch."""
    targets_M: Int64Array
    """The token that really comes next."""
    uniforms_Md: npt.NDArray[np.float32] | None = None
    """A number in [0, 1) for each draw from the distribution; None: no draws."""
    token_ids: TokenIds | None = None
    """The ids that distributions are cut to, at least k of them; None: all."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """One batch: a right-padded forward without a mask (see `batching`), and what is kept of it."""

    ids_BT: Int64Array
    blocks: tuple[int, ...] = ()
    """0-based decoder blocks whose outputs are kept."""
    final: tuple[FinalState, ...] = ()
    """States at the decoder's end that are kept."""
    rows_N: Int64Array
    """Rows of the flattened batch that are kept of each of `blocks` and `final`."""
    pooled_lengths_B: Int64Array | None = None
    """Tokens of each document that go into its embedding; None: no embeddings."""
    topk: TopkStep | None = None

    @property
    def needs_final(self) -> bool:
        """Whether the pass goes through the final norm."""
        return self.topk is not None or self.pooled_lengths_B is not None or "after_norm" in self.final


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockStates:
    """Outputs of one decoder block, or the states at the decoder's end."""

    bits_NH: Tensor
    """int16: the bits of bfloat16 numbers (rounded to nearest, ties to even)."""
    finite_N: Tensor
    """bool, as all that are called finite: whether the row is free of NaN and infinity."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PooledStates:
    """Embeddings: final hidden states pooled over each document."""

    mean_BH: Tensor
    """float32."""
    last_BH: Tensor
    """float32: of the last token."""
    finite_B: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TopkRows:
    """Next-token distributions, natural log at temperature 1, against all ids or those of the step."""

    ids_Mk: Tensor
    """int32, most probable first; ties: lowest token id first."""
    logprobs_Mk: Tensor
    """float16."""
    logsumexp_M: Tensor
    """float32."""
    target_logprob_M: Tensor
    """float32."""
    finite_M: Tensor
    sampled_ids_Md: Tensor | None
    """int32: ids drawn with replacement, in the order of the uniforms."""
    outside_mass_M: Tensor | None
    """float32: the probability of all other ids, where the step has some."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepResult:
    """What a step leaves on the device, as it goes to disk; no tensor of it is written to again."""

    blocks: dict[HiddenState, BlockStates]
    pooled: PooledStates | None
    topk: TopkRows | None

    def moved(self, move: Move) -> StepResult:
        """The same result with `move` applied to every tensor."""
        pooled, topk = self.pooled, self.topk
        return StepResult(
            blocks={
                n: BlockStates(bits_NH=move(block.bits_NH), finite_N=move(block.finite_N))
                for n, block in self.blocks.items()
            },
            pooled=None
            if pooled is None
            else PooledStates(
                mean_BH=move(pooled.mean_BH), last_BH=move(pooled.last_BH), finite_B=move(pooled.finite_B)
            ),
            topk=None
            if topk is None
            else TopkRows(
                ids_Mk=move(topk.ids_Mk),
                logprobs_Mk=move(topk.logprobs_Mk),
                logsumexp_M=move(topk.logsumexp_M),
                target_logprob_M=move(topk.target_logprob_M),
                finite_M=move(topk.finite_M),
                sampled_ids_Md=None if topk.sampled_ids_Md is None else move(topk.sampled_ids_Md),
                outside_mass_M=None if topk.outside_mass_M is None else move(topk.outside_mass_M),
            ),
        )


RunStep = Callable[[Step], StepResult]


class Engine:
    """A loaded teacher that runs steps. Holds the memory of one chunk of logits."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher, self._device = teacher, teacher.device
        self._buffers = ChunkBuffers(
            vocabulary_size=teacher.vocabulary_size, dtype=teacher.dtype, device=_logits_device(teacher)
        )
        self._outside: dict[TokenIds, Outside] = {}
        self._log_sums: LogSums = eager_log_sums
        if self._buffers.device.type == "cuda":
            self._log_sums = proven_log_sums(
                CompiledLogSums(),
                rows=self._buffers.rows,
                vocabulary_size=teacher.vocabulary_size,
                dtype=teacher.dtype,
                device=self._buffers.device,
            )

    @property
    def normaliser(self) -> str:
        """How the sum over the vocabulary is taken: "compiled" or "eager"."""
        return "eager" if self._log_sums is eager_log_sums else "compiled"

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Launch the step. On a CUDA device the result is complete when the current stream has come this far."""
        states = run_forward(
            self._teacher,
            on_device(step.ids_BT, self._device),
            blocks=step.blocks,
            needs_final=step.needs_final,
            needs_logits=step.topk is not None or step.pooled_lengths_B is not None,
            before_norm="before_norm" in step.final,
        )
        blocks: dict[HiddenState, BlockStates] = {}
        for n in step.blocks:
            state_FH = states.block_FH.pop(n)
            blocks[n] = block_states(state_FH, on_device(step.rows_N, state_FH.device))
        for name in step.final:
            end_FH = states.before_norm_FH if name == "before_norm" else states.final_FH
            assert end_FH is not None
            blocks[name] = block_states(end_FH, on_device(step.rows_N, end_FH.device))
        pooled = topk = None
        if step.pooled_lengths_B is not None:
            assert states.final_FH is not None
            final_BTH = states.final_FH.view(*step.ids_BT.shape, -1)
            pooled = pooled_states(final_BTH, on_device(step.pooled_lengths_B, final_BTH.device))
        if step.topk is not None:
            topk = self._topk(states, step.topk)
        # a model may lie on several devices, block by block
        return StepResult(blocks=blocks, pooled=pooled, topk=topk).moved(
            lambda tensor: tensor.to(self._device, non_blocking=True)
        )

    def _topk(self, states: States, step: TopkStep) -> TopkRows:
        """Through the head in chunks of rows: gathered from the final states, without padding and last tokens."""
        # chunks of equal size: a short last one would waste the matrix product
        n_rows = len(step.rows_M)
        if n_rows == 0:  # documents of one token
            return no_rows(step, self._device)
        n_chunks = -(-n_rows // self._buffers.rows)
        size = -(-n_rows // n_chunks)
        chunks = [slice(n * size, (n + 1) * size) for n in range(n_chunks)]
        return joined([self._topk_chunk(states, step, chunk) for chunk in chunks])

    def _topk_chunk(self, states: States, step: TopkStep, chunk: slice) -> TopkRows:
        logits_NV = self._logits(states, step.rows_M[chunk])
        targets_N = on_device(step.targets_M[chunk], logits_NV.device)
        log_outside_N = None if step.token_ids is None else self._outside_of(step.token_ids, logits_NV).cut(logits_NV)
        found = topk_logprobs(logits_NV, targets_N, step.k, self._log_sums)
        drawn_Nd = None
        if step.uniforms_Md is not None:
            uniforms_Nd = on_device(step.uniforms_Md[chunk], logits_NV.device)
            drawn_Nd = drawn_ids(logits_NV, found.largest_N, uniforms_Nd).int()
        checked_N = found.logsumexp_N + found.target_logprob_N + found.logprobs_Nk.sum(1)
        mass_N = None
        if log_outside_N is not None:
            mass_N = outside_mass(log_outside_N, found.logsumexp_N)
            checked_N = checked_N + mass_N
        return TopkRows(
            ids_Mk=found.ids_Nk.int(),
            logprobs_Mk=found.logprobs_Nk.half(),
            logsumexp_M=found.logsumexp_N,
            target_logprob_M=found.target_logprob_N,
            finite_M=checked_N.isfinite(),
            sampled_ids_Md=drawn_Nd,
            outside_mass_M=mass_N,
        )

    def _outside_of(self, token_ids: TokenIds, logits_NV: Tensor) -> Outside:
        """What is left out, put on the device once."""
        if token_ids not in self._outside:
            self._outside = {token_ids: Outside(token_ids, vocabulary_size=logits_NV.shape[1], device=logits_NV.device)}
        return self._outside[token_ids]

    def _logits(self, states: States, rows_N: Int64Array) -> Tensor:
        """[N, V] of these rows of the flattened batch."""
        if states.logits_FV is not None:
            return states.logits_FV.index_select(0, on_device(rows_N, states.logits_FV.device))
        assert states.final_FH is not None
        assert self._teacher.head is not None
        final_NH = states.final_FH.index_select(0, on_device(rows_N, states.final_FH.device))
        return self._teacher.head.logits(final_NH, self._buffers)


def on_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Without waiting: a copy from memory that is not pinned would wait for what the device does."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _logits_device(teacher: Teacher) -> torch.device:
    """Where the head computes; elsewhere than the first block where a model lies on several devices."""
    weight = None if teacher.head is None else getattr(teacher.head.linear, "weight", None)
    return weight.device if isinstance(weight, Tensor) and weight.device.type != "meta" else teacher.device


def block_states(state_FH: Tensor, rows_N: Tensor) -> BlockStates:
    state_NH = state_FH.index_select(0, rows_N)
    return BlockStates(bits_NH=bfloat16_bits(state_NH), finite_N=state_NH.isfinite().all(dim=1))


def bfloat16_bits(states: Tensor) -> Tensor:
    """int16: the states rounded to bfloat16 (to nearest, ties to even), as the bits that numpy can hold."""
    return states.to(torch.bfloat16).view(torch.int16)


def pooled_states(final_BTH: Tensor, lengths_B: Tensor) -> PooledStates:
    """The mean over each document's first tokens, and the state of the last of them.

    The mean accumulates in float32 whatever the states' precision; padding is left out, not multiplied by 0 (it may
    be NaN).
    """
    positions_T = torch.arange(final_BTH.shape[1], device=final_BTH.device)
    padding_BT1 = (positions_T >= lengths_B.unsqueeze(1)).unsqueeze(2)
    sum_BH = final_BTH.masked_fill(padding_BT1, 0.0).sum(dim=1, dtype=torch.float32)
    mean_BH = sum_BH / lengths_B.unsqueeze(1)
    last_BH = final_BTH[torch.arange(len(lengths_B), device=final_BTH.device), lengths_B - 1].float()
    # one NaN or infinity among the tokens is one in their mean
    return PooledStates(mean_BH=mean_BH, last_BH=last_BH, finite_B=mean_BH.isfinite().all(dim=1))


def no_rows(step: TopkStep, device: torch.device) -> TopkRows:
    """Kernels need not be asked what they make of nothing."""
    none_M = torch.empty(0, dtype=torch.float32, device=device)
    drawn = step.uniforms_Md
    return TopkRows(
        ids_Mk=torch.empty((0, step.k), dtype=torch.int32, device=device),
        logprobs_Mk=torch.empty((0, step.k), dtype=torch.float16, device=device),
        logsumexp_M=none_M,
        target_logprob_M=none_M,
        finite_M=none_M.bool(),
        sampled_ids_Md=None if drawn is None else torch.empty(drawn.shape, dtype=torch.int32, device=device),
        outside_mass_M=None if step.token_ids is None else none_M,
    )


def joined(chunks: list[TopkRows]) -> TopkRows:
    """The rows of all chunks, in their order."""
    drawn = [c.sampled_ids_Md for c in chunks if c.sampled_ids_Md is not None]
    masses = [c.outside_mass_M for c in chunks if c.outside_mass_M is not None]
    return TopkRows(
        ids_Mk=torch.cat([c.ids_Mk for c in chunks]),
        logprobs_Mk=torch.cat([c.logprobs_Mk for c in chunks]),
        logsumexp_M=torch.cat([c.logsumexp_M for c in chunks]),
        target_logprob_M=torch.cat([c.target_logprob_M for c in chunks]),
        finite_M=torch.cat([c.finite_M for c in chunks]),
        sampled_ids_Md=torch.cat(drawn) if drawn else None,
        outside_mass_M=torch.cat(masses) if masses else None,
    )
