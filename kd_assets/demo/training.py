"""How the demo's teacher is trained, and how well it then predicts.

Used by `kd_assets.demo.teacher`; needs torch and transformers. The corpus has some 160,000 tokens, so what counts is
loss per pass over them: Muon takes the matrices of the blocks further than AdamW does (see `optimizers_of`). The
learning rate is warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4), because there the decay can start early
when the wall clock runs out, and a machine that is fast enough never notices the clock: equal seeds then give equal
weights.

Legend: B sequences of a batch, T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kd_assets.demo.tokenizer import END

_WARMUP_STEPS = 20
_STABLE_SHARE = 0.6
"""Share of the steps, or of the time, after which the learning rate falls linearly to zero."""
_ADAMW_RATE_SHARE = 0.2
"""Of the plan's learning rate, for the matrices of the blocks where AdamW takes Muon's place."""
_PROGRESS_INTERVAL_S = 1.0

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """All that determines the teacher, besides the corpus."""

    vocabulary: int = 4096
    hidden_size: int = 256
    n_blocks: int = 6
    n_heads: int = 4
    n_key_value_heads: int = 2
    intermediate_size: int = 704
    max_position_embeddings: int = 2048
    steps: int = 420
    batch_sequences: int = 6
    sequence_tokens: int = 192
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    held_out_one_in: int = 16
    """Every so many passages one is kept from training, with the document and the chat made from it."""
    seed: int = 0


def build_model(plan: TrainingPlan, tokenizer: Any) -> Any:
    """An untrained `LlamaForCausalLM` of the plan's shape; its weights come from torch's global generator."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)]
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=plan.vocabulary,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=plan.n_blocks,
        num_attention_heads=plan.n_heads,
        num_key_value_heads=plan.n_key_value_heads,
        max_position_embeddings=plan.max_position_embeddings,
        tie_word_embeddings=True,
        use_cache=False,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=128, **special)
    return model


def train_model(
    model: Any, documents: Sequence[Sequence[int]], plan: TrainingPlan, *, budget_s: float, report: Report
) -> tuple[list[float], str, float]:
    """Train in place for `plan.steps` steps or `budget_s` seconds, whichever end first; for one step at least.

    Returns the loss of every step, the precision of the matrix products, and the seconds it took.
    """
    use_bfloat16 = bfloat16_is_faster()
    optimizers = optimizers_of(model, plan, use_bfloat16=use_bfloat16)
    batches = packed_batches(documents, plan)
    losses: list[float] = []
    started = reported = time.monotonic()
    model.train()
    for step in range(plan.steps):
        elapsed_s = time.monotonic() - started
        step_s = elapsed_s / max(step, 1)
        if step and elapsed_s + 1.5 * step_s > budget_s:
            break
        factor = rate_factor(step, plan.steps, time_share=elapsed_s / budget_s if budget_s > 0 else 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * factor
        input_ids_BT = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bfloat16):
            logits_BTV = model(input_ids=input_ids_BT[:, :-1]).logits
        loss = functional.cross_entropy(logits_BTV.float().flatten(0, 1), input_ids_BT[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        now = time.monotonic()
        if now - reported >= _PROGRESS_INTERVAL_S or step + 1 == plan.steps:
            reported = now
            seconds = now - started
            report(
                {
                    "event": "progress",
                    "step": step + 1,
                    "steps": plan.steps,
                    "loss": round(losses[-1], 4),
                    "tokens_per_s": round((step + 1) * input_ids_BT.numel() / seconds),
                    "seconds": round(seconds, 1),
                }
            )
    model.eval()
    return losses, "bfloat16" if use_bfloat16 else "float32", time.monotonic() - started


def optimizers_of(model: Any, plan: TrainingPlan, *, use_bfloat16: bool) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the matrices of the blocks, scaled as in Liu et al. 2025 ("Muon is scalable for LLM
    training", section 2.2), so that it takes AdamW's learning rates; AdamW for the rest.

    On a CPU that only emulates bfloat16 all is AdamW's: torch's Muon computes in bfloat16 whatever it is given, and
    would take many times as long. The default plan's teacher then ends at a held-out loss of 4.66 instead of 4.27.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    of_blocks = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in of_blocks]
    rate, decay = plan.learning_rate, plan.weight_decay
    for_matrices: torch.optim.Optimizer = (
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        if use_bfloat16
        else torch.optim.AdamW(matrices, lr=rate * _ADAMW_RATE_SHARE, weight_decay=decay, betas=(0.9, 0.95), fused=True)
    )
    return [for_matrices, torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.95), fused=True)]


def rate_factor(step: int, steps: int, *, time_share: float) -> float:
    """The learning rate at `step` as a share of its peak: warm-up, stable, then linearly to zero.

    The decay starts when the stable share of the steps or of the time is over, whichever comes first.
    """
    progress = max(step / steps, time_share)
    decayed = max(0.0, (progress - _STABLE_SHARE) / (1 - _STABLE_SHARE))
    return min(1.0, (step + 1) / _WARMUP_STEPS) * max(0.0, 1.0 - decayed)


def packed_batches(documents: Sequence[Sequence[int]], plan: TrainingPlan) -> Iterator[Tensor]:
    """Endless int64 [B, T + 1] batches cut from the documents laid end to end, in a new order every pass."""
    generator = torch.Generator().manual_seed(plan.seed)
    size = plan.batch_sequences * (plan.sequence_tokens + 1)
    tokens: list[int] = []
    while True:
        for i in torch.randperm(len(documents), generator=generator).tolist():
            tokens += documents[i]
            while len(tokens) >= size:
                yield torch.tensor(tokens[:size]).view(plan.batch_sequences, plan.sequence_tokens + 1)
                del tokens[:size]


@torch.no_grad()
def mean_loss(model: Any, documents: Sequence[Sequence[int]], *, max_length: int) -> float:
    """Mean next-token loss over the documents' tokens, in float32 and one document at a time."""
    total, n_tokens = 0.0, 0
    for document in documents:
        ids = torch.tensor(document[:max_length])
        logits_TV = model(input_ids=ids[None]).logits[0].float()
        total += functional.cross_entropy(logits_TV[:-1], ids[1:], reduction="sum").item()
        n_tokens += len(ids) - 1
    return total / max(n_tokens, 1)


def unigram_loss(train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], *, vocabulary: int) -> float:
    """Mean loss of the held-out tokens under the training tokens' frequencies, each count plus one."""
    counts_V = torch.ones(vocabulary, dtype=torch.float64)
    for document in train:
        counts_V += torch.bincount(torch.tensor(document), minlength=vocabulary)
    logprobs_V = (counts_V / counts_V.sum()).log()
    ids = torch.tensor([i for document in held_out for i in document[1:]])
    return -logprobs_V[ids].mean().item()


def bfloat16_is_faster() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 matrices: it gains about four times by them, and others
    emulate them and lose.

    Asked of the CPU and not measured: a busy moment must not decide what the weights are.
    """
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
