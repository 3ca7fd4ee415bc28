"""The demo's teacher: a small Llama trained on the demo's corpus, on the spot, in about a minute on two cores.

It leaves a folder like any other model's (config, safetensors, tokenizer with chat template), which the teacher pass
loads with the code that loads a 70B. The folder appears by rename when it is complete. A note beside the weights names
the recipe that made them (plan and corpus); equal recipes find it and train nothing.

The corpus has some 160,000 tokens, so what counts is loss per pass over them: Muon (see `kd_assets.demo.muon`) takes
the matrices of the blocks about 0.8 nats further than AdamW in equal time. The learning rate is
warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4), because there the decay can start early when the wall clock
runs out, and a machine that is fast enough never notices the clock: equal seeds then give equal weights.

Legend: B sequences of a batch, T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kd_assets.demo.corpus import CHATS_FILE, DOCUMENTS_FILE, passage_of
from kd_assets.demo.muon import Muon
from kd_assets.durable import atomic_write, prepare_folder, storage_errors
from kd_assets.errors import InputError, KdAssetsError, MissingInputError
from kd_assets.store import canonical_json

NOTE_FILE = "demo_teacher.json"
TRAINING_VERSION = 1
"""Counts up when this module would train another model from an equal plan and corpus."""

BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>", END)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The generation markers tell `apply_chat_template(return_assistant_tokens_mask=True)` what the assistant wrote."""

_WARMUP_STEPS = 20
_STABLE_SHARE = 0.6
"""Share of the steps, or of the time, after which the learning rate falls linearly to zero."""
_RESERVE_SHARE = 0.06
"""Share of the time kept for measuring and saving."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSummary:
    """What a training came to. Losses are nats a token."""

    fingerprint: str
    """Of plan and corpus."""
    n_parameters: int
    n_train_tokens: int
    n_held_out_tokens: int
    steps: int
    cut_short: bool
    """Whether the wall clock ended the training before its last step."""
    precision: str
    wall_s: float
    tokens_per_s: float
    train_loss: float
    """Mean over the last tenth of the steps."""
    held_out_loss: float
    unigram_loss: float
    """Of the held-out text under the training text's token frequencies: what a model that ignores context reaches."""
    uniform_loss: float


