"""Every result is recorded exactly once, with its own metadata, versions and checks, however it was collected."""

import dataclasses
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from kd_assets.components import TeacherCaches
from kd_assets.contract import Asset, Output, WorkUnit
from kd_assets.dagster_internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    SqlEventLogStorage,
    input_tags,
)
from kd_assets.errors import StorageUnavailableError
from kd_assets.orchestration.driving.waiting import STORAGE_PATIENCE_S
from kd_assets.orchestration.recording import recorder as recorder_module
from kd_assets.orchestration.recording.check_specs import check_specs
from kd_assets.orchestration.recording.metadata import result_metadata
from kd_assets.orchestration.recording.recorder import COLLECT_RESULTS, COLLECT_TOKENS, Recorder
from kd_assets.recipes.recipe import Recipe
from kd_assets.store import CheckResult, Manifest, ResultFiles, read_manifest
from kd_assets.store.checking.checks import check_all
from kd_assets.store.layout import MANIFEST_NAME
from kd_assets_tests.orchestration.deployment import is_reused
from kd_assets_tests.orchestration.recording.made_up import CPU_SERIES, GPU_SERIES
from kd_assets_tests.store import examples

ASSETS: tuple[Asset, ...] = ("shards_manifest", "topk_cache")
CHECKS = ("complete", "schema", "finite", "recomputed")


class Bench:
    """Committed results of a made-up recipe, and runs in which a test records them by hand."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.instance, self.now = instance, 0.0
        self.recipe: Recipe = TeacherCaches.model_validate(
            {
                "recipe": examples.RECIPE,
                "sources": [{"name": "corpus", "path": "corpus.jsonl"}],
                "teacher": {"model_id": "/teacher"},
                "caches": {"topk": {"k": examples.K, "max_length": examples.MAX_LENGTH}},
            }
        ).to_recipe()
        self._store, self._units = folder / "store", dict[str, dict[Asset, WorkUnit]]()

    def commit(self, n: int = 2, **changes: Any) -> list[str]:
        """Commit a shard and a top-k cache of each of `n` partitions; `changes` are of the caches. Returns the keys."""
        keys = [f"{examples.RECIPE}-{i:05d}" for i in range(n)]
        for key in keys:
            shard, _ = examples.commit(self._store, "shards_manifest", partition_key=key)
            examples.commit(self._store, "topk_cache", partition_key=key, **changes)
            inputs: dict[Asset, dict[str, tuple[str, ...]]] = {
                "shards_manifest": {},
                "topk_cache": {"shards_manifest": (str(shard),)},
            }
            self._units[key] = {
                asset: WorkUnit(partition_key=key, inputs=inputs[asset], outputs=(self.output(asset, key),))
                for asset in ASSETS
            }
        self.instance.add_dynamic_partitions(str(self.recipe.partitions.name), keys)
        return keys

    def add_facts(self, asset: Asset, keys: list[str], **facts: Any) -> None:
        """As if the results had been committed with these facts."""
        for key in keys:
            folder = Path(self.output(asset, key).path)
            manifest = dataclasses.replace(read_manifest(folder), facts=facts)
            (folder / MANIFEST_NAME).write_text(manifest.to_json())

    def output(self, asset: Asset, key: str) -> Output:
        return examples.output(self._store, asset, partition_key=key)

    def manifest(self, asset: Asset, key: str) -> Manifest:
        return read_manifest(Path(self.output(asset, key).path))

    def unit(self, asset: Asset, key: str) -> WorkUnit:
        return self._units[key][asset]

    def record(self, recorder: Recorder, asset: Asset, *keys: str) -> None:
        for key in keys:
            recorder.record(
                self.unit(asset, key),
                self.output(asset, key),
                self.manifest(asset, key),
                reused=True,
                facts={"fact": f"of {key}"},
            )

    def run(
        self, body: Callable[[Recorder], None], *, collect_s: float = 1.0, assets: tuple[Asset, ...] = ASSETS
    ) -> dg.ExecuteInProcessResult:
        """A run over all partitions with this body. Its recorder's clock is `now`."""
        recipe, partitions = self.recipe, self.recipe.partitions

        @dg.multi_asset(
            specs=[dg.AssetSpec(recipe.key(a), partitions_def=partitions, skippable=True) for a in ASSETS],
            check_specs=check_specs(recipe, partitions),
            can_subset=True,
            partitions_def=partitions,
            backfill_policy=dg.BackfillPolicy.single_run(),
        )
        def by_hand(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
            recorder = Recorder(
                context,
                recipe,
                plan_hash="plan",
                teacher_version=None,
                collect_s=collect_s,
                clock=lambda: self.now,
            )
            body(recorder)
            yield from ()

        keys = sorted(self._units)
        return (
            dg.Definitions(assets=[by_hand], executor=dg.in_process_executor)
            .resolve_implicit_global_asset_job_def()
            .execute_in_process(
                instance=self.instance,
                asset_selection=[recipe.key(a) for a in assets],
                tags={ASSET_PARTITION_RANGE_START_TAG: keys[0], ASSET_PARTITION_RANGE_END_TAG: keys[-1]},
                raise_on_error=False,
            )
        )

    def materializations(self, asset: Asset) -> list[dg.EventLogRecord]:
        """What all runs have recorded of it, in order: in Dagster's index, which the web UI asks."""
        return list(self.instance.fetch_materializations(self.recipe.key(asset), limit=1000, ascending=True).records)

    def n_recorded(self, asset: Asset = "topk_cache") -> int:
        return len(self.materializations(asset))

    def of_run(self, run_id: str, event_type: dg.DagsterEventType) -> list[dg.EventLogRecord]:
        return list(self.instance.get_records_for_run(run_id, of_type=event_type).records)

    def checks(self, run_id: str) -> list[dg.AssetCheckEvaluation]:
        records = self.of_run(run_id, dg.DagsterEventType.ASSET_CHECK_EVALUATION)
        events = [r.event_log_entry.dagster_event for r in records]
        return [e.asset_check_evaluation_data for e in events if e is not None]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    (tmp_path / "instance").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "instance")) as instance:
        yield Bench(tmp_path, instance)


