"""What an export refuses before it writes, how it goes on after a kill, and what it says of itself."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kd_assets.contract import Asset
from kd_assets.errors import (
    CorruptPartError,
    ExportFolderError,
    FailedCheckError,
    KdAssetsError,
    NotCommittedError,
    NothingToExportError,
    RecipeError,
    StorageUnavailableError,
    UnknownFieldError,
    VariantConflictError,
)
from kd_assets.export.exporting import ExportProgress, export_recipe, export_to_folder
from kd_assets.export.folder import EXPORT_NAME, JOURNAL_NAME, read_export, verify_export
from kd_assets.export.format import ExportOptions
from kd_assets.export.formats import FORMATS
from kd_assets.export.joined import JoinedPartition, joined_partition
from kd_assets.export.planning import bytes_written, in_validation
from kd_assets.export.source import FolderCaches, choose_needed, source_of
from kd_assets.store import Chosen, choose
from kd_assets_tests.export import made_up
from kd_assets_tests.store import examples, planned

RECIPE = made_up.RECIPE


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two partitions of every cache."""
    for key in ("made-up-00000", "made-up-00001"):
        made_up.commit(tmp_path / "store", made_up.truths(1, key))
    return tmp_path / "store"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------- refusals


def test_half_the_partitions_missing_is_refused_with_their_names(tmp_path: Path) -> None:
    store, keys = tmp_path / "store", [f"p-{i:05d}" for i in range(4)]
    planned.write_plan(store / examples.RECIPE, {key: key for key in keys})
    for key in keys[::2]:
        planned.commit_partition(store, key, key)
    with pytest.raises(NotCommittedError, match="Without a result of topk_cache: p-00001, p-00003"):
        export_recipe("hf", store / examples.RECIPE, tmp_path / "out")
    exported = export_recipe("hf", store / examples.RECIPE, tmp_path / "some", partition_keys=keys[::2])
    assert exported.n_documents == 2 * len(examples.LENGTHS)
    assert not (tmp_path / "out").exists()


