"""Kind `teacher`: one load, then partition after partition, each through one pass that feeds every missing cache.

Loaded by `kd_assets.worker` on a node; imports no dagster. The order of a partition: its documents are cut into windows
(one window = one part of each cache), a window into batches; a batch is one forward; a full window goes to the
writer's thread; when all parts are on disk a sample is recomputed from what was written, and each cache is committed.

The invariant: the bytes of a part depend on its documents and the recipe, never on which caches are missing or on what
an earlier attempt left. So batches are planned over the longest `max_length` of all caches of the recipe, selected or
not, and an attempt that needs only one of them runs the same batches (and stops as early in each as it may).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kd_assets.contract import Asset, JobFile, Output, TeacherParams, WorkUnit
from kd_assets.errors import ContractError, InterruptedTaskError, MissingInputError, RecipeError
from kd_assets.identity import DigestCache
from kd_assets.report import Reporter, StopFlag
from kd_assets.store import PartPlan, ResultWriter, Shard, plan_parts, read_shard
from kd_assets.store.provenance import task_provenance
from kd_assets.store.schema import CONVENTIONS
from kd_assets.teacher.batching import Batch, plan_batches
from kd_assets.teacher.capture import Capture, Wanted, Window
from kd_assets.teacher.head import ChunkBuffers
from kd_assets.teacher.load import Teacher, load_teacher
from kd_assets.teacher.memory import within_memory
from kd_assets.teacher.reference import Comparison, reference, sampled_documents, stored_row
from kd_assets.teacher.telemetry import GpuSampler, GpuUsage, device_name, peak_memory_gib
from kd_assets.teacher.writer import PartToWrite, PartWriter

PROGRESS_S = 1.0

FALLBACK_BUDGET_TOKENS = 1024
"""Most tokens of a batch of a teacher whose head is not proven: its own forward makes all their logits at once."""


def longest(params: TeacherParams) -> int:
    """The largest `max_length` of the recipe's caches: tokens of a document that run, whatever is selected."""
    caches = (params.topk, params.hidden_states, params.embeddings)
    return max(cache.max_length for cache in caches if cache is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedWindow:
    """A window that still has to run, and for which caches."""

    part: PartPlan
    assets: frozenset[Asset]
    batches: tuple[Batch, ...]

    @property
    def n_tokens(self) -> int:
        return sum(batch.n_tokens for batch in self.batches)


def plan_windows(
    shard: Shard,
    parts: Sequence[PartPlan],
    missing: Mapping[int, frozenset[Asset]],
    *,
    max_length: int,
    budget: int,
    alone_above: int | None,
) -> list[PlannedWindow]:
    """The windows some cache still misses, with their batches. `missing`: part index → caches without that part."""
    lengths_D = shard.n_tokens_D.clip(max=max_length)
    return [
        PlannedWindow(
            part=part,
            assets=missing[part.index],
            batches=plan_batches(
                lengths_D[part.first_document : part.first_document + part.n_documents],
                token_budget=budget,
                alone_above=alone_above,
            ),
        )
        for part in parts
        if missing[part.index]
    ]


@dataclass(kw_only=True, slots=True)
class Tally:
    """What has run of one partition so far, and its progress events."""

    report: Reporter
    partition_key: str
    n_documents: int
    n_tokens: int
    done_documents: int = 0
    done_tokens: int = 0
    computed_tokens: int = 0
    """Padding included."""
    n_batches: int = 0
    started: float = field(default_factory=time.perf_counter)
    reported: float = 0.0

    @staticmethod
    def of(windows: Sequence[PlannedWindow], *, report: Reporter, partition_key: str) -> Tally:
        return Tally(
            report=report,
            partition_key=partition_key,
            n_documents=sum(w.part.n_documents for w in windows),
            n_tokens=sum(w.n_tokens for w in windows),
        )

    def add(self, batch: Batch) -> None:
        self.done_documents += len(batch.documents_B)
        self.done_tokens += batch.n_tokens
        self.computed_tokens += batch.n_padded_tokens
        self.n_batches += 1
        now = time.perf_counter()
        if now - self.reported >= PROGRESS_S or self.done_tokens == self.n_tokens:
            self.reported = now
            self.report.emit(
                "progress",
                partition_key=self.partition_key,
                n_documents=self.n_documents,
                done_documents=self.done_documents,
                n_tokens=self.n_tokens,
                done_tokens=self.done_tokens,
                tokens_per_s=round(self.tokens_per_s, 1),
            )

    @property
    def tokens_per_s(self) -> float:
        return self.done_tokens / max(time.perf_counter() - self.started, 1e-9)

    @property
    def padding_fraction(self) -> float:
        return 1.0 - self.done_tokens / self.computed_tokens if self.computed_tokens else 0.0


class Clock:
    """Seconds since it was made, with laps."""

    def __init__(self) -> None:
        self._started = self._lap_started = time.perf_counter()
        self.laps_s: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Name the time since the last lap."""
        now = time.perf_counter()
        self.laps_s[name], self._lap_started = now - self._lap_started, now

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._started


class TeacherRunner:
    """A loaded teacher that works through partitions (see `kd_assets.worker.Runner`)."""

    def __init__(self, job: JobFile, report: Reporter, stop: StopFlag) -> None:
        if job.teacher is None:
            raise ContractError(f"job {job.key} is of kind teacher and has no teacher parameters")
        self._job, self._report, self._stop, self._params = job, report, stop, job.teacher
        self._teacher = teacher = within_memory(
            lambda params: load_teacher(
                params,
                # The control plane hashed the weights when it planned, and keeps the digests beside the store.
                digests=DigestCache(Path(job.recipe_folder).parent.parent / "digests.json"),
                warn=lambda message: report.emit("warning", message=message),
            ),
            job.teacher,
            doing="the teacher could not be loaded",
            device_remedy="no token budget makes room for its weights: use GPUs with more memory",
        )
        self._gpus = GpuSampler()
        self._buffers = ChunkBuffers(
            vocabulary_size=teacher.vocabulary_size, dtype=teacher.dtype, device=teacher.device
        )
        budget = job.teacher.token_budget
        self._budget = budget if teacher.head is not None else min(budget, FALLBACK_BUDGET_TOKENS)
        report.emit(
            "teacher_loaded",
            load_s=round(teacher.load_s, 3),
            device=str(teacher.device),
            gpu=device_name(teacher.device),
            n_parameters=teacher.n_parameters,
            head="proven" if teacher.head is not None else "own logits",
            attention=teacher.model.config._attn_implementation,
        )

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        """Make and commit every output of `unit`. Raises KdAssetsError; everything finished by then is on disk.

        After an OutOfDeviceMemoryError or OutOfHostMemoryError the runner is as good as before.
        """
        return within_memory(
            self._run,
            unit,
            doing=f"partition {unit.partition_key} failed with a token budget of {self._budget}",
            device_remedy="lower teacher.token_budget",
        )

    def _run(self, unit: WorkUnit) -> dict[str, Any]:
        clock, gpus = Clock(), self._gpus.span()
        shard = self._read_shard(unit)
        self._check_outputs(unit)
        max_length = longest(self._params)
        parts = plan_parts(
            shard.n_tokens_D.clip(max=max_length),
            max_documents=self._params.part_documents,
            max_tokens=self._params.part_tokens,
        )
        with ExitStack() as leases:
            leases.callback(gpus.close)
            results = {o.asset: leases.enter_context(self._result_of(o, unit.partition_key)) for o in unit.outputs}
            windows = plan_windows(
                shard,
                parts,
                {p.index: frozenset(a for a, r in results.items() if p.index not in r.finished) for p in parts},
                max_length=max_length,
                budget=self._budget,
                alone_above=self._teacher.alone_above,
            )
            tally = Tally.of(windows, report=self._report, partition_key=unit.partition_key)
            self._compute(unit.partition_key, shard, windows, results, tally)
            clock.lap("compute")
            checks = self._recompute(unit.partition_key, shard, parts, results)
            clock.lap("recompute")
            facts = self._facts(clock, tally, gpus.usage())
            provenance = self._provenance(facts)
            for asset, result in results.items():
                result.commit(
                    parts=len(parts),
                    checks={"recomputed": checks[asset]},
                    provenance=provenance,
                    facts=facts | {"convention": CONVENTIONS[asset]},
                )
        return {"partition_key": unit.partition_key, "assets": list(results), **facts}

    def close(self) -> None:
        self._gpus.close()

    def _read_shard(self, unit: WorkUnit) -> Shard:
        folders = unit.inputs.get("shards_manifest", ())
        if len(folders) != 1:
            raise ContractError(f"partition {unit.partition_key}: expected one shard as input, found {len(folders)}")
        shard = read_shard(Path(folders[0]))
        if not len(shard.input_ids_N):
            raise MissingInputError(f"partition {unit.partition_key}: the shard in {folders[0]} has no documents")
        check_token_ids(int(shard.input_ids_N.max()), self._teacher.n_token_ids, unit.partition_key)
        n_tokens = min(int(shard.n_tokens_D.max()), longest(self._params))
        if message := check_length(n_tokens, self._teacher, unit.partition_key):
            self._report.emit("warning", message=message)
        return shard

    def _result_of(self, output: Output, partition_key: str) -> ResultWriter:
        return ResultWriter(
            output, recipe=self._job.recipe, recipe_folder=Path(self._job.recipe_folder), partition_key=partition_key
        )

    def _check_outputs(self, unit: WorkUnit) -> None:
        kept = {
            "topk_cache": self._params.topk,
            "hidden_state_cache": self._params.hidden_states,
            "embedding_cache": self._params.embeddings,
        }
        if not unit.outputs:
            raise RecipeError(f"partition {unit.partition_key}: no cache is asked for")
        for output in unit.outputs:
            if kept.get(output.asset) is None:
                raise RecipeError(f"{output.asset} is asked for, and the recipe {self._job.recipe} has no such cache")

    def _compute(
        self,
        partition_key: str,
        shard: Shard,
        windows: Sequence[PlannedWindow],
        results: Mapping[Asset, ResultWriter],
        tally: Tally,
    ) -> None:
        """Run the windows; on return every part is on disk. Raises InterruptedTaskError after the batch in hand."""
        capture = Capture(teacher=self._teacher, partition_key=partition_key, buffers=self._buffers)
        with PartWriter() as writer:
            for planned in windows:
                window = Window.of(
                    shard,
                    planned.part.first_document,
                    planned.part.n_documents,
                    max_length=longest(self._params),
                    wanted=Wanted.of(self._params, set(planned.assets)),
                    teacher=self._teacher,
                )
                for batch in planned.batches:
                    self._raise_if_stopped(partition_key)
                    capture.run(window, batch)
                    tally.add(batch)
                for asset, arrays in window.arrays().items():
                    writer.put(
                        PartToWrite(
                            result=results[asset],
                            asset=asset,
                            index=planned.part.index,
                            n_tokens=arrays.documents.n_tokens,
                            encode=arrays.table,
                        )
                    )

    def _raise_if_stopped(self, partition_key: str) -> None:
        if self._stop:
            raise InterruptedTaskError(
                f"partition {partition_key}: stopped by {self._stop.signal_name}; its finished parts are on disk"
            )

    def _recompute(
        self, partition_key: str, shard: Shard, parts: Sequence[PartPlan], results: Mapping[Asset, ResultWriter]
    ) -> dict[Asset, dict[str, Any]]:
        """Compare a sample of what is on disk with the plain path; what `checks["recomputed"]` keeps, by asset."""
        params, n_documents = self._params, len(shard.document_ids)
        sample = sampled_documents(
            n_documents, params.recompute_documents, seed=params.seed, partition_key=partition_key
        )
        comparisons = {asset: Comparison(asset=asset, dtype=self._teacher.dtype) for asset in results}
        blocks = params.hidden_states.blocks if params.hidden_states is not None else ()
        for index in sample:
            part = next(p for p in reversed(parts) if p.first_document <= index)
            document = shard.slice(index, 1, max_length=longest(params))
            expected = reference(self._teacher, document.input_ids, blocks)
            for asset, result in results.items():
                path = result.folder / result.finished[part.index].name
                comparisons[asset].add(stored_row(path, index - part.first_document), expected)
        ids = [shard.document_ids[index] for index in sample]
        return {asset: c.result(ids, seed=params.seed) for asset, c in comparisons.items()}

    def _facts(self, clock: Clock, tally: Tally, gpus: GpuUsage) -> dict[str, Any]:
        """What this attempt cost; of a resumed partition only the windows that it ran itself."""
        compute_s = clock.laps_s["compute"]
        return {
            "wall_s": round(clock.wall_s, 3),
            "compute_s": round(compute_s, 3),
            "recompute_s": round(clock.laps_s["recompute"], 3),
            "tokens_per_s": round(tally.done_tokens / max(compute_s, 1e-9), 1),
            "computed_tokens": tally.done_tokens,
            "padding_fraction": round(tally.padding_fraction, 5),
            "n_batches": tally.n_batches,
            "token_budget": self._budget,
            "vocab_size": self._teacher.vocabulary_size,
            "peak_memory_gib": round(peak_memory_gib(self._teacher.device), 3),
            **gpus.facts(),
        }

    def _provenance(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What the control plane knew, where this ran, and with which teacher."""
        params, teacher = self._params, self._teacher
        return {
            **self._job.provenance,
            **task_provenance(),
            "job_key": self._job.key,
            "teacher": params.model,
            "teacher_revision": params.revision,
            "weights_fingerprint": params.weights_fingerprint,
            "tokenizer_fingerprint": params.tokenizer_fingerprint,
            "architecture": type(teacher.model).__name__,
            "dtype": params.dtype,
            "seed": params.seed,
            "device": str(teacher.device),
            "gpu": device_name(teacher.device),
            "n_threads": torch.get_num_threads(),
            "attention": teacher.model.config._attn_implementation,
            "head": "proven" if teacher.head is not None else "own logits",
            **{name: facts[name] for name in ("wall_s", "tokens_per_s", "joules")},
        }


def check_token_ids(largest_id: int, n_token_ids: int, partition_key: str) -> None:
    """Raise RecipeError for a shard that was made for another teacher's vocabulary."""
    if largest_id >= n_token_ids:
        raise RecipeError(
            f"partition {partition_key} has token id {largest_id}, the teacher knows ids 0 to {n_token_ids - 1}: the "
            "shard was tokenised with another tokenizer; name the teacher's own in the recipe"
        )


def check_length(n_tokens: int, teacher: Teacher, partition_key: str) -> str | None:
    """What to warn of, given the longest document to run. Raises RecipeError where results would be arbitrary."""
    if teacher.repeatable_tokens is not None and n_tokens > teacher.repeatable_tokens:
        raise RecipeError(
            f"partition {partition_key} has a document of {n_tokens} tokens; beyond {teacher.repeatable_tokens} this "
            "teacher's dynamic rotary scaling depends on what ran before: lower max_length of every cache to that"
        )
    if teacher.context_tokens is not None and n_tokens > teacher.context_tokens:
        return (
            f"partition {partition_key} has a document of {n_tokens} tokens, the teacher's context is "
            f"{teacher.context_tokens}: what it says beyond is not what it was trained for; lower max_length"
        )
    return None
