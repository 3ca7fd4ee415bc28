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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kd_assets.contract import Asset, JobFile, Output, Reporter, TeacherParams, WorkUnit
from kd_assets.errors import ContractError, MissingInputError, RecipeError
from kd_assets.library_internals import attention_of
from kd_assets.store import Documents, PartPlan, ResultWriter, Shard, plan_parts, read_shard
from kd_assets.store.schema import CONVENTIONS
from kd_assets.teacher.devices.compiled import compile_blocks
from kd_assets.teacher.devices.device import device_name, peak_memory_gib
from kd_assets.teacher.devices.measured_budget import LARGEST_BUDGET_TOKENS, measured_budget
from kd_assets.teacher.devices.memory import within_memory
from kd_assets.teacher.devices.teacher_on_devices import TeacherOnDevices
from kd_assets.teacher.model.load import Teacher
from kd_assets.teacher.partition.partition_pass import PartitionPass, StepRunner, longest
from kd_assets.teacher.recompute import Comparison, Reference, sampled_documents, sampled_positions, stored_row
from kd_assets.worker.provenance import task_provenance
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.telemetry.sampler import Sampler, UsageSpan

FALLBACK_BUDGET_TOKENS = 1024
"""Most tokens of a batch of a teacher whose head is not proven: its own forward makes all their logits at once."""


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
    """A loaded teacher that works through partitions (see `kd_assets.worker.task.Runner`)."""

    def __init__(
        self,
        job: JobFile,
        report: Reporter,
        stop: StopFlag,
        *,
        sampler: Sampler | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """`sampler`: the task's; None: one of its own. `teacher`: one that is loaded already, in place of the recipe's
        (see `TeacherOnDevices`)."""
        if job.teacher is None:
            raise ContractError(f"job {job.key} is of kind teacher and has no teacher parameters")
        self._job, self._report, self._stop, self._params = job, report, stop, job.teacher
        self._running = running = within_memory(
            lambda params: TeacherOnDevices(
                params,
                # The control plane hashed the weights when it planned, and keeps the digests beside the store.
                digests=Path(job.recipe_folder).parent.parent / "digests.json",
                warn=lambda message: report.emit("warning", message=message),
                report_fatal=report.report_fatal,
                teacher=teacher,
            ),
            job.teacher,
            doing="the teacher could not be loaded",
            device_remedy="no token budget makes room for its weights: use GPUs with more memory",
        )
        self._teacher = teacher = running.teacher
        try:
            self._blocks = compile_blocks(
                teacher,
                job.teacher.compile,
                blocks=job.teacher.hidden_states.blocks if job.teacher.hidden_states is not None else (),
                longest=longest_ever(job.teacher, teacher),
                is_shared=running.is_shared,
                warn=lambda message: report.emit("warning", message=message),
            )
            budget = first_budget(job.teacher, running)
        except BaseException:
            running.close()
            raise
        self._devices = StepRunner(
            teacher=teacher,
            run_step=running.run_step,
            first_budget=budget,
            budget_limit=budget if job.teacher.token_budget is not None else None,
            can_halve=not running.is_shared,
        )
        self._sampler, self._owns_sampler = sampler or Sampler(), sampler is None
        report.emit(
            "teacher_loaded",
            load_s=round(teacher.load_s, 3),
            device=str(teacher.device),
            gpu=device_name(teacher.device),
            n_parameters=teacher.n_parameters,
            head="proven" if teacher.head is not None else "own logits",
            attention=attention_of(teacher.model),
            quantization=teacher.quantisation_in_words,
            placement=running.placement.kind,
            n_devices=running.placement.n_devices,
            compiled=self._blocks.in_words,
            warm_up_s=round(self._blocks.warm_up_s, 3),
            token_budget=budget,
        )

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        """Make and commit every output of `unit`. Raises KdAssetsError; everything finished by then is on disk.

        After an OutOfDeviceMemoryError or OutOfHostMemoryError the runner is as good as before.
        """
        return within_memory(
            self._run,
            unit,
            doing=f"partition {unit.partition_key} failed with a token budget of {self._devices.first_budget}",
            device_remedy="lower teacher.token_budget",
        )

    def _run(self, unit: WorkUnit) -> dict[str, Any]:
        clock = Clock()
        shard = self._read_shard(unit)
        self._check_outputs(unit)
        max_length = longest(self._params)
        parts = plan_parts(
            shard.n_tokens_D.clip(max=max_length),
            max_documents=self._params.part_documents,
            max_tokens=self._params.part_tokens,
        )
        with ExitStack() as leases:
            telemetry = self._sampler.span()
            leases.callback(telemetry.close)
            results = {o.asset: leases.enter_context(self._result_of(o, unit.partition_key)) for o in unit.outputs}
            work = PartitionPass(
                partition_key=unit.partition_key,
                shard=shard,
                parts=parts,
                results=results,
                params=self._params,
                devices=self._devices,
                report=self._report,
                stop=self._stop,
                tokens_done=telemetry.tokens_done,
            )
            sample = sampled_documents(
                len(shard.document_ids),
                self._params.recompute_documents,
                seed=self._params.seed,
                partition_key=unit.partition_key,
            )
            ahead: dict[int, Reference] = {}

            def meanwhile() -> None:
                clock.lap("compute")
                # Only the first: a reference holds as much as a document's states and some rows of logits.
                ahead.update({index: self._reference(shard, index, results) for index in sample[:1]})
                clock.lap("recompute")

            work.run(meanwhile)
            clock.lap("write")
            checks = self._recompute(shard, sample, parts, results, ahead)
            clock.lap("compare")
            facts = self._facts(clock, work, telemetry)
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
        self._running.close()
        if self._owns_sampler:
            self._sampler.close()

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

    def _recompute(
        self,
        shard: Shard,
        sample: Sequence[int],
        parts: Sequence[PartPlan],
        results: Mapping[Asset, ResultWriter],
        ahead: dict[int, Reference],
    ) -> dict[Asset, dict[str, Any]]:
        """Compare documents as they are on disk with the plain path; what `checks["recomputed"]` keeps, by asset.

        `ahead`: references that are there already; they are used up.
        """
        teacher = self._teacher
        comparisons = {
            a: Comparison(
                asset=a,
                dtype=teacher.dtype,
                seed=self._params.seed,
                quantisation=teacher.quantisation,
                routed=teacher.routed,
            )
            for a in results
        }
        for index in sample:
            part = next(p for p in reversed(parts) if p.first_document <= index)
            expected = ahead.pop(index) if index in ahead else self._reference(shard, index, results)
            for asset, result in results.items():
                path = result.folder / result.finished[part.index].name
                comparisons[asset].add(stored_row(path, index - part.first_document), expected)
        ids = [shard.document_ids[index] for index in sample]
        return {asset: comparison.result(ids) for asset, comparison in comparisons.items()}

    def _reference(self, shard: Shard, index: int, results: Mapping[Asset, ResultWriter]) -> Reference:
        """A document by the plain path, as far as these results need it."""
        hidden = self._params.hidden_states
        document = shard.slice(index, 1, max_length=longest(self._params))
        with self._blocks.plain():
            return self._running.reference(
                document.input_ids,
                hidden.blocks if hidden is not None else (),
                self._sampled_positions(document) if "topk_cache" in results else np.arange(0),
            )

    def _sampled_positions(self, document: Documents) -> npt.NDArray[np.int64]:
        assert self._params.topk is not None
        n_positions = min(document.n_tokens, self._params.topk.max_length) - 1
        return sampled_positions(n_positions, seed=self._params.seed, document_id=document.document_ids[0])

    def _facts(self, clock: Clock, work: PartitionPass, telemetry: UsageSpan) -> dict[str, Any]:
        """What this attempt cost; of a resumed partition only the windows that it ran itself."""
        laps_s, done = clock.laps_s, work.tally.done
        compute_s = laps_s["compute"] + laps_s["write"]
        return {
            "wall_s": round(clock.wall_s, 3),
            "compute_s": round(compute_s, 3),
            "recompute_s": round(laps_s["recompute"] + laps_s["compare"], 3),
            "tokens_per_s": round(done.tokens / max(compute_s, 1e-9), 1),
            "computed_tokens": done.tokens,
            "padding_fraction": round(done.padding_fraction, 5),
            "n_batches": done.batches,
            "token_budget": work.last_budget,
            "n_budget_halvings": work.budgets.n_halvings,
            "vocab_size": self._teacher.vocabulary_size,
            "quantization": self._teacher.quantisation_in_words,
            "peak_memory_gib": round(peak_memory_gib(self._teacher.device), 3),
            **telemetry.usage().facts(),
            "telemetry": telemetry.series(),
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
            "placement": self._running.placement.kind,
            "n_devices": self._running.placement.n_devices,
            "compiled": self._blocks.in_words,
            "n_threads": torch.get_num_threads(),
            "attention": attention_of(teacher.model),
            "head": "proven" if teacher.head is not None else "own logits",
            "normaliser": self._running.normaliser,
            **({"trust_remote_code": True} if params.trust_remote_code else {}),
            "quantization": teacher.quantisation_in_words,
            **{name: facts[name] for name in ("wall_s", "tokens_per_s", "joules")},
        }


def longest_ever(params: TeacherParams, teacher: Teacher) -> int:
    """Tokens of the longest document that may be tried: beyond its context a teacher may have no positions, and what it
    cannot repeat must not run before a document that it can."""
    return min(n for n in (longest(params), teacher.context_tokens, teacher.repeatable_tokens) if n is not None)


def first_budget(params: TeacherParams, running: TeacherOnDevices) -> int:
    """Most tokens of a batch that every partition begins with: the recipe's word, or what fits."""
    teacher = running.teacher
    largest = LARGEST_BUDGET_TOKENS if teacher.head is not None else FALLBACK_BUDGET_TOKENS
    if params.token_budget is not None:
        return params.token_budget if teacher.head is not None else min(params.token_budget, largest)
    return measured_budget(
        running.run_step,
        teacher,
        params,
        longest=longest_ever(params, teacher),
        largest=largest,
        can_retry=not running.is_shared,
    )


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
    if teacher.learned_positions is not None and n_tokens > teacher.learned_positions:
        raise RecipeError(
            f"partition {partition_key} has a document of {n_tokens} tokens, and the teacher has positions for "
            f"{teacher.learned_positions}: lower max_length of every cache to that"
        )
    if teacher.context_tokens is not None and n_tokens > teacher.context_tokens:
        return (
            f"partition {partition_key} has a document of {n_tokens} tokens, the teacher's context is "
            f"{teacher.context_tokens}: what it says beyond is not what it was trained for; lower max_length"
        )
    return None
