"""The students of `worth`: one training a variant and seed, on equal batches from equal weights, and how good each is.

Documents come packed from `kd_assets.student.loading`, losses are those of `kd_assets.student.losses`, at temperature
1. A seed decides the first weights and the order of documents; both are the same for every variant. What is held out
is judged on the tokens that the loss masks ask for.

Legend: B rows, T tokens of a row, M selected positions, V vocabulary, H hidden size of the teacher.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kd_assets.contract import Asset, StudentParams
from kd_assets.demo.training import TrainingPlan, bfloat16_is_faster, optimizers_of
from kd_assets.store import read_shard
from kd_assets.student.dataset import TeacherCacheDataset, at_hidden_positions
from kd_assets.student.loading import TrainingLoader
from kd_assets.student.losses import (
    cross_entropy_loss,
    feature_cosine_loss,
    renormalised_response_loss,
    response_loss,
    rest_to_target_loss,
    sampled_response_loss,
)
from kd_assets.student.runner import Student

Loss = Literal["online", "cross_entropy", "bucket", "target", "renormalised", "draws"]
Batch = Mapping[str, Any]

WARMUP_SHARE = 0.05
FEATURE_WEIGHT = 1.0
"""Of the states' loss beside that of the distributions, as in the demo's student."""
N_BINS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """All that is the same for every variant."""

    steps: int = 240
    rows: int = 1
    """Packed rows of a batch."""
    row_tokens: int = 512
    hidden_size: int = 128
    n_layers: int = 2
    learning_rate: float = 5e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """What a model is worth on held-out tokens."""

    loss: float
    """Cross-entropy with the true next token, nats a token."""
    kl: float
    """KL(teacher ‖ model) over the whole vocabulary, nats a token."""
    ece: float
    """See `calibration_error`."""


class Teacher:
    """The teacher's whole distribution, for the online student and for what is held out.

    It is frozen, and a document's states are the same each time: they are computed when it is first seen, and kept.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._states: dict[str, Tensor] = {}

    @property
    def vocabulary(self) -> int:
        return int(self._model.config.vocab_size)

    @property
    def hidden_size(self) -> int:
        return int(self._model.config.hidden_size)

    @torch.no_grad()
    def states(self, document_id: str, input_ids_L: Tensor) -> Tensor:
        """[L, H]: what goes into the head."""
        if document_id not in self._states:
            self._states[document_id] = self._model.model(input_ids=input_ids_L[None]).last_hidden_state[0]
        return self._states[document_id]

    @torch.no_grad()
    def logprobs(self, states_MH: Tensor) -> Tensor:
        """[M, V], float32."""
        logprobs: Tensor = self._model.lm_head(states_MH).log_softmax(-1)
        return logprobs

    def states_of_batch(self, batch: Batch) -> Tensor:
        """[B, T, H] of a packed batch, zero on padding."""
        input_ids_BT = batch["input_ids"]
        states_BTH = torch.zeros(*input_ids_BT.shape, self.hidden_size)
        names = [name for row in batch["document_id"] for name in row]
        places = (batch[f"document_{name}"].tolist() for name in ("rows", "starts", "lengths"))
        for name, row, start, length in zip(names, *places, strict=True):
            place = slice(start, start + length)
            states_BTH[row, place] = self.states(name, input_ids_BT[row, place])
        return states_BTH


def train(
    caches: Mapping[Asset, tuple[Path, ...]], loss: Loss, teacher: Teacher, *, setting: Setting, seed: int
) -> Student:
    """A student of this loss, and of the caches' hidden states where there are any, after its last step."""
    dataset = TeacherCacheDataset.from_folders({asset: list(folders) for asset, folders in caches.items()})
    blocks = [name for name in dataset[0] if name.startswith("hidden_block_")]
    params = StudentParams(
        hidden_size=setting.hidden_size, n_layers=setting.n_layers, max_length=setting.row_tokens, seed=seed
    )
    torch.manual_seed(seed)
    student = Student(
        params, vocabulary=teacher.vocabulary, teacher_hidden_size=teacher.hidden_size, blocks=blocks
    ).train()
    # As the demo's teacher is trained: in so few steps it comes much further than by AdamW alone.
    autocast = bfloat16_is_faster()
    optimizers = optimizers_of(student.model, TrainingPlan(learning_rate=setting.learning_rate), use_bfloat16=autocast)
    if blocks:
        projectors = student.projectors.parameters()
        optimizers.append(torch.optim.AdamW(projectors, lr=setting.learning_rate, betas=(0.9, 0.95), fused=True))
    for step, batch in enumerate(batches(dataset, setting, seed)):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * rate_factor(step, setting.steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = loss_of(student, batch, loss, teacher)
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return student.eval()


def batches(dataset: TeacherCacheDataset, setting: Setting, seed: int) -> Iterator[Batch]:
    """One a step: epoch after epoch, the last batch of each left out where it is not whole."""
    loader = TrainingLoader(
        dataset, batch_size=setting.rows, pack_to=setting.row_tokens, seed=seed, drop_last=True, num_workers=0
    )
    steps = 0
    while True:
        for batch in loader:
            if steps == setting.steps:
                return
            steps += 1
            yield batch


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine to zero."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def loss_of(student: Student, batch: Batch, loss: Loss, teacher: Teacher) -> Tensor:
    # A packed row's documents are kept apart by their positions.
    output = student.model.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        output_hidden_states=bool(student.projectors),
    )
    asked_BT = batch["topk_mask"]
    logits_MV = student.model.lm_head(output.last_hidden_state[:, :-1][asked_BT]).float()
    asked_M = torch.ones(len(logits_MV), dtype=torch.bool)

    def of(name: str) -> Tensor:
        values: Tensor = batch[name][asked_BT]
        return values

    targets_M = batch["input_ids"][:, 1:][asked_BT]
    response: Callable[[], Tensor] = {
        "online": lambda: whole_response_loss(
            logits_MV, teacher.logprobs(teacher.states_of_batch(batch)[:, :-1][asked_BT])
        ),
        "cross_entropy": lambda: cross_entropy_loss(logits_MV, targets_M, asked_M),
        "bucket": lambda: response_loss(logits_MV, of("topk_ids"), of("topk_logprobs"), asked_M),
        "target": lambda: rest_to_target_loss(logits_MV, of("topk_ids"), of("topk_logprobs"), targets_M, asked_M),
        "renormalised": lambda: renormalised_response_loss(logits_MV, of("topk_ids"), of("topk_logprobs"), asked_M),
        "draws": lambda: sampled_response_loss(logits_MV, of("sampled_ids"), of("sampled_counts"), asked_M),
    }[loss]
    total = response()
    for layer, (name, projector) in zip(student.layers, student.projectors.items(), strict=True):
        projected_BTH = projector(at_hidden_positions(output.hidden_states[layer + 1], batch))
        total = total + FEATURE_WEIGHT * feature_cosine_loss(projected_BTH, batch[name], batch["hidden_mask"])
    return total


