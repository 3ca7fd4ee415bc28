"""A recipe's file in its commit: only what git has, and never a password."""

from __future__ import annotations

import subprocess
import warnings
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from kd_assets.components import TeacherCaches
from kd_assets.recipes import commit_url as module
from kd_assets.recipes.commit_url import commit_url, web_page


@pytest.fixture(autouse=True)
def git_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is."""
    monkeypatch.setattr(module, "GIT_S", 180.0)


@pytest.mark.parametrize(
    ("remote", "page"),
    [
        ("git@github.com:some/repo.git", "https://github.com/some/repo/tree"),
        ("ssh://git@github.com/some/repo.git", "https://github.com/some/repo/tree"),
        ("ssh://git@gitlab.example.org:2222/group/sub/repo", "https://gitlab.example.org/group/sub/repo/-/tree"),
        ("https://github.com/some/repo", "https://github.com/some/repo/tree"),
        ("https://ann:secret@github.com/some/repo.git", "https://github.com/some/repo/tree"),
        ("https://token@gitlab.com/some/repo.git/", "https://gitlab.com/some/repo/-/tree"),
        ("http://gitlab.local:8080/some/repo.git", "http://gitlab.local:8080/some/repo/-/tree"),
        ("https://bitbucket.org/some/repo.git", None),
        ("/srv/git/github/repo.git", None),
        ("../github/repo.git", None),
        ("github/repo.git", None),
        ("file:///srv/github/repo.git", None),
        ("", None),
    ],
)
def test_a_remote_is_a_page_without_its_password(remote: str, page: str | None) -> None:
    assert web_page(remote) == page


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With one file in one commit, and a remote."""
    file = tmp_path / "a project" / "defs" / "mine" / "defs.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("type: kd_assets.TeacherCaches\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "A recipe.")
    git(tmp_path, "remote", "add", "origin", "https://ann:secret@github.com/some/repo.git")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    said = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return said.stdout.strip()


def test_a_file_of_a_commit_has_its_url(repository: Path) -> None:
    file = repository / "a project" / "defs" / "mine" / "defs.yaml"
    commit = git(repository, "rev-parse", "HEAD")
    expected = f"https://github.com/some/repo/tree/{commit}/a%20project/defs/mine/defs.yaml#L3"
    assert commit_url(file, line=3) == expected
    beside = file.with_name("other.yaml")
    beside.write_text("")
    assert commit_url(beside) is None, "git does not have it"
    git(repository, "remote", "remove", "origin")
    assert commit_url(file) is None
    assert commit_url(repository.parent / "nowhere" / "defs.yaml") is None


def test_a_recipe_refers_to_its_file_and_its_commit_without_a_warning(repository: Path) -> None:
    file = repository / "a project" / "defs" / "mine" / "defs.yaml"

    class At:
        class start:  # noqa: N801 - as Dagster's SourcePosition has it
            line = 7

    context: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local, remote = TeacherCaches.get_code_references_for_yaml(file, At, context)
    assert isinstance(local, dg.LocalFileCodeReference)
    assert (local.file_path, local.line_number) == (str(file), 7)
    assert isinstance(remote, dg.UrlCodeReference)
    assert remote.url.endswith("/defs.yaml#L7")
