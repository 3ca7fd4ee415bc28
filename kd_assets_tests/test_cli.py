"""`kd-assets` as people run it: what it prints, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kd_assets import cli
from kd_assets.errors import printable
from kd_assets.recipes.project import PROJECT_FOLDER
from kd_assets.store import ResultWriter, commit_file_result, part_stats, plan_output
from kd_assets_tests.store import examples
from kd_assets_tests.store.planned import commit_partition, write_plan

WORDS = ["the", " cat", " sat", " on", " a", " mat", ".", " and", " slept", " well", "!"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tokenizer of eleven words, which decodes to them joined as they are."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("a tokenizer")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="!"))
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("a store")
    for key in ("tiny-00000", "tiny-00001"):
        examples.commit_all(store, partition_key=key)
    return store


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def text_of(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids)


def test_inspect_tells_what_is_in_a_recipe(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "inspect", store / "tiny")
    assert (status, err) == (0, "")
    for line in (
        "tiny/topk_cache  variant ",
        "  partitions        2  (tiny-00000 … tiny-00001)",
        "  documents         8",
        "  tokens            30",
        "  parameters        k=4  max_length=6",
        "  check recomputed  passed in 2 of 2 partitions  max_abs_logprob_difference=0.0001",
        "  committed         2026-11-22T12:00:00+00:00 on here",
        "  document-0  [tiny-00000]  5 tokens",
        "    hidden_block_2: 5 × 3, first vector [",
        "    mean_embedding: 3, first vector [",
        "(token ids, no text: the manifest names no tokenizer; give --tokenizer)",
    ):
        assert line in out
    assert " a token)" in out


def test_inspect_shows_tokens_and_predictions_as_text(
    store: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, "inspect", store / "tiny" / "topk_cache", "--tokenizer", tokenizer, "--documents", "1")
    docs = examples.documents()
    ids = docs.input_ids[:5].tolist()
    rows = examples.table("topk_cache", docs.slice(0, 2)).to_pylist()[0]
    assert f"    {json.dumps(text_of(ids))}\n" in out
    likeliest = WORDS[rows["topk_ids"][1][0]]
    line = next(line for line in out.splitlines() if "(position 1)" in line)
    assert line.startswith(f'    after "{WORDS[ids[1]]}" (position 1) came "{WORDS[ids[2]]}" 0.')
    assert f'teacher: "{likeliest}" 0.' in line
    assert "no text" not in out
    assert "document-1" not in out


def test_inspect_json_has_the_same_and_is_json(
    store: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, "inspect", store, "--tokenizer", tokenizer, "--json")
    caches = {cache["asset"]: cache for cache in json.loads(out)["caches"]}
    assert sorted(caches) == sorted(examples.TABLES)
    topk = caches["topk_cache"]
    assert (topk["n_documents"], topk["n_tokens"], topk["params"]) == (8, 30, {"k": 4, "max_length": 6})
    assert topk["bytes_per_token"] == topk["n_bytes"] / 30
    assert topk["checks"]["recomputed"]["n_passed"] == 2
    document = topk["documents"][0]
    assert document["text"] == text_of(document["input_ids"])
    position = document["positions"][0]
    assert position["top_text"] == [WORDS[token_id] for token_id, _ in position["top"]]
    probabilities = [probability for _, probability in position["top"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) < 1
    states = caches["hidden_state_cache"]["documents"][0]["vectors"]["hidden_block_0"]
    assert states["shape"] == [5, 3]
    assert 0 < states["first_norm"] < 10


def test_inspect_says_what_is_planned_and_not_there_and_what_is_not_current_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("tiny-00000", "tiny-00001", "tiny-00002")
    for key in keys[:2]:
        commit_partition(tmp_path, key, f"content of {key}", assets=["topk_cache"])
    recipe_folder = tmp_path / "tiny"
    _, out, _ = run(capsys, "inspect", recipe_folder)
    assert "  partitions        2  (tiny-00000 … tiny-00001)" in out, "no plan says what should be there"
    write_plan(recipe_folder, {keys[0]: "changed", keys[2]: "new"})
    _, out, _ = run(capsys, "inspect", recipe_folder)
    assert "  partitions        2, 2 planned  (tiny-00000 … tiny-00001)" in out
    assert (
        "  not read          3  (tiny-00000: it was made of another shard than the one that is planned now: "
        "materialize it again; tiny-00001: the current plan has no such partition; "
        "tiny-00002: it has no committed result)"
    ) in out
    _, out, _ = run(capsys, "inspect", next(recipe_folder.glob("topk_cache/*/tiny-00000")))
    assert "not read" not in out, "of one partition it tells what is in it"
    folder, _ = examples.commit(
        tmp_path, "embedding_cache", checks={"recomputed": examples.RECOMPUTED | {"passed": False}}
    )
    next(recipe_folder.glob("topk_cache/*/tiny-00001/head.json")).unlink()
    _, out, _ = run(capsys, "inspect", tmp_path)
    assert f"{folder} is not current: check recomputed failed: the recomputation was recorded as failed\n" in out
    assert "1 are committed and no head names them, such as " in out
    status, _, err = run(capsys, "inspect", recipe_folder / "embedding_cache")
    assert status == 1
    assert "holds no committed results that are current (1 failed a check, such as " in err
    _, out, _ = run(capsys, "inspect", tmp_path, "--json")
    found = json.loads(out)
    assert list(found["failed"]) == [str(folder)]
    assert len(found["without_head"]) == 1
    (topk,) = (cache for cache in found["caches"] if cache["asset"] == "topk_cache")
    assert (topk["n_planned"], sorted(topk["left_out"])) == (2, ["tiny-00000", "tiny-00002"])


def test_inspect_finds_the_tokenizer_that_the_manifest_names(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit_with_provenance(tmp_path, {"tokenizer": str(tokenizer)})
    _, out, _ = run(capsys, "inspect", tmp_path)
    assert json.dumps(text_of(examples.documents().input_ids[:5].tolist())) in out


@pytest.mark.parametrize(
    ("provenance", "reason"),
    [
        ({}, "the manifest names no tokenizer; give --tokenizer"),
        ({"tokenizer": "/nowhere/at/all"}, "no tokenizer.json in /nowhere/at/all on this machine"),
    ],
)
def test_inspect_without_a_tokenizer_shows_ids_and_says_why(
    tmp_path: Path, provenance: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commit_with_provenance(tmp_path, provenance)
    status, out, _ = run(capsys, "inspect", tmp_path)
    assert status == 0
    assert out.count(reason) == 1
    assert " ".join(map(str, examples.documents().input_ids[:5].tolist())) in out


def test_inspect_with_a_tokenizer_that_is_broken_or_missing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    status, out, _ = run(capsys, "inspect", store / "tiny" / "topk_cache", "--tokenizer", tmp_path)
    assert status == 0
    assert "tokenizer.json is no tokenizer: " in out
    status, out, err = run(capsys, "inspect", store, "--tokenizer", tmp_path / "missing")
    assert (status, err) == (2, f"kd-assets: no tokenizer.json at {tmp_path / 'missing'}\n")


def test_inspect_without_the_tokenizers_library_shows_ids(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # what an import of a library that is not installed does
    status, out, _ = run(capsys, "inspect", store / "tiny" / "topk_cache", "--tokenizer", tmp_path)
    assert (status, out.count("the tokenizers library is not installed")) == (0, 1)


def test_inspect_counts_what_is_not_current_and_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache")
    identity = examples.output(tmp_path, "topk_cache").identity
    commit_identity(tmp_path, identity | {"input": "a newer shard"}, {})
    out = examples.output(tmp_path, "topk_cache", partition_key="tiny-00009")
    with examples.writer(tmp_path, out, partition_key="tiny-00009"):
        pass
    _, printed, _ = run(capsys, "inspect", tmp_path)
    assert "1 older results are on disk beside the current ones" in printed
    assert f"1 unfinished, such as {out.path}" in printed
    _, printed, _ = run(capsys, "inspect", folder)  # by its own name it is shown, current or not
    assert "  partitions        1  (tiny-00000)" in printed


def test_inspect_of_files_that_are_no_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = plan_output("student_smoke", {"input": "i"}, recipe_folder=tmp_path / "r", partition_key="all")
    commit_file_result(
        out, recipe="r", recipe_folder=tmp_path / "r", partition_key="all", files={"a": b"1"}, checks={}, provenance={}
    )
    status, printed, _ = run(capsys, "inspect", tmp_path)
    assert status == 0
    assert "r/student_smoke" in printed


def test_verify_of_a_sound_store_says_what_it_counted(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "verify", store)
    assert (status, err) == (0, "")
    n_bytes = sum(path.stat().st_size for path in store.rglob("part-*"))
    counted = f"8 results, 16 parts, 32 documents, 122 tokens, {n_bytes:,} bytes"
    assert out == f"{store}: {counted}: all hashes and counts are right\n"


def test_verify_exits_1_and_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache")
    part = folder / "part-00001.parquet"
    examples.flip_byte(part)
    status, out, _ = run(capsys, "verify", tmp_path)
    assert status == 1
    assert out.startswith(f"changed_part: {part} has sha256 ")
    status, out, _ = run(capsys, "verify", folder, "--json")
    report = json.loads(out)
    assert (status, report["ok"]) == (1, False)
    assert report["reports"][0]["problems"][0]["path"] == str(part)
    assert report["reports"][0]["problems"][0]["kind"] == "changed_part"


def test_verify_of_several_paths_fails_when_one_does(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = examples.commit(tmp_path, "embedding_cache")
    (folder / "part-00000.parquet").unlink()
    status, out, _ = run(capsys, "verify", store, tmp_path, "--json")
    assert status == 1
    assert [report["ok"] for report in json.loads(out)["reports"]] == [True, False]


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_path_that_does_not_exist_ends_with_2_and_one_line(
    command: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [store, tmp_path / "missing"] if command == "verify" else [tmp_path / "missing"]
    status, out, err = run(capsys, command, *paths)
    assert (status, out, err) == (2, "", f"kd-assets: {tmp_path / 'missing'} does not exist\n")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_folder_that_holds_nothing_ends_with_1_and_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, command, tmp_path)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"kd-assets: {tmp_path} holds no ")


def test_damaged_result_is_an_error_of_one_line_for_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache")
    (folder / "part-00000.parquet").unlink()
    status, _, err = run(capsys, "inspect", tmp_path)
    assert (status, err.count("\n")) == (1, 1)
    assert f"{folder / 'part-00000.parquet'}" in err


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["verify"], ["inspect", ".", "--documents", "-1"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: kd-assets" in capsys.readouterr().err


def test_reader_of_a_pipe_that_goes_away_is_no_traceback(store: Path) -> None:
    command = f'"{sys.executable}" -m kd_assets.cli inspect "$0" --documents 4; echo "status $?" >&2'
    done = subprocess.run(
        ["bash", "-c", f"({command}) | true", str(store)], capture_output=True, text=True, timeout=300
    )
    assert done.stderr == f"status {cli.EXIT_BROKEN_PIPE}\n"


def test_command_line_starts_without_torch_dagster_and_tokenizers(store: Path) -> None:
    script = """
