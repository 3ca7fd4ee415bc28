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

from kd_assets.library_internals import has_hooks

CPU_CHUNK_BYTES = 128 * 2**20
"""Logits of one chunk on a CPU: 1,024 rows of a vocabulary of 32,768 in float32. Smaller ones do not fill the matrix
product (measured on 2 cores: 560 us a row at 128 rows, 438 at 340, 378 at 1,024)."""
CUDA_CHUNK_BYTES = 512 * 2**20
"""On a GPU: 2,092 rows of a vocabulary of 128,256 in 16 bits, enough to fill the matrix product."""

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
        """[N, V], valid until the next call with these buffers: in the model's precision, and its own numbers."""
        logits_NV = self._linear(final_NH, buffers)
        if self.divisor is not None:
            logits_NV.div_(self.divisor)
        if self.multiplier is not None:
            logits_NV.mul_(self.multiplier)
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def _linear(self, final_NH: Tensor, buffers: ChunkBuffers) -> Tensor:
        # Straight into a buffer: fresh memory of this size comes from the kernel page by page, which on a CPU costs
        # a quarter of the product itself. A quantised or sharded head knows its own way.
        if is_plain(self.linear):
            weight_HV, out_NV = self.linear.weight.T, buffers.logits(len(final_NH))
            final_NH = final_NH.to(weight_HV.dtype)  # Mamba keeps its residuals in float32, whatever its weights are
            if out_NV.dtype == weight_HV.dtype:
                bias_V = getattr(self.linear, "bias", None)
                if bias_V is None:
                    return torch.mm(final_NH, weight_HV, out=out_NV)
                return torch.addmm(bias_V, final_NH, weight_HV, out=out_NV)
        logits_NV: Tensor = self.linear(final_NH)
        return logits_NV


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a matrix product and nothing else: quantised layers are subclasses or have a weight that is no
    ordinary tensor, others take hooks, and layers that are sharded or laid on another device have a `forward` of their
    own."""
    is_wrapped = has_hooks(linear) or "forward" in vars(linear)
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not is_wrapped


class ChunkBuffers:
    """Memory for one chunk of logits in the model's precision, taken once for the whole pass."""

    def __init__(
        self, *, vocabulary_size: int, dtype: torch.dtype, device: torch.device, most_rows: int | None = None
    ) -> None:
        """`most_rows`: where no chunk has more of them."""
        self.rows = chunk_rows(vocabulary_size, dtype, device)
        if most_rows is not None:
            self.rows = min(self.rows, most_rows)
        self.device = device
        self._shape, self._dtype = (self.rows, vocabulary_size), dtype
        self._memory: Tensor | None = None

    def logits(self, n: int) -> Tensor:
        """[n, V]."""
        if self._memory is None:
            self._memory = torch.empty(self._shape, dtype=self._dtype, device=self.device)
        return self._memory[:n]


def chunk_rows(vocabulary_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of one chunk. Depends on nothing that changes between attempts, so that neither do the bytes."""
    chunk_bytes = CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
    return max(16, min(8192, chunk_bytes // (dtype.itemsize * vocabulary_size)))


DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def configured_head(model: Any, config: Any) -> Head | None:
    """The head as the model's text configuration describes it; None when the model has no output layer."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Module):
        return None

    def number(names: tuple[str, ...]) -> float | None:
        values = (getattr(config, name, None) for name in names)
        return next((float(v) for v in values if isinstance(v, (int, float)) and v), None)  # MPT's may be a word

    return Head(linear=linear, divisor=number(DIVISORS), multiplier=number(MULTIPLIERS), softcap=number(SOFTCAPS))


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
    difference = relative_difference(ours_NV.float(), logits_NV.to(ours_NV.device).float())
    return (head if difference <= PROOF_RTOL[final_NH.dtype] else None), difference


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of `theirs`. NaN or infinity in both is no difference:
    broken weights are not the head's fault, and the pass will name the document. In one alone it is an infinite one."""
    broken = ~ours.isfinite() & ~theirs.isfinite()
    delta = (ours - theirs).abs().masked_fill(broken, 0.0)
    difference = delta.masked_fill(delta.isnan(), float("inf")).max().item()
    scale = theirs.masked_fill(~theirs.isfinite(), 0.0).abs().max().item()
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))
