"""Exports as results of the store: made whole or not at all, gone on with after a kill, verified to the byte."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd_assets.cli import main
from kd_assets.contract import Asset, ExportAsset, ExportParams, FinalState, JobFile, read_events
from kd_assets.durable import prepare_folder
from kd_assets.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_RESUMABLE
from kd_assets.export.exporting import export_to_folder
from kd_assets.export.folder import EXPORT_NAME, JOURNAL_NAME, LEASE_NAME, verify_export
from kd_assets.export.format import ExportOptions
from kd_assets.export.formats.safetensors import Safetensors
from kd_assets.export.planning import in_validation
from kd_assets.export.runner import DATA_FOLDER
from kd_assets.store import put_aside, read_manifest, verify
from kd_assets.store.superseded import superseded
from kd_assets_tests.export import exported, made_up
from kd_assets_tests.store import examples

HF, SAFETENSORS = ExportParams(asset="export_hf"), ExportParams(asset="export_safetensors")
BOTH = (HF, SAFETENSORS)


@pytest.fixture
def folders(tmp_path: Path) -> dict[Asset, Path]:
    """Caches of one partition, of four parts each."""
    return made_up.commit(tmp_path, made_up.truths(1, exported.KEY, n=12))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def events_of(path: Path, event_type: str) -> list[dict[str, object]]:
    return [e.data for _, e in read_events(path) if not isinstance(e, str) and e.type == event_type]


def test_an_export_is_a_result_whose_manifest_names_every_file(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    job = exported.job_of(tmp_path, folders, BOTH)
    assert exported.run(job, tmp_path / "events.jsonl") == 0
    for (folder, manifest), params in zip(exported.results(job), BOTH, strict=True):
        assert manifest is not None
        whole = verify_export(folder / DATA_FOLDER)
        assert whole.export_format == params.format_name
        names = [part.name for part in manifest.parts]
        assert names == sorted(f"data/{name}" for name in (*whole.files, EXPORT_NAME))
        assert set(files_below(folder)) == {*names, "manifest.json", ".lease"}
        assert manifest.facts["n_documents"] == 12
        assert manifest.facts["n_tokens"] == sum(document.length for document in made_up.truths(1, n=12))
        assert manifest.identity["params"] == {"format": params.format_name}
        assert manifest.identity["caches"] == {a: read_manifest(f).variant for a, f in folders.items()}
    table = pq.read_table(exported.results(job)[0][0] / DATA_FOLDER / "data")
    assert sorted(table["document_id"].to_pylist()) == sorted(d.document_id for d in made_up.truths(1, n=12))
    for params in BOTH:
        report = verify(tmp_path / made_up.RECIPE / params.asset)
        assert (report.n_results, report.problems, report.notes) == (1, (), ())
    last = events_of(tmp_path / "events.jsonl", "progress")[-1]
    assert (last["done_documents"], last["n_documents"]) == (12, 12)
    assert last["done_tokens"] == last["n_tokens"]


def test_what_is_there_is_reused_and_equal_inputs_give_equal_bytes(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    job = exported.job_of(tmp_path, folders, BOTH)
    assert exported.run(job) == 0
    before = [(folder, files_below(folder / DATA_FOLDER)) for folder, _ in exported.results(job)]
    assert exported.run(job, tmp_path / "events.jsonl") == 0
    assert [e["reused"] for e in events_of(tmp_path / "events.jsonl", "committed")] == [True, True]
    versions = [read_manifest(folder).data_version for folder, _ in before]
    for folder, _ in before:
        shutil.rmtree(folder)
    assert exported.run(job) == 0
    for folder, files in before:
        assert files_below(folder / DATA_FOLDER) == files
    assert [read_manifest(folder).data_version for folder, _ in before] == versions


def test_other_options_and_other_caches_are_other_variants(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    cut = ExportParams(asset="export_hf", max_length=3)
    of_topk: dict[Asset, Path] = {"topk_cache": folders["topk_cache"]}
    jobs = [exported.job_of(tmp_path, folders), exported.job_of(tmp_path, folders, [cut])]
    jobs.append(exported.job_of(tmp_path, of_topk))
    other = made_up.commit(tmp_path, made_up.truths(1, exported.KEY, n=12), max_lengths={"topk_cache": 4})
    jobs.append(exported.job_of(tmp_path, {"topk_cache": other["topk_cache"]}))
    assert [exported.run(job) for job in jobs] == [0, 0, 0, 0]
    assert len({job.units[0].outputs[0].variant for job in jobs}) == 4
    assert all(manifest is not None for job in jobs for _, manifest in exported.results(job))
    listed = [(item.why, item.asset) for item in superseded(tmp_path / made_up.RECIPE) if item.asset == "export_hf"]
    assert listed == [("older variant", "export_hf")] * 3


@pytest.mark.parametrize("formats", [BOTH, (ExportParams(asset="export_original"),)])
def test_any_byte_of_any_file_that_changes_is_named_by_verify_and_mended_by_the_next_run(
    tmp_path: Path, folders: dict[Asset, Path], formats: tuple[ExportParams, ...]
) -> None:
    job = exported.job_of(tmp_path, folders, formats)
    assert exported.run(job) == 0
    for folder, manifest in exported.results(job):
        assert manifest is not None
        before = files_below(folder / DATA_FOLDER)
        for part in manifest.parts:
            examples.flip_byte(folder / part.name)
            (problem,) = verify(folder).problems
            assert (problem.kind, problem.path) == ("changed_part", folder / part.name)
            (folder / part.name).unlink()  # as the message says
            assert [problem.kind for problem in verify(folder).problems] == ["missing_part"]
            assert exported.run(job) == 0
            assert files_below(folder / DATA_FOLDER) == before
            assert verify(folder).ok
            assert read_manifest(folder).data_version == manifest.data_version
        shutil.rmtree(folder / DATA_FOLDER)
        assert {problem.kind for problem in verify(folder).problems} == {"missing_part"}
        assert exported.run(job) == 0
        assert files_below(folder / DATA_FOLDER) == before


def test_a_file_of_nobody_is_noted_in_whichever_folder_it_lies(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    job = exported.job_of(tmp_path, folders)
    assert exported.run(job) == 0
    ((folder, _),) = exported.results(job)
    (folder / "data" / "data" / "mine.txt").write_text("…")
    (folder / "data" / "own").mkdir()
    (folder / "data" / "own" / "deep.txt").write_text("…")
    notes = [(note.kind, note.path) for note in verify(folder).notes if note.kind == "foreign_file"]
    assert sorted(notes) == [
        ("foreign_file", folder / "data" / "data" / "mine.txt"),
        ("foreign_file", folder / "data" / "own"),
    ]
    assert verify(folder).ok


def test_an_export_is_put_aside_like_any_result(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    job = exported.job_of(tmp_path, folders)
    assert exported.run(job) == 0
    ((folder, _),) = exported.results(job)
    (moved,) = put_aside(tmp_path / made_up.RECIPE, [exported.KEY], ["export_hf"], why="a test")
    assert not folder.exists()
    assert (moved.folder / DATA_FOLDER / EXPORT_NAME).is_file()
    assert exported.run(job) == 0
    assert files_below(folder / DATA_FOLDER) == files_below(moved.folder / DATA_FOLDER)


def test_formats_of_draft_heads_are_results_with_a_file_a_document(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    torch = pytest.importorskip("torch")
    states: tuple[int | FinalState, ...] = (1, 2, 4, "after_norm")
    assets: tuple[ExportAsset, ...] = ("export_specforge", "export_specforge_dflash", "export_modelopt")
    exports = [ExportParams(asset=asset, states=states) for asset in assets]
    of_states: dict[Asset, Path] = {"hidden_state_cache": folders["hidden_state_cache"]}
    job = exported.job_of(tmp_path, of_states, exports)
    assert exported.run(job) == 0
    for folder, manifest in exported.results(job):
        assert manifest is not None
        assert 0 < manifest.facts["n_documents"] <= 12
        assert verify(folder).ok
        documents = [part.name for part in manifest.parts if part.name.endswith((".ckpt", ".pt"))]
        assert len(documents) == manifest.facts["n_documents"]
        assert "input_ids" in torch.load(folder / documents[0])
    before = [files_below(folder / DATA_FOLDER) for folder, _ in exported.results(job)]
    for folder, _ in exported.results(job):
        shutil.rmtree(folder)
    killed_at(job, tmp_path, "kd_assets.export.folder:Journal.append:3")
    assert exported.run(job) == 0
    assert [files_below(folder / DATA_FOLDER) for folder, _ in exported.results(job)] == before


# ------------------------------------------------------------------------------------------------------------ killed


def killed_at(job: JobFile, folder: Path, at: str) -> None:
    """Run the job in a process that kills itself where a function of ours is called for the n-th time."""
    (folder / "job.json").write_text(job.to_json())
    program = (
        "import os, signal, sys, importlib\n"
        "module, name, n = sys.argv[3].split(':')\n"
        "owner = importlib.import_module(module)\n"
        "*path, name = name.split('.')\n"
        "for part in path: owner = getattr(owner, part)\n"
        "real, left = getattr(owner, name), int(n)\n"
        "def killing(*args, **kwargs):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args, **kwargs)\n"
        "setattr(owner, name, killing)\n"
        "from kd_assets_tests.export import exported\n"
        "sys.exit(exported.main(sys.argv))\n"
    )
    command = [sys.executable, "-c", program, str(folder / "job.json"), str(folder / "events.jsonl"), at]
    done = subprocess.run(command, env={**os.environ}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize(
    "at",
    [
        "kd_assets.export.folder:Journal.open:1",
        "kd_assets.export.folder:Journal.append:1",
        "kd_assets.export.folder:Journal.append:3",
        "kd_assets.export.exporting:write_export:1",  # all sections are whole
        "kd_assets.export.folder:Journal.close:1",  # export.json is there, and the journal, too
        "kd_assets.export.runner:sweep:1",
        "kd_assets.store.writing.journal:Journal.rewrite:1",  # before the parts are adopted
        "kd_assets.store.writing.writer:ResultWriter.commit:1",
        "kd_assets.store.writing.writer:_finish_commit:1",  # the manifest is there
        "kd_assets.export.exporting:write_export:2",  # the first of two is committed
    ],
)
def test_a_task_that_is_killed_anywhere_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, folders: dict[Asset, Path], at: str
) -> None:
    job = exported.job_of(tmp_path, folders, BOTH)
    assert exported.run(job) == 0
    whole = [(folder, files_below(folder / DATA_FOLDER)) for folder, _ in exported.results(job)]
    for folder, _ in whole:
        shutil.rmtree(folder)
    killed_at(job, tmp_path, at)
    stood = {path: path.stat().st_mtime_ns for folder, _ in whole for path in folder.rglob("*.safetensors")}
    assert exported.run(job) == 0
    for folder, files in whole:
        assert files_below(folder / DATA_FOLDER) == files
        assert verify(folder).ok
    assert {path: path.stat().st_mtime_ns for path in stood} == stood, "whole sections are not made again"
    for params in BOTH:
        report = verify(tmp_path / made_up.RECIPE / params.asset)
        assert (report.problems, report.notes) == ((), ())


def test_a_task_that_is_killed_at_any_time_ends_with_the_same_bytes(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    job = exported.job_of(tmp_path, folders, BOTH)
    assert exported.run(job) == 0
    whole = [(folder, files_below(folder / DATA_FOLDER)) for folder, _ in exported.results(job)]
    for folder, _ in whole:
        shutil.rmtree(folder)
    (tmp_path / "job.json").write_text(job.to_json())
    module = "kd_assets_tests.export.exported"
    command = [sys.executable, "-m", module, str(tmp_path / "job.json"), str(tmp_path / "events.jsonl")]
    chance = random.Random(0)
    for _ in range(40):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300  # until it is at work, wherever the machine is slow
        while not any((folder / ".lease").exists() for folder, _ in whole) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.3)
        process.kill()
        process.wait()
        if all(manifest is not None for _, manifest in exported.results(job)):
            break
        for folder, _ in whole:
            (folder / ".lease").unlink(missing_ok=True)
    assert exported.run(job) == 0
    for folder, files in whole:
        assert files_below(folder / DATA_FOLDER) == files
        assert verify(folder).ok


@pytest.mark.parametrize("lost", ["data/export.json", "data/section-00001.safetensors"])
@pytest.mark.parametrize(
    "at", [*(f"pathlib:Path.unlink:{n}" for n in (1, 2, 4, 7)), "kd_assets.export.folder:Journal.append:2"]
)
def test_a_committed_export_that_lost_a_file_is_mended_even_by_a_task_that_is_killed(
    tmp_path: Path, folders: dict[Asset, Path], lost: str, at: str
) -> None:
    job = exported.job_of(tmp_path, folders, [ExportParams(asset="export_safetensors")])
    assert exported.run(job) == 0
    ((folder, _),) = exported.results(job)
    before = files_below(folder / DATA_FOLDER)
    (folder / lost).unlink()
    killed_at(job, tmp_path, at)
    assert exported.run(job) == 0
    assert files_below(folder / DATA_FOLDER) == before
    assert verify(folder).ok


def test_a_damaged_export_that_was_not_committed_yet_is_made_again(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    job = exported.job_of(tmp_path, folders)
    killed_at(job, tmp_path, "kd_assets.store.writing.journal:Journal.rewrite:1")
    ((folder, _),) = exported.results(job)
    examples.flip_byte(folder / DATA_FOLDER / "data" / "part-00001.parquet")
    assert exported.run(job) == 0
    assert verify(folder).ok
    verify_export(folder / DATA_FOLDER)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "data/part-00000.parquet"])
def test_files_of_no_known_export_are_put_aside_and_the_export_is_made(
    tmp_path: Path, folders: dict[Asset, Path], name: str, begun: bool
) -> None:
    job = exported.job_of(tmp_path, folders)
    ((folder, _),) = exported.results(job)
    prepare_folder((folder / DATA_FOLDER / name).parent)
    (folder / DATA_FOLDER / name).write_text("…")
    if begun:
        (folder / DATA_FOLDER / JOURNAL_NAME).write_bytes(b"")
    assert exported.run(job) == 0
    assert (folder / "data.unknown-1" / name).read_text() == "…"
    report = verify(folder)
    assert report.ok
    assert {note.path.name for note in report.notes} == {"data.unknown-1"}


@pytest.mark.parametrize("header", [b"", b'{"finger', b'{"fingerprint": "0"}', b"\0" * 64, b"[1]\n"])
def test_a_journal_without_a_whole_first_line_is_begun_anew(
    tmp_path: Path, folders: dict[Asset, Path], header: bytes
) -> None:
    job = exported.job_of(tmp_path, folders)
    ((folder, _),) = exported.results(job)
    prepare_folder(folder / DATA_FOLDER)
    (folder / DATA_FOLDER / JOURNAL_NAME).write_bytes(header)
    assert exported.run(job) == 0
    assert (verify(folder).problems, verify(folder).notes) == ((), ())


@pytest.mark.parametrize("n", range(1, 9))
def test_a_kill_while_an_unfinished_export_is_taken_away_leaves_one_that_goes_on(
    tmp_path: Path, folders: dict[Asset, Path], n: int
) -> None:
    made = export_to_folder("safetensors", {a: [f] for a, f in folders.items()}, tmp_path / "whole")
    copy = tmp_path / "out"
    shutil.copytree(made.folder, copy)
    (copy / EXPORT_NAME).unlink()
    (copy / JOURNAL_NAME).write_text(json.dumps({"fingerprint": made.fingerprint}) + "\n")
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from kd_assets.export.folder import discard\n"
        "real, left = Path.unlink, int(sys.argv[2])\n"
        "def killing(*args, **kwargs):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args, **kwargs)\n"
        "Path.unlink = killing\n"
        "discard(Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(copy), str(n)], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL
    export_to_folder("safetensors", {a: [f] for a, f in folders.items()}, copy)
    assert files_below(copy) == files_below(made.folder)


def test_a_request_to_stop_ends_the_task_between_sections_and_it_goes_on(
    tmp_path: Path, folders: dict[Asset, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd_assets.export.runner import _Progress
    from kd_assets.worker.stop_flag import StopFlag

    real, job = _Progress.section, exported.job_of(tmp_path, folders, [SAFETENSORS])

    def stopping(self: _Progress, progress: object) -> None:
        self._stop._signal_name = "SIGUSR1"  # as the handler does
        real(self, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(_Progress, "section", stopping)
    assert exported.run(job) == EXIT_RESUMABLE
    ((folder, manifest),) = exported.results(job)
    assert manifest is None
    assert (folder / DATA_FOLDER / JOURNAL_NAME).is_file()
    assert not (folder / DATA_FOLDER / LEASE_NAME).exists()
    assert len(list((folder / DATA_FOLDER).glob("*.safetensors"))) == 1
    monkeypatch.setattr(_Progress, "section", real)
    assert exported.run(job) == 0
    assert not StopFlag()
    assert verify(folder).ok


# ------------------------------------------------------------------------------------------------------- odd inputs


def test_a_format_that_cannot_be_made_keeps_no_other_from_its_turn(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    refused = ExportParams(asset="export_original", learned_only=True)
    job = exported.job_of(tmp_path, folders, [refused, HF])
    assert exported.run(job, tmp_path / "events.jsonl") == EXIT_BAD_INPUT
    (failed,) = events_of(tmp_path / "events.jsonl", "partition_failed")
    assert failed["error"] == "RecipeError"
    assert "loss mask" in str(failed["message"])
    (original, none), (hf, made) = exported.results(job)
    assert none is None
    assert not (original / DATA_FOLDER).exists()
    assert made is not None
    assert verify(hf).ok


def test_two_formats_that_cannot_be_made_are_both_named(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    refused = [
        ExportParams(asset="export_original", learned_only=True),
        ExportParams(asset="export_specforge", states=(1, 2)),
    ]
    job = exported.job_of(tmp_path, folders, refused)
    assert exported.run(job, tmp_path / "events.jsonl") == EXIT_BAD_INPUT
    (failed,) = events_of(tmp_path / "events.jsonl", "partition_failed")
    assert "export_original: " in str(failed["message"])
    assert "export_specforge: " in str(failed["message"])


def test_what_fails_two_formats_in_the_same_way_is_said_once(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    job = exported.job_of(tmp_path, folders, [HF, ExportParams(asset="export_original")])
    examples.flip_byte(folders["hidden_state_cache"] / "part-00000.arrow")
    assert exported.run(job, tmp_path / "events.jsonl") == 1
    (failed,) = events_of(tmp_path / "events.jsonl", "partition_failed")
    message = str(failed["message"])
    assert message.startswith("export_hf, export_original: ")
    assert message.count("part-00000.arrow was changed after its commit") == 1


def test_a_damaged_cache_is_named_and_nothing_is_committed(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    job = exported.job_of(tmp_path, folders)
    examples.flip_byte(folders["topk_cache"] / "part-00000.parquet")
    assert exported.run(job, tmp_path / "events.jsonl") == 1
    (failed,) = events_of(tmp_path / "events.jsonl", "partition_failed")
    assert failed["error"] == "CorruptPartError"
    assert str(folders["topk_cache"] / "part-00000.parquet") in str(failed["message"])
    assert exported.results(job)[0][1] is None


def test_a_validation_set_of_a_small_partition_may_be_empty(tmp_path: Path, folders: dict[Asset, Path]) -> None:
    rarely = ExportParams(asset="export_hf", validation_share=1e-9)
    job = exported.job_of(tmp_path, folders, [rarely])
    assert exported.run(job) == 0
    ((folder, manifest),) = exported.results(job)
    assert manifest is not None
    assert manifest.facts["splits"] == {"train": 12}
    assert not (folder / DATA_FOLDER / "validation").exists()
    assert verify(folder).ok


@pytest.mark.parametrize("asset", ["export_hf", "export_original"])
def test_a_partition_without_a_document_is_an_export_without_one(tmp_path: Path, asset: str) -> None:
    params = next(p for p in (HF, ExportParams(asset="export_original")) if p.asset == asset)
    key = "made-up-00007"
    folders = made_up.commit_empty(tmp_path, key)
    job = exported.job_of(tmp_path, folders, [params], key)
    assert exported.run(job) == 0
    ((folder, manifest),) = exported.results(job)
    assert manifest is not None
    assert (manifest.parts, manifest.facts["n_documents"]) == ((), 0)
    assert verify(folder).ok
    assert exported.run(job) == 0


def test_a_partition_of_which_a_format_can_hold_no_document_is_an_export_without_one(tmp_path: Path) -> None:
    documents = [dataclasses.replace(d, mask_L=np.zeros_like(d.mask_L)) for d in made_up.truths(1, exported.KEY, n=6)]
    folders = made_up.commit(tmp_path, documents, assets=("topk_cache",))
    job = exported.job_of(tmp_path, folders, [ExportParams(asset="export_distillkit")])
    assert exported.run(job) == 0
    ((folder, manifest),) = exported.results(job)
    assert manifest is not None
    assert (manifest.parts, manifest.facts["n_documents"]) == ((), 0)
    assert manifest.facts["left_out"]["fewer than 2 tokens"]["n_documents"] == sum(d.length == 1 for d in documents)
    assert manifest.facts["left_out"]["nothing of them is learned"]["n_documents"] == sum(
        d.length > 1 for d in documents
    )
    assert not (folder / DATA_FOLDER).exists()
    assert verify(folder).ok
    assert exported.run(job) == 0


def test_documents_that_a_format_cannot_hold_are_left_out_and_named_in_the_facts(tmp_path: Path) -> None:
    documents = [d for d in made_up.truths(1, exported.KEY, n=12) if d.length == 1]
    folders = made_up.commit(tmp_path, documents, assets=("topk_cache",))
    job = exported.job_of(tmp_path, folders, [ExportParams(asset="export_original")])
    assert exported.run(job) == 0
    ((folder, manifest),) = exported.results(job)
    assert manifest is not None
    assert manifest.facts["n_documents"] == 0
    assert manifest.facts["left_out"]["fewer than 2 tokens"]["n_documents"] == len(documents)
    assert [part.name for part in manifest.parts] == ["data/export.json"]
    assert verify(folder).ok


def of_which_one_split_learns(n: int, share: float, learned: str) -> list[made_up.Truth]:
    """Documents of which only those of one split have learned tokens, all of theirs."""
    documents = made_up.truths(1, exported.KEY, n=n)
    validation = in_validation([d.document_id for d in documents], ExportOptions(validation_share=share))
    assert 0 < validation.sum() < n
    return [
        dataclasses.replace(d, mask_L=np.full_like(d.mask_L, v == (learned == "validation")))
        for d, v in zip(documents, validation, strict=True)
    ]


@pytest.mark.parametrize("learned", ["train", "validation"])
@pytest.mark.parametrize("asset", ["export_distillkit", "export_specforge_dflash"])
def test_a_split_of_which_a_format_can_hold_no_document_is_left_out_and_the_other_one_stands(
    tmp_path: Path, asset: ExportAsset, learned: str
) -> None:
    cache: Asset = "topk_cache" if asset == "export_distillkit" else "hidden_state_cache"
    documents = of_which_one_split_learns(40, 0.15, learned)
    folders = made_up.commit(tmp_path, documents, assets=(cache,))
    job = exported.job_of(tmp_path, folders, [ExportParams(asset=asset, validation_share=0.15)])
    assert exported.run(job) == 0
    ((folder, manifest),) = exported.results(job)
    assert manifest is not None
    assert manifest.facts["n_documents"] > 0
    assert manifest.facts["splits"] == {learned: manifest.facts["n_documents"]}
    assert [path.name for path in (folder / DATA_FOLDER).iterdir() if path.is_dir()] == [learned]
    assert set(files_below(folder / DATA_FOLDER)) == {part.name.removeprefix("data/") for part in manifest.parts}
    assert verify(folder).ok
    before = files_below(folder / DATA_FOLDER)
    shutil.rmtree(folder)
    killed_at(job, tmp_path, "kd_assets.export.exporting:write_export:1")
    assert exported.run(job) == 0
    assert files_below(folder / DATA_FOLDER) == before


@pytest.mark.parametrize(
    ("share", "pack_to", "splits"), [(0.15, 128, {"train"}), (0.0, 4096, set()), (0.15, 4096, set())]
)
def test_a_split_with_fewer_packed_rows_than_the_loader_takes_is_left_out_and_counted(
    tmp_path: Path, share: float, pack_to: int, splits: set[str]
) -> None:
    documents = made_up.truths(1, exported.KEY, n=60)
    folders = made_up.commit(tmp_path, documents, assets=("topk_cache",), max_documents={"topk_cache": 1000})
    job = exported.job_of(
        tmp_path, folders, [ExportParams(asset="export_distillkit", validation_share=share, pack_to=pack_to)]
    )
    assert exported.run(job, tmp_path / "events.jsonl") == 0
    ((folder, manifest),) = exported.results(job)
    assert manifest is not None
    assert set(manifest.facts["splits"]) == splits
    n_left_out = sum(left_out["n_documents"] for left_out in manifest.facts["left_out"].values())
    assert manifest.facts["n_documents"] + n_left_out == len(documents)
    assert any("DistillKit's loader takes 2 or more" in why for why in manifest.facts["left_out"])
    (warning,) = events_of(tmp_path / "events.jsonl", "warning")
    assert ("it has no split 'validation'" if splits else "it has no document") in str(warning["message"])
    assert verify(folder).ok


@pytest.mark.parametrize("asset", ["export_distillkit", "export_axolotl", "export_hf"])
def test_an_export_without_a_document_warns(tmp_path: Path, asset: ExportAsset) -> None:
    key = "made-up-00007"
    folders = made_up.commit_empty(tmp_path, key)
    job = exported.job_of(tmp_path, folders, [ExportParams(asset=asset)], key)
    assert exported.run(job, tmp_path / "empty.jsonl") == 0
    (warning,) = events_of(tmp_path / "empty.jsonl", "warning")
    assert "it has no document: its caches have none" in str(warning["message"])
    if asset == "export_hf":
        return  # it holds documents of one token
    folders = made_up.commit(tmp_path, made_up.truths(1, exported.KEY), assets=("topk_cache",))
    job = exported.job_of(tmp_path, folders, [ExportParams(asset=asset, max_length=1)])
    assert exported.run(job, tmp_path / "short.jsonl") == 0
    (warning,) = events_of(tmp_path / "short.jsonl", "warning")
    assert "it has no document: 9 left out, fewer than 2 tokens" in str(warning["message"])


def test_formats_of_torch_files_are_made_where_torch_is_not_installed(
    tmp_path: Path, folders: dict[Asset, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assets: tuple[ExportAsset, ...] = ("export_modelopt", "export_specforge", "export_specforge_dflash")
    job = exported.job_of(tmp_path, folders, [ExportParams(asset=asset, states=(1, 2, 4)) for asset in assets])
    assert exported.run(job) == 0
    for folder, manifest in exported.results(job):
        assert manifest is not None
        assert manifest.facts["n_documents"] > 0
        assert verify(folder).ok
        recipe, to = str(tmp_path / made_up.RECIPE), tmp_path / folder.name
        name = manifest.identity["asset"].removeprefix("export_")
        assert main(["export", name, recipe, "--states", "1", "2", "4", "--to", str(to)]) == 0
        assert files_below(to) == files_below(folder / DATA_FOLDER)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("nobody foresaw it")])
def test_what_nobody_foresaw_of_one_format_keeps_no_other_from_its_turn(
    tmp_path: Path, folders: dict[Asset, Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(self: object, folder: Path, source: object, options: object) -> object:
        raise error

    monkeypatch.setattr(Safetensors, "writer", broken)
    refused = ExportParams(asset="export_original", learned_only=True)
    job = exported.job_of(tmp_path, folders, [refused, SAFETENSORS, HF])
    assert exported.run(job, tmp_path / "events.jsonl") == EXIT_FAILED
    (failed,) = events_of(tmp_path / "events.jsonl", "partition_failed")
    assert f"export_safetensors: {type(error).__name__}: {error}" in str(failed["message"])
    assert "export_original: " in str(failed["message"])
    assert [manifest is not None for _, manifest in exported.results(job)] == [False, False, True]


def test_no_memory_is_nothing_of_a_format(
    tmp_path: Path, folders: dict[Asset, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, folder: Path, source: object, options: object) -> object:
        raise MemoryError

    monkeypatch.setattr(Safetensors, "writer", broken)
    job = exported.job_of(tmp_path, folders, [SAFETENSORS, HF])
    assert exported.run(job, tmp_path / "events.jsonl") == EXIT_FAILED
    assert [manifest is not None for _, manifest in exported.results(job)] == [False, False]
