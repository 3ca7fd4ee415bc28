"""Decoder blocks compiled one by one with `torch.compile`, proved against themselves as they were.

Used by `kd_assets.teacher` only. A block's `forward` is replaced, so that equal blocks share their compiled code, and
hooks on blocks (where states are taken, and where a pass ends early) stay outside of it. Names: B, T = documents and
padded tokens of a batch, F = B x T, H = hidden size.

The invariants: compiling never decides whether a result is right, nor which bytes it has. What cannot be compiled, or
is not equal within the bound of the recomputation check, runs as it was, with the reason. All kernels are made before
the first batch, from inputs that are the same in every attempt, and chosen by rule instead of by stopwatch (inductor's
deterministic mode); afterwards nothing is compiled, and a batch that none of them can take runs as it was. So equal
batches give equal bytes, whichever came first.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kd_assets.library_internals import equal_sizes_kept_apart, has_compiler_settings, has_hooks
from kd_assets.teacher.batch.forward import States, run_forward
from kd_assets.teacher.model.load import Teacher, Warn
from kd_assets.teacher.model.quantised import tolerance
from kd_assets.teacher.partition.batching import rounded_up
from kd_assets.teacher.recompute import STATE_RTOL

REQUIRED_MODE = "deterministic"
"""Inductor's setting without which it times kernels and takes the fastest: another in the next attempt, perhaps, that
sums in another order."""
LIKE_EAGER = "emulate_precision_casts"
"""Inductor's setting that rounds to 16 bits wherever the uncompiled block does, so that both mostly give equal bits."""

WARM_UP_TOKENS = 4096
"""Of the batch that kernels are first made for: as large as a usual one, since inductor lays them out for it."""

AFTER_WARM_UP = "eager_on_recompile"
"""The stance of the compiler (`torch.compiler.set_stance`) in which nothing new is compiled."""

Forward = Callable[..., Any]
Mode = Literal["compile", "run", "plain"]
CompileChoice = Literal["auto", "always", "never"]