def test_a_cache_of_a_shard_that_changed_since_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "store"
    planned.write_plan(store / examples.RECIPE, {"p-00000": "old"})
    planned.commit_partition(store, "p-00000", "old")
    planned.write_plan(store / examples.RECIPE, {"p-00000": "new"})
    planned.commit(store, "shards_manifest", "p-00000", planned.hash_of("new"))
    with pytest.raises(NotCommittedError, match="made of another shard"):
        export_recipe("hf", store / examples.RECIPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cache_that_failed_a_check_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "store"
    planned.write_plan(store / examples.RECIPE, {"p-00000": "text"})
    shard = planned.commit(store, "shards_manifest", "p-00000", planned.hash_of("text"))
    planned.commit(store, "hidden_state_cache", "p-00000", shard)
    planned.commit(store, "topk_cache", "p-00000", shard, passed=False)
    with pytest.raises(FailedCheckError, match="check recomputed failed"):
        export_recipe("hf", store / examples.RECIPE, tmp_path / "out", options=ExportOptions(assets=("topk_cache",)))
    with pytest.raises(FailedCheckError, match="check recomputed failed"):  # nor is it silently left out
        export_recipe("hf", store / examples.RECIPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cache_of_two_variants_is_refused_until_one_is_named(tmp_path: Path) -> None:
    documents = made_up.truths(1)
    recipe = tmp_path / RECIPE
    for length in (None, 4):
        made_up.commit(tmp_path, documents, assets=("embedding_cache",), max_lengths={"embedding_cache": length or 99})
    made_up.commit(tmp_path, documents, assets=("topk_cache",))
    with pytest.raises(VariantConflictError, match="several variants"):
        export_recipe("hf", recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    variant = sorted(path.name for path in (recipe / "embedding_cache").iterdir())[0]
    exported = export_recipe("hf", recipe, tmp_path / "out", variants={"embedding_cache": variant})
    assert exported.said["sources"]["embedding_cache"][0]["variant"] == variant


def test_caches_of_other_shards_are_refused(tmp_path: Path) -> None:
    documents = made_up.truths(1)
    folders = made_up.commit(tmp_path / "a", documents, assets=("topk_cache",))
    folders |= made_up.commit(tmp_path / "b", documents, assets=("embedding_cache",), made_of="other")
    with pytest.raises(VariantConflictError, match="made from shard"):
        export_to_folder("hf", {asset: [folder] for asset, folder in folders.items()}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_caches_with_other_tokens_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    documents = made_up.truths(1)
    folders = made_up.commit(tmp_path / "a", documents, assets=("topk_cache",))
    for document in documents:
        document.ids_L[0] += 1
    folders |= made_up.commit(tmp_path / "b", documents, assets=("embedding_cache",))
    with pytest.raises(VariantConflictError, match="has other tokens in"):
        export_to_folder("hf", {asset: [folder] for asset, folder in folders.items()}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_caches_that_lack_documents_of_each_other_are_refused(tmp_path: Path) -> None:
    documents = made_up.truths(1)
    folders = made_up.commit(tmp_path / "a", documents, assets=("topk_cache",))
    folders |= made_up.commit(tmp_path / "b", documents[1:], assets=("embedding_cache",))
    with pytest.raises(NotCommittedError, match="differ by 1 documents"):
        export_to_folder("hf", {asset: [folder] for asset, folder in folders.items()}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mismatched_vocabularies_are_refused(tmp_path: Path) -> None:
    documents = made_up.truths(1)
    folders = made_up.commit(tmp_path / "a", documents, assets=("topk_cache",), facts={"vocab_size": 40})
    folders |= made_up.commit(tmp_path / "b", documents, assets=("hidden_state_cache",), facts={"vocab_size": 48})
    with pytest.raises(VariantConflictError, match="vocabulary"):
        export_to_folder("hf", {asset: [folder] for asset, folder in folders.items()}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("format_name", "options", "error", "words"),
    [
        ("nobodys", {}, RecipeError, "there is no export format 'nobodys'"),
        ("hf", {"states": (3,)}, UnknownFieldError, "has no block 3; it has 1, 2, 4, before_norm, after_norm"),
        ("hf", {"assets": ("topk_cache",), "states": (1,)}, RecipeError, "no hidden_state_cache is exported"),
        ("original", {"states": ("after_norm",)}, RecipeError, "outputs of blocks"),
        ("original", {"learned_only": True}, RecipeError, "no loss mask"),
        ("hf", {"draft_vocabulary": 8}, RecipeError, "counts no draft vocabulary"),
        ("safetensors", {"draft_vocabulary": 8}, RecipeError, "draft vocabulary"),
        ("hf", {"max_length": 0}, RecipeError, "max_length is 0"),
        ("hf", {"validation_share": 1.0}, RecipeError, "below 1"),
        ("hf", {"validation_share": 1e-9}, NotCommittedError, "'validation' would have no document"),
    ],
)
def test_what_cannot_be_asked_of_a_format_is_refused_before_anything_is_written(
    store: Path, tmp_path: Path, format_name: str, options: dict[str, Any], error: type[KdAssetsError], words: str
) -> None:
    with pytest.raises(error, match=words):
        export_recipe(format_name, store / RECIPE, tmp_path / "out", options=ExportOptions(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_a_document_that_the_format_holds_is_named_and_a_new_folder_is_left_as_it_was(
    tmp_path: Path, split: str
) -> None:
    documents, options = made_up.truths(1, n=40), ExportOptions(validation_share=0.15)
    validation = in_validation([document.document_id for document in documents], options)
    for document, is_validation in zip(documents, validation, strict=True):
        document.mask_L[:] = is_validation == (split == "train")
    folders = made_up.commit(tmp_path, documents, assets=("topk_cache",))
    for _ in range(2):
        with pytest.raises(NothingToExportError, match=f"the split '{split}': .* choose another validation_share"):
            export_to_folder("distillkit", {"topk_cache": [folders["topk_cache"]]}, tmp_path / "out", options=options)
        assert not (tmp_path / "out").exists()


def test_a_format_that_needs_all_positions_refuses_a_cache_of_some(tmp_path: Path) -> None:
    made_up.commit(tmp_path / "store", made_up.truths(1, kept=0.5), positions=True)
    with pytest.raises(RecipeError, match="keeps some positions only"):
        export_recipe("original", tmp_path / "store" / RECIPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_room_on_the_disk_is_refused(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total, used, _ = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=total, used=used, free=1000))
    with pytest.raises(StorageUnavailableError, match=r"needs about .* GiB, and its disk has 0\.00 GiB free"):
        export_recipe("hf", store / RECIPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("format_name", "asset", "codec"),
    [
        *(("hf", "hidden_state_cache", codec) for codec in (None, "split", "fp8", "int8_32")),
        *(("safetensors", "hidden_state_cache", codec) for codec in (None, "fp8")),
        *(("modelopt", "hidden_state_cache", codec) for codec in (None, "int8_32")),
        *(("safetensors", "topk_cache", codec) for codec in (None, "compact")),
        *(("hf", "topk_cache", codec) for codec in (None, "compact")),
    ],
)
def test_the_room_that_is_asked_for_is_about_what_is_written_of_coded_caches_too(
    tmp_path: Path, format_name: str, asset: Asset, codec: str | None
) -> None:
    folders = made_up.commit(
        tmp_path,
        made_up.truths(1, n=60, hidden=256, k=30),
        assets=(asset,),
        codecs={asset: codec} if codec else None,
        max_documents={asset: 100},
    )
    caches = FolderCaches(folders={asset: [folders[asset]]})
    options, source = ExportOptions(states=(1, 2, 4) if format_name == "modelopt" else None), source_of(caches.there())
    needs = FORMATS[format_name].needs(source, options)
    asked = bytes_written(choose_needed(caches, needs), needs, source.hidden_size)
    exported = export_to_folder(format_name, {asset: [folders[asset]]}, tmp_path / "out", options=options)
    # Ids of a vocabulary of 40 take a fraction of a byte in a cache; those of real ones two bytes and more.
    least = 0.7 if (format_name, asset) == ("safetensors", "topk_cache") else 0.9
    assert least * exported.n_bytes < asked < 2.5 * exported.n_bytes


def test_a_folder_that_holds_another_export_or_other_files_is_not_touched(store: Path, tmp_path: Path) -> None:
    export_recipe("hf", store / RECIPE, tmp_path / "out")
    before = files_in(tmp_path / "out")
    with pytest.raises(ExportFolderError, match="holds another export"):
        export_recipe("safetensors", store / RECIPE, tmp_path / "out")
    assert files_in(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(ExportFolderError, match=r"thesis\.tex"):
        export_recipe("hf", store / RECIPE, tmp_path / "mine")
    with pytest.raises(ExportFolderError, match="is no folder"):
        export_recipe("hf", store / RECIPE, tmp_path / "mine" / "thesis.tex")
    assert list(files_in(tmp_path / "mine")) == ["thesis.tex"]


def test_a_damaged_cache_is_found_before_its_numbers_are_exported(store: Path, tmp_path: Path) -> None:
    damaged = sorted((store / RECIPE / "hidden_state_cache").rglob("part-00000.arrow"))[0]
    examples.flip_byte(damaged)
    with pytest.raises(CorruptPartError, match="changed after its commit"):
        export_recipe("hf", store / RECIPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", range(6))
def test_a_damaged_part_is_found_before_its_section_is_written_and_those_before_it_stand(
    store: Path, tmp_path: Path, at: int
) -> None:
    parts = sorted((store / RECIPE / "hidden_state_cache").rglob("part-*.arrow"), key=lambda path: path.parts[-3:])
    assert len(parts) == 6, "two partitions of three parts"
    truth = made_up.truths(1, f"made-up-{at // 3:05d}")[at % 3 * 3 : at % 3 * 3 + 3]
    sound, bits = parts[at].read_bytes(), b"".join(document.bits_LH[1].tobytes() for document in truth)
    parts[at].write_bytes(sound.replace(bits, bytes([bits[0] ^ 1]) + bits[1:]))
    with pytest.raises(CorruptPartError, match="changed after its commit"):
        export_recipe("safetensors", store / RECIPE, tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out").rglob("*.safetensors"))
    assert written == [f"section-{i:05d}.safetensors" for i in range(at)]
    parts[at].write_bytes(sound)
    export_recipe("safetensors", store / RECIPE, tmp_path / "out")
    export_recipe("safetensors", store / RECIPE, tmp_path / "whole")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_of_an_export_that_goes_on_only_what_is_left_is_opened(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(progress: ExportProgress) -> None:
        if progress.n_sections == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_recipe("safetensors", store / RECIPE, tmp_path / "out", on_progress=cut)
    verified: list[tuple[str, int]] = []
    require = JoinedPartition.require_part_unchanged

    def seen(self: JoinedPartition, part: int) -> None:
        verified.append((self.partition_key, part))
        require(self, part)

    monkeypatch.setattr(JoinedPartition, "require_part_unchanged", seen)
    export_recipe("safetensors", store / RECIPE, tmp_path / "out")
    assert set(verified) == {("made-up-00001", 1), ("made-up-00001", 2)}


# ------------------------------------------------------------------------------------------------- going on, the end


@pytest.mark.parametrize(
    ("format_name", "states"), [("hf", None), ("safetensors", None), ("original", None), ("modelopt", (1, 2, 4))]
)
def test_an_export_that_is_cut_off_goes_on_and_ends_with_the_same_bytes(
    store: Path, tmp_path: Path, format_name: str, states: tuple[int, ...] | None
) -> None:
    class PowerCutError(Exception):
        pass

    def cut(progress: ExportProgress) -> None:
        if progress.n_sections == 3:
            raise PowerCutError

    options = ExportOptions(validation_share=0.3, states=states)
    whole = export_recipe(format_name, store / RECIPE, tmp_path / "whole", options=options)
    with pytest.raises(PowerCutError):
        export_recipe(format_name, store / RECIPE, tmp_path / "out", options=options, on_progress=cut)
    assert not (tmp_path / "out" / EXPORT_NAME).exists()
    with pytest.raises(NotCommittedError, match="not finished yet"):
        read_export(tmp_path / "out")
    lines = (tmp_path / "out" / JOURNAL_NAME).read_text().splitlines()
    first = json.loads(lines[1])["files"][0][0]
    split = json.loads(lines[1])["split"]
    examples.flip_byte(tmp_path / "out" / split / first)  # of a whole section: it is made again
    gone_on = export_recipe(format_name, store / RECIPE, tmp_path / "out", options=options)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    assert gone_on.files == whole.files


def test_an_export_that_is_killed_goes_on_after_its_last_whole_section(store: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from kd_assets.export.exporting import export_recipe\n"
        "def cut(progress):\n"
        "    if progress.n_sections == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export_recipe('safetensors', Path(sys.argv[1]), Path(sys.argv[2]), on_progress=cut)\n"
    )
    command = [sys.executable, "-c", program, str(store / RECIPE), str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    stood = {name for name in files_in(tmp_path / "out") if name.endswith(".safetensors")}
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in stood}
    assert len(stood) == 4
    export_recipe("safetensors", store / RECIPE, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in stood} == times
    export_recipe("safetensors", store / RECIPE, tmp_path / "whole")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_a_journal_that_says_nothing_of_documents_left_out_is_read(store: Path, tmp_path: Path) -> None:
    def cut(progress: ExportProgress) -> None:
        if progress.n_sections == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_recipe("safetensors", store / RECIPE, tmp_path / "out", on_progress=cut)
    path = tmp_path / "out" / JOURNAL_NAME
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.pop("left_out", None) for line in lines] == [None, {}, {}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stood = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    export_recipe("safetensors", store / RECIPE, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in stood} == stood


def test_an_unfinished_export_is_not_gone_on_with_other_options(store: Path, tmp_path: Path) -> None:
    def cut(progress: ExportProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_recipe("hf", store / RECIPE, tmp_path / "out", on_progress=cut)
    with pytest.raises(ExportFolderError, match="unfinished export"):
        export_recipe("hf", store / RECIPE, tmp_path / "out", options=ExportOptions(max_length=3))


def test_a_disk_that_is_full_at_the_first_line_leaves_nothing_and_a_torn_line_is_begun_anew(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if b'"fingerprint"' in bytes(data):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return real(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(StorageUnavailableError):
            export_recipe("hf", store / RECIPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    for torn in (b"", b'{"fingerpr'):
        (tmp_path / "out" / JOURNAL_NAME).write_bytes(torn)
        export_recipe("hf", store / RECIPE, tmp_path / "out")
        verify_export(tmp_path / "out")
        assert not (tmp_path / "out" / JOURNAL_NAME).exists()
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").mkdir()


def test_a_whole_export_is_found_and_not_made_again(store: Path, tmp_path: Path) -> None:
    export_recipe("hf", store / RECIPE, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = export_recipe("hf", store / RECIPE, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    (tmp_path / "out" / next(iter(again.files))).unlink()
    with pytest.raises(CorruptPartError, match="it is missing"):
        export_recipe("hf", store / RECIPE, tmp_path / "out")


def test_export_json_names_every_file_and_verify_finds_each_change(store: Path, tmp_path: Path) -> None:
    exported = export_recipe("original", store / RECIPE, tmp_path / "out", options=ExportOptions(validation_share=0.3))
    assert {*exported.files, EXPORT_NAME} == set(files_in(tmp_path / "out"))
    assert verify_export(tmp_path / "out") == exported
    versions = [source["data_version"] for source in exported.said["sources"]["topk_cache"]]
    assert len(set(versions)) == 2
    for name in exported.files:
        examples.flip_byte(tmp_path / "out" / name)
        with pytest.raises(CorruptPartError, match="sha256"):
            verify_export(tmp_path / "out")
        examples.flip_byte(tmp_path / "out" / name)
    verify_export(tmp_path / "out")


def test_documents_are_cut_to_what_all_caches_have_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    documents = made_up.truths(2, n=12)
    made_up.commit(tmp_path / "store", documents, max_lengths={"hidden_state_cache": 5})
    exported = export_recipe("hf", tmp_path / "store" / RECIPE, tmp_path / "out")
    n_cut = sum(document.length > 5 for document in documents)
    assert exported.said["n_cut_to_the_shortest_cache"] == n_cut > 0
    assert [r.message for r in caplog.records if "are cut" in r.message] == [
        f"{n_cut} documents are cut to the tokens that all caches of the export have (max_length: topk_cache None, "
        "hidden_state_cache 5, embedding_cache None); exported one by one the caches keep theirs"
    ]
    alone = ExportOptions(assets=("topk_cache",))
    whole = export_recipe("hf", tmp_path / "store" / RECIPE, tmp_path / "alone", options=alone)
    assert whole.n_tokens == sum(document.length for document in documents)


def test_states_are_views_of_the_mapped_file_and_may_be_read_more_than_once(store: Path) -> None:
    chosen: dict[Asset, Chosen] = {"hidden_state_cache": choose(store / RECIPE, "hidden_state_cache")}
    partition = joined_partition(chosen, "made-up-00000", states=(4,), max_length=None)
    documents = partition.documents(0, [0, 1, 2], first_number=5)
    assert len(documents) == 3
    for _ in range(2):  # as often as a format likes
        numbers = []
        for document in documents:
            assert document.states is not None
            assert partition._mapped is not None
            assert np.shares_memory(document.states.bits_NH[4], np.frombuffer(partition._mapped._memory, np.uint8))
            assert not document.states.bits_NH[4].flags.writeable
            numbers.append(document.number)
        assert numbers == [5, 6, 7]
    assert np.array_equal(partition.lengths_D, partition.whole_D)