def make_teacher(
    corpus: Path,
    folder: Path,
    *,
    plan: TrainingPlan | None = None,
    max_seconds: float = 150.0,
    report: Report = lambda _: None,
) -> tuple[TrainingSummary, bool]:
    """Train the teacher into `folder`, or find it there already. Returns its summary and whether it was found.

    Takes at most `max_seconds`. Raises MissingInputError without a corpus, InputError when `folder` holds something
    that is not a demo teacher: that is never overwritten.
    """
    started = time.monotonic()
    plan = plan or TrainingPlan()
    fingerprint = training_fingerprint(corpus, plan)
    found = _read_note(folder)
    if found is not None and found.fingerprint == fingerprint:
        return found, True
    tokenizer = train_tokenizer(corpus_texts(corpus), vocabulary=plan.vocabulary)
    train, held_out = split_documents(corpus, tokenizer, held_out_one_in=plan.held_out_one_in)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = build_model(plan, tokenizer)
        budget_s = max_seconds * (1 - _RESERVE_SHARE) - (time.monotonic() - started)
        losses, precision, train_s = train_model(model, train, plan, budget_s=budget_s, report=report)
    tail = losses[-max(1, len(losses) // 10) :]
    summary = TrainingSummary(
        fingerprint=fingerprint,
        n_parameters=sum(p.numel() for p in model.parameters()),
        n_train_tokens=sum(map(len, train)),
        n_held_out_tokens=sum(map(len, held_out)),
        steps=len(losses),
        cut_short=len(losses) < plan.steps,
        precision=precision,
        wall_s=round(time.monotonic() - started, 2),
        tokens_per_s=round(len(losses) * plan.batch_sequences * plan.sequence_tokens / train_s, 1),
        train_loss=sum(tail) / len(tail),
        held_out_loss=mean_loss(model, held_out, max_length=plan.max_position_embeddings),
        unigram_loss=unigram_loss(train, held_out, vocabulary=plan.vocabulary),
        uniform_loss=math.log(plan.vocabulary),
    )
    _save(folder, model, tokenizer, summary)
    return summary, False


def training_fingerprint(corpus: Path, plan: TrainingPlan) -> str:
    """SHA-256 over plan and corpus: equal ones make equal teachers. Raises MissingInputError without a corpus."""
    hashes = {name: hashlib.sha256(_corpus_bytes(corpus, name)).hexdigest() for name in (DOCUMENTS_FILE, CHATS_FILE)}
    recipe = {"version": TRAINING_VERSION, "plan": dataclasses.asdict(plan), "corpus": hashes}
    return hashlib.sha256(canonical_json(recipe).encode()).hexdigest()


def corpus_texts(corpus: Path) -> list[str]:
    """Every text and message of the corpus, in its order."""
    texts = [record["text"] for record in _corpus_records(corpus, DOCUMENTS_FILE)]
    chats = _corpus_records(corpus, CHATS_FILE)
    return texts + [message["content"] for chat in chats for message in chat["messages"]]


def train_tokenizer(texts: Sequence[str], *, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer (Sennrich et al. 2016) as transformers wraps it, with chat template.

    Plain texts get the bos token in front, as Llama's do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def split_documents(corpus: Path, tokenizer: Any, *, held_out_one_in: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the training and of the held-out documents, each ended by eos. The split is by passage."""
    texts = [(record["id"], record["text"]) for record in _corpus_records(corpus, DOCUMENTS_FILE)]
    tokens = [(i, tokenizer(text)["input_ids"]) for i, text in texts]
    for record in _corpus_records(corpus, CHATS_FILE):
        text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        tokens.append((record["id"], tokenizer(text, add_special_tokens=False)["input_ids"]))
    split: tuple[list[list[int]], list[list[int]]] = ([], [])
    for document_id, ids in tokens:
        digest = hashlib.sha256(passage_of(document_id).encode()).digest()
        split[int.from_bytes(digest[:8], "big") % held_out_one_in == 0].append([*ids, tokenizer.eos_token_id])
    return split


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
    """Train in place for `plan.steps` steps or `budget_s` seconds, whichever end first.

    Returns the loss of every step, the precision of the matrix products, and the seconds it took.
    """
    block_matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    in_blocks = {id(p) for p in block_matrices}
    others = [p for p in model.parameters() if id(p) not in in_blocks]
    use_bfloat16 = bfloat16_is_faster()
    optimizers: list[torch.optim.Optimizer] = [
        Muon(
            block_matrices,
            lr=plan.learning_rate,
            weight_decay=plan.weight_decay,
            dtype=torch.bfloat16 if use_bfloat16 else torch.float32,
        ),
        torch.optim.AdamW(others, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]
    batches = packed_batches(documents, plan)
    losses: list[float] = []
    started = reported = time.monotonic()
    model.train()
    for step in range(plan.steps):
        elapsed_s = time.monotonic() - started
        step_s = elapsed_s / max(step, 1)
        if elapsed_s + 1.5 * step_s > budget_s:
            break
        rate = plan.learning_rate * rate_factor(step, plan.steps, time_share=elapsed_s / budget_s)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
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
    """Whether this CPU multiplies bfloat16 matrices well above its float32 speed.

    Some have instructions for it (avx512_bf16, amx_bf16) and gain about four times; others emulate it and lose. The
    margin is wide so that a busy machine decides as an idle one.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(8):
            started = time.perf_counter()
            torch.matmul(a, b)
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return seconds[torch.float32] > 1.8 * seconds[torch.bfloat16]


def _save(folder: Path, model: Any, tokenizer: Any, summary: TrainingSummary) -> None:
    """Put the complete folder in place by rename; an older demo teacher there makes room, anything else stays."""
    folder = folder.absolute()
    prepare_folder(folder.parent)
    with storage_errors(folder, "write"):
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        try:
            model.save_pretrained(temporary, safe_serialization=True)
            tokenizer.save_pretrained(temporary)
            note = json.dumps(dataclasses.asdict(summary), indent=1, sort_keys=True) + "\n"
            atomic_write(temporary / NOTE_FILE, note.encode())
            temporary.chmod(0o750)
            for path in temporary.iterdir():
                path.chmod(0o640)
                with path.open("rb") as f:
                    os.fsync(f.fileno())
            if _read_note(folder) is not None:
                folder.rename(temporary / "replaced")
            elif folder.is_dir():
                folder.rmdir()  # an empty folder was made ready for us; a filled one is refused by _read_note
            temporary.rename(folder)
            shutil.rmtree(folder / "replaced", ignore_errors=True)
        finally:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(temporary)


def _read_note(folder: Path) -> TrainingSummary | None:
    """The note of the demo teacher in `folder`; None where nothing is. Raises InputError for anything else there."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        return TrainingSummary(**json.loads((folder / NOTE_FILE).read_bytes()))
    except (OSError, ValueError, TypeError) as e:
        raise InputError(
            f"{folder} is there and is not a demo teacher ({e}): move it away, or name another folder"
        ) from e


def _corpus_bytes(corpus: Path, name: str) -> bytes:
    try:
        return (corpus / name).read_bytes()
    except OSError as e:
        raise MissingInputError(
            f"no corpus at {corpus / name} ({e.strerror}): write it with python -m kd_assets.demo.corpus --out {corpus}"
        ) from e


def _corpus_records(corpus: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _corpus_bytes(corpus, name).splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kd_assets.demo.teacher", description="Train the demo's teacher.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder that kd_assets.demo.corpus wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; kept and reused")
    parser.add_argument("--max-seconds", type=float, default=150.0, help="wall-clock limit (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=TrainingPlan().steps, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    def report(event: Mapping[str, Any]) -> None:
        print(json.dumps(event), flush=True)

    from transformers.utils import logging as transformers_logging

    plan = TrainingPlan(steps=options.steps, seed=options.seed)
    transformers_logging.disable_progress_bar()  # its bar of one file would stand among our JSON lines
    try:
        summary, reused = make_teacher(
            options.corpus, options.out, plan=plan, max_seconds=options.max_seconds, report=report
        )
    except KdAssetsError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    report({"event": "finished", "teacher": str(options.out), "reused": reused} | dataclasses.asdict(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