def all_once(bench: Bench, keys: list[str], run_id: str) -> None:
    """That run recorded each partition of the cache once with each of its checks, in the index and in the run's log."""
    assert [r.partition_key for r in bench.materializations("topk_cache")] == keys
    logged = bench.of_run(run_id, dg.DagsterEventType.ASSET_MATERIALIZATION)
    assert [r.partition_key for r in logged if r.asset_key == bench.recipe.key("topk_cache")] == keys
    counted = Counter((e.partition, e.check_name) for e in bench.checks(run_id))
    assert counted == {(key, name): 1 for key in keys for name in CHECKS}


def test_collected_results_keep_their_own_metadata_versions_and_checks(bench: Bench) -> None:
    keys = bench.commit(3)

    def body(recorder: Recorder) -> None:
        bench.record(recorder, "topk_cache", *keys)
        bench.record(recorder, "shards_manifest", *keys)
        recorder.flush()

    result = bench.run(body)
    assert result.success
    all_once(bench, keys, result.run_id)
    shards = {r.partition_key: r for r in bench.materializations("shards_manifest")}
    records = bench.materializations("topk_cache")
    for record in records:
        key = str(record.partition_key)
        found = record.asset_materialization
        assert found is not None
        manifest = read_manifest(Path(bench.output("topk_cache", key).path))
        assert found.metadata["provenance"].value["job"] == {"fact": f"of {key}"}  # type: ignore[call-overload,index]
        assert is_reused(found)
        assert found.metadata["identity"].value["fingerprint"] == manifest.fingerprint  # type: ignore[call-overload,index]
        upstream = input_tags(bench.recipe.key("shards_manifest"), manifest.identity["input"], shards[key].storage_id)
        assert found.tags == upstream | {
            DATA_VERSION_TAG: manifest.data_version,
            CODE_VERSION_TAG: bench.recipe.code_version("topk_cache"),
        }
    targets = {(e.partition, e.target_materialization_data) for e in bench.checks(result.run_id)}
    assert {(key, t.storage_id, t.run_id, t.timestamp) for key, t in targets if t is not None} == {
        (r.partition_key, r.storage_id, result.run_id, r.timestamp) for r in records
    }
    assert all(e.passed for e in bench.checks(result.run_id))
    assert all(e.metadata["partition"].value == e.partition for e in bench.checks(result.run_id))


