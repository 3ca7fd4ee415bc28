"""What a run does with the teacher's weights: it hashes them where it makes caches, and nowhere else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from kd_assets.contract import JobKind
from kd_assets.diagnose.preview import UNKNOWN_KEY, preview
from kd_assets.errors import MissingInputError
from kd_assets.model_files import digests
from kd_assets.model_files.fingerprints import weights_fingerprint
from kd_assets.orchestration.materialize import planner_of
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment, failure_text, folder_of

WEIGHTS = "model.safetensors"


@pytest.fixture
def teacher(tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher of this test's own, whose digest is kept although it is new."""
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    return shutil.copytree(tiny_teacher, tmp_path / "teacher")


@pytest.fixture
def deployment(deploy: Callable[..., Deployment], teacher: Path) -> Deployment:
    made = deploy(teacher={"model_id": str(teacher), "dtype": "float32", "token_budget": 256})
    made.plan()
    return made


def only_checks(deployment: Deployment, asset: str, partition: str) -> dg.ExecuteInProcessResult:
    selection = dg.AssetSelection.checks_for_assets(deployment.recipe.key(asset))
    job = dg.define_asset_job("only_checks", selection=selection).resolve(
        asset_graph=deployment.definitions.resolve_asset_graph()
    )
    return (
        dg.Definitions.merge(deployment.definitions, dg.Definitions(jobs=[job]))
        .resolve_job_def("only_checks")
        .execute_in_process(
            instance=deployment.instance,
            tags={"dagster/partition": partition},
            raise_on_error=False,
        )
    )


@pytest.mark.slow
def test_students_and_checks_need_no_weights(deployment: Deployment, teacher: Path) -> None:
    made = deployment.run("shards_manifest", *CACHES, partition_range=(SHARDS[0], SHARDS[-1]))
    assert made.success, failure_text(made)
    fingerprint = weights_fingerprint(teacher, None)
    (teacher / WEIGHTS).unlink()

    trained = deployment.run("student_smoke")
    assert trained.success, failure_text(trained)
    (materialization,) = deployment.materializations(trained.run_id)["student_smoke", None]
    manifest = json.loads((folder_of(materialization) / "manifest.json").read_bytes())
    assert manifest["provenance"]["weights_fingerprint"] == fingerprint

    checked = only_checks(deployment, "topk_cache", SHARDS[0])
    assert checked.success, failure_text(checked)
    assert {(e.partition, e.passed) for e in deployment.checks(checked.run_id)} == {(SHARDS[0], True)}

    more = deployment.run("topk_cache", partition=SHARDS[0])
    assert not more.success, "a run of caches does need them"
    assert "holds no *.safetensors" in failure_text(more)


def test_a_run_of_caches_goes_by_the_weights_on_disk_and_others_by_those_it_went_by(
    deployment: Deployment, teacher: Path
) -> None:
    planner = planner_of(deployment.recipe, deployment.platform)
    assert planner.planned_weights() is None
    first = planner.teacher().weights
    raw = bytearray((teacher / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (teacher / WEIGHTS).write_bytes(raw)
    planner = planner_of(deployment.recipe, deployment.platform)
    assert planner.planned_weights() == first
    assert planner.known_weights() is None
    second = planner.teacher().weights
    assert second == planner.planned_weights() == planner.known_weights() != first


def test_weights_of_another_folder_are_not_those_that_were_planned_with(
    deployment: Deployment, teacher: Path, deploy: Callable[..., Deployment]
) -> None:
    planner_of(deployment.recipe, deployment.platform).teacher()
    other = shutil.copytree(teacher, teacher.with_name("another"))
    moved = deploy(teacher={"model_id": str(other), "dtype": "float32"})
    assert planner_of(moved.recipe, moved.platform).planned_weights() is None


@pytest.mark.parametrize("junk", [b"", b"[]", b"{}", b'{"weights_fingerprint": 3}'])
def test_a_damaged_record_of_the_teacher_is_none(deployment: Deployment, junk: bytes) -> None:
    planner = planner_of(deployment.recipe, deployment.platform)
    weights = planner.teacher().weights
    (deployment.home / "store" / "tiny" / "teacher.json").write_bytes(junk)
    assert planner.planned_weights() is None
    assert planner_of(deployment.recipe, deployment.platform).teacher().weights == weights
    assert planner.planned_weights() == weights


def test_hashing_says_how_far_it_is_in_the_log_of_the_run(deployment: Deployment, teacher: Path) -> None:
    said: list[str] = []
    planner_of(deployment.recipe, deployment.platform, say=said.append).teacher()
    assert [line.partition(":")[0] for line in said] == [f"hashing {teacher / WEIGHTS}"]
    said.clear()
    planner_of(deployment.recipe, deployment.platform, say=said.append).teacher()
    assert said == []


def test_a_preview_hashes_no_weights_and_says_that_a_run_would(deployment: Deployment, teacher: Path) -> None:
    assert deployment.run("shards_manifest", partition_range=(SHARDS[0], SHARDS[-1])).success

    def previewed(*assets: str) -> tuple[list[tuple[JobKind, int, str]], str]:
        shown = preview(deployment.recipe, deployment.platform, partitions=None, assets=assets)
        jobs = [(job.spec.kind, job.n_partitions, job.spec.key) for job in shown.jobs]
        return jobs, "\n".join([*shown.notes, *(note for job in shown.jobs for note in job.notes)])

    jobs, notes = previewed("topk_cache")
    assert jobs == [("teacher", 3, UNKNOWN_KEY)]
    assert f"the weights in {teacher} are not hashed yet" in notes
    assert "weights are not hashed yet" in previewed("student_smoke")[1]
    assert not (deployment.home / "store" / "tiny" / "teacher.json").exists()
    assert str(teacher / WEIGHTS) not in (deployment.home / "digests.json").read_text()

    planner_of(deployment.recipe, deployment.platform).teacher()
    ((kind, n_partitions, key),), notes = previewed("topk_cache")
    assert (kind, n_partitions) == ("teacher", 3)
    assert key != UNKNOWN_KEY
    assert notes == ""
    with pytest.raises(MissingInputError, match="no partition of tiny has all its caches"):
        planner_of(deployment.recipe, deployment.platform).student_work()
