"""A student trained by a plain loop with `accelerate` from a recipe's top-k cache, on one process or many.

    python -m kd_assets.examples.with_accelerate var/store/demo --to my-student
    accelerate launch --multi_gpu --num_processes 2 -m kd_assets.examples.with_accelerate var/store/demo --to my-student

The second is for a machine without GPUs, too: with `--cpu`, accelerate starts one process whatever `--num_processes`
says. Every batch is divided among the ranks, each reads only its own documents, and each predicted token counts alike:
the number of ranks changes the speed and not the student.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, gather_object, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from kd_assets.errors import InputError
from kd_assets.examples.setting import argument_parser, parsed_arguments, setting_of
from kd_assets.student.dataset import Sample, at_topk_positions, collate
from kd_assets.student.losses import response_loss


def kl(model: Any, batch: dict[str, Any]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # Row i of the cache is about token i + 1: the logits of the last token have no row.
    of_rows = at_topk_positions(logits[:, :-1], batch)
    return response_loss(of_rows, batch["topk_ids"], batch["topk_logprobs"], batch["topk_mask"])


def held_out_kl(accelerator: Accelerator, model: Any, held_out: Dataset[Sample]) -> float:
    """Mean over all rows, in nats a token; each rank computes a part of the documents."""
    of_sums = torch.zeros(2, device=accelerator.device)
    n_documents: int = len(held_out)  # type: ignore[arg-type]
    with accelerator.split_between_processes(list(range(n_documents))) as mine, torch.no_grad():
        for batch in DataLoader(Subset(held_out, mine), batch_size=16, collate_fn=collate):
            on_device = send_to_device(batch, accelerator.device)
            n_rows = on_device["topk_mask"].sum()
            of_sums += torch.stack([kl(accelerator.unwrap_model(model), on_device) * n_rows, n_rows])
    total, n_rows = accelerator.reduce(of_sums, "sum")
    return float(total / n_rows)


def train(
    student: Any,
    documents: Dataset[Sample],
    held_out: Dataset[Sample],
    *,
    to: Path,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 5e-3,
) -> dict[str, Any]:
    """Train in place and save. Returns the KL divergence before and after, and which documents the ranks saw.

    `batch_size` is that of all ranks together. Raises InputError where the documents do not fill one batch.
    """
    accelerator = Accelerator(
        # Without this word, processes on a machine without a GPU know nothing of each other and train a student each.
        cpu=not torch.accelerator.is_available(),
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
    )
    loader = DataLoader(documents, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    if not len(loader):
        raise InputError(f"no batch of {batch_size} documents: take a smaller one, or materialize more partitions")
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    model, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    before = held_out_kl(accelerator, model, held_out)
    seen: list[tuple[str, str]] = []
    for step, batch in enumerate(itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps)):
        n_rows = batch["topk_mask"].sum()
        # Gradients are averaged over ranks, whose documents differ in length.
        share = n_rows * accelerator.num_processes / accelerator.reduce(n_rows, "sum").clamp(min=1)
        accelerator.backward(kl(model, batch) * share)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step < len(loader):
            seen += zip(batch["partition_key"], batch["document_id"], strict=True)
    after = held_out_kl(accelerator, model, held_out)
    accelerator.unwrap_model(model).save_pretrained(to, is_main_process=accelerator.is_main_process)
    of_ranks = gather_object([seen])
    # The model goes first: where it is the last to hold the group of processes, DistributedDataParallel's reducer may
    # wait for ever for a thread of Gloo that asks for the interpreter's lock, which the reducer has.
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()
    return {"before": before, "after": after, "of_ranks": of_ranks, "is_first": accelerator.is_main_process}


if __name__ == "__main__":
    given = parsed_arguments(argument_parser("Train a student by accelerate from a recipe's top-k cache."))
    found = train(*setting_of(given), to=given.to, steps=given.steps, learning_rate=given.learning_rate)
    if found["is_first"]:
        all_seen = [key for seen in found["of_ranks"] for key in seen]
        print(f"KL divergence on held-out documents: {found['before']:.4f} before, {found['after']:.4f} after")
        print(f"documents of the first pass, by rank: {[len(seen) for seen in found['of_ranks']]}, ", end="")
        print(f"{len(set(all_seen))} different ones")