def test_an_upstream_that_was_never_materialized_has_no_event_pointer(bench: Bench) -> None:
    (key,) = bench.commit(1)
    assert bench.run(
        lambda recorder: bench.record(recorder, "topk_cache", key), collect_s=0, assets=("topk_cache",)
    ).success
    (record,) = bench.materializations("topk_cache")
    assert record.asset_materialization is not None
    expected = input_tags(bench.recipe.key("shards_manifest"), f"shard of {key}", None)
    assert expected.items() <= (record.asset_materialization.tags or {}).items()


def test_what_is_collected_is_written_after_collect_s_and_by_flush(bench: Bench) -> None:
    keys = bench.commit(4)
    seen = []

    def body(recorder: Recorder) -> None:
        for key in keys:
            bench.record(recorder, "topk_cache", key)
            seen.append(bench.n_recorded())
            bench.now += 0.4
        recorder.flush()
        seen.append(bench.n_recorded())

    result = bench.run(body, collect_s=0.8)
    assert result.success
    assert seen == [0, 0, 3, 3, 4]
    all_once(bench, keys, result.run_id)


def test_without_collecting_each_result_is_written_at_once(bench: Bench) -> None:
    keys = bench.commit(2)
    seen = []

    def body(recorder: Recorder) -> None:
        for key in keys:
            bench.record(recorder, "topk_cache", key)
            seen.append(bench.n_recorded())

    result = bench.run(body, collect_s=0)
    assert seen == [1, 2]
    all_once(bench, keys, result.run_id)


def test_large_results_are_not_collected(bench: Bench) -> None:
    (key,) = bench.commit(1)
    seen = []

    def body(recorder: Recorder) -> None:
        unit = bench.unit("topk_cache", key)
        large = WorkUnit(partition_key=key, n_tokens=COLLECT_TOKENS, inputs=unit.inputs, outputs=unit.outputs)
        recorder.record(large, unit.outputs[0], bench.manifest("topk_cache", key), reused=False, facts={})
        seen.append(bench.n_recorded())

    assert bench.run(body).success
    assert seen == [1]


def test_a_result_that_is_recorded_twice_in_a_run_is_recorded_once(bench: Bench) -> None:
    keys = bench.commit(2)

    def body(recorder: Recorder) -> None:
        bench.record(recorder, "topk_cache", *keys, *keys)
        recorder.flush()
        bench.record(recorder, "topk_cache", *keys)
        recorder.flush()

    all_once(bench, keys, bench.run(body).run_id)


def test_a_failed_check_is_recorded_and_remembered_and_the_others_go_on(bench: Bench) -> None:
    keys = bench.commit(3)
    part = sorted(Path(bench.output("topk_cache", keys[1]).path).glob("part-*"))[0]
    part.write_bytes(part.read_bytes()[:-20])
    failed: dict[str, list[str]] = {}

    def body(recorder: Recorder) -> None:
        bench.record(recorder, "topk_cache", *keys)
        recorder.flush()
        failed.update(recorder.failed_checks)

    result = bench.run(body)
    all_once(bench, keys, result.run_id)
    names = ("complete", "schema", "finite", "recomputed")  # each is of the bytes that were committed
    assert {(e.partition, e.check_name) for e in bench.checks(result.run_id) if not e.passed} == {
        (keys[1], name) for name in names
    }
    assert list(failed) == [keys[1]]
    assert [line.split(" failed: ")[0] for line in failed[keys[1]]] == [f"topk_cache: check {name}" for name in names]


