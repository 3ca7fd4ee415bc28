"""A student trained by `transformers.Trainer` from a recipe's top-k cache.

    python -m kd_assets.examples.with_trainer var/store/demo --to my-student

What a Trainer must be told: `remove_unused_columns=False`, else the teacher's fields never reach the loss, and
`label_names`, else `evaluate` computes none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from kd_assets.examples.setting import argument_parser, parsed_arguments, setting_of
from kd_assets.student.dataset import Sample, at_topk_positions, collate
from kd_assets.student.losses import response_loss


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """A Trainer of batches of `collate`, whose loss is the KL divergence of the student from the cached teacher."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        # Row i of the cache is about token i + 1: the logits of the last token have no row.
        loss = response_loss(
            at_topk_positions(outputs.logits[:, :-1], inputs),
            inputs["topk_ids"],
            inputs["topk_logprobs"],
            inputs["topk_mask"],
            temperature=1.0,
        )
        return (loss, outputs) if return_outputs else loss


def train(
    student: Any,
    documents: Dataset[Sample],
    held_out: Dataset[Sample],
    *,
    to: Path,
    steps: int,
    learning_rate: float = 5e-3,
) -> tuple[float, float]:
    """Train in place and save. Returns the KL divergence on `held_out` before and after, in nats a token."""
    arguments = TrainingArguments(
        output_dir=str(to),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        label_names=["topk_ids"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = DistillationTrainer(
        student, arguments, data_collator=collate, train_dataset=documents, eval_dataset=held_out
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    return before, after


if __name__ == "__main__":
    given = parsed_arguments(argument_parser("Train a student by transformers.Trainer from a recipe's top-k cache."))
    kls = train(*setting_of(given), to=given.to, steps=given.steps, learning_rate=given.learning_rate)
    print("KL divergence on held-out documents: {:.4f} before, {:.4f} after, in nats a token".format(*kls))
