"""A student trained by TRL's trainer for a teacher behind a server: the replay server, which answers from the cache.

    kd-assets serve var/store/demo &
    python -m kd_assets.examples.with_trl var/store/demo --to my-student --server http://127.0.0.1:8000

TRL's `ServerDistillationTrainer` has the student write each completion, which no cache can know. Here completions are
the cached documents' own, each run of learned tokens one: one method says so, and what is asked of the server, the
loss and the loop are TRL's, version 1.16. For a cache with `positions: learned` add `--not-kept null` to the server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
from trl.generation import vllm_client

from kd_assets.errors import InputError
from kd_assets.examples.setting import argument_parser, parsed_arguments, setting_of
from kd_assets.student.dataset import Sample


class CachedDocumentsTrainer(ServerDistillationTrainer):  # type: ignore[misc]
    """TRL's trainer, where a prompt brings its completion."""

    def _generate(self, prompts: list[dict[str, list[int]]]) -> tuple[Any, ...]:
        """Token ids of prompts and of completions; no tools, no images."""
        return [p["ids"] for p in prompts], [p["completion_ids"] for p in prompts], None, None, []


def as_prompts(documents: Dataset[Sample]) -> datasets.Dataset:
    """Each run of learned tokens as a completion of what stands before it: TRL learns completions to their end.

    Raises InputError for a learned token whose row the cache does not keep.
    """
    found = []
    for i in range(len(documents)):  # type: ignore[arg-type]
        sample = documents[i]
        ids = sample["input_ids"].tolist()
        for first, end in learned_runs(sample["loss_mask"]):
            _require_rows(sample, first, end)
            found.append({"prompt": {"ids": ids[:first], "completion_ids": ids[first:end]}})
    return datasets.Dataset.from_list(found)


def learned_runs(loss_mask_L: torch.Tensor) -> list[tuple[int, int]]:
    """The first of each run of learned tokens, and the one after its last."""
    learned_L = loss_mask_L.int()
    learned_L[:1] = 0  # of the first token nobody knows anything
    nothing = torch.zeros(1, dtype=torch.int32)
    changes = torch.diff(learned_L, prepend=nothing, append=nothing)
    firsts, ends = ((changes == change).nonzero().flatten().tolist() for change in (1, -1))
    return list(zip(firsts, ends, strict=True))


def _require_rows(sample: Sample, first: int, end: int) -> None:
    """Token t is predicted by row t - 1; a cache of some positions says which rows it has."""
    if "topk_positions" not in sample:
        return
    missing = set(range(first - 1, end - 1)) - set(sample["topk_positions"].tolist())
    if missing:
        raise InputError(
            f"document {sample['document_id']!r} of partition {sample['partition_key']!r} learns its token "
            f"{min(missing) + 1}, and the top-k cache keeps no row about it: TRL learns whole completions; make the "
            "cache with `positions: learned` or `positions: all`"
        )


def train(
    student: Any,
    documents: Dataset[Sample],
    held_out: Dataset[Sample],
    *,
    to: Path,
    steps: int,
    server: str,
    learning_rate: float = 5e-3,
) -> tuple[float, float]:
    """Train in place and save. Returns the KL divergence on `held_out` before and after, in nats a token."""
    # TRL's client wants vLLM on this machine, too, and uses it only to send weights to a server.
    vllm_client.is_vllm_available = lambda *_: True
    arguments = ServerDistillationConfig(
        output_dir=str(to),
        teacher_model_server_url=server,
        loss_top_k=documents[0]["topk_ids"].shape[-1],
        beta=0.0,  # forward KL, with the tokens outside of the top k as one
        max_steps=steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        bf16=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # All is token ids: the tokenizer is asked what to pad with, and nothing else.
    words = Tokenizer(WordLevel({"_": 0}, "_"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="_", eos_token="_")  # noqa: S106
    trainer = CachedDocumentsTrainer(
        student, arguments, as_prompts(documents), as_prompts(held_out), processing_class=tokenizer
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    return before, after


if __name__ == "__main__":
    parser = argument_parser("Train a student by TRL from a recipe's top-k cache behind the replay server.")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="of kd-assets serve (default: %(default)s)")
    given = parsed_arguments(parser)
    kls = train(
        *setting_of(given), to=given.to, steps=given.steps, server=given.server, learning_rate=given.learning_rate
    )
    print("KL divergence on held-out documents: {:.4f} before, {:.4f} after, in nats a token".format(*kls))
