"""The worker's kind `student`, as the worker runs it: a job in, a committed curve out."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_assets.contract import CACHES, Asset, JobFile, Reporter, StudentParams, WorkUnit
from kd_assets.errors import (
    ContractError,
    InterruptedTaskError,
    NotCommittedError,
    RecipeError,
    StudentDidNotLearnError,
)
from kd_assets.store import FORMAT_VERSION, plan_output, read_manifest
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets.student.runner import StudentRunner, distilled_fields, fallen, student_layers, vocabulary_of
from kd_assets.worker.stop_flag import StopFlag
from kd_assets_tests.student.made_up import RECIPE, VOCABULARY, commit_caches, made_up_documents

PARAMS = StudentParams(steps=30, batch_documents=8, max_length=16, hidden_size=32, n_layers=2, learning_rate=5e-3)


class Asked(StopFlag):
    """A stop flag after its signal."""

    @property
    def signal_name(self) -> str | None:
        return "SIGUSR1"

    def __bool__(self) -> bool:
        return True


class Setting:
    """A store with two shards, and a student job over them."""

    def __init__(
        self, folder: Path, *, params: StudentParams = PARAMS, assets: Sequence[Asset] = CACHES, draws: int = 0
    ) -> None:
        shards = [
            commit_caches(folder, f"made-up-{i:05d}", made_up_documents(20, seed=i), draws=draws) for i in range(2)
        ]
        identity = {"asset": "student_smoke", "format_version": FORMAT_VERSION, "input": "all"}
        recipe_folder = folder / RECIPE
        self.output = plan_output("student_smoke", identity, recipe_folder=recipe_folder, partition_key="all")
        self.result = Path(self.output.path)
        self.unit = WorkUnit(
            partition_key="all",
            inputs={asset: tuple(str(folders[asset]) for folders in shards) for asset in assets},
            outputs=(self.output,),
        )
        self.job = JobFile(
            kind="student",
            recipe=RECIPE,
            key="key",
            recipe_folder=str(recipe_folder),
            events_folder=str(folder / "events"),
            tasks=((0,),),
            units=(self.unit,),
            student=params,
            provenance={"run_id": "of a test"},
        )
        self.lines = io.StringIO()

    def train(self, stop: StopFlag | None = None) -> dict[str, Any]:
        with Reporter(None, stream=self.lines) as report:
            runner = StudentRunner(self.job, report, stop or StopFlag())
            try:
                return runner.run(self.unit)
            finally:
                runner.close()

    def curve(self) -> dict[str, list[float]]:
        curve: dict[str, list[float]] = json.loads((self.result / "curve.json").read_bytes())
        return curve

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.getvalue().splitlines()]


def test_student_learns_from_all_three_caches(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    summary = setting.train()
    curve = setting.curve()
    assert curve["steps"] == list(range(1, 31))
    for name in ("response", "feature", "relation"):
        losses = curve[name]
        assert all(math.isfinite(loss) for loss in losses)
        assert sum(losses[-5:]) < sum(losses[:5]), name
    for i, total in enumerate(curve["total"]):
        assert total == pytest.approx(curve["response"][i] + curve["feature"][i] + curve["relation"][i])
    manifest = read_manifest(setting.result)
    assert manifest.facts["first_loss"] == pytest.approx(sum(curve["total"][:3]) / 3)
    assert manifest.facts["last_loss"] == pytest.approx(sum(curve["total"][-3:]) / 3)
    assert manifest.facts["n_steps"] == 30
    assert manifest.facts["n_documents"] == 40
    assert manifest.facts["n_parameters"] > 0
    assert manifest.facts["tokens_per_s"] > 0
    assert manifest.facts["wall_s"] > 0
    assert manifest.provenance["run_id"] == "of a test"
    assert manifest.provenance["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert summary["last_loss"] < summary["first_loss"]


def test_student_learns_from_random_draws_at_temperature_one_and_from_the_top_k_at_others(tmp_path: Path) -> None:
    curves = []
    for draws, temperature in ((0, 1.0), (50, 1.0), (0, 2.0), (50, 2.0)):
        params = dataclasses.replace(PARAMS, temperature=temperature)
        setting = Setting(tmp_path / f"{draws} {temperature}", params=params, assets=("topk_cache",), draws=draws)
        setting.train()
        curves.append(setting.curve()["response"])
    topk, drawn, softened, drawn_softened = curves
    assert drawn != topk
    assert sum(drawn[-5:]) < sum(drawn[:5])
    assert drawn_softened == softened


@pytest.mark.parametrize(
    ("asset", "loss"),
    [("topk_cache", "response"), ("hidden_state_cache", "feature"), ("embedding_cache", "relation")],
)
def test_student_learns_from_one_cache_alone(tmp_path: Path, asset: Asset, loss: str) -> None:
    setting = Setting(tmp_path, assets=(asset,))
    setting.train()
    curve = setting.curve()
    assert set(curve) == {"steps", "total", loss}
    assert curve["total"] == curve[loss]


def test_equal_seeds_give_equal_curves(tmp_path: Path) -> None:
    settings = [Setting(tmp_path / name) for name in ("a", "b")]
    for setting in settings:
        torch.rand(1)  # the process's own random state makes no difference
        setting.train()
    assert settings[0].curve() == settings[1].curve()


def test_training_leaves_the_random_state_of_the_process_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    Setting(tmp_path).train()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_progress_ends_with_all_documents_done(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.train()
    last = setting.events()[-1]
    assert last["type"] == "progress"
    assert last["data"]["partition_key"] == "all"
    assert last["data"]["done_documents"] == last["data"]["n_documents"] == 240
    assert last["data"]["done_tokens"] == last["data"]["n_tokens"] > 0
    assert last["data"]["done_steps"] == last["data"]["n_steps"] == 30


def test_student_without_a_cache_is_a_bad_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least one cache of topk_cache"):
        Setting(tmp_path, assets=()).train()


def test_student_of_an_odd_size_is_a_bad_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"student\.hidden_size is 40"):
        Setting(tmp_path, params=StudentParams(hidden_size=40)).train()


def test_job_without_student_parameters_is_refused(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    job = JobFile(
        kind="student",
        recipe=RECIPE,
        key="key",
        recipe_folder="",
        events_folder="",
        tasks=((0,),),
        units=(setting.unit,),
    )
    with Reporter(None, stream=io.StringIO()) as report, pytest.raises(ContractError, match="no student parameters"):
        StudentRunner(job, report, StopFlag())


def test_student_that_does_not_learn_commits_nothing(tmp_path: Path) -> None:
    setting = Setting(tmp_path, params=StudentParams(steps=30, hidden_size=32, max_length=16, learning_rate=0.0))
    with pytest.raises(StudentDidNotLearnError, match=r"did not fall over 30 steps: \d"):
        setting.train()
    with pytest.raises(NotCommittedError):
        read_manifest(setting.result)


def test_stopped_student_commits_nothing(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    with pytest.raises(InterruptedTaskError, match="SIGUSR1"):
        setting.train(Asked())
    with pytest.raises(NotCommittedError):
        read_manifest(setting.result)


def test_losses_must_be_finite_and_fall() -> None:
    assert fallen([4.0, 4.0, *[3.0] * 16, 1.0, 2.0]) == (4.0, 1.5)
    assert fallen([2.0, 1.0]) == (2.0, 1.0)
    with pytest.raises(StudentDidNotLearnError, match="nan at step 2 of 3"):
        fallen([2.0, math.nan, 1.0])
    with pytest.raises(StudentDidNotLearnError, match=r"1\.0000 in the first 1, 1\.0000"):
        fallen([1.0, 1.0])


def test_the_students_layers_are_spread_over_the_teachers_blocks() -> None:
    assert student_layers(1, 2) == (0,)
    assert student_layers(1, 24) == (11,)
    assert student_layers(3, 4) == (0, 1, 2)
    assert student_layers(2, 1) == (0, 0)


def test_vocabulary_is_what_the_manifests_say_or_the_largest_token_id(tmp_path: Path) -> None:
    documents = made_up_documents(30)
    said = commit_caches(tmp_path / "said", "made-up-00000", documents)
    silent = commit_caches(tmp_path / "silent", "made-up-00000", documents, facts={"wall_s": 1.0})
    for folders in (said, silent):
        dataset = TeacherCacheDataset.from_folders({asset: [folder] for asset, folder in folders.items()})
        assert vocabulary_of(dataset) == VOCABULARY


def test_blocks_are_what_a_student_learns_from_and_a_final_state_where_there_are_none() -> None:
    ends = ["hidden_final_before_norm", "hidden_final_after_norm"]
    assert distilled_fields(["hidden_block_1", *ends]) == ["hidden_block_1"]
    assert distilled_fields(ends) == ["hidden_final_after_norm"]
    assert distilled_fields(ends[:1]) == ends[:1]
    assert distilled_fields([]) == []
