"""The student's log-probabilities of a few ids, without a second tensor of the logits' size.

Used by the losses of this folder. Logits are the largest tensor of a training by far (8 x 2,048 positions of 151,936
ids are 10 GB in float32). What the losses need of them is [M, k], so they are reduced in runs of rows, in float32
whatever their own dtype, and the backward pass computes probabilities again instead of keeping them: besides the logits
there is their gradient, in their dtype, and one run. No double backward.
Measured on a CPU, 1,024 rows of 32,000 ids, k = 16, against plain torch operations: beside logits of 125 MiB in float32
122 MiB instead of 617, of 62 MiB in bfloat16 74 instead of 632, about four times as fast.

Legend: as of the folder; R rows of a run, … the dimensions before the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RUN_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
"""Logits of one run: what stays in a CPU's caches, and what keeps a GPU busy."""

Places = tuple[Tensor, ...]
"""int64 [M] each: where in the dimensions before the last one the selected rows are."""


def selected_places(mask: Tensor, student: Tensor, *teacher: Tensor, shifted: bool = True) -> Places:
    """Where `mask` (bool […]) is True. `student` and `teacher` are […, any], `shifted` when about the next token.

    Raises ValueError for a mask that is not bool, or tensors that are not about the same positions.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype}: expected torch.bool (numbers would be taken for indices)")
    for name, tensor in (("student", student), *(("teacher", t) for t in teacher)):
        if tensor.shape[: mask.ndim] != mask.shape:
            rule = "row i is about token i + 1: give logits[:, :-1], and input_ids[:, 1:], with topk_mask"
            raise ValueError(
                f"the mask is over {tuple(mask.shape)} positions, and the {name}'s tensor has the shape "
                f"{tuple(tensor.shape)}: {rule if shifted else 'give states of all tokens with hidden_mask'}"
            )
    return mask.nonzero(as_tuple=True)


def chosen_logprobs(
    logits: Tensor, places: Places, ids_Mk: Tensor, *, temperature: float = 1.0, with_rest: bool = False
) -> Tensor:
    """[M, k]: log-probabilities of `ids_Mk` under softmax(logits / T) of the selected rows, over all V ids.

    `with_rest` adds a column: the log-probability of all other ids together. An id may be in a row twice.
    float64 for float64 logits, else float32. Raises ValueError for a temperature that is not positive or an id that the
    student has no logit for.
    """
    require_known_ids(ids_Mk, logits.shape[-1])
    scale = 1.0 / positive(temperature)
    logprobs: Tensor = _ChosenLogprobs.apply(logits, ids_Mk, scale, with_rest, *places)  # type: ignore[no-untyped-call]
    return logprobs


def chosen_logits(logits: Tensor, places: Places, ids_Mk: Tensor) -> Tensor:
    """[M, k]: the logits of `ids_Mk`, in float32 (float64 where they are). Raises ValueError for unknown ids."""
    require_known_ids(ids_Mk, logits.shape[-1])
    logits_Mk: Tensor = _ChosenLogits.apply(logits, ids_Mk, *places)  # type: ignore[no-untyped-call]
    return precise(logits_Mk)


def require_known_ids(ids_Mk: Tensor, vocabulary: int) -> None:
    """Raise ValueError where an id has no logit: on a GPU gather would end the process without a name."""
    if ids_Mk.numel() and not 0 <= (largest := int(ids_Mk.max())) < vocabulary:
        raise ValueError(
            f"the teacher's token id {largest} has no logit among the student's {vocabulary}: make the caches with "
            "the student's vocabulary, or give the student an embedding for each of the teacher's ids"
        )


def positive(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    return temperature


def precise(x: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


class _ChosenLogprobs(torch.autograd.Function):
    """See `chosen_logprobs`. With s = z / T, w = log Σ exp s, and g the gradient of each column, that of s_i is
    g_i - p_i Σg for the chosen i; for any other i it is (p_i / P) g_rest - p_i Σg, P the mass of all others."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids_Mk: Tensor, scale: float, with_rest: bool, *places: Tensor) -> Tensor:
        n_rows, k = ids_Mk.shape
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(n_rows, k + with_rest, dtype=dtype, device=logits.device)
        whole_M1 = torch.empty(n_rows, 1, dtype=dtype, device=logits.device)
        for run in _runs(n_rows, logits):
            scaled_RV = _scaled(logits, places, run, scale)
            whole_R1 = scaled_RV.logsumexp(-1, keepdim=True)
            logprobs[run, :k] = scaled_RV.gather(-1, ids_Mk[run]) - whole_R1
            if with_rest:
                # By itself rather than 1 - Σp: exact also where the chosen ids hold nearly everything.
                rest_R1 = scaled_RV.scatter_(-1, ids_Mk[run], -torch.inf).logsumexp(-1, keepdim=True)
                logprobs[run, k:] = rest_R1 - whole_R1
            whole_M1[run] = whole_R1
        ctx.save_for_backward(logits, ids_Mk, logprobs, whole_M1, *places)
        ctx.scale, ctx.with_rest = scale, with_rest
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids_Mk, logprobs, whole_M1, *places = ctx.saved_tensors
        k = ids_Mk.shape[1]
        found = torch.zeros_like(logits)
        for run in _runs(len(ids_Mk), logits):
            scaled_RV = _scaled(logits, places, run, ctx.scale).sub_(whole_M1[run])
            chosen_Rk, sum_R1 = gradient[run, :k], gradient[run].sum(-1, keepdim=True)
            if ctx.with_rest:
                rest_R1 = logprobs[run, k:]
                # p / P, which does not underflow as p and P do. For the chosen ids it is no number, and is replaced.
                shares_RV = scaled_RV.sub_(rest_R1.masked_fill(rest_R1.isneginf(), 0.0)).exp_()
                shares_RV.mul_(gradient[run, k:] - rest_R1.exp() * sum_R1)
                # an id that is there twice has one probability, and the sum of two gradients
                shares_RV.scatter_(-1, ids_Mk[run], -logprobs[run, :k].exp() * sum_R1)
                run_RV = shares_RV.scatter_add_(-1, ids_Mk[run], chosen_Rk)
            else:
                run_RV = scaled_RV.exp_().mul_(-sum_R1).scatter_add_(-1, ids_Mk[run], chosen_Rk)
            found[tuple(place[run] for place in places)] = run_RV.mul_(ctx.scale).to(found.dtype)
        return (found, None, None, None, *(None for _ in places))


class _ChosenLogits(torch.autograd.Function):
    """Plain indexing, whose own backward pass would make two tensors of the logits' size."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids_Mk: Tensor, *places: Tensor) -> Tensor:
        index = (*(place[:, None] for place in places), ids_Mk)
        ctx.save_for_backward(logits, *index)
        return logits[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, *index = ctx.saved_tensors
        found = torch.zeros_like(logits).index_put_(tuple(index), gradient, accumulate=True)
        return (found, *(None for _ in index))


def _runs(n_rows: int, logits: Tensor) -> Iterator[slice]:
    rows = max(1, RUN_ELEMENTS.get(logits.device.type, RUN_ELEMENTS["cuda"]) // logits.shape[-1])
    return (slice(start, start + rows) for start in range(0, n_rows, rows))


def _scaled(logits: Tensor, places: list[Tensor] | Places, run: slice, scale: float) -> Tensor:
    """A copy of the run's rows, which may be changed in place."""
    copy_RV = precise(logits[tuple(place[run] for place in places)])
    return copy_RV if scale == 1.0 else copy_RV.mul_(scale)
