"""What a loaded model is made of, found by its properties and proved on its weights by a small forward pass.

Used by `kd_assets.teacher` only. Architectures give their parts different names and put them in different places, so
nothing is trusted for its name. The invariant: what comes out of `dissected` has been seen to hold. The decoder run by
itself gives the states that it gives inside the model; they do not depend on what follows them; each block runs once,
and block n's output is what transformers calls `hidden_states[n + 1]` (n where it leaves out the embeddings; of the
last block it has only the state after the final norm).

Names: B, T = documents and tokens of the probe, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_assets.errors import TeacherError
from kd_assets.library_internals import no_hooks_left
from kd_assets.teacher.devices.memory import DEVICE_TEXTS, HOST_TEXTS
from kd_assets.teacher.model.final_norm import DecoderEnd, decoder_end, outside_of_blocks, watched
from kd_assets.teacher.model.head import Head, is_plain, proven_head, relative_difference
from kd_assets.teacher.model.quantised import Quantisation, tolerance

PROBE_TOKENS = 16
CAUSAL_RTOL = {torch.float32: 2.0**-14, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
"""Tolerance of the causality check: the largest change of a prefix's states when its suffix changes, relative to the
largest state. It covers the noise of batched kernels, which round differently."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """The parts of a model that the pass uses, and what they gave for the probe."""

    decoder: nn.Module
    """Ends in the final norm: ids [B, T] → `last_hidden_state` [B, T, H]."""
    blocks: nn.ModuleList
    """Decoder blocks, 0-based; empty where no list of them was found."""
    blocks_unusable: str | None
    """Why the outputs of `blocks` are not hidden states; None: they are."""
    end: DecoderEnd
    """What stands between the last block and the head."""
    final_BTH: Tensor
    """After the final norm."""
    logits_BTV: Tensor
    """The model's own."""


@torch.inference_mode()
def dissected(
    model: Any,
    *,
    n_blocks: int | None,
    n_token_ids: int,
    device: torch.device,
    quantisation: Quantisation | None = None,
) -> Anatomy:
    """The parts of `model`. Raises TeacherError, saying what is missing, for one that this pass cannot run."""
    decoders = possible_decoders(model)
    lists = {decoder: lists_of_blocks(decoder, n_blocks) for decoder in decoders}
    blocks = {block for found in lists.values() for candidate in found for block in candidate}
    ids_BT = probe_ids(n_token_ids).to(device)
    try:
        with (
            no_hooks_left(model),
            tapped((*decoders, *blocks)) as outputs,
            watched(outside_of_blocks(model, blocks)) as runs,
        ):
            output = model(input_ids=ids_BT, use_cache=False, output_hidden_states=True)
        logits_BTV = output.logits
        decoder = first_alone(decoders, ids_BT, outputs)
    except Exception as e:
        if not is_of_the_model(e):
            raise
        raise TeacherError(
            f"{type(model).__name__} does not run on token ids alone ({type(e).__name__}: {e}): only causal language "
            "models of text can be teachers"
        ) from e
    final_BTH = outputs[decoder][0]
    prove_causal(final_BTH, quantisation)
    found, reason = proven_blocks(lists[decoder], outputs, final_BTH, getattr(output, "hidden_states", None))
    return Anatomy(
        decoder=decoder,
        blocks=found,
        blocks_unusable=reason and f"{type(model).__name__}: {reason}",
        end=decoder_end(
            decoder,
            runs,
            final_BTH=final_BTH,
            last_block_BTH=outputs[found[-1]][0] if reason is None and len(found) else None,
            head=model.get_output_embeddings(),
        ),
        final_BTH=final_BTH,
        logits_BTV=logits_BTV,
    )


def is_of_the_model(e: Exception) -> bool:
    """Whether this says that the model does not do what is asked of it; not that memory or a device failed."""
    if type(e) is RuntimeError:
        return not any(known in str(e) for known in (*DEVICE_TEXTS, *HOST_TEXTS))
    return isinstance(e, (TypeError, ValueError, AttributeError, LookupError, NotImplementedError, ImportError))


