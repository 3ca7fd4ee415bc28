"""The demo's teacher: a small Llama trained on the demo's corpus, on the spot, in about a minute on two cores.

It leaves a folder like any other model's (config, safetensors, tokenizer with chat template), which the teacher pass
loads with the code that loads a 70B. The folder appears by rename when it is complete. A note beside the weights names
the recipe that made them (plan and corpus); equal recipes find it and train nothing.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_assets.demo.corpus import CHATS_FILE, DOCUMENTS_FILE
from kd_assets.demo.tokenizer import corpus_bytes, corpus_texts, split_documents, train_tokenizer
from kd_assets.demo.training import Report, TrainingPlan, build_model, mean_loss, train_model, unigram_loss
from kd_assets.durable import atomic_write, prepare_folder, storage_errors
from kd_assets.errors import InputError, KdAssetsError
from kd_assets.store import canonical_json

NOTE_FILE = "demo_teacher.json"
TRAINING_VERSION = 1
"""Counts up where teachers that are there already are to be trained again, from an equal plan and corpus."""

_RESERVE_SHARE = 0.06
"""Share of the time kept for measuring and saving."""


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
    hashes = {name: hashlib.sha256(corpus_bytes(corpus, name)).hexdigest() for name in (DOCUMENTS_FILE, CHATS_FILE)}
    recipe = {"version": TRAINING_VERSION, "plan": dataclasses.asdict(plan), "corpus": hashes}
    return hashlib.sha256(canonical_json(recipe).encode()).hexdigest()


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