def whole_response_loss(logits_MV: Tensor, teacher_MV: Tensor) -> Tensor:
    """KL(teacher ‖ student) over the whole vocabulary, mean over M, in nats (Hinton et al. 2015, section 2)."""
    return functional.kl_div(logits_MV.log_softmax(-1), teacher_MV, log_target=True, reduction="batchmean")


class HeldOut:
    """The held-out documents, and the teacher's distribution at every token of them that is learned."""

    def __init__(self, shards: tuple[Path, ...], teacher: Teacher) -> None:
        self._documents: list[tuple[Tensor, Tensor]] = []
        """Token ids and, of the predictions, which are learned."""
        self._teacher_MV: list[Tensor] = []
        for shard in map(read_shard, shards):
            for i, document_id in enumerate(shard.document_ids):
                place = slice(int(shard.offsets_D1[i]), int(shard.offsets_D1[i + 1]))
                ids_L = torch.from_numpy(shard.input_ids_N[place].astype("int64"))
                asked_L1 = torch.from_numpy(shard.loss_mask_N[place].copy())[1:]
                if asked_L1.any():
                    self._documents.append((ids_L, asked_L1))
                    states_MH = teacher.states(document_id, ids_L)[:-1][asked_L1]
                    self._teacher_MV.append(teacher.logprobs(states_MH))

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self._teacher_MV))

    @property
    def n_documents(self) -> int:
        return len(self._documents)

    def quality_of_teacher(self) -> Quality:
        return self._quality(iter(self._teacher_MV))

    @torch.no_grad()
    def quality(self, student: Student) -> Quality:
        return self._quality(
            student.model(input_ids=ids_L[None]).logits[0, :-1][asked_L1].log_softmax(-1)
            for ids_L, asked_L1 in self._documents
        )

    def _quality(self, logprobs: Iterator[Tensor]) -> Quality:
        """Of a model's log-probabilities [M, V], document after document."""
        loss, kl = 0.0, 0.0
        confidences, hits = [], []
        for model_MV, teacher_MV, (ids_L, asked_L1) in zip(logprobs, self._teacher_MV, self._documents, strict=True):
            targets_M = ids_L[1:][asked_L1]
            loss -= float(model_MV.gather(-1, targets_M[:, None]).sum())
            kl += float(functional.kl_div(model_MV, teacher_MV, log_target=True, reduction="sum"))
            confidence_M, first_M = model_MV.max(-1)
            confidences.append(confidence_M.exp())
            hits.append(first_M == targets_M)
        n = self.n_tokens
        return Quality(loss=loss / n, kl=kl / n, ece=calibration_error(torch.cat(confidences), torch.cat(hits)))


def calibration_error(confidence_M: Tensor, is_hit_M: Tensor, *, n_bins: int = N_BINS) -> float:
    """The expected calibration error: predictions are put into `n_bins` bins of equal width by the probability of their
    most likely token, and of each bin the distance of its mean probability from its share of hits is taken, weighted by
    its share of all predictions (Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3; 15 bins as in
    their section 5)."""
    bin_M = (confidence_M * n_bins).ceil().long().clamp(1, n_bins) - 1
    gaps = torch.zeros(n_bins, dtype=torch.float64)
    gaps.index_add_(0, bin_M, is_hit_M.double() - confidence_M.double())
    return float(gaps.abs().sum() / max(len(confidence_M), 1))


def trained_quality(
    caches: Mapping[Asset, tuple[Path, ...]],
    loss: Loss,
    teacher: Teacher,
    held_out: HeldOut,
    *,
    setting: Setting,
    seed: int,
) -> tuple[Quality, float]:
    """A student's quality, and the seconds of processor time that it took."""
    started = time.process_time()
    with torch.random.fork_rng(devices=[]):
        student = train(caches, loss, teacher, setting=setting, seed=seed)
    return held_out.quality(student), time.process_time() - started
