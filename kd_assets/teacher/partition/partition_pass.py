"""One partition through the devices: window after window, each a part of every cache that misses it.

Used by `kd_assets.teacher` only. Three threads share the work: the caller's launches steps, the collector puts their
results in place and hands full windows on, the writer encodes and writes them (see `batch.transfer`, `part_writer`).

The invariant: a window is written whole or not at all, and from batches of one token budget. Where the device runs out
of memory, the window in hand is begun again with half the budget, and what was already computed of it is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from kd_assets.contract import Asset, Reporter, TeacherParams
from kd_assets.errors import InterruptedTaskError, OutOfDeviceMemoryError
from kd_assets.store import PartPlan, ResultWriter, Shard
from kd_assets.teacher.batch.engine import Step, StepResult
from kd_assets.teacher.batch.transfer import Collector, copier
from kd_assets.teacher.devices.memory import free_cached_memory, within_memory
from kd_assets.teacher.devices.teacher_on_devices import TeacherOnDevices
from kd_assets.teacher.partition.batching import Batch, longest, plan_batches
from kd_assets.teacher.partition.budgets import BudgetRules, Budgets, recorded_budgets
from kd_assets.teacher.partition.part_writer import PartToWrite, PartWriter
from kd_assets.teacher.partition.progress import Tally
from kd_assets.teacher.partition.window import CacheRequest, Capture, Window
from kd_assets.worker.stop_flag import StopFlag

Int64Array = npt.NDArray[np.int64]


class PartitionPass:
    """The windows of one partition that some cache still misses."""

    def __init__(
        self,
        *,
        partition_key: str,
        shard: Shard,
        parts: Sequence[PartPlan],
        results: Mapping[Asset, ResultWriter],
        params: TeacherParams,
        devices: TeacherOnDevices,
        budget_rules: BudgetRules,
        report: Reporter,
        stop: StopFlag,
        tokens_done: Callable[[int], None],
    ) -> None:
        """`tokens_done` is called after each batch with the number of tokens that are done by then."""
        self._partition_key, self._shard, self._results = partition_key, shard, results
        self._params, self._devices, self._report, self._stop = params, devices, report, stop
        self._can_halve = budget_rules.can_halve
        self._last_index = parts[-1].index if parts else 0
        self._missing = {
            part: assets
            for part in parts
            if (assets := frozenset(a for a, r in results.items() if part.index not in r.finished))
        }
        self._lengths_D = shard.n_tokens_D.clip(max=longest(params))
        self.budgets = Budgets(
            rules=budget_rules,
            recorded=recorded_budgets(r.finished for r in results.values()),
        )
        self.tally = Tally(
            report=report,
            partition_key=partition_key,
            n_documents=sum(part.n_documents for part in self._missing),
            n_tokens=int(sum(self._lengths_of(part).sum() for part in self._missing)),
            tokens_done=tokens_done,
        )

    @property
    def last_budget(self) -> int:
        """The token budget of the partition's last window, whoever made it."""
        return self.budgets.of(self._last_index)

    def run(self, while_the_last_parts_are_written: Callable[[], None]) -> None:
        """Compute the windows; on return every part is on disk. The function is called once all is computed.

        Raises InterruptedTaskError after the batch in hand, OutOfDeviceMemoryError when a smaller budget cannot help.
        """
        with PartWriter() as writer, Collector(copier(self._devices.teacher.device)) as collector:
            for part in self._missing:
                while not self._run_window(part, writer, collector):
                    pass
            collector.flush()
            while_the_last_parts_are_written()

    def _run_window(self, part: PartPlan, writer: PartWriter, collector: Collector) -> bool:
        """Launch a window, batch by batch; False when it has to be begun again with a smaller budget."""
        budget = self.budgets.of(part.index)
        window = Window.of(
            self._shard,
            part.first_document,
            part.n_documents,
            max_length=longest(self._params),
            wanted=CacheRequest.of(self._params, set(self._missing[part])),
            hidden_size=self._devices.teacher.hidden_size,
        )
        batches = self._batches(part, budget)
        for n, batch in enumerate(batches):
            self._raise_if_stopped()
            try:
                self._launch(window, batch, collector, budget)
            except OutOfDeviceMemoryError as e:
                if not self._can_halve:
                    raise
                collector.flush()  # results on their way hold memory, too
                free_cached_memory()
                if len(batch.documents_B) == 1:
                    self._launch(window, batch, collector, budget)  # now or never
                    continue
                self.tally.take_back(batches[:n])
                self._halve(part, batch, str(e))
                return False
        collector.then(partial(self._put, part, window, budget, writer))
        return True

    def _launch(self, window: Window, batch: Batch, collector: Collector, budget: int) -> None:
        """Raises OutOfDeviceMemoryError, which holds none of the step's tensors."""
        capture = Capture(window=window, batch=batch, partition_key=self._partition_key, seed=self._params.seed)

        def keep(result: StepResult) -> None:
            capture.keep(result)
            self.tally.add(batch)

        def launch(step: Step) -> None:
            collector.submit(self._devices.run_step(step), keep)

        within_memory(
            launch,
            capture.step(),
            doing=f"partition {self._partition_key}: a batch of {len(batch.documents_B)} x {batch.width} tokens failed "
            f"with a token budget of {budget}",
            device_remedy="lower teacher.token_budget"
            if len(batch.documents_B) > 1
            else "no budget makes room for a single document: lower max_length, or use GPUs with more memory",
        )

    def _halve(self, part: PartPlan, failed: Batch, message: str) -> None:
        budget = self.budgets.halve(part.index, failed)
        self._report.emit(
            "warning",
            partition_key=self._partition_key,
            message=f"{message}. It goes on from part {part.index} with a token budget of {budget}",
            token_budget=budget,
        )

    def _put(self, part: PartPlan, window: Window, budget: int, writer: PartWriter) -> None:
        for asset, arrays in window.arrays().items():
            writer.put(
                PartToWrite(
                    result=self._results[asset],
                    asset=asset,
                    index=part.index,
                    n_tokens=arrays.documents.n_tokens,
                    token_budget=budget,
                    codec=self._params.codec_of(asset),
                    encode=arrays.table,
                )
            )

    def _batches(self, part: PartPlan, budget: int) -> tuple[Batch, ...]:
        teacher = self._devices.teacher
        return plan_batches(
            self._lengths_of(part),
            token_budget=budget,
            alone_above=teacher.alone_above,
            limits=[n for n in (longest(self._params), teacher.context_tokens, teacher.repeatable_tokens) if n],
        )

    def _lengths_of(self, part: PartPlan) -> Int64Array:
        return self._lengths_D[part.first_document : part.first_document + part.n_documents]

    def _raise_if_stopped(self) -> None:
        if self._stop:
            raise InterruptedTaskError(
                f"partition {self._partition_key}: stopped by {self._stop.signal_name}; its finished parts are on disk"
            )
