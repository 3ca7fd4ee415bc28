"""`kd-assets export` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd_assets import cli
from kd_assets.commands.export import progress_line
from kd_assets.export.exporting import ExportProgress
from kd_assets.export.folder import verify_export
from kd_assets_tests.export import made_up
from kd_assets_tests.export.saved_rows import saved_rows


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for key in ("made-up-00000", "made-up-00001", "made-up-00002"):
        made_up.commit(tmp_path / "store", made_up.truths(1, key))
    return tmp_path / "store" / made_up.RECIPE


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_export_writes_a_recipes_folder_and_says_what(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status, said, progress = run(capsys, "export", "original", recipe, "--to", out, "--max-length", "6")
    exported = verify_export(out)
    assert status == 0
    assert said.splitlines()[0].startswith(f"{out}: original of recipe made-up: {exported.n_documents} documents, ")
    assert "documents are left out: fewer than 2 tokens, such as made-up-00000/" in said
    assert (
        f"export: {exported.n_documents} of {exported.n_documents} documents, section 9 of 9 (made-up-00002)"
        in progress
    )


def test_export_takes_partitions_states_and_splits_and_speaks_json(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, _ = run(
        capsys,
        *("export", "safetensors", recipe, "--to", tmp_path / "out", "--partitions", "made-up-00001..made-up-00002"),
        *("--assets", "hidden_state_cache", "--states", "4", "after_norm", "--validation-share", "0.5", "--json"),
    )
    shown = json.loads(said)
    assert status == 0
    assert shown["states"] == [4, "after_norm"]
    assert [s["partition_key"] for s in shown["sources"]["hidden_state_cache"]] == ["made-up-00001", "made-up-00002"]
    assert set(shown["splits"]) == {"train", "validation"}
    assert "topk_cache" not in shown["sources"]


def test_export_packs_documents_into_rows(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("export", "distillkit", recipe, "--to", tmp_path / "out", "--pack-to", "32", "--json")
    status, said, _ = run(capsys, *command)
    assert status == 0
    assert json.loads(said)["options"] == {"pack_to": 32}
    assert {len(row["input_ids"]) for row in saved_rows(tmp_path / "out")} == {32}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--partitions", "made-up-00009"], "there is no partition 'made-up-00009'; there are 3"),
        (["--partitions", "made-up-00002..made-up-00000"], "reversed"),
        (["--states", "last"], "'last' is no state"),
        (["--states", "7"], "has no block 7"),
        (["--pack-to", "64"], "hf: a row of it is one document"),
        (["--variant", "topk_cache"], "not of the form CACHE=VARIANT"),
    ],
)
def test_export_refuses_what_is_not_there_in_one_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    status, said, errors = run(capsys, "export", "hf", recipe, "--to", tmp_path / "out", *arguments)
    assert (status != 0, said, len(errors.splitlines())) == (True, "", 1)
    assert words in errors
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_recipes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = run(capsys, "export", "hf", tmp_path, "--to", tmp_path / "out")
    assert status != 0
    assert "no recipe's folder in a store" in errors


def test_progress_says_the_speed_since_the_beginning() -> None:
    done = ExportProgress(
        n_sections=3, of_sections=4, n_documents=30, of_documents=40, n_bytes=6 << 20, partition_key="p"
    )
    assert progress_line(done, 2.0) == ("export: 30 of 40 documents, section 3 of 4 (p), 6,291,456 bytes, 3 MiB/s")