def probe_ids(n_token_ids: int) -> Tensor:
    """int64 [2, `PROBE_TOKENS`]: fixed ids spread over the vocabulary, equal in the first half of both rows."""
    ids_BT = (torch.arange(2 * PROBE_TOKENS) * 7919 % n_token_ids).view(2, PROBE_TOKENS)
    ids_BT[1, : PROBE_TOKENS // 2] = ids_BT[0, : PROBE_TOKENS // 2]
    return ids_BT


def possible_decoders(model: Any) -> list[nn.Module]:
    """Modules that may be the decoder, the likeliest first: what transformers names, then any that holds the
    embedding table and not the head, outermost first."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    candidates = [model.get_decoder(), getattr(model, model.base_model_prefix, None), *model.modules()]
    found: dict[nn.Module, None] = {}
    for module in candidates:
        if isinstance(module, nn.Module) and module is not model and module is not embeddings:
            inside = set(module.modules())
            if embeddings in inside and head not in inside:
                found[module] = None
    if not found:
        raise TeacherError(
            f"{type(model).__name__} has no part from an embedding table up to a language-model head: only causal "
            "language models can be teachers"
        )
    return list(found)


def lists_of_blocks(decoder: nn.Module, n_blocks: int | None) -> list[nn.ModuleList]:
    """The lists of modules that lie nearest to the decoder, whatever it calls them (layers, h, ...): those of
    `n_blocks` modules where there is one (an old configuration may count another stack's)."""
    nearest: list[nn.ModuleList] = []
    level: list[nn.Module] = [decoder]
    while level:
        children = [child for module in level for child in module.children()]
        lists = [child for child in children if isinstance(child, nn.ModuleList) and len(child)]
        if found := [blocks for blocks in lists if len(blocks) == n_blocks]:
            return found
        nearest = nearest or lists
        level = [child for child in children if not isinstance(child, nn.ModuleList)]
    return nearest


def first_alone(decoders: Sequence[nn.Module], ids_BT: Tensor, outputs: dict[nn.Module, list[Tensor]]) -> nn.Module:
    """The first of these that gives the same states run alone as it gave inside of the model.

    One that does not gets more from the model than token ids (embeddings of its own making, say).
    """
    for decoder in decoders:
        inside = outputs.get(decoder, [])
        if len(inside) == 1 and inside[0].ndim == 3 and inside[0].shape[:2] == ids_BT.shape:
            alone_BTH = state_of(decoder(input_ids=ids_BT, use_cache=False))
            if relative_difference(alone_BTH.float(), inside[0].float()) <= CAUSAL_RTOL[inside[0].dtype]:
                return decoder
    names = ", ".join(type(decoder).__name__ for decoder in decoders)
    raise TeacherError(
        f"none of {names} gives from token ids alone the hidden states that it gives inside of the model: this "
        "architecture is not supported"
    )


def prove_causal(final_BTH: Tensor, quantisation: Quantisation | None = None) -> None:
    """Raise TeacherError unless the probe's shared prefix has the same states before either suffix.

    Right padding without a mask, and one pass for caches of different `max_length`, are exact only then.
    """
    half = PROBE_TOKENS // 2
    first_TH, second_TH = final_BTH[0, :half].float(), final_BTH[1, :half].float()
    difference = relative_difference(first_TH, second_TH)
    if difference > tolerance(CAUSAL_RTOL[final_BTH.dtype], quantisation):
        raise TeacherError(
            f"the teacher is not causal: a token's state changes with what follows (relative difference "
            f"{difference:.2g}); only causal language models have a next-token distribution at every position"
        )


def proven_blocks(
    lists: Sequence[nn.ModuleList],
    outputs: dict[nn.Module, list[Tensor]],
    final_BTH: Tensor,
    hidden_states: Sequence[Tensor] | None,
) -> tuple[nn.ModuleList, str | None]:
    """The list whose outputs are the model's hidden states; without one, the nearest and what is wrong with it."""
    reasons = [what_is_wrong(blocks, outputs, final_BTH, hidden_states) for blocks in lists]
    for blocks, reason in zip(lists, reasons, strict=True):
        if reason is None:
            return blocks, None
    if len(lists) == 1:
        return lists[0], reasons[0]
    return nn.ModuleList(), "it has no list of decoder blocks, one after the other"


def what_is_wrong(
    blocks: nn.ModuleList,
    outputs: dict[nn.Module, list[Tensor]],
    final_BTH: Tensor,
    hidden_states: Sequence[Tensor] | None,
) -> str | None:
    """Why the outputs of these blocks are not the hidden states of the layers they stand for; None: they are."""
    for n, block in enumerate(blocks):
        runs = outputs.get(block, [])
        if len(runs) != 1:
            return f"block {n} runs {len(runs)} times in one pass, so that its output is not one layer's"
        if runs[0].shape != final_BTH.shape:
            return f"block {n} gives {list(runs[0].shape)}, expected a state a token {list(final_BTH.shape)}"
    if not hidden_states:
        return None  # a model with code of its own may not give them: then the list alone has to say it
    if len(hidden_states) != len(blocks) + 1:
        return f"it has {len(blocks)} blocks, and gives {len(hidden_states)} hidden states"
    # Mamba and RWKV leave out the embeddings that come first elsewhere
    for first in (1, 0):
        wrong = [n for n, block in enumerate(blocks[:-1]) if not is_equal(outputs[block][0], hidden_states[n + first])]
        if not wrong:
            return None
    return f"the output of block {wrong[0]} is none of what transformers gives as hidden_states"


def is_equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and relative_difference(ours.to(theirs.device).float(), theirs.float()) == 0


def proven_variant(head: Head | None, anatomy: Anatomy) -> tuple[Head | None, float]:
    """`head`, or what its configuration may mean besides, if proven; and by how much `head` itself is wrong.

    One name means several things: `logits_scaling` divides in Granite and multiplies in HyperCLOVA X, and MPT has a
    `logit_scale` that nothing reads. And a vocabulary padded for the matrix product may be cut back after it.
    """
    hidden_size = anatomy.final_BTH.shape[-1]
    if head is None or getattr(head.linear, "in_features", hidden_size) != hidden_size:
        return None, float("inf")
    head = dataclasses.replace(head, linear=first_rows(head.linear, anatomy.logits_BTV.shape[-1]))
    proven, difference = proven_head(head, anatomy.final_BTH, anatomy.logits_BTV)
    if proven is None:
        swapped = dataclasses.replace(head, divisor=head.multiplier, multiplier=head.divisor)
        for variant in (swapped, Head(linear=head.linear)):
            proven, _ = proven_head(variant, anatomy.final_BTH, anatomy.logits_BTV)
            if proven is not None:
                break
    return proven, difference


def first_rows(linear: nn.Module, n_rows: int) -> nn.Module:
    """A plain layer cut to its first outputs, with the same memory; any other as it is."""
    if not is_plain(linear) or linear.out_features <= n_rows:
        return linear
    cut = nn.Linear(linear.in_features, n_rows, bias=False, device="meta")
    cut.weight = nn.Parameter(linear.weight[:n_rows], requires_grad=False)
    if linear.bias is not None:
        cut.bias = nn.Parameter(linear.bias[:n_rows], requires_grad=False)
    return cut


@contextmanager
def tapped(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Keep what each of these modules gives, run after run, while the body runs."""
    outputs: dict[nn.Module, list[Tensor]] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.setdefault(module, []).append(state_of(output))

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def state_of(output: Any) -> Tensor:
    """The hidden state in a module's output: itself, `last_hidden_state`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    state = getattr(output, "last_hidden_state", None)
    if not isinstance(state, Tensor):
        state = output[0]
    if not isinstance(state, Tensor):
        raise TypeError(f"expected a hidden state, found {type(state).__name__}")
    return state