import sys
from kd_assets import cli
assert cli.main(["verify", sys.argv[1]]) == 0
heavy = {"torch", "dagster", "transformers", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script, str(store)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def commit_with_provenance(store: Path, provenance: dict[str, Any]) -> None:
    commit_identity(store, examples.output(store, "topk_cache").identity, provenance)


def commit_identity(store: Path, identity: dict[str, Any], provenance: dict[str, Any]) -> None:
    recipe_folder = store / examples.RECIPE
    out = plan_output("topk_cache", identity, recipe_folder=recipe_folder, partition_key=examples.PARTITION)
    docs = examples.documents().slice(0, 2)
    rows = examples.table("topk_cache", docs)
    with ResultWriter(
        out, recipe=examples.RECIPE, recipe_folder=recipe_folder, partition_key=examples.PARTITION
    ) as result:
        result.write_part(0, rows, n_tokens=docs.n_tokens, stats=part_stats("topk_cache", rows))
        result.commit(parts=1, checks={}, provenance=provenance)


# ---------------------------------------------------------------------------------------------- preview and doctor

WITHOUT_DAGSTER = (
    "import sys; sys.modules['dagster'] = None; from kd_assets.cli import main; sys.exit(main(sys.argv[1:]))"
)


def run_without_dagster(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_DAGSTER, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [["preview", "demo"], ["doctor"]])
def test_what_needs_dagster_says_so_where_it_is_not_installed(command: list[str]) -> None:
    ended = run_without_dagster(*command)
    assert ended.returncode == 2
    assert ended.stderr.startswith("kd-assets: this command needs ")
    assert "pip install 'kd-assets[control]'" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_the_other_commands_need_no_dagster(store: Path) -> None:
    ended = run_without_dagster("verify", store)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("dagster")
    for name in ("KD_SCHEDULER", "KD_SLURM_PROFILE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KD_HOME", str(tmp_path / "a home"))
    return tmp_path / "a home"


def test_preview_and_doctor_know_the_recipes_by_name(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("preview", "doctor"):
        status, out, err = run(capsys, command, "dmeo")
        assert (status, out) == (2, "")
        assert err == f"kd-assets: there is no recipe 'dmeo'; there are demo, llama31_70b in {PROJECT_FOLDER}\n"


def test_preview_without_a_plan_says_what_to_do(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "preview", "demo", "--all")
    assert status == 2
    assert err.startswith("kd-assets: no shard plan at ")
    assert not home.exists(), "looking writes nothing"


def test_preview_takes_one_selection(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["preview", "demo", "--all", "--partitions", "a..b"])
    assert ended.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_doctor_ends_with_1_when_something_fails(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "doctor", "demo", "--no-job")
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert lines[:2] == ["ok   scheduler: local (KD_SCHEDULER)", f"ok   KD_HOME: {home} can be written"]
    documents, chats, weights = (line for line in lines if line.startswith("FAIL"))
    assert documents.startswith(f"FAIL sources: documents: source file {home}/inputs/demo/corpus/documents.jsonl")
    assert documents.endswith("→ materialize demo/corpus")
    assert chats.endswith("→ materialize demo/corpus")
    assert weights.startswith(f"FAIL weights: no model folder at {home}/inputs/demo/teacher")
    assert weights.endswith("→ materialize demo/teacher")


HOSTILE = "id\x1b[2J\x9b31m\u202ereversed\u2066\nverify: all is well\udcff"


def test_what_is_printed_has_escapes_in_the_place_of_control_characters() -> None:
    assert printable(HOSTILE) == r"id\x1b[2J\x9b31m\u202ereversed\u2066\nverify: all is well\udcff"
    assert printable("naïve 日本語 “quotes” … ×") == "naïve 日本語 “quotes” … ×"


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_an_id_of_a_document_cannot_command_the_terminal(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = HOSTILE.removesuffix("\udcff")  # no file can hold a lone surrogate
    ids = [hostile, *(f"document-{i}" for i in range(1, 4))]
    documents = dataclasses.replace(examples.documents(), document_ids=ids)
    examples.commit(tmp_path, "topk_cache", docs=documents)
    status, out, err = run(capsys, "inspect", tmp_path, *arguments)
    assert (status, err) == (0, "")
    assert "reversed" in out
    assert all(character.isprintable() for character in out.replace("\n", ""))
    assert not any(line.startswith("verify:") for line in out.splitlines())


def test_an_error_about_a_hostile_path_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "verify", tmp_path / HOSTILE.replace("\n", ""))
    assert status != 0
    assert err.rstrip("\n").isprintable()
