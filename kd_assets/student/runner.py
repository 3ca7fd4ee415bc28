"""The worker's kind `student`: a small student that learns from the caches, as proof that they teach.

Used by `kd_assets.worker`; needs torch and transformers. One unit is one training: it reads every shard of the caches
it is given, trains for a fixed number of steps with every loss they allow, and commits the curve. Equal caches, seed
and machine give an equal curve. A student whose loss is not finite or does not fall commits nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_assets.contract import CACHES, STUDENT_HEAD_SIZE, JobFile, Output, Reporter, StudentParams, WorkUnit
from kd_assets.errors import ContractError, InterruptedTaskError, RecipeError, StudentDidNotLearnError
from kd_assets.store import CacheReader, Ragged, ResultWriter
from kd_assets.store.schema import hidden_state_of
from kd_assets.student.dataset import (
    TeacherCacheDataset,
    at_hidden_positions,
    at_topk_positions,
    collate,
)
from kd_assets.student.fields import hidden_fields
from kd_assets.student.losses import (
    feature_cosine_loss,
    mean_pooled,
    relation_angle_loss,
    relation_distance_loss,
    response_loss,
    sampled_response_loss,
)
from kd_assets.worker.provenance import task_provenance
from kd_assets.worker.stop_flag import StopFlag

CURVE_FILE = "curve.json"

_ANGLE_WEIGHT = 2.0
"""Of the angle-wise beside the distance-wise loss: the ratio of Park et al. 2019, section 4."""
_WARMUP_STEPS = 5
_PROGRESS_INTERVAL_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The losses of every step; a loss whose cache was not given is empty."""

    total: list[float]
    response: list[float]
    feature: list[float]
    relation: list[float]

    @classmethod
    def empty(cls) -> Curve:
        return cls(total=[], response=[], feature=[], relation=[])

    def append(self, losses: dict[str, Tensor]) -> None:
        for name, loss in losses.items():
            getattr(self, name).append(loss.item())
        self.total.append(math.fsum(loss.item() for loss in losses.values()))

    def to_json(self) -> bytes:
        curves = {name: getattr(self, name) for name in ("total", "response", "feature", "relation")}
        steps = list(range(1, len(self.total) + 1))
        return json.dumps({"steps": steps} | {name: values for name, values in curves.items() if values}).encode()


class Student(nn.Module):
    """A small Llama, with a projector from one of its blocks to each cached block of the teacher."""

    def __init__(
        self, params: StudentParams, *, vocabulary: int, teacher_hidden_size: int, blocks: Sequence[str]
    ) -> None:
        """`blocks` are the names of the hidden-state fields; empty without that cache."""
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        if params.hidden_size < 1 or params.hidden_size % STUDENT_HEAD_SIZE:
            raise RecipeError(
                f"student.hidden_size is {params.hidden_size}: it must be a multiple of {STUDENT_HEAD_SIZE}"
            )
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=params.hidden_size,
                intermediate_size=params.hidden_size * 3,
                num_hidden_layers=params.n_layers,
                num_attention_heads=params.hidden_size // STUDENT_HEAD_SIZE,
                max_position_embeddings=params.max_length,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
                use_cache=False,
            )
        )
        self.layers = student_layers(len(blocks), params.n_layers)
        self.projectors = nn.ModuleDict(
            {name: nn.Linear(params.hidden_size, teacher_hidden_size, bias=False) for name in blocks}
        )

    def losses(self, batch: dict[str, Any], *, temperature: float) -> dict[str, Tensor]:
        """Every loss that the batch has a cache for: some of `response`, `feature` and `relation`."""
        # Padding is on the right, so a causal student sees none of it and needs no attention mask.
        output = self.model.model(input_ids=batch["input_ids"], output_hidden_states=bool(self.projectors))
        losses: dict[str, Tensor] = {}
        if "topk_ids" in batch:
            # Logits are the student's largest tensor: only rows that the loss looks at are computed.
            asked_BT = batch["topk_mask"]
            states_BMH = at_topk_positions(output.last_hidden_state[:, :-1], batch)
            logits_MV = self.model.lm_head(states_BMH[asked_BT])
            asked_M = asked_BT[asked_BT]
            if "sampled_ids" in batch and temperature == 1.0:  # drawn at temperature 1: they say nothing of another
                losses["response"] = sampled_response_loss(
                    logits_MV, batch["sampled_ids"][asked_BT], batch["sampled_counts"][asked_BT], asked_M
                )
            else:
                losses["response"] = response_loss(
                    logits_MV,
                    batch["topk_ids"][asked_BT],
                    batch["topk_logprobs"][asked_BT],
                    asked_M,
                    temperature=temperature,
                )
        if self.projectors:
            of_blocks = [
                feature_cosine_loss(
                    projector(at_hidden_positions(output.hidden_states[layer + 1], batch)),
                    batch[name],
                    batch["hidden_mask"],
                )
                for layer, (name, projector) in zip(self.layers, self.projectors.items(), strict=True)
            ]
            losses["feature"] = torch.stack(of_blocks).mean()
        if "mean_embedding" in batch:
            # A document that the student sees only the beginning of has another embedding than the teacher's.
            whole_B = batch["embedded_tokens"] <= batch["attention_mask"].sum(1)
            student_MS = mean_pooled(output.last_hidden_state, batch["attention_mask"])[whole_B]
            teacher_MH = batch["mean_embedding"][whole_B]
            losses["relation"] = relation_distance_loss(student_MS, teacher_MH) + _ANGLE_WEIGHT * relation_angle_loss(
                student_MS, teacher_MH
            )
        return losses


