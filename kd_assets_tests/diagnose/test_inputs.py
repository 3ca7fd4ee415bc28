"""The doctor looks at what a recipe reads, before a plan does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kd_assets.components import TeacherCaches
from kd_assets.diagnose.finding import Finding, Status
from kd_assets.diagnose.inputs import check_disk, check_licences, check_sources, check_variables
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.recipe import Recipe


def recipe_of(source: dict[str, Any], **more: Any) -> Recipe:
    attributes: dict[str, Any] = {
        "recipe": "r",
        "sources": [{"name": "web", **source}],
        "teacher": {"model_id": "$MODELS/teacher"},
        "caches": {"topk": {"k": 4, "max_length": 8}},
    }
    return TeacherCaches(**attributes | more).to_recipe()


def only(findings: Any) -> Finding:
    (finding,) = findings
    assert isinstance(finding, Finding)
    return finding


def test_a_variable_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    platform, recipe = Platform(home=str(tmp_path)), recipe_of({"path": "${DATA_OF_TEST}/web.jsonl"})
    monkeypatch.setenv("MODELS", "/models")
    monkeypatch.delenv("DATA_OF_TEST", raising=False)
    found = only(check_variables(recipe, platform))
    assert (found.status, found.fix) == (Status.FAIL, "export DATA_OF_TEST=…")
    monkeypatch.setenv("DATA_OF_TEST", "/data")
    assert only(check_variables(recipe, platform)).found == "DATA_OF_TEST, MODELS"


def test_a_source_is_there_or_named(tmp_path: Path) -> None:
    platform, recipe = Platform(home=str(tmp_path)), recipe_of({"path": "$KD_HOME/web.jsonl"})
    missing = only(check_sources(recipe, platform))
    assert missing.status is Status.FAIL
    assert "web.jsonl" in missing.found
    (tmp_path / "web.jsonl").write_text('{"text": "a"}\n')
    assert only(check_sources(recipe, platform)).found.startswith("web: 1 files")
    afar = only(check_sources(recipe_of({"path": "s3://bucket/web.jsonl"}), platform))
    assert afar.status is Status.WARN, "nothing outside this machine is asked"


def test_a_licence_that_is_unknown_or_not_allowed_fails() -> None:
    assert only(check_licences(recipe_of({"path": "/w", "licence": "CC0-1.0"}))).status is Status.OK
    unknown = only(check_licences(recipe_of({"path": "/w"})))
    assert (unknown.status, "licence is unknown" in unknown.found) == (Status.FAIL, True)
    other = only(check_licences(recipe_of({"path": "/w", "licence": "CC0-1.0"}, allowed_licences=["MIT"])))
    assert (other.status, "not among allowed_licences" in other.found) == (Status.FAIL, True)


def test_free_space_is_said_without_a_recipe(tmp_path: Path) -> None:
    assert "free in" in only(check_disk(Platform(home=str(tmp_path)))).found
