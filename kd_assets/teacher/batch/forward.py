"""One forward pass over a batch: as far up the decoder as the wanted caches need, and no further.

Used by `kd_assets.teacher` only. Names: B, T = documents and padded tokens of a batch, H = hidden size,
V = vocabulary, F = B x T.

The invariant: what is kept does not depend on what else is kept. The blocks run the same operations on the same batch
whether the pass ends at block n or at the logits, so hidden states are equal bit for bit either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_assets.teacher.model.anatomy import state_of
from kd_assets.teacher.model.final_norm import input_of
from kd_assets.teacher.model.load import Teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """What one forward pass left on the device, in the teacher's precision."""

    block_FH: dict[int, Tensor]
    """Outputs of the wanted blocks (0-based), each before any final norm: for the last block, too."""
    final_FH: Tensor | None
    """After the final norm; None when the pass ended below it."""
    before_norm_FH: Tensor | None
    """What went into the final norm; None unless it is wanted."""
    logits_FV: Tensor | None
    """The model's own; only of a teacher whose head is not proven."""


class _EndError(Exception):
    """Unwinds the decoder once all that is needed of it is there."""


@torch.inference_mode()
def run_forward(
    teacher: Teacher,
    ids_BT: Tensor,
    *,
    blocks: tuple[int, ...],
    needs_final: bool,
    needs_logits: bool = True,
    before_norm: bool = False,
) -> States:
    """Run a right-padded batch without a mask (see `batching`), keeping the outputs of `blocks`.

    Without `needs_final` the pass stops before the final norm, where `before_norm` asks for what goes into it, else
    after the highest of `blocks`: what lies above, and the head, never run. Without `needs_logits` the head does not.
    """
    with (
        _kept_blocks(teacher.blocks, blocks, stop=not needs_final and not before_norm) as block_FH,
        _kept_input(teacher.end.norm if before_norm else None, stop=not needs_final) as into_norm,
    ):
        final_FH = logits_FV = None
        try:
            if needs_final and needs_logits and teacher.head is None:
                final_FH, logits_FV = _whole_model(teacher, ids_BT)
            else:
                final_FH = state_of(teacher.decoder(input_ids=ids_BT, use_cache=False)).flatten(0, 1)
        except _EndError:
            pass
    return States(
        block_FH=block_FH,
        final_FH=final_FH,
        before_norm_FH=into_norm[0] if into_norm else None,
        logits_FV=logits_FV,
    )


def _whole_model(teacher: Teacher, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    kept: list[Tensor] = []
    handle = teacher.decoder.register_forward_hook(lambda module, args, output: kept.append(state_of(output)))
    try:
        logits_BTV: Tensor = teacher.model(input_ids=ids_BT, use_cache=False).logits
    finally:
        handle.remove()
    return kept[-1].flatten(0, 1), logits_BTV.flatten(0, 1)


@contextmanager
def _kept_blocks(modules: nn.ModuleList, blocks: tuple[int, ...], *, stop: bool) -> Iterator[dict[int, Tensor]]:
    """Hooks on the wanted blocks. With `stop`, the highest of them ends the pass."""
    block_FH: dict[int, Tensor] = {}
    last = max(blocks, default=-1)

    def hook_of(n: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            block_FH[n] = state_of(output).flatten(0, 1)
            if stop and n == last:
                raise _EndError

        return keep

    handles = [modules[n].register_forward_hook(hook_of(n)) for n in set(blocks)]
    try:
        yield block_FH
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _kept_input(norm: nn.Module | None, *, stop: bool) -> Iterator[list[Tensor]]:
    """A hook on the final norm, which keeps what goes into it. With `stop`, the pass ends there."""
    kept_FH: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        state = input_of(args, kwargs)
        assert state is not None, "proved on the probe"
        kept_FH.append(state.flatten(0, 1))
        if stop:
            raise _EndError

    handle = None if norm is None else norm.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield kept_FH
    finally:
        if handle is not None:
            handle.remove()
