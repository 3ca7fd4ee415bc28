"""`kd-assets plan`: what a plan would cost, from facts where there are some, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_assets import cli
from kd_assets.components import load_recipe
from kd_assets.diagnose.bill import bill_of, fits, text_lines
from kd_assets.errors import RecipeError
from kd_assets.model_files.size import TeacherShape, teacher_shape
from kd_assets.orchestration.billing.bill import Bill
from kd_assets.orchestration.billing.space import Amount, bytes_at_most, in_windows
from kd_assets.orchestration.billing.words import rows, why_it_does_not_fit
from kd_assets.orchestration.platform import Platform
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment, documents, failure_text

USAGE = namedtuple("USAGE", "total used free")
SIZE = {"parameters": 70.6e9, "hidden_size": 8192, "n_blocks": 80, "vocabulary": 128256}
ABSENT = {"model_id": "nobody/absent", "dtype": "bfloat16"}


def bill(deployment: Deployment) -> Bill:
    return bill_of(deployment.recipe, deployment.platform)


def text(bill: Bill) -> str:
    return "\n".join(text_lines(bill))


def full_disk(monkeypatch: pytest.MonkeyPatch, free: int = 1000) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(10**9, 10**9 - free, free))


# ---------------------------------------------------------------- what it takes


def test_a_bill_writes_nothing_and_leaves_the_current_plan(deployment: Deployment) -> None:
    deployment.write(documents(20))
    before = {p: p.read_bytes() for p in deployment.home.rglob("*") if p.is_file() and "digests" not in p.name}
    found = bill(deployment)
    after = {p: p.read_bytes() for p in deployment.home.rglob("*") if p.is_file() and "digests" not in p.name}
    assert after == before
    assert (found.n_shards, found.n_documents) == (5, 20)


def test_a_source_is_billed_with_its_rate_licence_copies_and_what_is_left_over(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(drop_duplicates=True, max_documents=6)
    deployment.write([*documents(8), {**documents(1)[0], "id": "d0"}])
    (line,) = bill(deployment).sources
    assert (line.name, line.n_documents, line.licence) == ("corpus", 6, "CC0-1.0")
    assert line.is_measured
    assert line.bytes_per_token != 4.0
    assert line.n_duplicates + line.n_left == 3
    assert "left over" in text(bill(deployment))


def test_sizes_are_upper_bounds_until_something_was_made_and_as_measured_then(deployment: Deployment) -> None:
    before = bill(deployment)
    assert {line.rests_on for line in before.caches} == {"at most, before compression"}
    assert deployment.run("shards_manifest", *CACHES, partition=SHARDS[0]).success
    after = bill(deployment)
    for line in after.caches:
        assert "as the results that are there" in line.rests_on
        assert line.n_there == 1
        assert line.bytes_there > 0
    assert after.teacher.hours_rest_on.startswith(f"measured on {SHARDS[0]}")
    assert after.teacher.device == "CPU"
    assert after.bytes_left < sum(line.n_bytes or 0 for line in after.caches)


def test_results_of_other_parameters_measure_nothing(deployment: Deployment, deploy: Callable[..., Deployment]) -> None:
    assert deployment.run("shards_manifest", "topk_cache", partition=SHARDS[0]).success
    other = deploy(caches={"topk": {"k": 2, "max_length": 64}})
    topk = {line.asset: line for line in bill(other).caches}["topk_cache"]
    assert (topk.n_there, topk.rests_on) == (0, "at most, before compression")


def test_documents_are_cut_at_what_each_cache_keeps(deploy: Callable[..., Deployment]) -> None:
    recipe = deploy().recipe
    amounts = [Amount(n_documents=2, n_tokens=40), Amount(n_documents=1, n_tokens=1000)]
    at_most = bytes_at_most(recipe, amounts, 32)
    assert at_most["hidden_state_cache"] == (16 + 8) * (5 + 2 * 32) + 3 * 100
    assert at_most["topk_cache"] == (40 + 64) * (5 + 4 * 6 + 8) + 3 * 100
    assert bytes_at_most(recipe, amounts, None)["embedding_cache"] is None


@pytest.mark.parametrize(("logsumexp", "n_bytes"), [(True, 4 * 4 + 1 + 2 + 2), (False, 4 * 4 + 1 + 2)])
def test_a_compact_cache_is_billed_by_its_bytes(
    deploy: Callable[..., Deployment], logsumexp: bool, n_bytes: int
) -> None:
    topk = {"k": 4, "max_length": 64, "codec": "compact", "logsumexp": logsumexp}
    at_most = bytes_at_most(deploy(caches={"topk": topk}).recipe, [Amount(n_documents=1, n_tokens=40)], 32)
    assert at_most["topk_cache"] == 40 * (5 + n_bytes) + 100


@pytest.mark.parametrize(("codec", "bytes_a_state"), [("raw", 64), ("split", 64), ("fp8", 32 + 4), ("int8_32", 32 + 2)])
def test_coded_states_are_billed_as_what_they_take(
    deploy: Callable[..., Deployment], codec: str, bytes_a_state: int
) -> None:
    deployment = deploy(caches={"hidden_states": {"blocks": [0, 1], "max_length": 8, "codec": codec}})
    at_most = bytes_at_most(deployment.recipe, [Amount(n_documents=1, n_tokens=8)], 32)
    assert at_most["hidden_state_cache"] == 8 * (5 + 2 * bytes_a_state) + 100


def test_a_codec_that_the_teachers_states_do_not_suit_is_refused_with_the_plan(
    deploy: Callable[..., Deployment],
) -> None:
    caches = {"hidden_states": {"blocks": [0], "max_length": 8, "codec": "int8_128"}}
    deployment = deploy(caches=caches)
    with pytest.raises(RecipeError, match="int8_128, whose groups of 128 do not divide the teacher's hidden size 32"):
        bill(deployment)
    run = deployment.run("shard_plan")
    assert not run.success
    assert "do not divide the teacher's hidden size 32" in failure_text(run)
    elsewhere = deploy(caches=caches, teacher={**ABSENT, "size": {**SIZE, "hidden_size": 8000}})
    with pytest.raises(RecipeError, match="hidden size 8000"):
        bill(elsewhere)


def test_each_final_state_is_billed_as_a_block_and_runs_all_of_them(deploy: Callable[..., Deployment]) -> None:
    hidden = {"blocks": [], "max_length": 8, "final": "both"}
    deployment = deploy(caches={"hidden_states": hidden})
    at_most = bytes_at_most(deployment.recipe, [Amount(n_documents=1, n_tokens=8)], 32)
    assert at_most["hidden_state_cache"] == 8 * (5 + 2 * 2 * 32) + 100
    assert bill(deployment).teacher.flops_rest_on.startswith("all 3 blocks, without the head")


def test_documents_that_are_split_are_billed_as_their_windows(deploy: Callable[..., Deployment]) -> None:
    recipe = deploy(long_documents="split", overlap=32).recipe
    assert in_windows(recipe, Amount(n_documents=1, n_tokens=640)) == Amount(n_documents=21, n_tokens=1280)


# ---------------------------------------------------------------- the teacher


def test_flops_are_two_a_parameter_and_token_for_what_runs() -> None:
    shape = TeacherShape(parameters=1000, hidden_size=4, n_blocks=8, vocabulary=25)
    assert shape.flops_a_token(n_blocks=8, with_head=True) == 2 * (800 + 100)
    assert shape.flops_a_token(n_blocks=2, with_head=False) == 2 * 200
    tied = TeacherShape(parameters=1000, hidden_size=4, n_blocks=8, vocabulary=25, tied_embeddings=True)
    assert tied.flops_a_token(n_blocks=8, with_head=False) == 2 * 900


def test_a_teachers_size_is_read_from_its_files(tiny_teacher: Path) -> None:
    shape = teacher_shape(tiny_teacher)
    assert (shape.hidden_size, shape.n_blocks) == (32, 3)
    assert shape.parameters > 2 * shape.vocabulary * 32


def test_where_only_hidden_states_are_wanted_the_blocks_above_cost_nothing(deploy: Callable[..., Deployment]) -> None:
    teacher = bill(deploy(caches={"hidden_states": {"blocks": [0], "max_length": 8}})).teacher
    assert teacher.flops_rest_on.startswith("the first 1 of 3 blocks, without the head")


def test_a_teacher_that_is_not_here_is_billed_by_the_recipes_size(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(teacher={**ABSENT, "size": SIZE})
    (source,), teacher = bill(deployment).sources, bill(deployment).teacher
    assert not source.is_measured
    assert teacher.flops is not None
    assert teacher.flops / teacher.n_tokens == pytest.approx(2 * (70.6e9 - 128256 * 8192))
    assert teacher.hours_rest_on == "at 40% of an H100's 989 TFLOP/s in bfloat16"
    assert teacher.joules == pytest.approx((teacher.device_hours or 0) * 3600 * 700)


def test_a_teacher_of_which_nothing_is_known_leaves_the_rest_billed(deploy: Callable[..., Deployment]) -> None:
    found = bill(deploy(teacher=ABSENT))
    sizes = {line.asset: line.n_bytes for line in found.caches}
    assert sizes["hidden_state_cache"] is None
    assert sizes["embedding_cache"] is None
    assert sizes["topk_cache"]
    assert (found.teacher.flops, found.teacher.device_hours) == (None, None)
    assert "teacher.size of the recipe" in text(found)
    assert fits(found)


def test_the_size_of_the_teacher_and_what_short_space_does_are_in_no_code_version(
    deploy: Callable[..., Deployment],
) -> None:
    one, other = deploy(teacher=ABSENT), deploy(teacher={**ABSENT, "size": SIZE}, when_space_is_short="warn")
    for asset in one.everything:
        assert one.recipe.code_version(asset) == other.recipe.code_version(asset)


def test_caches_of_a_teacher_that_is_not_here_are_not_said_to_fit(deploy: Callable[..., Deployment]) -> None:
    found = bill(deploy(teacher=ABSENT))
    assert None in [line.n_bytes for line in found.caches]
    assert text(found).endswith("The caches whose size is known fit.")


def test_a_task_whose_share_takes_longer_than_its_time_is_told(deploy: Callable[..., Deployment]) -> None:
    jobs = {"teacher": {"n_tasks": 1, "slurm": {"time": "00:01:00"}}}
    deployment = deploy(teacher={**ABSENT, "size": {**SIZE, "parameters": 1e18}}, jobs=jobs)
    tasks = {line.kind: line for line in bill(deployment).tasks}
    assert "jobs.teacher.n_tasks" in tasks["teacher"].warning
    assert tasks["shards"].warning == ""


# ---------------------------------------------------------------- space


def test_caches_that_do_not_fit_are_the_last_line_with_what_to_change(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert text(bill(deployment)).endswith("The caches fit.")
    full_disk(monkeypatch)
    last = list(text_lines(bill(deployment)))[-1]
    assert last.startswith("the caches do not fit")
    assert "1.0 KB are free" in last
    assert "move KD_HOME to a larger disk" in last


def test_a_plan_whose_caches_do_not_fit_never_becomes_current(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = deployment.platform.recipe_folder("tiny") / "shard_plan" / "plan.json"
    before = plan.read_bytes()
    deployment.write(documents(20))
    full_disk(monkeypatch)
    result = deployment.run("shard_plan")
    assert not result.success
    assert "the caches do not fit" in failure_text(result)
    assert plan.read_bytes() == before


def test_a_recipe_may_have_short_space_warned_of_only(
    deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(when_space_is_short="warn")
    full_disk(monkeypatch)
    assert deployment.run("shard_plan").success


# ---------------------------------------------------------------- where it is shown


def test_the_plans_metadata_has_the_bill_and_what_became_of_each_source(deployment: Deployment) -> None:
    result = deployment.run("shard_plan")
    (materialization,) = result.asset_materializations_for_node("tiny__shard_plan")
    metadata = materialization.metadata
    assert metadata["documents"].value == 12
    assert isinstance(metadata["tokens"].value, int)
    assert isinstance(metadata["sources"], dg.TableMetadataValue)
    (source,) = metadata["sources"].records
    assert source.data["licence"] == "CC0-1.0"
    assert source.data["copies left out"] == 0
    assert isinstance(metadata["bill"], dg.TableMetadataValue)
    assert [r.data["what"] for r in metadata["bill"].records] == [row[0] for row in rows(bill(deployment))]


def test_a_bill_that_cannot_be_made_stops_no_plan(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    (deployment.platform.recipe_folder("tiny") / "topk_cache").write_text("a file where a folder belongs")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (_ for _ in ()).throw(OSError("no such device")))
    assert deployment.run("shard_plan").success


def test_a_billion_tokens_of_parquet_are_billed_for_llama31_70b_from_footers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of 64 MB of text, and 63 links to a copy whose pages are overwritten: no row of it can be read. (Of the
    first file a few rows are tried, whether documents can be made of them.)"""
    folder = tmp_path / "texts"
    folder.mkdir()
    first = folder / "part-00.parquet"
    body = "All the words that a teacher of seventy billion parameters is going to read. " * 13
    table = pa.table({"text": [body] * 64_000})
    pq.write_table(table, first, row_group_size=1000, compression="zstd", use_dictionary=False)
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(first.read_bytes())
    with damaged.open("r+b") as f:
        f.seek(4)
        f.write(b"\0" * 64)
    for i in range(1, 64):
        (folder / f"part-{i:02d}.parquet").hardlink_to(damaged)
    monkeypatch.setenv("KD_LLAMA31_70B_SHARDS", str(folder))
    monkeypatch.setenv("KD_HOME", str(tmp_path / "home"))
    full_disk(monkeypatch, free=10**18)
    assert cli.main(["plan", "llama31_70b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_documents"] == 64 * 64_000
    assert found["n_tokens"] > 10**9
    assert found["n_shards"] == 4000
    teacher = found["teacher"]
    assert teacher["flops"] == pytest.approx(2 * 69.55e9 * teacher["n_tokens"], rel=0.01)
    assert teacher["device_hours"] == pytest.approx(teacher["flops"] / 989e12 / 0.4 / 3600)
    assert "accepted: whoever set KD_LLAMA31_70B_SHARDS" in found["sources"][0]["licence"]
    hidden = next(line for line in found["caches"] if line["asset"] == "hidden_state_cache")
    assert hidden["n_bytes"] > 16_000 * 10**9
    full_disk(monkeypatch)
    assert cli.main(["plan", "llama31_70b"]) == 1
    assert "the caches do not fit" in capsys.readouterr().out.splitlines()[-1]


def test_a_recipe_whose_variable_is_not_set_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KD_LLAMA31_70B_SHARDS", raising=False)
    with pytest.raises(Exception, match="KD_LLAMA31_70B_SHARDS"):
        bill_of(load_recipe("llama31_70b"), Platform(home=str(tmp_path)))


def test_what_fits_has_no_reason(deployment: Deployment) -> None:
    assert why_it_does_not_fit(bill(deployment)) is None
