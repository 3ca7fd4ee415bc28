"""A recipe whose codec was changed: its results are made of those that are there, and the teacher is not loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from kd_assets import cli, components
from kd_assets.dagster_internals import DATA_VERSION_TAG, input_data_version_tag
from kd_assets.diagnose.preview import preview
from kd_assets.errors import EXIT_BAD_INPUT, EXIT_FAILED
from kd_assets.store import Manifest, choose, read_head, read_manifest, variants_of, verify
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets_tests.orchestration.deployment import (
    CACHES,
    DOCUMENTS_PER_SHARD,
    SHARDS,
    Deployment,
    failure_text,
    is_reused,
)
from kd_assets_tests.store.examples import flip_byte

ALL = (SHARDS[0], SHARDS[-1])
CODED = ("topk_cache", "hidden_state_cache")


def caches(topk: str = "plain", states: str = "raw", **of_topk: Any) -> dict[str, Any]:
    return {
        "topk": {"k": 4, "max_length": 64, "draws": 3, "codec": topk, **of_topk},
        "hidden_states": {"blocks": [1], "final": "after_norm", "max_length": 32, "codec": states},
        "embeddings": {"max_length": 64},
    }


def results_of(deployment: Deployment, asset: str, codec: str) -> dict[str, tuple[Path, Manifest]]:
    """Partition → its current result with this codec."""
    found = {}
    for partition in sorted(deployment.platform.recipe_folder("tiny").glob(f"{asset}/*/*")):
        head = read_head(partition)
        if head is not None and (manifest := read_manifest(head)).params.get("codec", "plain") == codec:
            found[partition.name] = (head, manifest)
    return found


def n_jobs(deployment: Deployment, kind: str) -> int:
    return len(list((deployment.home / "jobs" / "tiny").glob(f"{kind}-*/*/job.json")))


@dataclass(frozen=True, kw_only=True)
class Changed:
    """A recipe that was materialized, and then asked for other codecs."""

    before: Deployment
    after: Deployment
    shown: Any
    """What `kd-assets preview` said before the run."""
    result: dg.ExecuteInProcessResult


@pytest.fixture(scope="module")
def make_deployment(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path
) -> Iterator[Callable[..., Deployment]]:
    """Makes deployments in homes by name, all on one Dagster instance."""
    folder = tmp_path_factory.mktemp("recoded")
    (folder / "instance").mkdir()
    with dg.DagsterInstance.local_temp(str(folder / "instance")) as instance:

        def make(home: str, **changes: Any) -> Deployment:
            (folder / home).mkdir(exist_ok=True)
            return Deployment(folder / home, tiny_teacher, instance, **{"student": None, **changes})

        yield make


@pytest.fixture(scope="module")
def changed(make_deployment: Callable[..., Deployment]) -> Changed:
    before = make_deployment("home", caches=caches())
    before.plan()
    made = before.run("shards_manifest", *CACHES, partition_range=ALL)
    assert made.success, failure_text(made)
    after = make_deployment("home", caches=caches("compact", "int8_32"))
    shown = preview(after.recipe, after.platform, partitions=None, assets=None)
    result = after.run("shards_manifest", *CACHES, partition_range=ALL)
    assert result.success, failure_text(result)
    return Changed(before=before, after=after, shown=shown, result=result)


@pytest.fixture(scope="module")
def by_teacher(make_deployment: Callable[..., Deployment]) -> Deployment:
    """The same recipe in a store where nothing can be recoded."""
    deployment = make_deployment("elsewhere", caches=caches("compact", "int8_32"))
    deployment.plan()
    made = deployment.run("shards_manifest", *CACHES, partition_range=ALL)
    assert made.success, failure_text(made)
    return deployment


def test_a_changed_codec_costs_no_pass_of_the_teacher(changed: Changed) -> None:
    assert (n_jobs(changed.after, "teacher"), n_jobs(changed.after, "recode")) == (1, 1)
    assert changed.after.n_teacher_loads() == 1
    assert changed.after.recipe.tasks_of("recode") == changed.after.recipe.tasks_of("shards")
    recorded = changed.after.materializations(changed.result.run_id)
    assert set(recorded) == {(asset, key) for asset in ("shards_manifest", *CACHES) for key in SHARDS}
    assert all(len(found) == 1 for found in recorded.values())
    evaluations = changed.after.checks(changed.result.run_id)
    names = {e.check_name for e in evaluations if e.asset_key.path[-1] in CODED}
    assert names == {"complete", "schema", "finite", "recomputed", "codec", "rebuilt", "recoded"}
    rebuilt = [(e.asset_key.path[-1], e.partition) for e in evaluations if e.check_name == "rebuilt"]
    assert sorted(rebuilt) == sorted((asset, key) for asset in CODED for key in SHARDS)
    assert all(e.passed for e in evaluations), [e.description for e in evaluations if not e.passed]
    report = verify(changed.after.platform.recipe_folder("tiny"))
    assert (report.problems, report.notes) == ((), ())


def test_the_bytes_and_names_are_those_that_the_teacher_gives(changed: Changed, by_teacher: Deployment) -> None:
    for asset, codec in zip(CODED, ("compact", "int8_32"), strict=True):
        found, expected = results_of(changed.after, asset, codec), results_of(by_teacher, asset, codec)
        assert set(found) == set(expected) == set(SHARDS)
        for key in SHARDS:
            (folder, made), (of_teacher, manifest) = found[key], expected[key]
            assert (made.fingerprint, made.data_version) == (manifest.fingerprint, manifest.data_version)
            assert (made.parts, made.stats) == (manifest.parts, manifest.stats)
            index = [(path / "documents.index").read_bytes() for path in (folder, of_teacher)]
            assert index[0] == index[1]
            assert "recoded_from" not in manifest.provenance


def test_readers_follow_the_recipe_to_its_new_codec_and_the_old_one_stays(changed: Changed) -> None:
    folder = changed.after.platform.recipe_folder("tiny")
    assert len(variants_of(folder / "topk_cache")) == 2
    manifests = choose(folder, "topk_cache").manifests
    assert [m.params.get("codec") for m in manifests] == ["compact"] * len(SHARDS)
    assert len(TeacherCacheDataset.from_recipe(folder)) == len(SHARDS) * DOCUMENTS_PER_SHARD


def test_dagster_shows_what_a_result_was_recoded_from(changed: Changed) -> None:
    key = SHARDS[1]
    for asset, codec in zip(CODED, ("plain", "raw"), strict=True):
        (materialization,) = changed.after.materializations(changed.result.run_id, asset)[asset, key]
        source, before = results_of(changed.before, asset, "plain")[key]
        metadata, tags = materialization.metadata, materialization.tags or {}
        assert str(metadata["recoded_from"].value).startswith(f"{codec}, {source}")
        provenance: Any = metadata["provenance"].value
        assert provenance["recoded_from"]["data_version"] == before.data_version
        assert provenance["teacher"] == changed.after.recipe.teacher.model
        assert "/recode-" in str(metadata["made_by"].value), "the log is that of the job that recoded it"
        assert not is_reused(materialization)
        assert tags[input_data_version_tag(changed.after.recipe.key("shards_manifest"))] == before.identity["input"]
        assert tags[DATA_VERSION_TAG] != before.data_version
        folder, made = results_of(changed.after, asset, "compact" if asset == "topk_cache" else "int8_32")[key]
        own = made.provenance["recoded_by"]
        assert own["dagster_run_id"] == changed.result.run_id != made.provenance["dagster_run_id"]
        assert {"host", "kd_assets", "libraries", "job_key", "submission_key"} <= set(own)
        assert folder.parent.parent != source.parent.parent
        assert read_head(source.parent) == source


def test_a_preview_shows_the_job_and_that_the_teacher_has_none(changed: Changed) -> None:
    assert [(job.spec.kind, job.n_partitions) for job in changed.shown.jobs] == [("recode", 3)]
    assert any("3 of topk_cache from plain, 3 of hidden_state_cache from raw" in note for note in changed.shown.notes)
    again = preview(changed.after.recipe, changed.after.platform, partitions=None, assets=None)
    assert not again.jobs


def test_the_next_run_reuses_what_was_recoded(changed: Changed) -> None:
    again = changed.after.run(*CACHES, partition_range=ALL)
    assert again.success, failure_text(again)
    recorded = changed.after.materializations(again.run_id)
    assert {is_reused(m) for found in recorded.values() for m in found} == {True}
    assert n_jobs(changed.after, "recode") == 1


def test_recode_false_asks_the_teacher(changed: Changed, make_deployment: Callable[..., Deployment]) -> None:
    asked = make_deployment("home", caches=caches("plain", "split"), recode=False)
    shown = preview(asked.recipe, asked.platform, partitions=None, assets=None)
    assert [(job.spec.kind, job.n_partitions) for job in shown.jobs] == [("teacher", 3)]
    assert asked.recipe.code_version("topk_cache") == changed.before.recipe.code_version("topk_cache")


def test_what_was_rounded_is_the_teachers_to_make_and_that_is_said(
    by_teacher: Deployment, make_deployment: Callable[..., Deployment]
) -> None:
    asked = make_deployment("elsewhere", caches=caches("plain", "int8_32"))
    shown = preview(asked.recipe, asked.platform, partitions=None, assets=None)
    assert [(job.spec.kind, job.n_partitions) for job in shown.jobs] == [("teacher", 3)]
    assert any("rounded already by compact" in note for note in shown.notes)


def test_states_that_were_recoded_to_raw_have_that_check(
    changed: Changed, make_deployment: Callable[..., Deployment]
) -> None:
    """A recipe without a codec has it, too; of a plain top-k, which nothing can be recoded to, there is none."""
    split = make_deployment("from split", caches=caches("plain", "split"))
    split.plan()
    assert split.run("shards_manifest", *CACHES, partition=SHARDS[0]).success
    raw = make_deployment("from split", caches=caches("plain", "raw"))
    result = raw.run("shards_manifest", *CACHES, partition=SHARDS[0])
    assert result.success, failure_text(result)
    recoded = [e for e in raw.checks(result.run_id) if e.check_name == "recoded"]
    assert [(e.asset_key.path[-1], e.passed) for e in recoded] == [("hidden_state_cache", True)]


def test_a_damaged_source_fails_its_partition_and_asks_no_teacher(
    changed: Changed, make_deployment: Callable[..., Deployment]
) -> None:
    asked = make_deployment("home", caches=caches("compact", "split"))
    folder, _ = results_of(changed.before, "hidden_state_cache", "plain")[SHARDS[2]]
    flip_byte(folder / "part-00000.arrow")
    try:
        failed = asked.run(*CACHES, partition_range=(SHARDS[1], SHARDS[2]))
    finally:
        flip_byte(folder / "part-00000.arrow")
    assert not failed.success
    assert "damaged source" in failure_text(failed)
    assert str(folder) in failure_text(failed)
    recorded = asked.materializations(failed.run_id, "hidden_state_cache")
    assert set(recorded) == {("hidden_state_cache", SHARDS[1])}
    assert asked.n_teacher_loads() == 1
    mended = asked.run("hidden_state_cache", partition=SHARDS[2])
    assert mended.success, failure_text(mended)
    assert asked.n_teacher_loads() == 1


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(
    changed: Changed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`kd-assets recode tiny …` on the home of the recipe before it was changed → status, stdout, stderr."""
    monkeypatch.setenv("KD_HOME", str(changed.before.home))
    monkeypatch.setattr(components, "load_recipe", lambda name: changed.before.recipe)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main(["recode", "tiny", *arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_the_command_does_the_same_without_dagster(
    command: Callable[..., tuple[int, str, str]], changed: Changed
) -> None:
    asked = ("--codec", "hidden_states=fp8", "--partitions", SHARDS[1])
    status, said, _ = command(*asked, "--dry-run", "--json")
    (planned,) = json.loads(said)["results"]
    assert (status, planned["state"], planned["from_codec"], planned["codec"]) == (0, "to be made", "raw", "fp8")
    assert not Path(planned["folder"]).exists()
    status, said, _ = command(*asked, "--dry-run")
    assert f"hidden_state_cache of {SHARDS[1]} as fp8: to be made from raw" in said
    assert "Nothing was written" in said

    status, said, progress = command(*asked)
    assert status == 0
    assert f"hidden_state_cache of {SHARDS[1]} as fp8: made from raw" in said
    assert "part 1 of 1" in progress
    ((key, (folder, made)),) = results_of(changed.before, "hidden_state_cache", "fp8").items()
    assert (key, str(folder)) == (SHARDS[1], planned["folder"])
    assert made.n_bytes == pytest.approx(planned["bytes"], rel=0.5)
    assert made.provenance["recoded_from"]["codec"] == "raw"
    assert "dagster_run_id" not in made.provenance["recoded_by"]

    assert "Readers that name none get " in said
    for words in (f'variant="{made.variant}"', f"--variant {made.variant}", f"hidden_state_cache={made.variant}"):
        assert words in said
    assert f"gc {changed.before.platform.recipe_folder('tiny')} --dry-run" in said

    status, said, _ = command(*asked)
    assert status == 0
    assert "is there already, nothing to do" in said
    assert "0 results recoded" in said


def test_a_result_that_is_there_and_failed_its_check_is_an_error_and_nothing_is_done(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_assets.commands.recode.failed_check", lambda manifest: "check recoded failed: a difference")
    asked = ("--codec", "hidden_states=int8_32", "--partitions", SHARDS[1])
    for more in ((), ("--dry-run",)):
        status, said, error = command(*asked, *more)
        assert status == EXIT_FAILED
        assert f"hidden_state_cache of {SHARDS[1]} is there already, and never current: check recoded failed" in error
        assert "kd-assets quarantine" in error
        assert "nothing to do" not in said


def test_the_command_leaves_the_logsumexp_out(command: Callable[..., tuple[int, str, str]]) -> None:
    status, said, _ = command("--codec", "topk=compact", "--without-logsumexp", "--json")
    assert status == 0
    assert {(r["state"], r["codec"], r["from_codec"]) for r in json.loads(said)["results"]} == {
        ("made", "compact without logsumexp", "plain")
    }


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), EXIT_BAD_INPUT, "codes no cache: say which codec, such as --codec topk=compact"),
        (("--codec", "topk=gzip"), EXIT_BAD_INPUT, "topk have no codec 'gzip'; there are plain, compact"),
        (("--codec", "hidden_states=fp4"), EXIT_BAD_INPUT, "there are raw, split, fp8, int8_32, int8_128"),
        (("--codec", "embeddings=fp8"), EXIT_BAD_INPUT, "is not of the form CACHE=CODEC with a cache of topk"),
        (("--codec", "topk"), EXIT_BAD_INPUT, "is not of the form CACHE=CODEC"),
        (("--without-logsumexp",), EXIT_BAD_INPUT, "is of a coded top-k cache"),
        (("--codec", "topk=compact", "--partitions", "x"), EXIT_BAD_INPUT, "there is no partition 'x'"),
        (("--codec", "hidden_states=int8_128"), EXIT_BAD_INPUT, "groups of 128 do not divide"),
    ],
)
def test_what_the_command_cannot_do_is_said(
    command: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], status: int, words: str
) -> None:
    found, _, error = command(*arguments)
    assert (found, words in error) == (status, True), error


def test_the_command_names_what_has_no_source_and_makes_the_others(
    command: Callable[..., tuple[int, str, str]], changed: Changed, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = results_of(changed.before, "hidden_state_cache", "plain")[SHARDS[0]]
    aside = folder.with_name("aside")
    folder.rename(aside)
    try:
        status, said, error = command("--codec", "hidden_states=split")
    finally:
        aside.rename(folder)
    assert status == EXIT_BAD_INPUT
    assert f"hidden_state_cache of {SHARDS[0]} cannot be recoded: no committed result of raw is there" in error
    assert "is of int8_32, and its numbers are rounded already" in error
    assert said.count("is there already") + said.count("made from raw") == 2

    monkeypatch.setattr("kd_assets.commands.recode.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1}))
    status, _, error = command("--codec", "hidden_states=int8_32", "--partitions", SHARDS[0])
    assert status == 0, error  # it is there, and takes no room
    status, _, error = command("--codec", "hidden_states=split", "--partitions", SHARDS[0])
    assert status == EXIT_FAILED
    assert "bytes are to be made, and 1 are free" in error