@pytest.mark.parametrize("error", [StorageUnavailableError("Stale file handle"), OSError("Stale file handle")])
@pytest.mark.parametrize("comes_back", [True, False])
def test_checks_wait_for_files_that_cannot_be_reached_and_fail_in_the_storages_words_when_they_stay_away(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, comes_back: bool
) -> None:
    keys = bench.commit(2)
    away = Path(bench.output("topk_cache", keys[0]).path)
    back_at = 60.0 if comes_back else 1e9

    def checks(files: ResultFiles, shard: ResultFiles) -> list[CheckResult]:
        if files.folder == away and bench.now < back_at:
            raise error
        return check_all(files, shard)

    monkeypatch.setattr(recorder_module, "check_all", checks)
    first_look: list[int] = []
    failed: dict[str, list[str]] = {}

    def sleep(seconds: float) -> None:
        assert bench.now < 2 * STORAGE_PATIENCE_S
        bench.now += seconds

    def body(recorder: Recorder) -> None:
        bench.record(recorder, "topk_cache", *keys)
        recorder.flush()
        first_look.append(bench.n_recorded())
        recorder.finish(sleep)
        failed.update(recorder.failed_checks)

    result = bench.run(body)
    assert first_look == [2], "the materializations do not wait"
    all_once(bench, keys, result.run_id)
    if comes_back:
        assert failed == {}
    else:
        assert failed == {keys[0]: [f"topk_cache: check {name} failed: Stale file handle" for name in sorted(CHECKS)]}


def test_checks_alone_are_of_each_partitions_last_materialization(bench: Bench) -> None:
    keys = bench.commit(2)
    for _ in range(2):
        assert bench.run(lambda recorder: bench.record(recorder, "topk_cache", *keys), collect_s=0).success

    def body(recorder: Recorder) -> None:
        for key in keys:
            output, manifest = bench.output("topk_cache", key), bench.manifest("topk_cache", key)
            recorder.record_checks(bench.unit("topk_cache", key), output, manifest)
        recorder.flush()

    result = bench.run(body)
    last = {r.partition_key: r.storage_id for r in bench.materializations("topk_cache")[2:]}
    evaluations = bench.checks(result.run_id)
    assert len(evaluations) == 8
    for evaluation in evaluations:
        assert evaluation.target_materialization_data is not None
        assert evaluation.target_materialization_data.storage_id == last[evaluation.partition]
    assert bench.n_recorded() == 4


def before_event(monkeypatch: pytest.MonkeyPatch, bench: Bench, at: int, act: Callable[[], None]) -> None:
    """Before event number `at` of those that are stored from now on, do `act`."""
    storage, counted = bench.instance.event_log_storage, Counter[str]()
    assert isinstance(storage, SqlEventLogStorage)
    row_of = storage._event_to_row

    def counting(event: Any) -> dict[str, Any]:
        counted["events"] += 1
        if counted["events"] == at:
            act()
        return row_of(event)

    monkeypatch.setattr(storage, "_event_to_row", counting)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 11])