class Blocks:
    """The decoder blocks of a teacher, and how they run now."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._blocks = blocks
        self._mode: Mode = "plain"
        self.off: str | None = "not compiled yet"
        """Why they are not compiled; None: they are."""
        self.exceptions: list[str] = []
        """Kinds of batches that could not be compiled for, and run as before; each with its reason."""
        self.warm_up_s = 0.0

    @property
    def in_words(self) -> str:
        """`blocks`, or `off` and why."""
        if self.off is not None:
            return f"off: {self.off}"
        return "; ".join(["blocks", *(f"except {exception}" for exception in self.exceptions)])

    @contextmanager
    def plain(self) -> Iterator[None]:
        """As they were, while the body runs: for what is to share nothing with the compiled code."""
        before, self._mode = self._mode, "plain"
        try:
            yield
        finally:
            self._mode = before

    def replace(self) -> None:
        """Give the blocks forwards that run as `_mode` says, one for each class, so that they share compiled code."""
        forwards: dict[type, Forward] = {}
        for block in self._blocks:
            kind = type(block)
            if kind not in forwards:
                forwards[kind] = self._forward_of(kind.forward)
            # Not through nn.Module: this is a method, no module or parameter.
            object.__setattr__(block, "forward", MethodType(forwards[kind], block))

    def put_back(self) -> None:
        for block in self._blocks:
            block.__dict__.pop("forward", None)

    def run_compiled(self, *, compiling: bool) -> None:
        self._mode = "compile" if compiling else "run"

    def _forward_of(self, plain: Forward) -> Forward:
        compiled = torch.compile(plain, dynamic=True, fullgraph=True, options={REQUIRED_MODE: True, LIKE_EAGER: True})

        @functools.wraps(plain)
        def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._mode == "plain":
                return plain(block, *args, **kwargs)
            if self._mode == "compile":
                return compiled(block, *args, **kwargs)
            with torch.compiler.set_stance(AFTER_WARM_UP):
                return compiled(block, *args, **kwargs)

        return forward


def compile_blocks(
    teacher: Teacher, wanted: CompileChoice, *, blocks: tuple[int, ...], longest: int, is_shared: bool, warn: Warn
) -> Blocks:
    """Compile the teacher's blocks, if that is wanted and possible, for documents of up to `longest` tokens.

    `blocks`: 0-based, whose states the proof compares beside the final ones. `is_shared`: other processes take part in
    each pass. Never raises for what only compiling could not do: then the blocks are as they were, `off` of the result
    says why, and so is `warn` told where it was tried.
    """
    found = Blocks(teacher.blocks)
    found.off = "other processes take part in it" if is_shared else why_not(teacher, wanted)
    if found.off is not None:
        if wanted == "always":
            warn(f"the decoder's blocks are not compiled: {found.off}")
        return found
    started = time.perf_counter()
    found.replace()
    try:
        found.off = _warmed_up(teacher, found, blocks=blocks, longest=longest)
    except Exception as e:  # noqa: BLE001 - compilers fail in every way there is, and the blocks can run without
        found.off = _in_a_line(e)
    if found.off is not None:
        warn(f"the decoder's blocks run uncompiled: {found.off}")
        found.put_back()
        gc.collect()
        if teacher.device.type == "cuda":
            torch.cuda.empty_cache()
    for exception in found.exceptions:
        warn(f"the decoder's blocks run uncompiled in {exception}")
    found.warm_up_s = time.perf_counter() - started
    return found


def why_not(teacher: Teacher, wanted: CompileChoice) -> str | None:
    """Why the blocks are not even tried to be compiled; None: they are."""
    inside = [module for block in teacher.blocks for module in block.modules() if module is not block]
    reasons = {
        "the recipe says so": wanted == "never",
        "auto compiles on a GPU only": wanted == "auto" and teacher.device.type != "cuda",
        "auto compiles no quantised modules": wanted == "auto" and getattr(teacher.model, "is_quantized", False),
        "no list of decoder blocks was found": not len(teacher.blocks),
        "something has replaced the forward of its blocks (accelerate, say)": any(
            map(_has_own_forward, teacher.blocks)
        ),
        "its blocks have hooks inside (it is spread over devices, say)": any(map(has_hooks, inside)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None) or _missing_setting()


def _missing_setting() -> str | None:
    if has_compiler_settings((REQUIRED_MODE, LIKE_EAGER)):
        return None
    return f"torch {torch.__version__} has no deterministic mode of its compiler"


def _has_own_forward(block: nn.Module) -> bool:
    return getattr(block.forward, "__func__", None) is not type(block).forward


def _warmed_up(teacher: Teacher, found: Blocks, *, blocks: tuple[int, ...], longest: int) -> str | None:
    """Compile for, and prove on, every kind of batch there will be. Returns what is wrong; None: nothing.

    Raises what the compiler raises for the first kind, of several documents, which most batches are.
    """
    bound = tolerance(STATE_RTOL[teacher.dtype], teacher.quantisation)
    for i, (n_documents, width) in enumerate(warm_up_shapes(teacher.model.config, longest=longest)):
        ids_BT = spread_ids(n_documents, width, teacher.n_token_ids).to(teacher.device)
        found.run_compiled(compiling=True)
        try:
            with equal_sizes_kept_apart():
                run_forward(teacher, ids_BT, blocks=blocks, needs_final=True)
        except Exception as e:
            if i == 0:
                raise
            found.exceptions.append(f"batches like {n_documents} x {width} tokens: {_in_a_line(e)}")
        found.run_compiled(compiling=False)
        ours = run_forward(teacher, ids_BT, blocks=blocks, needs_final=True)
        with found.plain():
            plain = run_forward(teacher, ids_BT, blocks=blocks, needs_final=True)
        difference = largest_difference(ours, plain)
        if not difference <= bound:
            return f"compiled blocks differ by {difference:.2g} of a state's norm, above the bound of {bound:.2g}"
    return None


def warm_up_shapes(config: Any, *, longest: int) -> list[tuple[int, int]]:
    """B and T of the batches that compiled code is made for: several documents, and one.

    The compiler makes code of its own for a size of 1. Blocks with a sliding window or chunks get a mask only for
    longer documents, which is code of its own, too: so widths on either side of each such length.
    """
    usual = min(longest, WARM_UP_TOKENS // 2)
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    others = [w for limit in limits if limit for w in (max(2, limit // 2), int(rounded_up(np.array([limit + 1]))[0]))]
    widths = [usual, *(w for w in dict.fromkeys(others) if w <= longest and w != usual)]
    return [shape for width in widths for shape in ((max(2, min(64, WARM_UP_TOKENS // width)), width), (1, width))]


def spread_ids(n_documents: int, width: int, n_token_ids: int) -> Tensor:
    """int64 [B, T]: fixed ids from all over the vocabulary."""
    return (torch.arange(n_documents * width) * 7919 % n_token_ids).view(n_documents, width)


def largest_difference(ours: States, plain: States) -> float:
    """Over all states: the norm of the difference over the norm. NaN where either has one."""
    pairs = [(ours.block_FH[n], plain.block_FH[n]) for n in plain.block_FH]
    assert ours.final_FH is not None
    assert plain.final_FH is not None
    pairs.append((ours.final_FH, plain.final_FH))
    return float(torch.stack([_relative(a_FH.float(), b_FH.float()) for a_FH, b_FH in pairs]).max())


def _relative(ours_FH: Tensor, plain_FH: Tensor) -> Tensor:
    scale_F: Tensor = plain_FH.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    relative_F: Tensor = (ours_FH - plain_FH).norm(dim=1) / scale_F
    return relative_F.max()


def _in_a_line(e: Exception) -> str:
    line = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
    return f"{type(e).__name__}: {line[:300]}"
