"""What the web UI says of a result: a dozen rows, the rest folded; of an export, how its tool is told of the folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from kd_assets.cards.words import bytes_in_words
from kd_assets.contract import CACHES, Asset, ExportParams
from kd_assets.export.formats import FORMATS
from kd_assets.orchestration.recording.metadata import LOADED_BY, check_metadata, export_metadata, result_metadata
from kd_assets.recipes.exports import CACHES_OF_FORMAT
from kd_assets.store import CheckResult, Manifest, ResultFiles, check_all
from kd_assets.store.ragged_topk import mean_kept_mass
from kd_assets_tests.export import exported, made_up
from kd_assets_tests.orchestration.recording.made_up import GPU_SERIES
from kd_assets_tests.store import examples

OF_STATES: tuple[Asset, ...] = ("hidden_state_cache",)

LINES = {
    "export_axolotl": "datasets: [{path: DATA, type: completion}], skip_prepare_dataset: true",
    "export_distillkit": "distillkit-pack-logits --dataset DATA --split train",
    "export_hf": 'datasets.load_dataset("DATA", split="train")',
    "export_modelopt": 'torch.load("DATA/00000000.pt")',
    "export_original": "the trainer's data folder: DATA",
    "export_safetensors": 'safetensors.safe_open("DATA/section-00000.safetensors", "pt")',
    "export_specforge": "data.hidden_states_path=DATA",
    "export_specforge_dflash": "data.hidden_states_path=DATA",
    "export_speculators": "--data-path DATA",
}
PACKED = "disk_path: DATA, prepacked: true, functionary_packing: true"


def test_every_format_has_a_line_and_no_other() -> None:
    assert set(LINES) == {f"export_{name}" for name in FORMATS}
    assert set(LOADED_BY) == {*FORMATS, "distillkit with pack_to"}


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_an_export_says_how_its_tool_is_told_of_it(tmp_path: Path, share: float) -> None:
    pytest.importorskip("torch")
    folders = made_up.commit(tmp_path, made_up.truths(1, exported.KEY, n=40))
    cases: list[tuple[ExportParams, str]] = []
    for asset, line in LINES.items():
        states = (1, 2, 4) if CACHES_OF_FORMAT.get(asset) == OF_STATES else None  # type: ignore[call-overload]
        cases.append((ExportParams(asset=asset, states=states, validation_share=share), line))  # type: ignore[arg-type]
    cases.append((ExportParams(asset="export_distillkit", pack_to=32, validation_share=share), PACKED))
    for params, line in cases:
        caches = CACHES_OF_FORMAT.get(params.asset, CACHES)
        job = exported.job_of(tmp_path, {asset: folders[asset] for asset in caches}, [params])
        assert exported.run(job) == 0
        ((folder, manifest),) = exported.results(job)
        assert manifest is not None
        data = folder / "data" / ("train" if share else "")
        assert data.is_dir()
        assert export_metadata(manifest, folder)["how_to_load"] == line.replace("DATA", str(data))


def test_an_export_says_what_it_is_made_of_and_what_is_not_in_it(tmp_path: Path) -> None:
    folders = made_up.commit(tmp_path, made_up.truths(1, exported.KEY), max_lengths={"hidden_state_cache": 5})
    job = exported.job_of(tmp_path, folders, [ExportParams(asset="export_original", states=(1, 4))])
    assert exported.run(job) == 0
    ((folder, manifest),) = exported.results(job)
    assert manifest is not None
    shown = export_metadata(manifest, folder)
    variants = manifest.identity["caches"]
    assert shown["made of"] == ", ".join(f"{cache} (variant {variants[cache]})" for cache in CACHES)
    assert shown["states exported"] == "1, 4"
    assert shown["documents left out"] == "1, fewer than 2 tokens"
    assert manifest.facts["n_cut_to_the_shortest_cache"] > 0
    assert shown["documents cut to the shortest cache"] == f"{manifest.facts['n_cut_to_the_shortest_cache']:,}"


AT_SLURM = {"slurm_partition": "h100", "slurm_array_job_id": "14", "slurm_array_task_id": "3", "slurm_job_id": "17"}
MEASURED: dict[str, Any] = {"tokens_per_s": 4887.25, "joules": 300.0, "computed_tokens": 1000, "wall_s": 41.3}


def topk(tmp_path: Path, **changes: Any) -> tuple[Manifest, Path]:
    """A committed top-k cache, as if made on a GPU of a cluster."""
    folder, manifest = examples.commit(tmp_path, "topk_cache")
    where = {"host": "n01", "gpu": "NVIDIA H100", "n_devices": 4, "attempt": 2, "teacher_revision": None} | AT_SLURM
    facts = MEASURED | {"n_batches": 3, "gpu_power_watts": None, "telemetry": GPU_SERIES}
    return dataclasses.replace(manifest, **({"provenance": where, "facts": facts} | changes)), folder


def test_a_check_names_its_partition_and_plots_no_number_that_is_the_same_by_construction(tmp_path: Path) -> None:
    shard, cache = (ResultFiles(examples.commit(tmp_path, asset)[0]) for asset in ("shards_manifest", "topk_cache"))
    shown = {check.name: check_metadata("tiny-00000", check) for check in check_all(cache, shard)}
    assert {found["partition"] for found in shown.values()} == {"tiny-00000"}
    complete = shown["complete"]
    assert complete["expected_documents"] == str(complete["n_documents"])
    assert complete["expected_tokens"] == str(complete["n_tokens"])
    plotted = {name: {k for k, v in found.items() if isinstance(v, int | float)} for name, found in shown.items()}
    assert plotted["complete"] == {"n_documents", "n_tokens"}
    assert plotted["schema"] == {"n_parts"}
    assert "n_non_finite" not in plotted["finite"]
    assert not {"seed", "n_documents"} & plotted["recomputed"]


def test_a_check_shows_as_many_digits_of_a_number_as_a_person_reads() -> None:
    numbers: dict[str, Any] = {"max_codec_kl": 7.974688883916059e-06, "n": 123_456_789}
    found = CheckResult(name="codec", passed=True, description="as it should be", numbers=numbers)
    assert check_metadata("tiny-0", found) == {"partition": "tiny-0", "max_codec_kl": 7.9747e-06, "n": 123_456_789}


def test_a_result_has_a_dozen_rows_and_numbers_that_are_worth_a_plot(tmp_path: Path) -> None:
    manifest, folder = topk(tmp_path)
    job = {"log": "/jobs/slurm-14_3.log", "queue_wait_s": 12.5, "restarts": 2}
    metadata = result_metadata(manifest, folder, job=job)
    numbers = {name: value for name, value in metadata.items() if isinstance(value, int | float)}
    assert numbers == {
        "dagster/size_bytes": manifest.n_bytes,
        "bytes_per_token": pytest.approx(manifest.n_bytes / manifest.n_tokens, rel=1e-4),
        "largest_logprob_difference_nats": examples.RECOMPUTED["max_abs_logprob_difference"],
        "kept_mass": pytest.approx(mean_kept_mass(part.stats for part in manifest.parts), rel=1e-4),
        "tokens_per_s": 4887.2,
        "joules_per_token": 0.3,
        "queue_wait_s": 12.5,
    }
    n, size = manifest.n_documents, bytes_in_words(manifest.n_bytes)
    assert metadata["contents"] == f"{n} documents, {manifest.n_tokens:,} tokens, {size}"
    made_at = manifest.created_at[:16].replace("T", " ")
    assert metadata["made_by"] == (
        f"{made_at} UTC, SLURM job 14_3 on n01 (4 × NVIDIA H100), in 41 s, 2 restarts, log /jobs/slurm-14_3.log"
    )
    assert len(metadata) == len(numbers) + len(["contents", "made_by", "telemetry", "identity", "provenance"]) == 12


def test_a_result_of_an_earlier_run_says_so_and_who_made_it(tmp_path: Path) -> None:
    manifest, folder = topk(tmp_path)
    made, reused = (result_metadata(manifest, folder, reused=is_reused) for is_reused in (False, True))
    assert reused["made_by"] == f"reused: {made['made_by']}"
    assert [m["provenance"].value["reused"] for m in (made, reused)] == [False, True]
    assert reused.keys() == made.keys()


def test_hashes_are_in_the_identity_and_all_else_that_is_known_in_the_provenance(tmp_path: Path) -> None:
    manifest, folder = topk(tmp_path)
    metadata = result_metadata(manifest, folder, job={"log": "/log"})
    assert metadata["identity"].value == {
        "folder": str(folder),
        "variant": manifest.variant,
        "fingerprint": manifest.fingerprint,
        "data_version": manifest.data_version,
    }
    provenance = metadata["provenance"].value
    assert provenance["parameters"] == manifest.identity
    assert provenance["facts"] == MEASURED | {"n_batches": 3}
    assert provenance["statistics"] == manifest.stats
    assert provenance["job"] == {"log": "/log"}
    assert AT_SLURM.items() <= provenance.items()
    assert "null" not in json.dumps([m.value for m in metadata.values() if isinstance(m, dg.JsonMetadataValue)])


def test_without_slurm_there_is_no_slurm_job_and_no_queue(tmp_path: Path) -> None:
    manifest, folder = topk(tmp_path, provenance={"host": "laptop", **AT_SLURM, "slurm_partition": None})
    metadata = result_metadata(manifest, folder, job={"queue_wait_s": 0.1, "log": "/log"})
    assert "queue_wait_s" not in metadata
    assert "UTC, on laptop, in 41 s, log /log" in metadata["made_by"]
    assert not any(name.startswith("slurm") for name in metadata["provenance"].value)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "quick"])
def test_a_number_that_is_none_is_left_out(tmp_path: Path, value: object) -> None:
    manifest, folder = topk(tmp_path, facts={"tokens_per_s": value}, checks={"recomputed": {"max_abs_x": value}})
    metadata = result_metadata(manifest, folder)
    assert not {"tokens_per_s", "joules_per_token", "largest_logprob_difference_nats"} & metadata.keys()


def test_a_result_without_documents_and_of_an_early_version_has_a_page(tmp_path: Path) -> None:
    manifest, folder = topk(tmp_path, n_documents=0, n_tokens=0, n_bytes=0, parts=(), facts={}, stats={}, checks={})
    metadata = result_metadata(dataclasses.replace(manifest, provenance={}), folder)
    assert set(metadata) == {"identity", "provenance"}
