"""The decoder's final norm, found by what it does and proved on the loaded weights.

Used by `kd_assets.teacher` only. The invariant: where a state at the decoder's end is not said to be unusable, its
column's convention holds of it. `before_norm` goes into the final norm and is the last block's output; `after_norm`
comes out of that norm, is what the decoder gives, and goes into the head. A model that does something else in between
(a projection as in OPT-350m, a scale before the head as in MiniCPM), or has no norm there, is said to.

Names: B, T = documents and tokens of the probe, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd_assets.contract import FinalState
from kd_assets.teacher.model.head import relative_difference

LARGE_RMS = 32.0
"""Of the states that the proof gives to a norm: beside their squares no epsilon counts, and none overflows float16."""
NORM_RTOL = {torch.float32: 2.0**-12, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
"""What a norm may make of twice a state, relative to the largest number: epsilon and a few roundings. A projection
doubles it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of a module that takes one tensor and gives one."""

    input: Tensor
    output: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderEnd:
    """What stands at the end of a decoder."""

    norm: nn.Module | None = None
    """None: there is none, or it is not proved to be one."""
    unusable: Mapping[FinalState, str] = field(default_factory=dict)
    """The states that cannot be kept → why."""
    dtypes: Mapping[FinalState, torch.dtype] = field(default_factory=dict)
    """The precision of each state as the model has it."""


@contextmanager
def watched(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[Run]]]:
    """Keep copies of what each of these modules takes and gives, run after run, while the body runs."""
    runs: dict[nn.Module, list[Run]] = {}
    taken: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        taken.pop(module, None)
        if (state := input_of(args, kwargs)) is not None:
            taken[module] = state.clone()  # what comes after may write into it

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if module in taken and isinstance(output, Tensor):
            runs.setdefault(module, []).append(Run(input=taken.pop(module), output=output.clone()))

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(after) for module in modules]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The state that a module is given: its only tensor of floating point; None where it has several or none."""
    states = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
    return states[0] if len(states) == 1 else None


def outside_of_blocks(model: nn.Module, blocks: set[nn.Module]) -> list[nn.Module]:
    """The modules that are neither in a block nor hold one: a final norm and a head are among them."""
    inside = {module for block in blocks for module in block.modules()}
    return [m for m in model.modules() if m not in inside and inside.isdisjoint(m.modules())]


def decoder_end(
    decoder: nn.Module,
    runs: Mapping[nn.Module, Sequence[Run]],
    *,
    final_BTH: Tensor,
    last_block_BTH: Tensor | None,
    head: nn.Module | None,
) -> DecoderEnd:
    """What the runs of the probe show. `last_block_BTH`: its output; None: no block's output is a hidden state."""
    inside = set(decoder.modules())
    found = [
        module
        for module, of_module in runs.items()
        if module in inside
        and len(of_module) == 1
        and is_same(of_module[0].output, final_BTH)
        and not is_same(of_module[0].input, final_BTH)
    ]
    norm = next((module for module in found if is_norm(module, runs[module][0])), None)
    if norm is None:
        reason = "its decoder does not end in a norm" + (
            f" ({type(found[0]).__name__} comes last)" if found else ", or gives something else than what it makes"
        )
        return DecoderEnd(unusable={"before_norm": reason, "after_norm": reason})
    unusable: dict[FinalState, str] = {}
    before_BTH = runs[norm][0].input
    if last_block_BTH is None:
        unusable["before_norm"] = "its blocks are not found, so that nothing says what goes into its final norm"
    elif not is_same(before_BTH, last_block_BTH):
        unusable["before_norm"] = "something stands between its last block and its final norm"
    into_head = runs.get(head, ()) if head is not None else ()
    if len(into_head) != 1 or not is_same(into_head[0].input, final_BTH):
        unusable["after_norm"] = "something else than what its final norm gives goes into its head"
    return DecoderEnd(
        norm=norm,
        unusable=unusable,
        dtypes={"before_norm": before_BTH.dtype, "after_norm": final_BTH.dtype},
    )


def is_same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal numbers, whatever the precision they are held in."""
    if ours.shape != theirs.shape:
        return False
    coarser = max((ours.dtype, theirs.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    ours, theirs = ours.to(coarser), theirs.to(device=ours.device, dtype=coarser)
    return relative_difference(ours.float(), theirs.float()) == 0


def is_norm(module: nn.Module, run: Run) -> bool:
    """Whether it makes the same of a state and of twice that state, as a norm does and nothing linear."""
    state_BTH = run.input.float()
    scale = LARGE_RMS / state_BTH.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-30)
    large_BTH = (state_BTH * scale).to(run.input.dtype)
    once, twice = module(large_BTH), module(2 * large_BTH)
    coarser = max((once.dtype, run.input.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return relative_difference(twice.float(), once.float()) <= NORM_RTOL[coarser]
