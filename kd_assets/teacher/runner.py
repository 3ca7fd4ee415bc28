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
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from kd_assets.contract import JobFile, Output, Reporter, TeacherParams, WorkUnit
from kd_assets.errors import ContractError, RecipeError
from kd_assets.library_internals import attention_of
from kd_assets.store import ResultWriter, plan_parts
from kd_assets.store.schema import CONVENTIONS, topk_convention
from kd_assets.store.vocabulary import VOCABULARY_NAME
from kd_assets.teacher.devices.compiled import compile_blocks
from kd_assets.teacher.devices.device import device_name, peak_memory_gib
from kd_assets.teacher.devices.measured_budget import first_budget, longest_possible
from kd_assets.teacher.devices.memory import within_memory
from kd_assets.teacher.devices.teacher_on_devices import TeacherOnDevices
from kd_assets.teacher.model.load import Teacher
from kd_assets.teacher.partition.batching import longest
from kd_assets.teacher.partition.budgets import BudgetRules
from kd_assets.teacher.partition.input_shard import read_input_shard
from kd_assets.teacher.partition.partition_pass import PartitionPass
from kd_assets.teacher.partition.rebuilding import rebuilt_checks
from kd_assets.teacher.partition.recomputation import Recomputation
from kd_assets.worker.provenance import task_provenance
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.telemetry.sampler import Sampler, UsageSpan


class Stopwatch:
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
        self._devices = devices = self._load(job.teacher, teacher)
        self._teacher = devices.teacher
        try:
            self._blocks = compile_blocks(
                devices.teacher,
                job.teacher.compile,
                blocks=job.teacher.hidden_states.blocks if job.teacher.hidden_states is not None else (),
                longest=longest_possible(job.teacher, devices.teacher),
                is_shared=devices.is_shared,
                warn=self._warn,
            )
            budget = first_budget(job.teacher, devices)
        except BaseException:
            devices.close()
            raise
        self._budget_rules = BudgetRules(
            first=budget,
            limit=budget if job.teacher.token_budget is not None else None,
            can_halve=not devices.is_shared,
        )
        self._sampler, self._owns_sampler = sampler or Sampler(), sampler is None
        self._report_loaded()

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        """Make and commit every output of `unit`. Raises KdAssetsError; everything finished by then is on disk.

        After an OutOfDeviceMemoryError or OutOfHostMemoryError the runner is as good as before.
        """
        return within_memory(
            self._run,
            unit,
            doing=f"partition {unit.partition_key} failed with a token budget of {self._budget_rules.first}",
            device_remedy="lower teacher.token_budget",
        )

    def _run(self, unit: WorkUnit) -> dict[str, Any]:
        stopwatch, params = Stopwatch(), self._params
        shard = read_input_shard(unit, self._teacher, params, warn=self._warn)
        self._check_outputs(unit)
        parts = plan_parts(
            shard.n_tokens_D.clip(max=longest(params)),
            max_documents=params.part_documents,
            max_tokens=params.part_tokens,
        )
        with ExitStack() as leases:
            telemetry = self._sampler.span()
            leases.callback(telemetry.close)
            results = {o.asset: leases.enter_context(self._result_of(o, unit.partition_key)) for o in unit.outputs}
            is_resumed = any(result.finished for result in results.values())
            work = PartitionPass(
                partition_key=unit.partition_key,
                shard=shard,
                parts=parts,
                results=results,
                params=params,
                devices=self._devices,
                budget_rules=self._budget_rules,
                report=self._report,
                stop=self._stop,
                tokens_done=telemetry.tokens_done,
            )
            recomputation = Recomputation(
                partition_key=unit.partition_key,
                shard=shard,
                params=params,
                devices=self._devices,
                blocks=self._blocks,
                with_logits="topk_cache" in results,
            )

            def while_the_last_parts_are_written() -> None:
                stopwatch.lap("compute")
                recomputation.begin()
                stopwatch.lap("recompute")

            work.run(while_the_last_parts_are_written)
            stopwatch.lap("write")
            checks = recomputation.compare(parts, results)
            rebuilt = rebuilt_checks(
                unit=unit,
                shard=shard,
                params=params,
                devices=self._devices,
                results=results,
                is_resumed=is_resumed,
            )
            stopwatch.lap("compare")
            facts = self._facts(stopwatch, work, telemetry)
            provenance = self._provenance(facts)
            token_ids = None if params.topk is None else params.topk.token_ids
            conventions = {**CONVENTIONS, "topk_cache": topk_convention(token_ids is not None)}
            if token_ids is not None and token_ids.size_if_whole is None and "topk_cache" in results:
                results["topk_cache"].write_beside(VOCABULARY_NAME, token_ids.to_json())
            for asset, result in results.items():
                result.commit(
                    parts=len(parts),
                    checks={
                        "recomputed": checks[asset],
                        **({"rebuilt": rebuilt[asset]} if asset in rebuilt else {}),
                    },
                    provenance=provenance,
                    facts=facts | {"convention": conventions[asset]},
                )
        return {"partition_key": unit.partition_key, "assets": list(results), **facts}

    def close(self) -> None:
        self._devices.close()
        if self._owns_sampler:
            self._sampler.close()

    def _load(self, params: TeacherParams, teacher: Teacher | None) -> TeacherOnDevices:
        return within_memory(
            lambda params: TeacherOnDevices(
                params,
                # The control plane hashed the weights when it planned, and keeps the digests beside the store.
                digests=Path(self._job.recipe_folder).parent.parent / "digests.json",
                warn=self._warn,
                report_fatal=self._report.report_fatal,
                teacher=teacher,
            ),
            params,
            doing="the teacher could not be loaded",
            device_remedy="no token budget makes room for its weights: use GPUs with more memory",
        )

    def _warn(self, message: str) -> None:
        self._report.emit("warning", message=message)

    def _report_loaded(self) -> None:
        teacher, placement = self._teacher, self._devices.placement
        self._report.emit(
            "teacher_loaded",
            load_s=round(teacher.load_s, 3),
            device=str(teacher.device),
            gpu=device_name(teacher.device),
            n_parameters=teacher.n_parameters,
            head="proven" if teacher.head is not None else "own logits",
            attention=attention_of(teacher.model),
            quantization=teacher.quantisation_in_words,
            placement=placement.kind,
            n_devices=placement.n_devices,
            compiled=self._blocks.in_words,
            warm_up_s=round(self._blocks.warm_up_s, 3),
            token_budget=self._budget_rules.first,
        )

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

    def _facts(self, stopwatch: Stopwatch, work: PartitionPass, telemetry: UsageSpan) -> dict[str, Any]:
        """What this attempt cost; of a resumed partition only the windows that it ran itself."""
        laps_s, done = stopwatch.laps_s, work.tally.done
        compute_s = laps_s["compute"] + laps_s["write"]
        return {
            "wall_s": round(stopwatch.wall_s, 3),
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
            "placement": self._devices.placement.kind,
            "n_devices": self._devices.placement.n_devices,
            "compiled": self._blocks.in_words,
            "n_threads": torch.get_num_threads(),
            "attention": attention_of(teacher.model),
            "head": "proven" if teacher.head is not None else "own logits",
            "normaliser": self._devices.normaliser,
            **({"trust_remote_code": True} if params.trust_remote_code else {}),
            "quantization": teacher.quantisation_in_words,
            **({"unused_weights": dict(teacher.unused_weights)} if teacher.unused_weights else {}),
            **{name: facts[name] for name in ("wall_s", "tokens_per_s", "joules")},
        }