def test_a_flush_that_fails_leaves_nothing_half_and_the_next_one_records_all_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Three materializations, then twelve checks."""
    keys = bench.commit(3)

    def full() -> None:
        raise OSError("no space left")

    def body(recorder: Recorder) -> None:
        bench.record(recorder, "topk_cache", *keys)
        before_event(monkeypatch, bench, at, full)
        with pytest.raises(OSError, match="no space left"):
            recorder.flush()
        assert bench.n_recorded() == (0 if at <= 3 else 3)
        recorder.flush()

    result = bench.run(body)
    assert result.success
    all_once(bench, keys, result.run_id)


@pytest.mark.parametrize("at", [2, 5])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_termination_during_a_flush_comes_after_what_is_being_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, at: int, sent: signal.Signals
) -> None:
    keys = bench.commit(3)
    seen = []

    def body(recorder: Recorder) -> None:
        try:
            bench.record(recorder, "topk_cache", *keys)
            before_event(monkeypatch, bench, at, lambda: os.kill(os.getpid(), sent))
            recorder.flush()
        except dg.DagsterExecutionInterruptedError:
            seen.append(bench.n_recorded())
            raise
        finally:
            recorder.flush()

    result = bench.run(body)
    assert not result.success
    assert seen == [3]
    all_once(bench, keys, result.run_id)


@pytest.mark.parametrize("series", [CPU_SERIES, GPU_SERIES])
def test_a_partition_has_a_picture_of_its_telemetry_and_not_its_numbers(bench: Bench, series: dict[str, Any]) -> None:
    keys = bench.commit(1)
    bench.add_facts("topk_cache", keys, telemetry=series, joules=12.5, computed_tokens=100, gpu_power_watts=300.0)
    folder = Path(bench.output("topk_cache", keys[0]).path)
    metadata = result_metadata(read_manifest(folder), folder)
    assert isinstance(metadata["telemetry"], dg.MarkdownMetadataValue)
    assert str(metadata["telemetry"].value).startswith("![")
    assert metadata["joules_per_token"] == 0.125
    facts = metadata["provenance"].value["facts"]
    assert facts == {"joules": 12.5, "computed_tokens": 100, "gpu_power_watts": 300.0}


@pytest.mark.parametrize("facts", [{}, {"telemetry": None}])
def test_a_partition_that_was_too_short_has_no_picture(bench: Bench, facts: dict[str, Any]) -> None:
    keys = bench.commit(1)
    bench.add_facts("topk_cache", keys, **facts)
    folder = Path(bench.output("topk_cache", keys[0]).path)
    metadata = result_metadata(read_manifest(folder), folder)
    assert "telemetry" not in metadata
    assert "facts" not in metadata["provenance"].value


def test_how_a_teacher_ran_is_folded_into_the_provenance(bench: Bench) -> None:
    keys = bench.commit(1)
    bench.add_facts("topk_cache", keys, token_budget=4096, n_batches=3)
    folder = Path(bench.output("topk_cache", keys[0]).path)
    ran = {"placement": "tensor_parallel", "n_devices": 2, "compiled": "blocks", "quantization": "fp8 weights"}
    manifest = dataclasses.replace(read_manifest(folder), provenance=ran | {"trust_remote_code": True, "gpu": None})
    metadata = result_metadata(manifest, folder)
    provenance = metadata["provenance"].value
    assert {name: provenance[name] for name in ran} == ran
    assert provenance["trust_remote_code"] is True
    assert "gpu" not in provenance, "what is not known is not said"
    assert provenance["facts"] == {"token_budget": 4096, "n_batches": 3}


def test_recording_with_all_checks_takes_less_than_50_ms_a_partition(bench: Bench) -> None:
    """Nearly all of what a run over many partitions costs, pictures included. Of the CPU's time, about 10 ms: others
    may use it, too."""
    keys = bench.commit(COLLECT_RESULTS)
    bench.add_facts("topk_cache", keys, telemetry=GPU_SERIES)
    elapsed_s = []

    def body(recorder: Recorder) -> None:
        started = time.process_time()
        bench.record(recorder, "topk_cache", *keys)
        elapsed_s.append(time.process_time() - started)

    result = bench.run(body, assets=("topk_cache",))
    all_once(bench, keys, result.run_id)
    assert elapsed_s[0] / len(keys) < 0.05
