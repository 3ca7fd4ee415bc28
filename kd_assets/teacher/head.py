"""The language-model head, run on chunks of rows so that all logits never exist at once; and its proof.

Used by `kd_assets.teacher` only. Names: N = rows (tokens) of a chunk, H = hidden size, V = vocabulary (columns of the
logits), B, T = documents and tokens of the probe.

The invariant: a `Head` gives the model's own logits. What stands between the final hidden states and the logits (a
bias, a scale, soft-capping) is read from the configuration and then proved on the loaded weights: `proven_head`
compares both on a probe. A model with something else in between has no `Head`, and the pass takes the model's own
logits (see `forward`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

CPU_CHUNK_BYTES = 128 * 2**20
"""Float32 logits of one chunk on a CPU: 1,024 rows of a vocabulary of 32,768. Smaller ones do not fill the matrix
product (measured on 2 cores: 560 us a row at 128 rows, 438 at 340, 378 at 1,024)."""
CUDA_CHUNK_BYTES = 2**30
"""On a GPU: 2,092 rows of a vocabulary of 128,256, enough to fill the matrix product."""

PROOF_RTOL = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest difference in the proof, relative to the largest logit: one rounding of the result in 16 bits; in float32
what another order of summation costs. The same numbers in the same shape mostly give no difference at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """logits = softcap(linear(final hidden state) x multiplier / divisor), each part where the model has it."""

    linear: nn.Module
    """[.., H] → [.., V]; with or without a bias, tied to the embeddings or not."""
    divisor: float | None = None
    """Granite's `logits_scaling`."""
    multiplier: float | None = None
    """Cohere's `logit_scale`, Falcon-H1's `lm_head_multiplier`."""
    softcap: float | None = None
    """Gemma's `final_logit_softcapping`: c x tanh(logits / c)."""

    def logits(self, final_NH: Tensor, buffers: ChunkBuffers) -> Tensor:
        """float32 [N, V], valid until the next call with these buffers.

        Computed in the model's precision, as the model does, and only then widened: the same numbers as its own.
        """
        logits_NV = self._linear(final_NH, buffers)
        if self.divisor is not None:
            logits_NV.div_(self.divisor)
        if self.multiplier is not None:
            logits_NV.mul_(self.multiplier)
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return buffers.widened(logits_NV)

    def _linear(self, final_NH: Tensor, buffers: ChunkBuffers) -> Tensor:
        # Straight into a buffer: fresh memory of this size comes from the kernel page by page, which on a CPU costs
        # a quarter of the product itself. A quantised or sharded head knows its own way.
        if not is_plain(self.linear):
            logits_NV: Tensor = self.linear(final_NH)
            return logits_NV
        out_NV, weight_HV = buffers.logits(len(final_NH)), self.linear.weight.T
        bias_V = getattr(self.linear, "bias", None)
        if bias_V is None:
            return torch.mm(final_NH, weight_HV, out=out_NV)
        return torch.addmm(bias_V, final_NH, weight_HV, out=out_NV)


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a matrix product and nothing else: quantised and sharded layers are subclasses or take hooks."""
    return type(linear) is nn.Linear and not linear._forward_hooks and not linear._forward_pre_hooks


class ChunkBuffers:
    """Memory for one chunk of logits, taken once for the whole pass.

    Cost: rows x V x 4 bytes twice, and in 16-bit precision once more in that precision.
    """

    def __init__(self, *, vocabulary_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = chunk_rows(vocabulary_size, device)
        self.dtype = dtype
        self._shape = (self.rows, vocabulary_size)
        self._device = device
        self._memory: dict[str, Tensor] = {}

    def logits(self, n: int) -> Tensor:
        """[n, V] in the model's precision."""
        return self._buffer("logits", self.dtype)[:n]

    def scratch(self, n: int) -> Tensor:
        """float32 [n, V], for the reductions over a chunk."""
        return self._buffer("scratch", torch.float32)[:n]

    def widened(self, logits_NV: Tensor) -> Tensor:
        """The same logits in float32; themselves where they are."""
        if logits_NV.dtype == torch.float32:
            return logits_NV
        return self._buffer("float32", torch.float32)[: len(logits_NV)].copy_(logits_NV)

    def _buffer(self, name: str, dtype: torch.dtype) -> Tensor:
        if name not in self._memory:
            self._memory[name] = torch.empty(self._shape, dtype=dtype, device=self._device)
        return self._memory[name]


def chunk_rows(vocabulary_size: int, device: torch.device) -> int:
    """Rows of one chunk. Depends on nothing that changes between attempts, so that neither do the bytes."""
    chunk_bytes = CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
    return max(16, min(8192, chunk_bytes // (4 * vocabulary_size)))


def configured_head(model: Any, config: Any) -> Head | None:
    """The head as the model's text configuration describes it; None when the model has no output layer."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Module):
        return None
    multiplier = getattr(config, "logit_scale", None)
    if multiplier is None:
        multiplier = getattr(config, "lm_head_multiplier", None)
    return Head(
        linear=linear,
        divisor=getattr(config, "logits_scaling", None),
        multiplier=multiplier,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


@torch.inference_mode()
def proven_head(head: Head | None, final_BTH: Tensor, logits_BTV: Tensor) -> tuple[Head | None, float]:
    """`head` if it turns these final hidden states into these logits of the model's own, else None.

    Also the largest difference relative to the largest logit (infinite when the shapes differ).
    """
    if head is None:
        return None, float("inf")
    final_NH, logits_NV = final_BTH.flatten(0, 1), logits_BTV.flatten(0, 1)
    vocabulary_size = logits_NV.shape[-1]
    buffers = ChunkBuffers(vocabulary_size=vocabulary_size, dtype=final_NH.dtype, device=final_NH.device)
    if is_plain(head.linear) and head.linear.out_features != vocabulary_size:
        return None, float("inf")
    pieces = [head.logits(piece_NH, buffers).clone() for piece_NH in torch.split(final_NH, buffers.rows)]
    ours_NV = torch.cat(pieces)
    if ours_NV.shape != logits_NV.shape:
        return None, float("inf")
    difference = relative_difference(ours_NV, logits_NV.float())
    return (head if difference <= PROOF_RTOL[final_NH.dtype] else None), difference


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of `theirs`. NaN or infinity in both is no difference:
    broken weights are not the head's fault, and the pass will name the document."""
    broken = ~ours.isfinite() & ~theirs.isfinite()
    difference = (ours - theirs).abs().masked_fill(broken, 0.0).max().item()
    scale = theirs.masked_fill(~theirs.isfinite(), 0.0).abs().max().item()
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))