class StudentRunner:
    """Trains the students of a task, one a unit."""

    def __init__(self, job: JobFile, report: Reporter, stop: StopFlag) -> None:
        if job.student is None:
            raise ContractError(f"job {job.key} is of kind student and has no student parameters")
        self._job, self._params, self._report, self._stop = job, job.student, report, stop
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        """Train on `unit.inputs` (cache → result folders, the shards in one order) and commit the curve.

        Raises RecipeError without a cache or documents, StudentDidNotLearnError when the loss does not fall, and
        InterruptedTaskError on a stop: a restart trains from the beginning.
        """
        with ExitStack() as leases:
            # Before the training: a process that is at it already is to be found now, not at the end.
            results = [leases.enter_context(self._result_of(output, unit)) for output in unit.outputs]
            curve, facts = self._trained(unit)
            for result in results:
                self._commit(result, curve, facts)
        return facts

    def _trained(self, unit: WorkUnit) -> tuple[Curve, dict[str, Any]]:
        """The losses of a training, and what there is to say of it."""
        folders = {asset: [Path(f) for f in unit.inputs[asset]] for asset in CACHES if unit.inputs.get(asset)}
        dataset = TeacherCacheDataset.from_folders(folders, max_length=self._params.max_length)
        if not len(dataset):
            raise RecipeError(f"partition {unit.partition_key!r}: the caches given to the student hold no documents")
        # A training leaves the process's random state as it found it.
        with torch.random.fork_rng():
            torch.manual_seed(self._params.seed)
            student = self._new_student(dataset)
            started = time.monotonic()
            curve, n_tokens = self._train(student, dataset, unit)
        wall_s = time.monotonic() - started
        first, last = fallen(curve.total)
        return curve, {
            "first_loss": first,
            "last_loss": last,
            "n_steps": len(curve.total),
            "n_parameters": sum(p.numel() for p in student.parameters()),
            "n_documents": len(dataset),
            "tokens_per_s": n_tokens / wall_s,
            "wall_s": wall_s,
            "caches": sorted(folders),
        }

    def close(self) -> None:
        """Nothing is held between units."""

    def _new_student(self, dataset: TeacherCacheDataset) -> Student:
        sample = dataset[0]
        blocks = distilled_fields(hidden_fields(sample))
        student = Student(
            self._params,
            vocabulary=vocabulary_of(dataset),
            teacher_hidden_size=sample[blocks[0]].shape[-1] if blocks else 0,
            blocks=blocks,
        )
        return student.to(self._device).train()

    def _train(self, student: Student, dataset: TeacherCacheDataset, unit: WorkUnit) -> tuple[Curve, int]:
        """Train in place. Returns the losses of every step, and how many tokens they were over."""
        params = self._params
        optimizer = torch.optim.AdamW(student.parameters(), lr=params.learning_rate, betas=(0.9, 0.95))
        curve, n_tokens = Curve.empty(), 0
        started = reported = time.monotonic()
        for step, batch in enumerate(itertools.islice(self._batches(dataset), params.steps)):
            if self._stop:
                raise InterruptedTaskError(f"stopped by {self._stop.signal_name} after {step} steps of the student")
            for group in optimizer.param_groups:
                group["lr"] = params.learning_rate * min(1.0, (step + 1) / _WARMUP_STEPS) * (1 - step / params.steps)
            losses = student.losses(batch, temperature=params.temperature)
            torch.autograd.backward(torch.stack(list(losses.values())).sum())
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(losses)
            n_tokens += int(batch["attention_mask"].sum())
            now = time.monotonic()
            if now - reported >= _PROGRESS_INTERVAL_S or step + 1 == params.steps:
                reported = now
                self._report.emit(
                    "progress",
                    partition_key=unit.partition_key,
                    n_documents=params.steps * params.batch_documents,
                    done_documents=(step + 1) * params.batch_documents,
                    n_tokens=n_tokens * params.steps // (step + 1),
                    done_tokens=n_tokens,
                    tokens_per_s=round(n_tokens / (now - started), 1),
                    n_steps=params.steps,
                    done_steps=step + 1,
                    loss=curve.total[-1],
                )
        return curve, n_tokens

    def _batches(self, dataset: TeacherCacheDataset) -> Iterator[dict[str, Any]]:
        """Endless batches on the device, in a new order every pass."""
        loader = DataLoader(
            dataset,
            batch_size=min(self._params.batch_documents, len(dataset)),
            shuffle=True,
            drop_last=True,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(self._params.seed),
        )
        for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
            yield {k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _result_of(self, output: Output, unit: WorkUnit) -> ResultWriter:
        recipe_folder = Path(self._job.recipe_folder)
        return ResultWriter(
            output, recipe=self._job.recipe, recipe_folder=recipe_folder, partition_key=unit.partition_key
        )

    def _commit(self, result: ResultWriter, curve: Curve, facts: dict[str, Any]) -> None:
        provenance = self._job.provenance | task_provenance()
        provenance |= {"device": str(self._device), "seed": self._params.seed}
        if self._device.type == "cuda":
            provenance["gpu"] = torch.cuda.get_device_name(self._device)
        result.commit_files(
            {CURVE_FILE: curve.to_json()},
            checks={"learned": {"first_loss": facts["first_loss"], "last_loss": facts["last_loss"]}},
            provenance=provenance,
            facts=facts,
        )


def distilled_fields(fields: Sequence[str]) -> list[str]:
    """The hidden-state fields that the student learns from: those of blocks; without any, the last of the others."""
    return [f for f in fields if isinstance(hidden_state_of(f), int)] or list(fields[-1:])


def student_layers(n_blocks: int, n_layers: int) -> tuple[int, ...]:
    """Which of the student's layers (0-based) learns from each of the teacher's cached blocks: spread evenly."""
    return tuple(max(0, round((i + 1) / (n_blocks + 1) * n_layers) - 1) for i in range(n_blocks))


def vocabulary_of(dataset: TeacherCacheDataset) -> int:
    """The size of the teacher's vocabulary as the caches' manifests have it (`vocab_size` among their facts).

    Caches that do not say so are read through for their largest token id: the student needs no more than these.
    """
    facts = [manifest.facts for reader in dataset.readers.values() for manifest in reader.manifests]
    known = [int(f["vocab_size"]) for f in facts if "vocab_size" in f]
    if known:
        return max(known)
    drawn = [m.stats.get("max_sampled_id", 0) for reader in dataset.readers.values() for m in reader.manifests]
    largest = int(max(drawn))
    for reader in dataset.readers.values():
        names = [name for name in ("input_ids", "topk_ids") if name in reader.fields]
        ids_only = CacheReader.from_folders(reader.folders, fields=names, allow_failed=True)  # as the dataset was
        for i in range(len(ids_only)):
            document = ids_only[i]
            ids = (document[name].values if isinstance(document[name], Ragged) else document[name] for name in names)
            largest = max(largest, *(int(of.max(initial=0)) for of in ids))
    return largest + 1


def fallen(losses: Sequence[float]) -> tuple[float, float]:
    """The mean of the first and of the last tenth of the losses (a step at least).

    Raises StudentDidNotLearnError when a loss is not finite or the second mean is not below the first.
    """
    bad = next((step for step, loss in enumerate(losses, start=1) if not math.isfinite(loss)), None)
    if bad is not None:
        raise StudentDidNotLearnError(
            f"the student's loss is {losses[bad - 1]} at step {bad} of {len(losses)}: lower student.learning_rate, and "
            "run kd-assets verify on the caches"
        )
    n = max(1, len(losses) // 10)
    first, last = math.fsum(losses[:n]) / n, math.fsum(losses[-n:]) / n
    if last >= first:
        raise StudentDidNotLearnError(
            f"the student's loss did not fall over {len(losses)} steps: {first:.4f} in the first {n}, {last:.4f} in "
            f"the last {n}; raise student.steps or lower student.learning_rate, and kd-assets inspect the caches"
        )
    return first, last
